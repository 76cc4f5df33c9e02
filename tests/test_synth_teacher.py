"""Teachers: caching, retries, budgets and terms, against a scripted local endpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from scripted_teacher import scripted_teacher

from criadero.artifact import Input, create
from criadero.errors import UserError
from criadero.synth import teacher as module
from criadero.synth.teacher import Answer, Ask, Teacher, TeacherFields, ask, open_teacher
from criadero.synth.terms import check_terms


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CRIADERO_TEACHER_KEY", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between two tries; nobody waits."""
    found: list[float] = []
    monkeypatch.setattr(module, "_sleep", found.append)
    return found


def fields(url: str, **changes: Any) -> TeacherFields:
    return TeacherFields(**({"teacher": url, "teacher_model": "m", "teacher_licence": "apache-2.0"} | changes))


def asks(n: int) -> list[Ask]:
    return [ask(f"question {i}") for i in range(n)]


def test_answers_come_in_order_and_are_asked_once(own_cache: Path) -> None:
    with scripted_teacher(lambda text, _: text.upper()) as server:
        teacher = open_teacher(fields(server.url))
        texts = [one.text for one in teacher.answer([*asks(9), *asks(9)])]
        assert texts == [f"QUESTION {i}" for i in range(9)] * 2
        assert len(server.requests) == 9
        assert server.most_at_once <= 4
        again = open_teacher(fields(server.url))
        assert [one.text for one in again.answer(asks(9))] == texts[:9]
        assert len(server.requests) == 9, "an answer that is in the cache is not paid for twice"
        assert again.counts["cached"] == 9
        body = server.requests[0]
        assert body["model"] == "m"
        assert {"max_tokens", "temperature", "top_p", "seed", "messages"} <= body.keys()
        # another seed, another temperature: another request
        again.answer([ask("question 0", seed=1), ask("question 0", temperature=0.1)])
        assert len(server.requests) == 11
    (file,) = own_cache.rglob("*.jsonl")
    assert file.stat().st_mode & 0o077 == 0
    assert "question 0" not in file.read_text(), "questions may hold private documents: their hash is enough"


def test_concurrency_is_bounded() -> None:
    def slow(text: str, _: int) -> str:
        time.sleep(0.03)
        return text

    with scripted_teacher(slow) as server:
        open_teacher(fields(server.url, concurrency=2)).answer(asks(8))
        assert server.most_at_once == 2


