"""Stage ``clean_chats``: shared chats, as people copied them from a web page -> chats to learn from, as Vicuna's makers did it.

HTML becomes Markdown; what the page's buttons and errors left is taken out; turns are put in order; chats in other languages and
duplicates are removed; and chats that are longer than the student's context are split between rounds, so that nothing is cut.
What happened to how many is counted. (FastChat's ``data/clean_sharegpt.py``, ``optional_clean.py`` and ``split_long_conversation.py``.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.artifact import Artifact, create, open_artifact, resolve
from criadero.data import dedup, filters
from criadero.data.chats import FROM, detect, shapes_of, split_rounds
from criadero.data.documents import Document, find_files, read_rows
from criadero.data.filters import Tally
from criadero.errors import UserError
from criadero.synth.dataset import Chat, chat_source, removed_line, write_chats
from criadero.synth.html_text import looks_like_html, to_markdown
from criadero.synth.self_instruct import check_held_out
from criadero.synth.teacher import described, say

if TYPE_CHECKING:
    from criadero.chat import Message

# lines that the page's buttons leave, and the errors that a chat ends with
_BUTTONS = re.compile(
    r"(?mi)^(?:copy code|copiar código|regenerate response|share prompt|\d+ / \d+|was this response better or worse\?.*)[ \t]*$\n?"
)
_ERRORS = re.compile(
    r"(?i)\A\W*(?:network error|error in (?:message|body) stream|something went wrong\b|an error occurred\b|too many requests|"
    r"the server (?:is|had) (?:currently )?(?:overloaded|an error)|request timed out|conversation not found|!?\s*error\b\W*\Z)"
)
_ERROR_WORDS = 40  # an answer that long is no error message


@dataclass(frozen=True, kw_only=True)
class CleanChatsRecipe:
    """Which chats, for which student, and how strictly."""

    data: tuple[str, ...] = described(
        "files or folders of chats: ShareGPT's conversations, or any other shape of chats"
    )
    base: str = described("the student: its tokenizer and template measure the chats", "cria")
    context: int = described(
        "longest chat, in tokens; 0: the student's context; more: tune it with the same context", 0
    )
    data_licence: str = described("licence of the chats")
    attribution: str = described("who is to be named", "")
    url: str = described("where they come from", "")
    languages: tuple[str, ...] = described("languages to keep", ("en", "es"))
    near_dedup: float = described("remove chats this alike by word 5-grams (0: only equal ones)", 0.8)
    remove_pasted: bool = described("remove chats whose answers name another assistant's maker", False)
    blocked: tuple[str, ...] = described("regular expressions of words; a chat with one is removed", ())
    min_words: int = described("fewest words in the answers of a chat", 3)
    written_by_model: bool = described("the answers are a model's, as ShareGPT's are; the passport says so", True)
    held_out: float = described("share of the chats held out; the parts of one stay together", 0.1)
    licence: str = described("licence you give the dataset", "")
    seed: int = described("of the split", 0)


def clean_chats(recipe: CleanChatsRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Clean and split the chats and seal them as a ``dataset``. It takes minutes: cut off, it starts again.

    UserError before any work: a file that is not there or no chats, a student without template; after it: no chat is left.
    """
    from criadero.data.build import compile_pattern

    check_held_out(recipe.held_out)
    if not recipe.data:
        raise UserError("data: none given: name a file of chats")
    files = [file for path in recipe.data for file in find_files(path)]
    for pattern in recipe.blocked:
        compile_pattern(pattern, "blocked")
    measure, context = _ruler(recipe)
    tally, counts = Tally(), Counter[str]()
    with create(
        out, kind="dataset", recipe=recipe, seeds={"seed": recipe.seed},
        licence=recipe.licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        names = {file: source_name(file, files) for file in files}
        for file, name in names.items():
            draft.add_input(
                "contains", file, name=f"{name}/{file.name}", licence=recipe.data_licence, locator=str(file)
            )
        draft.add_input("evaluated_on", recipe.base)  # it measures only; nothing of it is in the result
        documents: Iterable[Document] = (
            d for file, name in names.items() for d in _read(file, name, recipe, tally, counts)
        )
        documents = filters.normalise(documents, tally)
        documents = filters.language(documents, tally, languages=recipe.languages)
        if recipe.remove_pasted:
            documents = filters.pasted(documents, tally)
        if recipe.blocked:
            documents = filters.blocked(documents, tally, words=recipe.blocked)
        documents = dedup.exact(documents, tally)
        if recipe.near_dedup:
            documents = dedup.near(documents, tally, threshold=recipe.near_dedup)
        chats = list(_split_all(documents, measure, context, tally, counts))
        sources = [
            chat_source(name, recipe.data_licence, url=recipe.url, attribution=recipe.attribution)
            for name in names.values()
        ]
        read = {name: counts[f"read {name}"] for name in names.values()}
        synthetic = dict.fromkeys(names.values(), recipe.written_by_model)
        written = write_chats(
            draft, chats, tally, sources, read, held_out=recipe.held_out, seed=recipe.seed, synthetic=synthetic
        )
        derived = {key: n for key, n in sorted(counts.items()) if not key.startswith("read ")}
        draft.step["derived"] = {"context": context, **derived}
        for name in names.values():
            changes = ", ".join(f"{what} {n}" for what, n in tally.changes(name).items()) or "nothing"
            say(f"{name}: {read[name]} chats; removed: {removed_line(tally, name)}; changed: {changes}")
        say(
            f"{counts['whole']} chats fit in {context} tokens, {counts['split']} were split into {counts['parts']} parts; "
            f"{written['train']} to learn, {written['held_out']} held out"
        )
    return open_artifact(out)


def source_name(file: Path, files: Sequence[Path]) -> str:
    """A file's name in the tables: without its suffixes, and with its folder where another has the same."""
    name = file.name.partition(".")[0] or file.name
    twins = [one for one in files if one.name.partition(".")[0] == name]
    return name if len(twins) < 2 else f"{file.parent.name}-{name}-{twins.index(file)}"


def _ruler(recipe: CleanChatsRecipe) -> tuple[Callable[[Sequence[Message]], int], int]:
    """A function that counts the tokens of a chat as the student will see it, and the longest that is allowed."""
    from criadero.chat import render
    from criadero.checkpoints import load_config, template_of, tokenizer_of

    path = resolve(recipe.base)
    tokenizer, template, config = tokenizer_of(path), template_of(path), load_config(path)
    longest = config.max_position_embeddings
    if recipe.context < 0:
        raise UserError(f"context must be positive, or 0 for that of {recipe.base}, {longest}, not {recipe.context}")
    if recipe.context > longest:
        say(f"context {recipe.context}: {recipe.base} has {longest}, so it has to be tuned with the same context")
    return (lambda messages: len(render(list(messages), tokenizer, template).ids)), recipe.context or longest


def _read(file: Path, name: str, recipe: CleanChatsRecipe, tally: Tally, counts: Counter[str]) -> Iterator[Document]:
    """The chats of a file that can be put in order: HTML converted, debris taken out; the others counted by reason."""
    rows = list(read_rows(file))
    good = [(place, row) for place, row in rows if shapes_of(row)]
    if not good:
        detect([row for _, row in rows], places=[place for place, _ in rows], file=file)  # its complaint names the row
    shape = detect([row for _, row in good], places=[place for place, _ in good], file=file)
    for place, row in rows:
        counts[f"read {name}"] += 1
        id = str(row.get("id") or place.rpartition("/")[2])
        found = shapes_of(row)
        if not found:
            tally.drop(Document(id, "", "", name, ""), "no_chat")
            continue
        turns, changes = in_order(turns_of(row, shape))
        messages = []
        for role, text in turns:
            text, changed = clean_turn(role, text)
            changes += changed
            messages.append({"role": role, "content": text})
        messages, ended = without_errors(messages)
        changes += ended
        document = Document(
            id,
            "\n".join(m["content"] for m in messages),
            str(row.get("lang") or ""),
            name,
            recipe.data_licence,
            {"messages": messages},
        )
        if (reason := unfit(messages, recipe.min_words)) is not None:
            tally.drop(document, reason)
            continue
        for what in sorted(set(changes)):
            tally.change(document, what)
        yield document


def turns_of(row: dict[str, Any], shape: Any) -> list[tuple[str, str]]:
    """(role, text) of a row, as it stands; unknown roles keep their name, and what is not text becomes ""."""
    names = dict(shape.fields)
    if shape.name not in ("messages", "sharegpt"):
        from criadero.data.chats import to_messages

        try:
            return [(m["role"], m["content"]) for m in to_messages(row, shape)]
        except ValueError:
            return []
    role_key, text_key = ("role", "content") if shape.name == "messages" else ("from", "value")
    turns = []
    for turn in row.get(names["turns"]) or []:
        if isinstance(turn, dict):
            role, text = turn.get(role_key), turn.get(text_key)
            turns.append((FROM.get(str(role).lower(), str(role)), text if isinstance(text, str) else ""))
    return turns


def in_order(turns: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The turns from the first question on, up to the last answer: ShareGPT's links may begin or end in the middle."""
    system = list(turns[:1]) if turns and turns[0][0] == "system" else []
    rest, changes = list(turns[len(system) :]), []
    while rest and rest[0][0] != "user":
        rest.pop(0)
        changes.append("beginning_cut")
    while rest and rest[-1][0] != "assistant":
        rest.pop()
        changes.append("end_cut")
    return [*system, *rest], changes


def clean_turn(role: str, text: str) -> tuple[str, list[str]]:
    """One turn as text. Only an answer is taken for HTML: what a user pasted is what was meant."""
    changes = []
    if role == "assistant" and looks_like_html(text):
        text = to_markdown(text)
        changes.append("html")
    if role == "assistant" and (bare := _BUTTONS.sub("", text)) != text:
        text = bare
        changes.append("buttons")
    return text.strip(), changes


def without_errors(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[str]]:
    """The chat up to the first answer that is an error message of the page, or empty."""
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text = message["content"]
        if not text or (_ERRORS.search(text) and len(text.split()) <= _ERROR_WORDS):
            cut = messages[:n]
            while cut and cut[-1]["role"] != "assistant":
                cut.pop()
            return cut, ["cut_at_error"]
    return messages, []


def unfit(messages: Sequence[dict[str, str]], min_words: int) -> str | None:
    """Why a chat cannot be used, or None: ``empty``, ``roles`` (not by turns, or unknown), ``empty_turn``, ``short``."""
    body = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not body:
        return "empty"
    if any(m["role"] != ("user", "assistant")[n % 2] for n, m in enumerate(body)) or len(body) % 2:
        return "roles"
    if not all(m["content"].strip() for m in messages):
        return "empty_turn"
    if sum(len(m["content"].split()) for m in body[1::2]) < min_words:
        return "short"
    return None


def _split_all(
    documents: Iterable[Document],
    measure: Callable[[Sequence[Message]], int],
    context: int,
    tally: Tally,
    counts: Counter[str],
) -> Iterator[Chat]:
    for document in documents:
        messages = document.meta["messages"]
        parts, long_rounds = split_rounds(messages, measure, context)
        if long_rounds:
            counts["long_rounds"] += long_rounds
            tally.change(document, "long_rounds_left_out")
        if not parts:
            tally.drop(document, "longer_than_context")
            continue
        counts["whole" if len(parts) == 1 and not long_rounds else "split"] += 1
        counts["parts"] += len(parts) if len(parts) > 1 or long_rounds else 0
        for n, part in enumerate(parts):
            id = document.id if len(parts) == 1 else f"{document.id}#{n + 1}"
            yield Chat(
                id, part, document.lang, document.source, document.licence, group=f"{document.source} {document.id}"
            )
