"""The chat in a terminal: ``criadero chat MODEL``. With piped input every line is a turn, and output is plain."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from criadero.artifact import Artifact, open_artifact
from criadero.chat import Message, render
from criadero.engine.llm import LLM, Stream, fit
from criadero.engine.request import SamplingParams
from criadero.errors import UserError
from criadero.trust.last import keep_last, last_file

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from criadero.trust.search import Index

COMMANDS = {
    "/retry": "answer the last question again, with another seed",
    "/undo": "take back the last question and its answer",
    "/reset": "forget the conversation",
    "/system TEXT": "start again with a system message",
    "/model NAME": "go on with another model",
    "/temperature N": "0 is always the likeliest word; 0.8 is livelier",
    "/seed N": "the same seed gives the same answers; without N it is left to chance",
    "/stats": "tokens, speed, context and settings of the last answer",
    "/save FILE": "add the conversation to a file that criadero tune reads (chats.jsonl)",
    "/help": "this list",
    "/exit": "leave (or Ctrl-D)",
}
KEYS = (
    "Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer; criadero trace --last shows where it came from"
)
HOTTEST = 2  # a higher temperature makes noise of any model
NAME = 12  # characters of a model's name before its answers


@dataclass
class Talk:
    """A conversation: the model, what was said, and the settings; what the last answer took, for /stats."""

    llm: LLM
    ref: str
    temperature: float = 0.3
    max_tokens: int = 200
    seed: int | None = None
    opening: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    require_passport: bool = False
    pubkey: Path | None = None
    guard: str | None = None  # an index of what the model learned from: an answer that copies too much of it is stopped
    guard_tokens: int = 50
    index: Index | None = None  # the guard's, opened for this model
    retries: int = 0  # of the last question
    dropped: int = 0  # messages that the model no longer sees
    took: str = "nothing was answered yet"


def open_model(ref: str | Path | Artifact, *, require_passport: bool = False, pubkey: Path | None = None) -> LLM:
    """A model that can chat. UserError: none there, not as its passport says where that is asked for, no chat template."""
    if require_passport or pubkey:
        from criadero.trust.verify import require

        require(ref.path if isinstance(ref, Artifact) else ref, pubkey=pubkey)
    llm = LLM(ref)
    llm.template  # noqa: B018  a model without a template says so before the first question
    return llm


def open_guard(talk: Talk) -> None:
    """Open the guard's index, for the model that talks now. UserError: it is of other data, or of other tokens."""
    if talk.guard is None:
        return
    from criadero.trust.guard import Guard, same_words
    from criadero.trust.trace import index_for

    index = index_for(talk.ref, talk.guard)
    same_words(index, talk.llm.tokenizer)
    Guard(index, most=talk.guard_tokens)  # refuses what cannot be, before the first question
    talk.index = index


def reply(talk: Talk, messages: list[Message]) -> Stream:
    """Pieces of the answer, with settings that suit small models: a little penalty against repeating."""
    seed = None if talk.seed is None else (talk.seed + talk.retries) % 2**32
    watch = None
    if talk.index is not None:
        from criadero.trust.guard import Guard

        watch = Guard(talk.index, most=talk.guard_tokens).push
    return talk.llm.chat(
        messages,
        max_tokens=min(talk.max_tokens, talk.llm.context),
        temperature=talk.temperature,
        top_p=0.9,
        repetition_penalty=1.0 if talk.temperature == 0 else 1.1,
        seed=seed,
        watch=watch,
    )


