"""The loop: accumulation is one large batch, nothing is learned from nothing, and every line of metrics says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero.chat import Example
from criadero.errors import UserError
from criadero.model import Llama
from criadero.train import curves
from criadero.train.batches import Batch, rows_to_batch
from criadero.train.loop import Best, Plan, train
from criadero.train.loss import next_token_loss
from criadero.train.optim import Optimizer
from criadero.train.progress import Progress


def rows(count: int, seed: int = 0) -> list[list[Example]]:
    """Rows of very different lengths, with very different shares of learned tokens."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for n in range(count):
        length = int(torch.randint(3, 30, (1,), generator=generator))
        ids = torch.randint(0, 280, (length,), generator=generator).tolist()
        out.append([Example(ids, [bool(i >= length * (n % 4) / 5) for i in range(length)])])
    return out


def batch_of(these: list[list[Example]]) -> Batch:
    return rows_to_batch(these, 32, pad=0, dtype=torch.float32)


def run(
    folder: Path, batch_at: Callable[[int], Batch], model: Llama | None = None, method: str = "adamw", **plan: Any
) -> tuple[Llama, dict[str, Any], list[dict]]:
    model = model or tiny.model(scale=0.5)
    optimizer = Optimizer(model.named_parameters(), method=method, weight_decay=0.1)
    settings = {"steps": 3, "micro_batches": 1, "lr": 1e-2, "schedule": "constant", "warmup": 0.0, "save_minutes": 0}
    folder.mkdir(exist_ok=True)
    done = train(model, optimizer, batch_at, next_token_loss, Plan(**(settings | plan)), folder)
    return model, done, curves.read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_accumulation_is_one_large_batch_token_weighted(tmp_path: Path, method: str) -> None:
    everything = rows(12)
    whole, done, lines = run(tmp_path / "a", lambda n: batch_of(everything[n * 4 : n * 4 + 4]), method=method)
    # each micro-batch is a row, and rows differ in length and in learned tokens: a mean of means would differ
    parts, done2, lines2 = run(tmp_path / "b", lambda n: batch_of([everything[n]]), method=method, micro_batches=4)
    assert done["tokens"] == done2["tokens"] == sum(len(row[0].ids) for row in everything)
    for one, two in zip(lines, lines2, strict=True):
        assert one["supervised"] == two["supervised"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    for (name, mine), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_micro_batch_with_nothing_to_learn_changes_nothing(tmp_path: Path) -> None:
    learned = rows(3)
    nothing = [[Example([1, 2, 3], [False] * 3)]]
    alone, _, lines = run(tmp_path / "a", lambda n: batch_of(learned[n : n + 1]))
    beside, _, lines2 = run(
        tmp_path / "b", lambda n: batch_of(learned[n // 2 : n // 2 + 1] if n % 2 else nothing), micro_batches=2
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in lines2]
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), beside.parameters(), strict=True))


def test_a_step_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    """Neither a NaN nor a false loss of 0."""
    nothing = [[Example([1, 2, 3], [False] * 3)]]
    with pytest.raises(UserError, match="step 1: no token in the batch is supervised"):
        run(tmp_path / "a", lambda n: batch_of(nothing))
    only_first = [[Example([1, 2, 3], [True, False, False])]]  # nothing predicts the first token
    with pytest.raises(UserError, match="no token in the batch is supervised"):
        run(tmp_path / "b", lambda n: batch_of(only_first))


def test_a_loss_that_is_not_finite_names_the_step_and_the_batch(tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(UserError, match="step 1: the loss is not finite in batch 1; nothing was learned yet"):
        run(tmp_path, lambda n: batch_of(rows(2)), model)


def test_a_line_of_metrics_a_step_and_what_the_run_did(tmp_path: Path) -> None:
    everything = rows(4)
    measured: list[int] = []

    def evaluate() -> dict[str, Any]:
        measured.append(1)
        return {"en text": {"loss": 5.0}}

    model = tiny.model(scale=0.5)
    optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.0)
    plan = Plan(steps=5, micro_batches=1, lr=1e-2, warmup=0.4, decay=0.4, eval_every=2, save_minutes=0)
    done = train(model, optimizer, lambda n: batch_of(everything), next_token_loss, plan, tmp_path, evaluate=evaluate)
    lines = curves.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in lines] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 5e-3])
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4]
    assert len(measured) == 2
    tokens = sum(len(row[0].ids) for row in everything)
    assert [line["tokens"] for line in lines] == [tokens * (n + 1) for n in range(5)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert done["steps"] == 5
    assert done["tokens"] == 5 * tokens
    assert done["resumed_at"] == 0
    assert done["train_loss"] == pytest.approx(lines[-1]["loss"], abs=1e-6)
    assert not (tmp_path / "resume").exists()


def scripted(tmp_path: Path, losses: list[float], **plan: Any) -> tuple[dict[str, Any], list[dict], list[torch.Tensor]]:
    """A run whose held-out losses are given, measured every step; with the first weights after each measurement."""
    model = tiny.model(scale=0.5)
    optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.0)
    weights: list[torch.Tensor] = []

    def evaluate() -> dict[str, Any]:
        weights.append(model.lm_head.weight.detach().clone())
        return {"one": {"loss": losses[len(weights) - 1] - 1}, "two": {"loss": losses[len(weights) - 1] + 1}}

    settings = {"lr": 1e-2, "save_minutes": 0, "eval_every": 1, "keep_best": True, "patience": 2} | plan
    tracked: list[dict] = []
    done = train(
        model, optimizer, lambda n: batch_of(rows(1)), next_token_loss, Plan(len(losses), 1, **settings), tmp_path,
        evaluate=evaluate, sample=lambda: [f"after {len(weights)}"], track=lambda line: tracked.append(dict(line)),
    )  # fmt: skip
    lines = curves.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in tracked] == [line["step"] for line in lines]
    return done, lines, [*weights, model.lm_head.weight.detach()]


