"""The chat in a terminal: lines in, lines out; commands; and what happens when the context is full."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny

from criadero import cli, terminal
from criadero.chat import Message, render
from criadero.engine.llm import LLM
from criadero.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("terminal") / "base")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def talk(folder: Path, lines: Iterable[str], **settings: Any) -> str:
    out = io.StringIO()
    terminal.chat(folder, lines=lines, out=out, **({"temperature": 0.0, "max_tokens": 8} | settings))
    return out.getvalue()


# --- the context ---


def size(llm: LLM, messages: list[Message]) -> int:
    return len(render(messages, llm.tokenizer, llm.template, add_generation_prompt=True).ids)


def test_the_oldest_turns_go_first_and_the_system_message_stays(llm: LLM) -> None:
    system: Message = {"role": "system", "content": "Be kind."}
    turns = [m for n in range(12) for m in (user(f"Question {n}?"), assistant("Yes, we are open."))]
    messages = [system, *turns, user("And now?")]
    visible, dropped = terminal.fit(llm, messages, 20)
    assert dropped > 0
    assert dropped % 2 == 0
    assert visible == [system, *turns[dropped:], user("And now?")]
    assert size(llm, visible) + 20 <= 128
    assert size(llm, [system, *turns[dropped - 2 :], user("And now?")]) + 20 > 128  # no more than was needed
    short = [user("a"), assistant("b"), user("c")]
    assert terminal.fit(llm, short, 20) == (short, 0)


def test_a_long_answer_does_not_push_out_the_whole_conversation(llm: LLM) -> None:
    messages = [user("a"), assistant("b"), user("c")]
    assert terminal.fit(llm, messages, 10_000) == (messages, 0)


def test_a_question_that_fills_the_context_alone(llm: LLM) -> None:
    long = user("Question " * 200)
    with pytest.raises(UserError, match=r"this message takes \d+ tokens and the model's context is 128; shorten it"):
        terminal.fit(llm, [user("a"), assistant("b"), long], 20)
    room = user("x" * (128 - 16 - size(llm, [user("")])))  # with just enough room for a word or two
    assert terminal.fit(llm, [room], 100) == ([room], 0)


def test_the_loss_of_turns_and_a_question_too_long_are_said(folder: Path) -> None:
    said = talk(folder, ["Can I pay by card?"] * 8 + ["Question " * 200, "And now?"], max_tokens=20)
    assert "the context is full: the model no longer sees the first 2 messages" in said
    assert "error: this message takes" in said
    assert said.count("model:") == 9  # the refused one got no answer, and the chat went on
    assert "you:   And now?" in said


# --- lines ---


def test_every_line_is_a_turn_and_the_answers_are_the_models(folder: Path, llm: LLM) -> None:
    said = talk(folder, ["Can I pay by card?", "", "  ", "And now?\n"])
    first = "".join(llm.chat([user("Can I pay by card?")], max_tokens=8, top_p=0.9))
    chat = [user("Can I pay by card?"), assistant(first), user("And now?")]
    second = "".join(llm.chat(chat, max_tokens=8, top_p=0.9))
    assert said == f"you:   Can I pay by card?\nmodel: {first}\nyou:   And now?\nmodel: {second}\n"


def test_markup_in_an_answer_is_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLM, "chat", lambda self, messages, **settings: iter(["[bold]", "x[/bold] ", ":smile:"]))
    assert "model: [bold]x[/bold] :smile:\n" in talk(folder, ["a"])


def test_a_seed_gives_the_same_chat(folder: Path) -> None:
    settings = {"temperature": 1.0, "max_tokens": 20}
    assert talk(folder, ["a", "b"], seed=3, **settings) == talk(folder, ["a", "b"], seed=3, **settings)
    assert talk(folder, ["a", "b"], seed=3, **settings) != talk(folder, ["a", "b"], seed=4, **settings)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Message]] = []

    def answer(self: LLM, messages: list[Message], **settings: Any) -> Iterable[str]:
        calls.append(list(messages))
        yield "Well"
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "chat", answer)
    said = talk(folder, ["a", "b"])
    assert said == "you:   a\nmodel: Well [stopped]\nyou:   b\nmodel: Well\n"
    assert calls[1] == [user("a"), assistant("Well"), user("b")]


def test_the_system_message_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Message]] = []
    monkeypatch.setattr(LLM, "chat", lambda self, messages, **settings: iter(seen.append(list(messages)) or ["ok"]))
    talk(folder, ["a", "/system Be brief.", "b", "/undo", "c", "/reset", "d", "/exit", "e"], system="Be kind.")
    kind: Message = {"role": "system", "content": "Be kind."}
    brief: Message = {"role": "system", "content": "Be brief."}
    assert seen == [[kind, user("a")], [brief, user("b")], [brief, user("c")], [brief, user("d")]]


# --- commands ---


def test_commands() -> None:
    system: Message = {"role": "system", "content": "s"}
    messages = [system, user("a"), assistant("b"), user("c"), assistant("d")]
    run = terminal.command
    assert run("/reset", messages, [system], 0.3)[:3] == ([system], [system], 0.3)
    assert run("/undo", messages, [system], 0.3)[0] == messages[:3]
    assert run("/undo", [system], [system], 0.3)[0] == [system]
    assert run("/undo", [], [], 0.3)[0] == []
    assert run("/system", messages, [system], 0.3)[:2] == ([], [])
    assert run("/system  x y ", messages, [system], 0.3)[1] == [{"role": "system", "content": "x y"}]
    assert run("/temperature 0.8", messages, [system], 0.3)[2] == 0.8
    for bad in ("", "warm", "-1", "2.5", "nan", "inf"):
        value, said = run(f"/temperature {bad}", messages, [system], 0.3)[2:]
        assert value == 0.3
        assert "give a number from 0 to 2" in said
    assert "/undo" in run("/help", messages, [system], 0.3)[3]
    assert run("/hlep", messages, [system], 0.3) == (messages, [system], 0.3, "no command /hlep; /help lists them")


def test_the_opening_is_not_changed_by_the_chat_that_follows() -> None:
    system: Message = {"role": "system", "content": "s"}
    opening = [system]
    messages = terminal.command("/reset", [], opening, 0.3)[0]
    messages.append(user("a"))
    assert opening == [system]


# --- at the keyboard ---


def test_prompts_are_of_one_width() -> None:
    assert terminal.prompts("cria") == ("you>   ", "cria>  ")
    assert terminal.prompts("tienda") == ("you>     ", "tienda>  ")
    assert terminal.prompts("me") == ("you>  ", "me>   ")
    assert terminal.prompts("my-very-long-name") == ("you>           ", "my-very-long>  ")
    assert terminal.prompts("小店") == ("you>   ", "小店>  ")  # letters of two columns
    assert terminal.prompts("a\x1b[2J\nb")[1] == "a[2Jb>  "
    assert terminal.prompts("\n")[1] == "model>  "


def test_the_prompt_names_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    typed, asked = iter(["Can I pay by card?", "/exit"]), []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(typed))
    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(LLM, "chat", lambda self, messages, **settings: iter(["Yes."]))
    out = Screen()
    terminal.chat(".", out=out)
    assert asked == ["you>   "] * 2
    assert "base>  " in out.getvalue()
    assert "cria>" not in out.getvalue()


# --- from the command line ---


def test_piped_input(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "criadero.cli", "chat", str(folder), "--temperature", "0", "--max-tokens", "5"],
        input=b"Can I pay by card?\n/exit\n", capture_output=True, timeout=300,
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert text.startswith("you:   Can I pay by card?\nmodel: ")
    assert "\x1b" not in text  # no colours in a pipe


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert cli._run(["chat", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_what_cannot_be_is_said_before_the_first_question(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    plain = tiny.base(tmp_path / "plain", template=None)
    assert "has no chat template: it is a base model" in refused(capsys, plain)
    assert "temperature must lie between" in refused(capsys, folder, "--temperature=-1")
    assert "temperature must lie between 0 and 2, not 5" in refused(capsys, folder, "--temperature", 5)
    assert "temperature must lie between 0 and 2, not nan" in refused(capsys, folder, "--temperature", "nan")
    assert "max_tokens must lie between" in refused(capsys, folder, "--max-tokens", 0)
    assert "no such" in refused(capsys, tmp_path / "nowhere")


def test_input_that_is_not_utf_8(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "error: the input is not UTF-8" in refused(capsys, folder)
