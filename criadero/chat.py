"""Chats to token ids and a loss mask: the only template code. Training, evaluation and serving all call `render`.

A template is Jinja, as Hugging Face has it; its file travels with the weights. How a chat becomes ids:

1. The template writes the chat as one text. It also writes it with each content replaced by a mark that occurs nowhere; the
   two together tell which characters are contents and which the template wrote. A template may strip contents; one that
   changes them in another way is refused.
2. The text is encoded once. Special tokens are recognised only in what the template wrote: a content that spells one is
   text. What stands between two special tokens is one string for the tokenizer, so the ids are those that transformers
   gives for the same template wherever contents spell no special tokens.
3. The loss mask is read off the tokens' character offsets: the tokens that touch an assistant's content, what follows
   up to and including the special token that ends the turn, and what stands between the prompt for an answer and the
   answer (a space in llama2 and vicuna): all that a model has to generate. Nothing is encoded twice. Where the template has
   ``{% generation %}`` tags, they decide instead.

Prefix: the ids of ``render(chat[:-1], add_generation_prompt=True)`` are those of ``render(chat)`` up to its last answer, for
all built-in templates, if the answer begins with a letter or a digit. Templates that end a prompt with a special token or a newline
(criadero, llama3, chatml, alpaca) have it for every answer. In llama2 and vicuna the space before the answer is part of its
first token, so the space is not in the prompt; an answer whose first character a vocabulary joins with ``]`` or ``:`` across
that space would break it, but none of the vocabularies known here does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.tokenizer import Tokenizer

BUILTIN = ("criadero", "llama2", "llama3", "alpaca", "vicuna", "chatml")
ROLES = ("system", "user", "assistant")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Example:
    """One rendered chat: ``loss_mask[i]`` says whether token ``ids[i]`` is learned.

    ``bos`` says where the BOS token came from: "template"; "added" (the template has none, and the tokenizer puts one before
    every text); "doubled" (the template wrote two, one was taken away); "none".
    """

    ids: list[int]
    loss_mask: list[bool]
    bos: Literal["template", "added", "doubled", "none"] = "template"


@dataclass(frozen=True)
class Template:
    """A chat template: its Jinja source, and a name for messages."""

    source: str
    name: str


@cache
def builtin_template(name: str) -> Template:
    """One of `BUILTIN`."""
    if name not in BUILTIN:
        raise UserError(f"there is no built-in chat template {name!r}; there are {', '.join(BUILTIN)}")
    from importlib import resources  # nobody else needs it

    source = resources.files("criadero").joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")
    return Template(source, name)


def load_template(folder: str | Path) -> Template:
    """The template that travels with a model: chat_template.jinja, or the one in tokenizer_config.json."""
    folder = Path(folder)
    file, config_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return Template(file.read_text(encoding="utf-8"), str(file))
        config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template in {folder} cannot be read: {error}") from None
    source = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{folder} has no chat template: it is a base model, which completes text but has not learned to chat; tune it "
            f"with a template ({', '.join(BUILTIN)}), or put its chat_template.jinja there"
        )
    return Template(source, str(config_file))


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: Template,
    *,
    add_generation_prompt: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Example:
    """Ids and loss mask of a chat.

    ``add_generation_prompt`` ends with what precedes an answer, for generating one. ``train_on="last"`` learns only the
    last assistant turn. UserError: messages that are no chat; a template that refuses them, fails, changes contents, or ends
    an assistant's turn with no special token (a model trained so would never stop).
    """
    from criadero.tokenizer import mend_surrogates

    if train_on not in ("all", "last"):
        raise UserError(f"train_on is {train_on!r}; it can be 'all' or 'last'")
    _check(messages, add_generation_prompt)
    roles = [message["role"] for message in messages]
    contents = [mend_surrogates(message["content"]) for message in messages]
    open_, close = _marks(contents, template)
    named = {f"{key}_token": name for key, name in tokenizer.names.items()}
    variables: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **named,
    }
    text, skeleton = (
        _run(template, variables | {"messages": [{"role": r, "content": c} for r, c in zip(roles, these, strict=True)]})
        for these in (contents, [f"{open_}{turn}{close}" for turn in range(len(contents))])
    )
    text, learned = _cut_generation_marks(text, template)
    skeleton, _ = _cut_generation_marks(skeleton, template)
    spans = _find_contents(text, skeleton, re.compile(f"{open_}([0-9]+){close}"), contents, roles, template)
    plain = sorted((start, end) for start, end, _ in spans)
    ids, offsets = tokenizer.encode_template(text, plain)
    if learned is None:
        lead = _lead(template, tuple(named.items()))
        learned = [
            (start - len(lead) if text.endswith(lead, 0, start) else start, end)
            for start, end in _answers(ids, offsets, spans, roles, tokenizer, template, add_generation_prompt)
        ]
    if train_on == "last":
        learned = learned[-1:]
    mask = [any(_touch(offset, span) for span in learned) for offset in offsets]
    return _settle_bos(ids, mask, tokenizer)


def _check(messages: Sequence[Message], add_generation_prompt: bool) -> None:
    if not messages:
        raise UserError("the chat has no messages; give at least one from the user")
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise UserError(f"message {turn} is not an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise UserError(f"message {turn} has the role {message['role']!r}; roles are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UserError(f"message {turn} has a content that is not text but {type(message['content']).__name__}")
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise UserError("the last message is the assistant's: there is nothing to answer")


def _marks(contents: Sequence[str], template: Template) -> tuple[str, str]:
    """Two strings of private-use characters that occur neither in the contents nor in the template."""
    from criadero.template_sandbox import GENERATION

    everything = "".join([template.source, *contents])
    if _GENERATION_TAG.search(template.source) and any(mark in everything for mark in GENERATION):
        raise UserError(
            "a message holds the private-use characters U+F5FFA or U+F5FFB, which mark answers; take them out"
        )
    size = 1
    while "\U000f5ff0" * size in everything or "\U000f5ff1" * size in everything:
        size += 1
    return "\U000f5ff0" * size, "\U000f5ff1" * size


def _run(template: Template, variables: dict[str, Any]) -> str:
    from criadero.template_sandbox import TemplateProblem, run_apart, run_here

    trusted = any(template.source == builtin_template(name).source for name in BUILTIN)
    try:
        return (run_here if trusted else run_apart)(template.source, variables)
    except TemplateProblem as problem:
        raise UserError(f"chat template {template.name}: {problem}") from None


def _cut_generation_marks(text: str, template: Template) -> tuple[str, list[tuple[int, int]] | None]:
    """The text without the marks of ``{% generation %}``, and the spans between them; None without such tags."""
    from criadero.template_sandbox import GENERATION

    if not _GENERATION_TAG.search(template.source):
        return text, None
    pieces = re.split(f"([{''.join(GENERATION)}])", text)
    if "".join(pieces[1::2]) != "".join(GENERATION) * (len(pieces) // 4):
        raise UserError(f"chat template {template.name}: its generation tags stand inside each other")
    ends, at = [], 0
    for piece in pieces[::2]:
        at += len(piece)
        ends.append(at)
    return "".join(pieces[::2]), list(zip(ends[:-1:2], ends[1::2], strict=True))


def _find_contents(
    text: str, skeleton: str, mark: re.Pattern[str], contents: Sequence[str], roles: Sequence[str], template: Template
) -> list[tuple[int, int, int]]:
    """Where the contents stand in ``text``: (start, end, turn), in order.

    ``skeleton`` is the same chat with marks for contents. Each content may stand there as it is, or stripped.
    """
    literals, turns = mark.split(skeleton)[::2], [int(turn) for turn in mark.split(skeleton)[1::2]]
    missing = [turn for turn in range(len(contents)) if turn not in turns]
    if missing:
        raise UserError(
            f"chat template {template.name}: it leaves out message {missing[0] + 1} ({roles[missing[0]]}); its place is unknown"
        )
    # all ways to read the text so far: end of what is read -> spans up to there; one way is the rule
    ways: dict[int, tuple[tuple[int, int, int], ...]] = {}
    if text.startswith(literals[0]):
        ways[len(literals[0])] = ()
    for number, (turn, literal) in enumerate(zip(turns, literals[1:], strict=True), 1):
        content = contents[turn]
        longer: dict[int, tuple[tuple[int, int, int], ...]] = {}
        for at, spans in ways.items():
            for shape in (content, content.strip(), content.lstrip(), content.rstrip()):
                end = at + len(shape)
                if text.startswith(shape, at) and text.startswith(literal, end):
                    longer.setdefault(end + len(literal), (*spans, (at, end, turn)))
        if number == len(turns):
            longer = {end: spans for end, spans in longer.items() if end == len(text)}
        if not longer:
            raise UserError(
                f"chat template {template.name}: it alters the content of message {turn + 1} ({roles[turn]}), or writes other "
                "things around it because of what it says, so the mask cannot be placed; use a template that does not"
            )
        ways = longer
    return list(ways[len(text)])


@lru_cache(maxsize=64)
def _lead(template: Template, named: tuple[tuple[str, str], ...]) -> str:
    """What the template writes between the prompt for an answer and the answer: a model has to generate that too.

    It is a space in llama2 and vicuna, and empty in the others; empty too where a short chat does not tell.
    """
    question: Message = {"role": "user", "content": "Q"}
    answer: Message = {"role": "assistant", "content": "\U000f5ff0"}
    variables: dict[str, Any] = {"tools": None, "documents": None, **dict(named)}
    try:
        prompt = _run(template, variables | {"messages": [question], "add_generation_prompt": True})
        whole = _run(template, variables | {"messages": [question, answer], "add_generation_prompt": False})
    except UserError:
        return ""
    before, found, _ = whole.partition(answer["content"])
    return before.removeprefix(prompt) if found and before.startswith(prompt) else ""


def _answers(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int, int]],
    roles: Sequence[str],
    tokenizer: Tokenizer,
    template: Template,
    add_generation_prompt: bool,
) -> list[tuple[int, int]]:
    """The characters to learn: each assistant's content and what follows, up to the end of the token that ends the turn."""
    special = set(tokenizer.special.values())
    ends = [offset for id, offset in zip(ids, offsets, strict=True) if id in special and id != tokenizer.bos_id]
    answers = []
    for number, (start, end, turn) in enumerate(spans):
        if roles[turn] != "assistant":
            continue
        limit = spans[number + 1][0] if number + 1 < len(spans) else offsets[-1][1]
        closing = next((stop for first, stop in ends if end <= first and stop <= limit), None)
        if closing is None and not add_generation_prompt:
            raise UserError(
                f"chat template {template.name}: no special token of this tokenizer ends message {turn + 1} (assistant), so a "
                "model would never learn to stop; use a template made for this tokenizer, or one that ends with eos_token"
            )
        answers.append((start, end if closing is None else closing))
    return answers


def _touch(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    """Whether a token's characters and a span overlap; a token of no characters counts by where it stands."""
    if offset[0] == offset[1]:
        return span[0] <= offset[0] < span[1]
    return offset[0] < span[1] and span[0] < offset[1]


def _settle_bos(ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> Example:
    bos = tokenizer.bos_id
    if bos is None or (ids[:1] != [bos] and not tokenizer.adds_bos):
        return Example(ids, mask, "none")
    if ids[:1] != [bos]:
        return Example([bos, *ids], [False, *mask], "added")
    if ids[1:2] == [bos]:
        return Example(ids[1:], mask[1:], "doubled")
    return Example(ids, mask, "template")
