"""The small task that is asked while tuning: what it counts as right, what it refuses, and where its numbers go."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero.artifact import open_artifact
from criadero.checkpoints import load_model, template_of, tokenizer_of
from criadero.errors import UserError
from criadero.run import make
from criadero.train import fast, task
from criadero.train.task import Item, read_task, score

YES = "Yes, we are open on Sundays."


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "base"
    folder.mkdir()
    tiny.base(folder)
    return folder


def items(base: Path, path: Path, context: int = 200) -> list[Item]:
    return read_task(path, tokenizer_of(base), template_of(base), context)


def test_it_is_in_the_metrics_the_passport_and_the_report(base: Path, tmp_path: Path) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl", 40)
    file = write(
        tmp_path / "task.jsonl",
        {"question": "Question 3?", "answer": YES.upper()},
        "",
        {"question": "Question 5?", "answer": "No."},
        {"question": "Question 7?", "choices": ["xq zv", YES, "qqq"], "answer": YES},
    )
    values = {"base": str(base), "data": str(data), "eval_task": str(file), "dtype": "float32", "epochs": 5.0}
    made = make("sft", values | {"batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}, tmp_path / "out")
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    measured = [line["task"] for line in lines if "held_out" in line]
    assert measured
    assert measured[-1] == {"accuracy": pytest.approx(2 / 3, abs=1e-6), "questions": 3.0}
    shares = {m["slice"]: float(m["value"]) for m in made.metrics if m["suite"] == "task"}
    assert shares["before"] < shares["after"] == pytest.approx(2 / 3, abs=1e-6)
    assert {one["relation"] for one in open_artifact(made.path).inputs} >= {"evaluated_on"}
    page = (made.path / "report.html").read_text()
    assert "task, answered right" in page
    assert "67 %" in page


def test_several_tasks_are_counted_by_themselves_too(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl", 40)
    file = write(
        tmp_path / "task.jsonl",
        {"question": "Question 3?", "answer": YES, "task": "open"},
        {"question": "Question 5?", "answer": "No.", "task": "<closed>"},
        {"question": "Question 7?", "choices": ["xq zv", YES], "answer": YES, "task": "open"},
        {"question": "Question 9?", "answer": "No."},
    )
    values = {"base": str(base), "data": str(data), "eval_task": str(file), "dtype": "float32", "epochs": 5.0}
    made = make("sft", values | {"batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}, tmp_path / "out")
    said = capsys.readouterr().err
    assert "of 4 questions right before, 50% after" in said
    assert "task open: " in said
    assert " of 2 questions right before, 100% after" in said
    line = json.loads((made.path / "metrics.jsonl").read_text().splitlines()[-1])["task"]
    assert line == {
        "accuracy": 0.5, "questions": 4.0, "open": {"accuracy": 1.0, "questions": 2.0},
        "<closed>": {"accuracy": 0.0, "questions": 1.0},
    }  # fmt: skip
    shares = {(m["suite"], m["slice"]): float(m["value"]) for m in made.metrics if m["suite"].startswith("task")}
    assert shares["task open", "after"] == 1.0
    assert shares["task", "after"] == 0.5
    page = (made.path / "report.html").read_text()
    assert "<dt>open</dt>" in page
    assert "<dt>&lt;closed&gt;</dt>" in page


def test_of_choices_the_likeliest_a_token_is_taken(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ["a", "a longer one", "b"]
    asked = items(base, write(tmp_path / "t", {"question": "q", "choices": choices, "answer": "b"}))
    monkeypatch.setattr(task, "mean_losses", lambda *_: [3.0, 2.0, 1.0])
    model = load_model(base).train()
    assert score(model, asked, tokenizer_of(base), (), torch.float32) == {"accuracy": 1.0, "questions": 1.0}
    assert model.training


@pytest.mark.parametrize("compiled", [True, False])
def test_choices_are_read_together_as_they_are_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(fast, "obstacle", lambda model: "in a test")
    monkeypatch.setattr(task, "LENGTH", 64)  # many rows, and several groups of them
    monkeypatch.setattr(task, "CHUNK", 50)
    monkeypatch.setattr(task, "ROWS", 3)
    lines = [
        {"question": f"q {n}" * (n % 4 + 1), "choices": [f"{n} a" * (n % 5 + 1), "no"], "answer": "no"}
        for n in range(30)
    ]
    asked = items(base, write(tmp_path / "t", *lines))
    examples = [choice for item in asked for choice in item.choices]
    model = load_model(base).float().eval()
    found = task.mean_losses(model, examples, torch.float32)
    for example, mine in zip(examples, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([example.ids]))[0, :-1].log_softmax(-1)
        each = -logits[range(len(logits)), example.ids[1:]]
        assert mine == pytest.approx(float(each[torch.tensor(example.loss_mask[1:])].mean()), rel=1e-4)
    assert task.work(asked, tokenizer_of(base)) == (sum(len(one.ids) for one in examples), 0)


def test_a_long_task_is_asked_less_often_and_its_time_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("criadero.train.sft.measure_speed", lambda *_: 100.0)
    data = tiny.write_chats(tmp_path / "shop.jsonl", 40)
    values = {
        "base": str(base),
        "data": str(data),
        "dtype": "float32",
        "epochs": 5.0,
        "batch_tokens": 256,
        "micro_tokens": 256,
    }
    short = make("sft", values, tmp_path / "short").passport["step"]["derived"]["eval_every"]
    capsys.readouterr()
    file = write(
        tmp_path / "t.jsonl",
        *({"question": f"q {n}", "choices": ["a b c", "d e f"], "answer": "a b c"} for n in range(60)),
    )
    long = make("sft", values | {"eval_task": str(file)}, tmp_path / "long").passport["step"]
    assert long["derived"]["eval_every"] == math.ceil(long["steps"] / 2) > short
    assert " s of measuring" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('["q", "a"]', "line 2: an object with question, answer"),
        ({"question": "q"}, "line 2: an object with question, answer"),
        ({"question": "q", "answer": "a", "choice": ["a"]}, "and nothing else"),
        ({"question": 3, "answer": "a"}, "the question must be text"),
        ({"question": "q", "answer": "a", "task": 3}, "task must be a name"),
        ({"question": "q", "answer": "a", "task": "accuracy"}, "task must be a name .* none of accuracy"),
        ({"question": "q", "answer": " "}, "the answer must be text, and not empty"),
        ({"question": "q", "answer": ["a"]}, "the answer must be text"),
        ({"question": "q", "answer": "c", "choices": ["a", "b"]}, "one of at least two different choices"),
        ({"question": "q", "answer": "a", "choices": ["a", "a"]}, "one of at least two different choices"),
        ({"question": "q", "answer": "a", "choices": []}, "one of at least two different choices"),
        ({"question": "q " * 300, "answer": "a"}, "and the context is 200; shorten the question"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_named(base: Path, tmp_path: Path, line: Any, message: str) -> None:
    file = write(tmp_path / "t.jsonl", {"question": "q", "answer": "a"}, line)
    with pytest.raises(UserError, match=message):
        items(base, file)


def test_no_file_no_question_no_template(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\)"):
        items(base, tmp_path / "none")
    with pytest.raises(UserError, match="no question is in it"):
        items(base, write(tmp_path / "empty", ""))
    with pytest.raises(UserError, match="no chat template"):
        read_task(write(tmp_path / "t", {"question": "q", "answer": "a"}), tokenizer_of(base), None, 200)