def chat(
    ref: str | Path | Artifact, *, system: str | None = None, temperature: float = 0.3, max_tokens: int = 200,
    seed: int | None = None, require_passport: bool = False, pubkey: Path | None = None, guard: str | None = None,
    guard_tokens: int = 50, lines: Iterable[str] | None = None, out: TextIO | None = None,
) -> None:  # fmt: skip
    """Talk to a model until the input ends. ``lines`` replaces the keyboard (for tests and transcripts).

    The last answer is kept for ``criadero trace --last`` (`criadero.trust.last`). With `require_passport` no model is opened,
    with /model neither, that is not as its passport says; with `pubkey` it must be signed with that key too. `guard` is an index of
    the model's training data: an answer ends where it has copied more than `guard_tokens` tokens whose licence does not allow that.
    """
    if not 0 <= temperature <= HOTTEST:
        raise UserError(f"temperature must lie between 0 and {HOTTEST}, not {temperature:g}")
    SamplingParams(temperature=temperature, max_tokens=max_tokens)  # refuses what cannot be, before loading
    llm = open_model(ref, require_passport=require_passport, pubkey=pubkey)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    talk = Talk(
        llm, str(ref.path if isinstance(ref, Artifact) else ref), temperature, max_tokens, seed, opening, list(opening),
        require_passport, pubkey, guard, guard_tokens,
    )  # fmt: skip
    open_guard(talk)
    out = out or sys.stdout
    console = Console(file=out, highlight=False, soft_wrap=True)
    live = lines is None and sys.stdin.isatty() and console.is_terminal
    if live:
        console.print(_greeting(llm))
        console.print(Text(f"Type a message; /help for commands, /exit to leave. {KEYS}.\n", style="dim"))
    for line in lines if lines is not None else _typed(talk, console) if live else _piped():
        text = line.strip()
        if not text:
            continue
        if text in ("/exit", "/quit"):
            break
        before = list(talk.messages), talk.retries
        if text.split()[0] == "/retry":
            if not _take_back_answer(talk):
                console.print(Text("there is no answer to give again", style="dim"))
                continue
            talk.retries += 1
        elif text.startswith("/"):
            console.print(Text(command(talk, text), style="dim"))
            continue
        else:
            talk.messages.append({"role": "user", "content": text})
            talk.retries = 0
        if not live:
            print(f"you:   {text}", file=out)
        if not turn(talk, console, prompts(_name(talk.llm))[1] if live else "model: "):
            talk.messages, talk.retries = before


def turn(talk: Talk, console: Console, label: str) -> bool:
    """Answer the last message. False when it cannot be answered, as when it does not fit into the context; why is printed."""
    try:
        visible, dropped = fit(talk.llm, talk.messages, talk.max_tokens)
    except UserError as error:
        console.print(Text(f"error: {error}", style="red"))
        return False
    if dropped:
        said = f"(the context is full: the model no longer sees the first {dropped} messages)"
        console.print(Text(said, style="dim"))
    talk.dropped = dropped
    console.print(Text(label, style="bold green"), end="")
    try:
        answer = _answer(talk, visible, console)
    except UserError as error:  # NaN logits, or a prompt that this model cannot take
        console.print(Text(f"error: {error}", style="red"))
        return False
    talk.messages.append({"role": "assistant", "content": answer})
    keep_last(talk.ref, answer)
    return True


def _answer(talk: Talk, messages: list[Message], console: Console) -> str:
    pieces: list[str] = []
    began = time.monotonic()
    first: float | None = None
    stopped = False
    stream: Stream | None = None
    try:
        stream = reply(talk, messages)
        for piece in stream:
            first = first or time.monotonic() - began
            pieces.append(piece)
            console.out(printable(piece) if console.is_terminal else piece, end="", highlight=False)
    except KeyboardInterrupt:
        stopped = True
        console.print(Text(" [stopped]", style="dim"), end="")
        if isinstance(stream, Stream):
            stream.close()
    if hit := getattr(stream, "hit", None):
        where = f"{hit.document.name} ({hit.document.source})"
        said = f" [stopped by the guard: {hit.tokens} tokens as in {where}: {hit.asks}; /retry answers anew]"
        console.print(Text(said, style="dim"), end="")
    seconds = time.monotonic() - began
    result = getattr(stream, "result", None)
    tokens = result.usage.completion if result else len(talk.llm.tokenizer.encode("".join(pieces)))
    speed = f"{tokens} tokens, {tokens / max(1e-9, seconds):.0f}/s"
    console.print(Text(f"  ({speed})" if console.is_terminal else "", style="dim"))
    talk.took = f"{speed}, {seconds:.2f} s in all, the first word after {first or seconds:.2f} s"
    if result is not None:
        ends = {"length": "; cut off at the longest answer", "stop": ""}
        talk.took += (
            f"; {result.usage.prompt} tokens were read, {result.usage.cached} of them known from before"
            f"{ends.get(result.finish_reason or '', '')}"
        )
    elif stopped:
        talk.took += "; stopped"
    return "".join(pieces)