def test_tries_again_and_obeys_retry_after(naps: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    script = [(429, {"Retry-After": "7"}, b"{}"), (503, {}, b"busy"), "yes"]
    with scripted_teacher(lambda _, n: script[n]) as server:
        teacher = open_teacher(fields(server.url))
        assert teacher.answer([ask("a")])[0].text == "yes"
    assert naps[0] == 7
    assert 1 <= naps[1] <= 3, "the second wait is about two seconds, with a random part"
    assert teacher.counts["tried_again"] == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, "once of a kind: busy, and a server's error"
    assert all(line.endswith(f"tried again, at most {module.TRIES} times a request") for line in said)


def test_gives_up_on_one_and_keeps_the_others(naps: list[float]) -> None:
    with scripted_teacher(lambda text, _: (500, {}, b"{}") if text == "question 1" else text) as server:
        teacher = open_teacher(fields(server.url))
        found = teacher.answer(asks(3))
        assert [one.problem for one in found] == ["", "server_error", ""]
        assert teacher.counts["unanswered"] == 0, "an error that says so is not charged"
        assert len(server.requests) == 2 + module.TRIES


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((401, {}, b'{"error": {"message": "bad key sk-secret"}}'), "check the key"),
        ((404, {}, b"no such model"), "HTTP 404: no such model"),
        ((302, {"Location": "http://elsewhere.invalid/"}, b""), "sends us elsewhere"),
        ((429, {"Retry-After": "7200"}, b"{}"), "asks to wait 7200 s"),
    ],
)
def test_refusals_stop_the_run(reply: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIADERO_TEACHER_KEY", "sk-secret")
    with scripted_teacher(lambda _, n: "fine" if n == 0 else reply) as server:
        teacher = open_teacher(fields(server.url, concurrency=1))
        with pytest.raises(UserError, match="run the same again") as caught:
            teacher.answer(asks(5))
        assert words in str(caught.value)
        assert "sk-secret" not in str(caught.value)
        assert len(server.requests) == 2
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        teacher = open_teacher(fields(server.url))
        assert teacher.answer(asks(1))[0].text == "fine"


@pytest.mark.parametrize("reply", [(200, {}, b"<html>"), (200, {}, b'{"choices": []}'), (200, {}, b"[" * 100_000)])
def test_rubbish_is_counted_and_then_enough(reply: Any, naps: list[float]) -> None:
    with scripted_teacher(lambda *_: reply) as server:
        teacher = open_teacher(fields(server.url))
        assert teacher.answer([ask("a")])[0].problem == "malformed"
        with pytest.raises(UserError, match="in a row had no answer"):
            teacher.answer(asks(40))
        assert len(server.requests) < 20
    assert not naps, "what was answered wrongly may have been charged: it is not asked for again at once"


def test_timeout_is_whole_even_when_bytes_drip(naps: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    release = threading.Event()

    def hang(*_: Any) -> str:
        release.wait(5)
        return "late"

    with scripted_teacher(hang) as server:
        teacher = open_teacher(fields(server.url, timeout=0.05, price_in=1.0, price_out=1.0))
        found = teacher.answer([ask("a", max_tokens=10)])[0]
        release.set()
        assert found.problem == "timeout"
        assert capsys.readouterr().err.count("no answer within 0.05 s; tried again") == 1
        # each of the tries may have been charged
        assert teacher.cost == pytest.approx(module.TRIES * (ask("a").most_prompt_tokens + 10) / 1e6)


def test_unreachable() -> None:
    teacher = open_teacher(fields("http://127.0.0.1:9/v1"))
    module_sleep, module._sleep = module._sleep, lambda _: None
    try:
        with pytest.raises(UserError, match=r"in a row had no answer \(the last: unreachable\)"):
            teacher.answer(asks(10))
    finally:
        module._sleep = module_sleep


def test_budget_holds_with_many_at_once_and_what_was_paid_is_kept() -> None:
    with scripted_teacher(lambda text, _: text) as server:
        # each answer costs 100 and 50 tokens, at most (27 + 512) and so
        priced = {"price_in": 10_000.0, "price_out": 10_000.0, "concurrency": 4}
        most = (asks(1)[0].most_prompt_tokens + 512) / 100
        teacher = open_teacher(fields(server.url, budget=most + 4.6, **priced))
        with pytest.raises(UserError, match=r"the budget of .* does not cover another request: .* the next may cost"):
            teacher.answer(asks(20))
        assert teacher.cost <= most + 4.6
        paid = len(server.requests)
        assert teacher.cost == pytest.approx(1.5 * paid)
        assert paid == 4, "four of 1.5 fit, and a fifth may need 5.39 of the 4 that are left"
        # the same budget does not buy more: what an earlier run paid counts
        again = open_teacher(fields(server.url, budget=most + 4.6, **priced))
        with pytest.raises(UserError, match="budget"):
            again.answer(asks(20))
        assert len(server.requests) == paid
        more = open_teacher(fields(server.url, budget=1000.0, **priced))
        assert len(more.answer(asks(20))) == 20
        assert len(server.requests) == 20
        assert more.report()["cost"] == pytest.approx(30)
        assert more.report()["paid_in_this_run"] == pytest.approx(1.5 * 16)


def test_usage_that_is_not_said_is_bounded() -> None:
    with scripted_teacher(lambda *_: "word", usage=False) as server:
        teacher = open_teacher(fields(server.url, price_in=1.0, price_out=1.0))
        teacher.answer([ask("hello")])
        assert teacher.counts["prompt_tokens"] == ask("hello").most_prompt_tokens
        assert teacher.counts["completion_tokens"] == 4


def test_a_cut_off_line_of_the_cache_is_left_out(own_cache: Path) -> None:
    with scripted_teacher(lambda text, _: text) as server:
        open_teacher(fields(server.url)).answer(asks(3))
        (file,) = own_cache.rglob("*.jsonl")
        raw = file.read_bytes()
        file.write_bytes(raw[:-20])
        teacher = open_teacher(fields(server.url))
        assert [one.text for one in teacher.answer(asks(3))] == [f"question {i}" for i in range(3)]
        assert len(server.requests) == 4
        assert len(open_teacher(fields(server.url)).answer(asks(3))) == 3
        assert len(server.requests) == 4, "an answer behind a line that was cut off is found again"


KILLED = """
import sys
from criadero.synth.teacher import TeacherFields, ask, open_teacher
teacher = open_teacher(TeacherFields(teacher=sys.argv[1], teacher_model="m", teacher_licence="mit", concurrency=1))
print("open", flush=True)
teacher.answer([ask(f"question {i}") for i in range(40)])
"""


def test_kill_loses_only_what_was_under_way() -> None:
    def slow(text: str, n: int) -> str:
        time.sleep(0.01)
        return text

    with scripted_teacher(slow) as server:
        child = subprocess.Popen([sys.executable, "-c", KILLED, server.url], env=os.environ.copy())
        while len(server.requests) < 10:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        seen = len(server.requests)
        teacher = open_teacher(fields(server.url, teacher_licence="mit", concurrency=1))
        assert [one.text for one in teacher.answer(asks(40))] == [f"question {i}" for i in range(40)]
        assert teacher.counts["cached"] >= seen - 1
        assert len(server.requests) <= 41


def test_recording_is_a_teacher(tmp_path: Path) -> None:
    with scripted_teacher(lambda text, _: text.upper()) as server:
        teacher = open_teacher(fields(server.url))
        teacher.answer(asks(3))
        teacher.write_recording(tmp_path / "answers.jsonl")
    replayed = open_teacher(TeacherFields(teacher=str(tmp_path / "answers.jsonl")))
    assert [one.text for one in replayed.answer(asks(3))] == ["QUESTION 0", "QUESTION 1", "QUESTION 2"]
    assert replayed.licence == "apache-2.0"
    assert replayed.made_by.id == teacher.made_by.id
    with pytest.raises(UserError, match="no recorded answer"):
        replayed.answer(asks(4))
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match="not a file of recorded answers"):
        open_teacher(TeacherFields(teacher=str(tmp_path / "other.jsonl")))


def test_local_model_answers(tmp_path: Path) -> None:
    with create(tmp_path / "base", kind="chat", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path)
    teacher = open_teacher(TeacherFields(teacher=str(tmp_path / "base")))
    assert teacher.licence == "Apache-2.0"
    one, same, long = teacher.answer(
        [ask("Are we open?", max_tokens=8, seed=1), ask("Are we open?", max_tokens=8, seed=1), ask("a b " * 200)]
    )
    assert one.text
    assert one == same
    assert long.problem == "too_long"
    again = open_teacher(TeacherFields(teacher=str(tmp_path / "base")))
    assert again.answer([ask("Are we open?", max_tokens=8, seed=1)]) == [one]
    assert again.counts["cached"] == 1


def test_local_answers_are_computed_together_and_are_those_of_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from criadero.engine.core import Engine

    with create(tmp_path / "base", kind="chat", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path)
    steps: list[int] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
    many = [ask(f"question {i}", max_tokens=6 + i, seed=i, temperature=0.1 * i) for i in range(7)]
    together = open_teacher(TeacherFields(teacher=str(tmp_path / "base"))).answer(many)
    assert len(steps) <= 12 + 3, "as many steps as the longest answer, and a few for the prompts"
    assert [one.completion_tokens <= 6 + i for i, one in enumerate(together)] == [True] * 7
    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "other"))
    alone = open_teacher(TeacherFields(teacher=str(tmp_path / "base")))
    assert [alone.answer([one])[0] for one in many] == together
    turns = [("question 1", "and then?"), ("question 2",), ("question 3", "and then?", "and then?")]
    answers = module.local_answers(str(tmp_path / "base"), turns, max_tokens=5)
    assert [len(one) for one in answers] == [2, 1, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher_model": ""}, "teacher_model must be given"),
        ({"teacher_licence": ""}, "teacher_licence must be given"),
        ({"teacher": "https://api.example.com/v1"}, "price_in and price_out must be given"),
        ({"teacher": "ftp://x/v1"}, "is not the URL of an endpoint"),
        ({"teacher": "https://me:pw@example.com/v1"}, "a URL with a name, a key or a query"),
        ({"teacher": "http://example.com/v1"}, "without encryption"),
        ({"teacher": "no-such.jsonl"}, "no such file of recorded answers"),
        ({"teacher": "no-such-model"}, "no such"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0.0}, "timeout"),
        ({"budget": -1.0}, "must not be negative"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIADERO_TEACHER_KEY", "sk-secret")
    with pytest.raises(UserError, match=words) as caught:
        open_teacher(fields("http://localhost:1/v1", **changes))
    assert "sk-secret" not in str(caught.value)
    assert "pw" not in str(caught.value)


# -- terms ------------------------------------------------------------------------------------------------------------


def of_licence(licence: str) -> Teacher:
    made_by = Input("outputs_of", "sha256:" + "1" * 64, "teacher", licence, "https://x/v1")
    return Teacher("teacher", licence, made_by, lambda _: Answer("x"), None)


def terms(licence: str, **changes: Any) -> list[str]:
    return check_terms(of_licence(licence), TeacherFields(teacher="x", **changes))


@pytest.mark.parametrize(
    ("licence", "changes", "words"),
    [
        ("openai-terms", {}, "compete"),
        ("openai-terms", {"student": "llama2"}, "compete"),
        ("llama2", {}, "same family"),
        ("llama2", {"student": "apache-2.0"}, "same family"),
        ("llama2", {"use": "private"}, "same family"),
        ("llama3", {"student": "llama2"}, "same family"),
        ("llama3", {"student": "mit"}, "same family"),
        ("my-own-words", {}, "is not known"),
        ("unknown", {}, "is not known"),
    ],
)
def test_terms_that_forbid_it(licence: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        terms(licence, **changes)


@pytest.mark.parametrize(
    ("licence", "changes"),
    [
        ("apache-2.0", {}),
        ("mit", {"student": "llama2"}),
        ("llama2", {"student": "llama2"}),
        ("llama3", {"student": "llama3"}),
        ("llama3.1", {}),
        ("openai-terms", {"use": "private"}),
    ],
)
def test_terms_that_allow_it(licence: str, changes: dict[str, Any]) -> None:
    terms(licence, **changes)


def test_a_teacher_tuned_from_llama_2_speaks_under_its_terms(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "config.json").write_text("{}")
    with create(tmp_path / "tuned", kind="chat", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path)
        draft.add_input("finetune_of", tmp_path / "meta", licence="llama2")
    recipe = TeacherFields(teacher=str(tmp_path / "tuned"))
    with pytest.raises(UserError, match="same family"):
        check_terms(open_teacher(recipe), recipe)
    recipe = TeacherFields(teacher=str(tmp_path / "tuned"), student=str(tmp_path / "tuned"))
    check_terms(open_teacher(recipe), recipe)
