"""The one training loop.

An objective is a function ``loss(model, batch) -> (loss_sum, count, metrics)``. The loop adds up sums and counts over the
micro-batches of a step and divides the gradient once by the total count, so gradient accumulation is the same computation as
one large batch. Logging, evaluation, saving and stopping are the visible lines below; there is nothing to inherit or to hook.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from criadero.errors import UserError
from criadero.model import Llama
from criadero.train import checkpoint
from criadero.train.batches import Batch
from criadero.train.optim import Optimizer, learning_rate
from criadero.train.progress import Progress

Loss = Callable[[Llama, Batch], tuple[Tensor, int, dict[str, float]]]


@dataclass(frozen=True)
class Plan:
    """How long and how fast. ``steps`` optimizer steps of ``micro_batches`` batches each."""

    steps: int
    micro_batches: int
    lr: float
    schedule: str = "wsd"  # wsd | cosine | constant
    warmup: float = 0.02  # fraction of the steps
    decay: float = 0.2  # fraction of the steps, for wsd
    floor: float = 0.0  # the last learning rate as a fraction of lr
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 0  # steps; 0: only at the end
    save_minutes: float = 5.0  # between resume points; 0: none


def train(
    model: Llama, optimizer: Optimizer, batch_at: Callable[[int], Batch], loss: Loss, plan: Plan, folder: Path, *,
    evaluate: Callable[[], dict[str, Any]] | None = None, about: dict[str, Any] | None = None, label: str = "training",
) -> dict[str, Any]:  # fmt: skip
    """Run ``plan`` and return what it did: steps, tokens, seconds, last loss, evaluations.

    ``batch_at(n)`` is the n-th micro-batch of the run. ``folder/resume`` takes resume points; when it already holds one, with
    the same ``about``, the run goes on from it and ends bit for bit where an unbroken run on the same machine ends.
    ``folder/metrics.jsonl`` gets a line a step. Ctrl-C and SIGTERM end the step in hand, save, and raise KeyboardInterrupt.
    """
    about = json.loads(json.dumps(about or {}))
    metrics_path, resume = folder / "metrics.jsonl", folder / "resume"
    start, tokens, seconds = _restore(optimizer, resume, about, metrics_path)
    progress = Progress(label, plan.steps, start)
    saved = time.monotonic()
    last: dict[str, Any] = {}
    with open(metrics_path, "a", encoding="utf-8") as log, _stop_between_steps() as stopping, progress:
        for step in range(start, plan.steps):
            began = time.perf_counter()
            torch.manual_seed(plan.seed * 1_000_003 + step)  # dropout: the same whether or not the run was interrupted
            loss_sum, count, real = 0.0, 0, 0
            extra: dict[str, float] = {}
            for micro in range(plan.micro_batches):
                batch = batch_at(step * plan.micro_batches + micro)
                part, n, measured = loss(model, batch)
                if n:
                    part.backward()
                    optimizer.collect()
                loss_sum, count, real = loss_sum + float(part.detach()), count + n, real + batch.tokens
                for key, value in measured.items():
                    extra[key] = extra.get(key, 0.0) + value
            if count == 0:
                raise UserError(
                    f"step {step + 1}: no token in the batch is supervised, so nothing can be learned from it"
                )
            lr = plan.lr * learning_rate(
                step, plan.steps, schedule=plan.schedule, warmup=plan.warmup, decay=plan.decay, floor=plan.floor
            )
            try:
                norm = optimizer.step(lr, divide_by=count, clip=plan.clip)
            except FloatingPointError:
                raise UserError(
                    f"step {step + 1}: the gradient is not finite; use a lower lr than {plan.lr:g} or dtype float32"
                ) from None
            took = time.perf_counter() - began
            tokens, seconds = tokens + real, seconds + took
            last = {
                "step": step + 1, "loss": loss_sum / count, "lr": lr, "grad_norm": norm, "tokens": tokens,
                "supervised": count, "tokens_per_second": real / took, "seconds": seconds, **extra,
            }  # fmt: skip
            if evaluate and plan.eval_every and (step + 1) % plan.eval_every == 0 and step + 1 < plan.steps:
                last["held_out"] = evaluate()
            log.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in last.items()}) + "\n")
            progress.step(last)
            due = plan.save_minutes > 0 and time.monotonic() - saved > plan.save_minutes * 60
            if stopping() or (due and step + 1 < plan.steps):
                log.flush()
                state = {"about": about, "tokens": tokens, "seconds": seconds, "optimizer_steps": optimizer.steps}
                checkpoint.save(resume, step + 1, optimizer.state(), state)
                saved = time.monotonic()
            if stopping():
                progress.note(f"stopped after step {step + 1} of {plan.steps}; the same command goes on from here")
                raise KeyboardInterrupt
    return {
        "steps": plan.steps,
        "tokens": tokens,
        "seconds": seconds,
        "train_loss": last.get("loss"),
        "resumed_at": start,
    }


def _restore(optimizer: Optimizer, resume: Path, about: dict[str, Any], metrics: Path) -> tuple[int, int, float]:
    """Load the newest resume point, if there is one, and cut ``metrics.jsonl`` back to it: (step, tokens, seconds)."""
    found = checkpoint.latest(resume)
    if found is None:
        metrics.unlink(missing_ok=True)
        return 0, 0, 0.0
    state, path = found
    if state["about"] != about:
        changed = sorted(k for k in about.keys() | state["about"].keys() if about.get(k) != state["about"].get(k))
        raise UserError(
            f"{resume.parent}: an unfinished run with other settings is here ({', '.join(changed)} changed); "
            "give the old settings to go on with it, or delete the folder"
        )
    try:
        optimizer.load_state(checkpoint.load(path), state["optimizer_steps"])
    except KeyError as error:
        raise UserError(f"{path}: cannot resume: {error.args[0]}; delete {resume.parent} to start again") from None
    if metrics.exists():
        with open(metrics, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        whole = metrics.with_name(metrics.name + ".tmp")
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(metrics)  # at once: a kill here must not lose the lines
    return state["step"], state["tokens"], state["seconds"]


@contextmanager
def _stop_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a wish that the loop grants after its step; a second one is immediate."""
    wish: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if wish:
            raise KeyboardInterrupt
        wish.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        old = [signal.signal(number, handler) for number in numbers]
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(wish)
    finally:
        for number, previous in zip(numbers, old, strict=True):
            signal.signal(number, previous)
