"""The chat in a terminal: lines in, lines out; commands; and what happens when the context is full."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
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


@pytest.fixture
def talking(llm: LLM) -> terminal.Talk:
    """A chat of two turns, begun with a system message."""
    system: Message = {"role": "system", "content": "s"}
    return terminal.Talk(
        llm, "base", opening=[system], messages=[system, user("a"), assistant("b"), user("c"), assistant("d")]
    )


def test_commands(talking: terminal.Talk) -> None:
    system, before = talking.opening[0], list(talking.messages)
    terminal.command(talking, "/undo")
    assert talking.messages == before[:3]
    terminal.command(talking, "/undo")
    terminal.command(talking, "/undo")
    assert talking.messages == [system]
    talking.messages = list(before)
    terminal.command(talking, "/reset")
    talking.messages.append(user("a"))
    assert talking.opening == [system]  # what follows does not change it
    terminal.command(talking, "/system  x y ")
    assert talking.messages == talking.opening == [{"role": "system", "content": "x y"}]
    terminal.command(talking, "/system")
    assert talking.messages == talking.opening == []
    assert all(name.split()[0] in terminal.command(talking, "/help") for name in terminal.COMMANDS)
    assert terminal.command(talking, "/hlep") == "no command /hlep; /help lists them"


def test_settings(talking: terminal.Talk) -> None:
    assert terminal.command(talking, "/temperature 0.8") == "temperature is 0.8"
    for bad in ("", "warm", "-1", "2.5", "nan", "inf"):
        assert "give a number from 0 to 2" in terminal.command(talking, f"/temperature {bad}")
    assert talking.temperature == 0.8
    assert terminal.command(talking, "/seed 7") == "the seed is 7"
    for bad in ("x", "-1", "1.5", str(2**32), "²"):
        assert "the seed is 7; give a whole number" in terminal.command(talking, f"/seed {bad}")
    assert talking.seed == 7
    terminal.command(talking, "/seed")
    assert talking.seed is None


def test_another_model_goes_on_with_the_conversation(
    talking: terminal.Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.base(tmp_path / "other")
    tiny.base(tmp_path / "plain", template=None)
    before = list(talking.messages)
    assert "this is base" in terminal.command(talking, "/model")
    assert "error: no such model 'nowhere'" in terminal.command(talking, "/model nowhere")
    assert "has no chat template" in terminal.command(talking, "/model plain")
    assert talking.ref == "base"
    assert "it sees the conversation so far" in terminal.command(talking, "/model other")
    assert (talking.ref, talking.llm.path, talking.messages) == ("other", Path("other"), before)
    talking.require_passport = True
    (tmp_path / "third").mkdir()
    assert "third has no passport.json" in terminal.command(talking, "/model third")


def test_what_is_saved_can_be_tuned_on(talking: terminal.Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from criadero.data.chats import read_chats

    monkeypatch.chdir(tmp_path)
    assert "give a file" in terminal.command(talking, "/save")
    assert "end with .jsonl" in terminal.command(talking, "/save chat.txt")
    assert "No such file or directory" in terminal.command(talking, "/save nowhere/chats.jsonl")
    for _ in range(2):
        assert terminal.command(talking, "/save chats.jsonl").endswith("added (5 messages)")
    assert read_chats("chats.jsonl").chats == [talking.messages] * 2
    terminal.command(talking, "/reset")
    assert terminal.command(talking, "/save chats.jsonl") == "there is nothing to save yet"


def test_a_question_is_answered_again_with_another_seed(folder: Path) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 20, "seed": 3}
    said = talk(folder, ["/retry", "a", "/retry", "/retry", "/stats"], **settings)
    assert said.startswith("there is no answer to give again\nyou:   a\n")
    answers = [part.split("you:")[0] for part in said.split("model: ")[1:]]
    assert len(set(answers)) == 3
    assert "; 2 messages" in said  # one question and the last answer
    assert talk(folder, ["a"], **settings).split("model: ")[1] == answers[0].split("you:")[0]


def test_a_retry_that_fails_leaves_question_and_answer(folder: Path, tmp_path: Path) -> None:
    small = tiny.base(tmp_path / "small", max_position_embeddings=24)
    said = talk(
        folder,
        ["Can I pay by card, and when? " * 3, f"/model {small}", "/retry", f"/model {folder}", "/stats", "/retry"],
    )
    assert "the model's context is 24; shorten it" in said
    assert "; 2 messages" in said
    assert said.count("model: ") == 2
    once = talk(folder, ["Can I pay by card, and when? " * 3, "/retry", "/retry"], temperature=1.0, seed=3)
    lines = ["Can I pay by card, and when? " * 3, "/retry", f"/model {small}", "/retry", f"/model {folder}", "/retry"]
    again = talk(folder, lines, temperature=1.0, seed=3)
    assert again.split("model: ")[-1] == once.split("model: ")[-1]  # the one that failed has not used up a seed


def test_stats_tell_what_the_answer_took(folder: Path) -> None:
    said = talk(folder, ["/stats", "Can I pay by card?", "And now?", "/stats"], seed=5)
    assert "nothing was answered yet" in said
    assert re.search(r"answer +\d+ tokens, \d+/s, .*; \d+ tokens were read, \d+ of them known from before", said)
    assert re.search(r"context +\d+ of 128 tokens; 4 messages", said)
    assert "temperature 0, seed 5, at most 8 tokens" in said


# --- at the keyboard ---


def test_prompts_are_of_one_width() -> None:
    assert terminal.prompts("cria") == ("you>   ", "cria>  ")
    assert terminal.prompts("tienda") == ("you>     ", "tienda>  ")
    assert terminal.prompts("me") == ("you>  ", "me>   ")
    assert terminal.prompts("my-very-long-name") == ("you>           ", "my-very-long>  ")
    assert terminal.prompts("小店") == ("you>   ", "小店>  ")  # letters of two columns
    assert terminal.prompts("a\x1b[2J\nb")[1] == "a[2Jb>  "
    assert terminal.prompts("\n")[1] == "model>  "


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def keyboard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> Iterable[Callable[[str], tuple[str, list[list[Message]]]]]:
    """Type keys into a chat at a terminal: what the screen shows, and the messages of each answer. Every answer is "Yes."."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdin", Screen())
    monkeypatch.chdir(folder)
    seen: list[list[Message]] = []
    monkeypatch.setattr(LLM, "chat", lambda self, messages, **settings: iter(seen.append(list(messages)) or ["Yes."]))

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def type_keys(text: str) -> tuple[str, list[list[Message]]]:
            keys.send_text(text)
            out = Screen()
            terminal.chat(".", out=out)
            return out.getvalue(), seen

        yield type_keys


