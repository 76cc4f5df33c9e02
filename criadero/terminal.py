"""The chat in a terminal: ``criadero chat MODEL``. With piped input every line is a turn, and output is plain."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from criadero.artifact import Artifact, open_artifact
from criadero.chat import Message
from criadero.engine.llm import LLM, fit
from criadero.engine.request import SamplingParams
from criadero.errors import UserError
from criadero.trust.last import keep_last

HELP = """  /reset          forget the conversation
  /system TEXT    start again with a system message
  /undo           take back the last question and its answer
  /temperature N  0 is always the likeliest word; 0.8 is livelier
  /help           this list
  /exit           leave (or Ctrl-D; Ctrl-C stops an answer)"""

HOTTEST = 2  # a higher temperature makes noise of any model
NAME = 12  # characters of a model's name before its answers


def reply(llm: LLM, messages: list[Message], *, max_tokens: int, temperature: float, seed: int | None) -> Iterator[str]:
    """Pieces of the answer, with settings that suit small models: a little penalty against repeating."""
    penalty = 1.0 if temperature == 0 else 1.1
    yield from llm.chat(
        messages,
        max_tokens=min(max_tokens, llm.context),
        temperature=temperature,
        top_p=0.9,
        repetition_penalty=penalty,
        seed=seed,
    )


def chat(
    ref: str | Path | Artifact, *, system: str | None = None, temperature: float = 0.3, max_tokens: int = 200,
    seed: int | None = None, lines: Iterable[str] | None = None, out: TextIO | None = None,
) -> None:  # fmt: skip
    """Talk to a model until the input ends. ``lines`` replaces the keyboard (for tests and transcripts)."""
    if not 0 <= temperature <= HOTTEST:
        raise UserError(f"temperature must lie between 0 and {HOTTEST}, not {temperature:g}")
    SamplingParams(temperature=temperature, max_tokens=max_tokens)  # refuses what cannot be, before loading
    llm = LLM(ref)
    llm.template  # noqa: B018  a model without a template says so before the first question
    out = out or sys.stdout
    console = Console(file=out, highlight=False, soft_wrap=True)
    live = lines is None and sys.stdin.isatty() and console.is_terminal
    asks, answers = prompts(_name(llm)) if live else ("", "model: ")
    if live:
        console.print(_greeting(llm))
        console.print(Text("Type a message; /help for commands, /exit to leave.\n", style="dim"))
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    for line in _turns(lines, asks, console):
        text = line.strip()
        if not text:
            continue
        if text.startswith("/"):
            if text.split()[0] in ("/exit", "/quit"):
                break
            messages, opening, temperature, said = command(text, messages, opening, temperature)
            console.print(Text(said, style="dim"))
            continue
        messages.append({"role": "user", "content": text})
        try:
            visible, dropped = fit(llm, messages, max_tokens)
        except UserError as error:
            messages.pop()
            console.print(Text(f"error: {error}", style="red"))
            continue
        if dropped:
            console.print(
                Text(f"(the context is full: the model no longer sees the first {dropped} messages)", style="dim")
            )
        if not live:
            print(f"you:   {text}", file=out)
        console.print(Text(answers, style="bold green"), end="")
        messages.append({"role": "assistant", "content": _answer(llm, visible, console, max_tokens, temperature, seed)})
        keep_last(str(ref.path if isinstance(ref, Artifact) else ref), messages[-1]["content"])


def _answer(
    llm: LLM, messages: list[Message], console: Console, max_tokens: int, temperature: float, seed: int | None
) -> str:
    pieces: list[str] = []
    began = time.monotonic()
    try:
        for piece in reply(llm, messages, max_tokens=max_tokens, temperature=temperature, seed=seed):
            pieces.append(piece)
            console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        console.print(Text(" [stopped]", style="dim"), end="")
    tokens = len(llm.tokenizer.encode("".join(pieces)))
    speed = f"  ({tokens} tokens, {tokens / max(1e-9, time.monotonic() - began):.0f}/s)" if console.is_terminal else ""
    console.print(Text(speed, style="dim"))
    return "".join(pieces)


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


def _turns(lines: Iterable[str] | None, prompt: str, console: Console) -> Iterator[str]:
    if lines is not None:
        yield from lines
        return
    if prompt:
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            yield input(prompt)
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not UTF-8 ({error.reason}); convert it first") from None
        except EOFError:
            if prompt:
                console.print()
            return
        except KeyboardInterrupt:
            console.print()
            return


def command(
    text: str, messages: list[Message], opening: list[Message], temperature: float
) -> tuple[list[Message], list[Message], float, str]:
    """Carry out a /command: the new messages, opening, temperature, and what to tell the user."""
    name, _, rest = text.partition(" ")
    if name == "/reset":
        return list(opening), opening, temperature, "the conversation starts again"
    if name == "/system":
        opening = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
        return (
            list(opening),
            opening,
            temperature,
            "the conversation starts again" + (" with this system message" if opening else ""),
        )
    if name == "/undo":
        kept = messages[: len(messages) - 2] if len(messages) >= len(opening) + 2 else list(opening)
        return kept, opening, temperature, "the last question and its answer are forgotten"
    if name == "/temperature":
        try:
            value = float(rest)
            if not 0 <= value <= HOTTEST:
                raise ValueError
        except ValueError:
            return messages, opening, temperature, f"temperature is {temperature:g}; give a number from 0 to {HOTTEST}"
        return messages, opening, value, f"temperature is {value:g}"
    if name == "/help":
        return messages, opening, temperature, HELP
    return messages, opening, temperature, f"no command {name}; /help lists them"