def test_early_stopping_keeps_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done, lines, weights = scripted(tmp_path, [5.0, 4.0, 4.5, 3.5, 3.5, 3.6, 1.0, 1.0])
    assert (done["best_step"], done["best_loss"], done["steps"], done["ended_early"]) == (4, 3.5, 6, True)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["answers"] for line in lines] == [[f"after {n}"] for n in range(1, 7)]
    assert torch.equal(weights[-1], weights[3])  # the model ends with the best, not with the last
    assert not torch.equal(weights[-1], weights[5])
    said = capsys.readouterr().err
    assert (
        "ended early after step 6: 2 measurements in a row were not below the held-out loss of step 4, 3.5000"
        in " ".join(said.split())
    )


def test_without_patience_it_runs_to_the_end_and_still_keeps_the_best(tmp_path: Path) -> None:
    done, lines, weights = scripted(tmp_path, [4.0, float("nan"), 6.0, 0.0, 0.0], patience=0, eval_every=2)
    assert (done["best_step"], done["steps"], done["ended_early"]) == (2, 5, False)
    assert [line["step"] for line in lines if "held_out" in line] == [2, 4, 5]  # the last step is measured as well
    assert torch.equal(weights[-1], weights[0])


def test_losses_that_are_no_numbers_end_a_run_with_its_last_weights(tmp_path: Path) -> None:
    done, lines, weights = scripted(tmp_path, [float("nan")] * 5)
    assert (done["best_step"], done["best_loss"], len(lines)) == (0, None, 2)
    assert torch.equal(weights[-1], weights[1])


def test_dropout_is_drawn_from_the_step(tmp_path: Path) -> None:
    """So that a resumed run draws what an unbroken one would have drawn."""
    draws: list[float] = []

    def loss(model: Llama, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        draws.append(float(torch.rand(())))
        return next_token_loss(model, batch)

    model = tiny.model(scale=0.5)
    for seed in (1, 1, 2):
        optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.0)
        torch.rand(len(draws) + 1)
        plan = Plan(steps=2, micro_batches=2, lr=1e-3, seed=seed, save_minutes=0)
        train(model, optimizer, lambda n: batch_of(rows(1)), loss, plan, tmp_path)
    assert draws[:4] == draws[4:8]
    assert draws[:4] != draws[8:]
    assert len(set(draws)) == 8


def test_measures_of_the_objective_reach_the_log(tmp_path: Path) -> None:
    def loss(model: Llama, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
        value, count, _ = next_token_loss(model, batch)
        return value, count, {"rows": 1.0}

    model = tiny.model(scale=0.5)
    optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.0)
    train(model, optimizer, lambda n: batch_of(rows(1)), loss, Plan(1, 3, 1e-3, save_minutes=0), tmp_path)
    assert curves.read_metrics(tmp_path / "metrics.jsonl")[0]["rows"] == 3.0


# --- curves ---


def test_curves_are_a_picture_of_the_lines(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    lines: list[dict[str, Any]] = [{"step": n, "loss": 5.0 - n / 100, "tokens": n * 1000} for n in range(1, 301)]
    lines[99]["held_out"] = {"es <text>": {"loss": 4.5}}
    lines[-1]["held_out"] = {"es <text>": {"loss": 2.5}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves.write_curves(tmp_path, title="a & b")
    tree = ElementTree.fromstring((tmp_path / "curves.svg").read_text())
    texts = [text.text or "" for text in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert "a & b" in texts
    assert "held out: es <text> 2.500" in texts
    assert any(text.startswith("training 2.0") for text in texts)
    points = [p.get("points", "").split() for p in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    for x, y in (point.split(",") for line in points for point in line):
        assert 0 <= float(x) <= curves.WIDTH
        assert 0 <= float(y) <= curves.HEIGHT


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": 2.0, "tokens": 5}]])
def test_curves_of_almost_nothing(lines: list[dict]) -> None:
    assert curves.draw(lines, title="x").startswith("<svg")


def test_a_note_is_one_line_however_narrow_the_terminal_is(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = Best(step=30, loss=1.7, since=2).ended(50)
    assert len(text) > 80
    Progress("tuning", 200, 0).note(text)
    assert capfd.readouterr().err == text + "\n"