def test_lines_are_typed_and_the_prompt_names_the_model(keyboard: Any) -> None:
    shown, seen = keyboard("Can I pay by card?\rAnd\x1b\rnow?\r/stats\r/exit\r")
    assert [messages[-1] for messages in seen] == [user("Can I pay by card?"), user("And\nnow?")]
    assert shown.count("base>  ") == 2
    assert "cria>" not in shown
    assert "4 messages" in shown


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(keyboard: Any) -> None:
    shown, seen = keyboard("a\r" + "never sent\x03" + "b\r" + "\x04")
    assert [messages[-1]["content"] for messages in seen] == ["a", "b"]
    assert "Ctrl-D or /exit leaves" in shown


def test_the_lines_of_the_last_session_come_back(keyboard: Any, tmp_path: Path) -> None:
    keyboard("a\r\x04")
    _, seen = keyboard("\x1b[A\r\x04")
    assert [messages[-1]["content"] for messages in seen] == ["a", "a"]
    file = tmp_path / "state" / "criadero" / "chat-history"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_home_that_cannot_be_written_stops_nothing(keyboard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/nowhere")
    assert len(keyboard("a\r\x04")[1]) == 1


def test_what_a_terminal_obeys_is_not_printed() -> None:
    assert terminal.printable("a\x1b[2J\x07b\n\tñ\u200d😀\x9b") == "a[2Jb\n\tñ\u200d😀"


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