def printable(text: str) -> str:
    """Text without what a terminal obeys instead of printing: a model may have learned escape codes."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def prompts(name: str) -> tuple[str, str]:
    """What stands before a question and before an answer of the model ``name``, of one width: ``you>   ``, ``cria>  ``.

    At most `NAME` characters of it; what a terminal would not print (a downloaded name may hold control codes) is left out.
    """
    name = "".join(letter for letter in name if letter.isprintable()).strip()[:NAME].strip() or "model"
    width = max(cell_len("you"), cell_len(name))
    return "you>" + " " * (width - 1), f"{name}>" + " " * (width - cell_len(name) + 2)


def _name(llm: LLM) -> str:
    """The artifact's name, or the folder's or file's."""
    if (llm.path / "passport.json").is_file():
        return open_artifact(llm.path).name
    path = llm.path.resolve()
    return path.stem if path.is_file() else path.name


def _greeting(llm: LLM) -> Text:
    text = Text()
    if (llm.path / "passport.json").is_file():
        artifact = open_artifact(llm.path)
        text.append(artifact.name, style="bold")
        text.append(f" ({artifact.kind}, {artifact.id[7:19]})")
    else:
        text.append(str(llm.path), style="bold")
    return text.append(f": {llm.config.parameters():,} parameters, context {llm.context}")


# -- what is typed ----------------------------------------------------------------------------------------------------


def _piped() -> Iterator[str]:
    try:
        yield from iter(sys.stdin.readline, "")
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason}); convert it first") from None


def _typed(talk: Talk, console: Console) -> Iterator[str]:
    """Messages from the keyboard, of one or several lines. Ctrl-C clears what is being typed, Ctrl-D ends."""
    asking = session()
    while True:
        ask = prompts(_name(talk.llm))[0]
        try:
            yield asking.prompt(ask, prompt_continuation=lambda width, *_: " " * width)
        except KeyboardInterrupt:
            console.print(Text("Ctrl-D or /exit leaves", style="dim"))
        except EOFError:
            return


