"""The one training loop.

An objective is a function ``loss(model, batch) -> (loss_sum, count, metrics)``. The loop adds up sums and counts over the
micro-batches of a step and divides the gradient once by the total count, so gradient accumulation is the same computation as
one large batch. Logging, evaluation, saving and stopping are the visible lines below; there is nothing to inherit or to hook.

Early stopping, where a plan asks for it: a run ends when ``patience`` measurements in a row were not below the lowest, and with
``keep_best`` it gives back the weights of the lowest. Both are part of a resume point.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from criadero import kernels
from criadero.errors import UserError
from criadero.model import Llama
from criadero.train import checkpoint, fast
from criadero.train.batches import Batch
from criadero.train.optim import Optimizer, learning_rate
from criadero.train.progress import Progress

BEST = "best."  # before the names of the best weights in a resume point
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
    keep_best: bool = False  # end with the weights of the lowest held-out loss; then the last step is measured too
    patience: int = 0  # with keep_best: measurements in a row that are not the lowest, after which it ends; 0: never
    save_minutes: float = 5.0  # between resume points; 0: none


def train(
    model: Llama, optimizer: Optimizer, batch_at: Callable[[int], Batch], loss: Loss, plan: Plan, folder: Path, *,
    evaluate: Callable[[], dict[str, Any]] | None = None, sample: Callable[[], list[str]] | None = None,
    task: Callable[[], dict[str, Any]] | None = None, track: Callable[[dict[str, Any]], None] | None = None,
    about: dict[str, Any] | None = None, label: str = "training",
    name_batch: Callable[[int], str] = lambda n: f"batch {n + 1}",
) -> dict[str, Any]:  # fmt: skip
    """Run ``plan`` and return what it did: steps, tokens, seconds, last loss; the step and loss of the best, whether it ended early.

    ``evaluate()`` gives ``{group: {"loss": nats, ...}}``, and the mean of the groups' losses is what is compared; ``sample()``
    is asked after it for answers, and ``task()`` for numbers, which go into the log. ``track`` gets every line of the log.

    ``batch_at(n)`` is the n-th micro-batch of the run. ``folder/resume`` takes resume points; when it already holds one, with
    the same ``about``, the run goes on from it and ends bit for bit where an unbroken run on the same machine ends.
    A loss or gradient that is not finite ends the run: UserError with ``name_batch(n)``, and the state before it is kept.
    ``folder/metrics.jsonl`` gets a line a step. Ctrl-C and SIGTERM end the step in hand, save, and raise KeyboardInterrupt.
    """
    about = json.loads(json.dumps(about or {}))
    metrics_path, resume = folder / "metrics.jsonl", folder / "resume"
    computed_by = _computed_by(model)
    start, tokens, seconds, best, moved = _restore(optimizer, resume, about, computed_by, metrics_path)
    progress = Progress(label, plan.steps, start)
    saved = time.monotonic()
    last: dict[str, Any] = {}

    def save(steps: int) -> None:
        state = {"about": about, "tokens": tokens, "seconds": seconds, "optimizer_steps": optimizer.steps}
        state["computed_by"] = computed_by
        state["best"] = {"step": best.step, "loss": best.loss if best.step else None, "since": best.since}
        kept = {BEST + name: tensor for name, tensor in best.weights.items()}
        checkpoint.save(resume, steps, optimizer.state() | kept, state)

    def diverged(step: int, what: str, first: int, number: int) -> UserError:
        kept = "nothing was learned yet"
        if step > start and plan.save_minutes > 0:
            log.flush()
            save(step)
        if checkpoint.latest(resume):
            kept = f"the last good state is kept in {resume}"
        named = "; ".join(name_batch(n) for n in range(first, first + number))
        return UserError(
            f"step {step + 1}: the {what} is not finite in {named}; {kept}. Look at those examples, or start over "
            f"(--no-resume) with a lower lr than {plan.lr:g} or dtype float32"
        )

    with open(metrics_path, "a", encoding="utf-8") as log, _stop_between_steps() as stopping, progress:
        if moved:
            progress.note(
                f"goes on with {moved}: it will end close to where an unbroken run ends, not bit for bit there"
            )
        for step in range(start, plan.steps):
            if plan.patience and best.since >= plan.patience:
                progress.note(best.ended(step))
                break
            began = time.perf_counter()
            torch.manual_seed(plan.seed * 1_000_003 + step)  # dropout: the same whether or not the run was interrupted
            loss_sum, count, real = 0.0, 0, 0
            extra: dict[str, float] = {}
            for micro in range(plan.micro_batches):
                batch = batch_at(step * plan.micro_batches + micro)
                part, n, measured = loss(model, batch)
                if not math.isfinite(float(part.detach())):
                    raise diverged(step, "loss", step * plan.micro_batches + micro, 1)
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
                raise diverged(step, "gradient", step * plan.micro_batches, plan.micro_batches) from None
            took = time.perf_counter() - began
            tokens, seconds = tokens + real, seconds + took
            last = {
                "step": step + 1, "loss": loss_sum / count, "lr": lr, "grad_norm": norm, "tokens": tokens,
                "supervised": count, "tokens_per_second": real / took, "seconds": seconds, **extra,
            }  # fmt: skip
            due = plan.eval_every > 0 and (step + 1) % plan.eval_every == 0 and step + 1 < plan.steps
            if evaluate and (due or (plan.keep_best and step + 1 == plan.steps)):
                last["held_out"] = evaluate()
                last |= {"answers": sample()} if sample else {}
                last |= {"task": task()} if task else {}
                if plan.keep_best:
                    best = best.after(step + 1, last["held_out"], optimizer)
            if track:
                track(last)
            log.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in last.items()}) + "\n")
            progress.step(last)
            due = plan.save_minutes > 0 and time.monotonic() - saved > plan.save_minutes * 60
            if stopping() or (due and step + 1 < plan.steps):
                log.flush()
                save(step + 1)
                saved = time.monotonic()
            if stopping():
                progress.note(f"stopped after step {step + 1} of {plan.steps}; the same command goes on from here")
                raise KeyboardInterrupt
    steps = last.get("step", start)
    if best.step and best.step != steps:
        best.restore(optimizer)
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": seconds,
        "train_loss": last.get("loss"),
        "resumed_at": start,
        "best_step": best.step,
        "best_loss": best.loss if best.step else None,
        "ended_early": steps < plan.steps,
    }


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, the weights that had it, in the dtype they are computed in, and how many measurements
    since were not below it."""

    step: int = 0  # 0: none yet
    loss: float = math.inf
    since: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def after(self, step: int, held_out: dict[str, Any], optimizer: Optimizer) -> Best:
        """The best after one more measurement; a loss that is not a number is never it."""
        loss = sum(scores["loss"] for scores in held_out.values()) / max(1, len(held_out))
        if not loss < self.loss:
            return dataclasses.replace(self, since=self.since + 1)
        return Best(step, loss, 0, {name: p.detach().clone() for name, p in optimizer.parameters.items()})

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Put its weights back into the model."""
        for name, p in optimizer.parameters.items():
            p.copy_(self.weights[name])

    def ended(self, step: int) -> str:
        """Why a run ends after ``step`` steps."""
        row = "measurement was" if self.since == 1 else f"{self.since} measurements in a row were"
        return f"ended early after step {step}: {row} not below the held-out loss of step {self.step}, {self.loss:.4f}"


def _computed_by(model: Llama) -> dict[str, str]:
    """What rounding and the order of sums depend on, besides the settings. Two processors at the same level of the kernels need not
    have the same instructions: hence what became of ``base_matmul = "auto"``, and how bfloat16 is multiplied."""
    found = {"threads": str(torch.get_num_threads()), "kernels": kernels.level(), "PyTorch": torch.__version__}
    found["bfloat16"] = "multiplied as it is" if fast.multiplies_bfloat16() else "multiplied as float32"
    found["device"] = model.model.embed_tokens.weight.device.type
    if fast.has_adapters(model):
        found["base_matmul"] = "int8" if fast.multiplies_in_int8(model) else "exact"
    return found


def _restore(
    optimizer: Optimizer, resume: Path, about: dict[str, Any], now: dict[str, str], metrics: Path
) -> tuple[int, int, float, Best, str]:
    """Load the newest resume point, if there is one, and cut ``metrics.jsonl`` back to it: (step, tokens, seconds, best, and
    in words what computes otherwise than before, or "")."""
    found = checkpoint.latest(resume)
    if found is None:
        metrics.unlink(missing_ok=True)
        return 0, 0, 0.0, Best(), ""
    state, path = found
    if state["about"] != about:
        changed = sorted(k for k in about.keys() | state["about"].keys() if about.get(k) != state["about"].get(k))
        raise UserError(
            f"{resume.parent}: an unfinished run with other settings is here ({', '.join(changed)} changed); "
            "give the old settings to go on with it, or delete the folder"
        )
    tensors = checkpoint.load(path)
    weights = {name.removeprefix(BEST): tensors.pop(name) for name in list(tensors) if name.startswith(BEST)}
    was = state.get("best") or {"step": 0}
    best = Best(was["step"], was["loss"], was["since"], weights) if was["step"] else Best(since=was.get("since", 0))
    try:
        optimizer.load_state(tensors, state["optimizer_steps"])
    except KeyError as error:
        raise UserError(f"{path}: cannot resume: {error.args[0]}; delete {resume.parent} to start again") from None
    if metrics.exists():
        with open(metrics, encoding="utf-8") as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        whole = metrics.with_name(metrics.name + ".tmp")
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(metrics)  # at once: a kill here must not lose the lines
    then = state.get("computed_by", {})
    moved = ", ".join(f"{key} {now[key]} (before: {then[key]})" for key in now if then.get(key, now[key]) != now[key])
    return state["step"], state["tokens"], state["seconds"], best, moved


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
