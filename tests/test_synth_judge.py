"""Judging: verdicts read strictly, both orders, ties, intervals against independent formulas."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import tiny
from scripted_teacher import scripted_teacher

from criadero.artifact import create, verify
from criadero.errors import UserError
from criadero.run import make
from criadero.synth.judge import bootstrap, read_mark, read_questions, read_verdict, wilson, winner

SERVED = {"teacher_model": "judge", "teacher_licence": "apache-2.0"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("criadero.synth.teacher._sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Because. [[A]]", "A"),
        ("[[B]]\n\n[[B]]", "B"),
        ("[[C]]", "C"),
        ("[[A]] or [[B]]", None),
        ("[A]", None),
        ("A is better", None),
        ("[[D]]", None),
        ("[[a]]", None),
        ("", None),
    ],
)
def test_verdicts(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Good. [[7]]", 7),
        ("[[10]]", 10),
        ("[[8.5]]", 8.5),
        ("[[0]]", None),
        ("[[11]]", None),
        ("7/10", None),
        ("[[3]] [[4]]", None),
    ],
)
def test_marks(text: str, mark: float | None) -> None:
    assert read_mark(text) == mark


def test_a_win_has_to_hold_in_both_orders() -> None:
    found = {(x, y): winner(x, y) for x in ("A", "B", "C", None) for y in ("A", "B", "C", None)}
    assert found["A", "B"] == ("a", True)
    assert found["B", "A"] == ("b", True)
    assert found["C", "C"] == ("tie", True)
    assert found["A", "A"] == found["B", "B"] == ("tie", False), "it only likes what it reads first, or last"
    assert found["A", "C"] == ("tie", False)
    assert all(found[pair] == (None, False) for pair in found if None in pair)


def test_wilson_solves_its_equation() -> None:
    """The bounds are where (p - share)^2 = z^2 p (1 - p) / n."""
    for k, n in ((0, 10), (3, 10), (10, 10), (70, 100), (1, 1)):
        low, high = wilson(k, n)
        for p in (low, high):
            if 1e-9 < p < 1 - 1e-9:
                assert (p - k / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n)
        assert low - 1e-12 <= k / n <= high + 1e-12
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_near_the_normal_interval() -> None:
    draw = random.Random(1)
    values = [draw.gauss(5, 2) for _ in range(400)]
    mean, low, high = bootstrap(values, 0)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 399)
    half = 1.96 * deviation / math.sqrt(400)
    assert low == pytest.approx(mean - half, abs=0.1 * half * 2)
    assert high == pytest.approx(mean + half, abs=0.1 * half * 2)
    assert bootstrap(values, 0) == (mean, low, high)
    assert bootstrap([1.0], 0) == (1.0, 1.0, 1.0)


def setting() -> None:
    with create("student", kind="chat", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path)
    rows = [{"question_id": n, "category": "shop", "turns": [f"Question {n}?", "And then?"]} for n in range(6)]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, word in (("good", "GOOD"), ("poor", "POOR")):
        lines = [{"id": str(n), "answers": [f"{word} {n}", f"{word} again"]} for n in range(6)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def referee(text: str, _: int) -> str:
    """Prefers GOOD; on question 1 it likes what comes first, on 2 it sees no difference, on 3 it mumbles."""
    first = text.index("=== Assistant A ===")
    body = text[first:]
    if "Question 1?" in body:
        return "The first. [[A]]"
    if "Question 2?" in body:
        return "Equal. [[C]]"
    if "Question 3?" in body:
        return "Hm."
    return "[[A]]" if body.index("GOOD") < body.index("POOR") else "[[B]]"


def test_compare_two_files_of_answers() -> None:
    setting()
    with scripted_teacher(referee) as server:
        made = make(
            "judge",
            {"questions": "questions.jsonl", "a": "good.jsonl", "b": "poor.jsonl", "teacher": server.url, **SERVED},
            "judged",
        )
        assert len(server.requests) == 12
    assert made.kind == "audit"
    assert verify(made.path) == []
    figures = {row["metric"]: row for row in made.metrics}
    assert {name: figures[name]["value"] for name in ("a_wins", "b_wins", "ties", "unparsable")} == {
        "a_wins": 3,
        "b_wins": 0,
        "ties": 2,
        "unparsable": 2,
    }
    assert figures["win_rate"]["value"] == "0.8"
    assert figures["win_rate"]["n"] == 5
    assert [float(x) for x in figures["wins_of_decided"]["ci"]] == pytest.approx(wilson(3, 3))
    assert figures["orders_agree"]["value"] == "0.8"
    rows = [json.loads(line) for line in (made.path / "verdicts.jsonl").read_text().splitlines()]
    assert [row["winner"] for row in rows] == ["a", "tie", "tie", None, "a", "a"]
    assert not any(one["relation"] == "outputs_of" for one in made.inputs), "nobody learns from a judgement"


def test_mark_a_local_model() -> None:
    setting()
    with scripted_teacher(
        lambda text, n: f"Fine. [[{3 + text.count('Person:')}]]" if "Question 5" not in text else "Fine."
    ) as server:
        values = {"questions": "questions.jsonl", "a": "student", "teacher": server.url, **SERVED, "answer_tokens": 4}
        made = make("judge", values, "marked")
        again = make("judge", {**values, "a": "marked/answers-a.jsonl"}, "again")
    figures = {(row["metric"], row["slice"]): row["value"] for row in made.metrics}
    assert figures["mean_mark", ""] == "4.5"
    assert figures["mean_mark", "turn 2"] == "5.0"
    assert figures["unparsable", ""] == 2
    assert again.metrics == made.metrics


def test_bad_judgements() -> None:
    setting()
    values = {"questions": "questions.jsonl", "a": "good.jsonl", "teacher_model": "m", "teacher_licence": "mit"}
    with scripted_teacher(lambda *_: "Hm.") as server:
        with pytest.raises(UserError, match="not one of 12 replies had a mark"):
            make("judge", {**values, "teacher": server.url}, "new")
        with pytest.raises(UserError, match="not one of 6 pairs got a verdict"):
            make("judge", {**values, "b": "poor.jsonl", "teacher": server.url}, "new")
        Path("short.jsonl").write_text('{"id": "0", "answers": ["one"]}\n')
        with pytest.raises(UserError, match="no answer to every turn of the question '0'"):
            make("judge", {**values, "a": "short.jsonl", "teacher": server.url}, "new")
    Path("twice.jsonl").write_text('{"id": "x", "prompt": "a", "response": "b"}\n' * 2)
    with pytest.raises(UserError, match="two questions are called 'x'"):
        read_questions("twice.jsonl")
    assert not Path("new").exists()


def test_questions_of_mt_bench(shared: Path) -> None:
    items = read_questions(shared / "eval" / "mt_bench" / "mt_bench.jsonl")
    assert len(items) > 50
    assert all(len(item.turns) == 2 for item in items)