def session() -> PromptSession[str]:
    """Line editing with history (kept for this user alone) and completion of commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history: History = InMemoryHistory()
    file = last_file().with_name("chat-history")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        history = FileHistory(str(file))
    except OSError:  # a home that cannot be written: this session's lines are remembered
        pass
    words = WordCompleter([name.split()[0] for name in COMMANDS], sentence=True)
    asking: PromptSession[str] = PromptSession(
        multiline=True, key_bindings=keys, history=history, completer=words, auto_suggest=AutoSuggestFromHistory(),
    )  # fmt: skip
    begins = Condition(lambda: asking.default_buffer.text.startswith("/"))
    asking.complete_while_typing = begins
    return asking


# -- commands ---------------------------------------------------------------------------------------------------------


def command(talk: Talk, text: str) -> str:
    """Carry out a /command (but /retry, which is a turn, and /exit) and say what to tell the user."""
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        talk.messages, talk.dropped = list(talk.opening), 0
        return "the conversation starts again"
    if name == "/system":
        talk.opening = [{"role": "system", "content": rest}] if rest else []
        talk.messages, talk.dropped = list(talk.opening), 0
        return "the conversation starts again" + (" with this system message" if rest else "")
    if name == "/undo":
        _take_back_answer(talk)
        if len(talk.messages) > len(talk.opening):
            talk.messages.pop()
        return "the last question and its answer are forgotten"
    if name == "/temperature":
        return _set_temperature(talk, rest)
    if name == "/seed":
        return _set_seed(talk, rest)
    if name == "/model":
        return _change_model(talk, rest)
    if name == "/stats":
        return stats(talk)
    if name == "/save":
        return save(talk, rest)
    if name == "/help":
        width = max(map(len, COMMANDS)) + 2
        return "\n".join(f"  {name:<{width}}{about}" for name, about in COMMANDS.items()) + f"\n  {KEYS}"
    return f"no command {name}; /help lists them"


def _take_back_answer(talk: Talk) -> bool:
    """Forget the last answer, so that its question stands last; False when there is none."""
    if len(talk.messages) < len(talk.opening) + 2:
        return False
    talk.messages.pop()
    return True


def _set_temperature(talk: Talk, text: str) -> str:
    try:
        value = float(text)
        if not 0 <= value <= HOTTEST:
            raise ValueError
    except ValueError:
        return f"temperature is {talk.temperature:g}; give a number from 0 to {HOTTEST}"
    talk.temperature = value
    return f"temperature is {value:g}"


def _set_seed(talk: Talk, text: str) -> str:
    if not text:
        talk.seed = None
        return "the seed is left to chance"
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        return f"the seed is {_seed(talk)}; give a whole number from 0 to {2**32 - 1}"
    talk.seed = int(text)
    return f"the seed is {talk.seed}"


def _seed(talk: Talk) -> str:
    return "left to chance" if talk.seed is None else str(talk.seed)


def _change_model(talk: Talk, ref: str) -> str:
    if not ref:
        return f"this is {talk.ref}; /model NAME takes a bundled model, a folder or a .gguf file"
    try:
        other = replace(talk, llm=open_model(ref, require_passport=talk.require_passport, pubkey=talk.pubkey), ref=ref)
        open_guard(other)
    except UserError as error:
        return f"error: {error}"
    talk.llm, talk.index = other.llm, other.index
    talk.ref, talk.took = ref, "this model has answered nothing yet"
    return f"{_greeting(talk.llm).plain}; it sees the conversation so far"


def stats(talk: Talk) -> str:
    """What the last answer took, how full the context is, and the settings."""
    system = len(talk.messages[:1]) if talk.opening else 0
    visible = talk.messages[:system] + talk.messages[system + talk.dropped :]
    used = len(render(visible, talk.llm.tokenizer, talk.llm.template).ids) if visible else 0
    unseen = f", of which the model no longer sees the first {talk.dropped}" if talk.dropped else ""
    return "\n".join(
        (
            f"  answer    {talk.took}",
            f"  context   {used} of {talk.llm.context} tokens; {len(talk.messages)} messages{unseen}",
            f"  settings  {talk.ref}, temperature {talk.temperature:g}, seed {_seed(talk)}, at most {talk.max_tokens} tokens an answer",
        )
    )


def save(talk: Talk, name: str) -> str:
    """Add the conversation to a JSONL file, one line a chat, as `criadero tune` and `criadero data show` read it."""
    if len(talk.messages) < len(talk.opening) + 2:
        return "there is nothing to save yet"
    if not name:
        return "give a file: /save chats.jsonl"
    file = Path(name).expanduser()
    if file.suffix != ".jsonl":
        return f"{name} is not saved: chats are kept in files that end with .jsonl"
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n")
    except (OSError, UnicodeError) as error:
        return f"{name} cannot be written: {getattr(error, 'strerror', None) or error}"
    return f"{name}: this conversation is added ({len(talk.messages)} messages)"
