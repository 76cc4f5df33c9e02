"""A training run in a process of its own, to be killed: ``python resume_worker.py FOLDER [STEPS]``.

Everything that an exact resume must get right is in it: bfloat16 weights with float32 masters, Muon and AdamW, two
micro-batches a step, random numbers in the objective, batches that change with every epoch, and a best checkpoint that is not
the last.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file

from criadero.chat import Example
from criadero.model import Llama
from criadero.train.batches import Batch, ExampleBatches
from criadero.train.loop import Plan, train
from criadero.train.loss import cross_entropy_sum, next_token_loss
from criadero.train.optim import Optimizer

STEPS = 24


def noisy_loss(model: Llama, batch: Batch) -> tuple[torch.Tensor, int, dict[str, float]]:
    """Next-token loss with dropout on the last hidden states."""
    hidden = model(batch.ids, positions=batch.positions, return_hidden=True)
    hidden = torch.nn.functional.dropout(hidden, 0.2)
    value = cross_entropy_sum(hidden, model.lm_head.weight, batch.targets)
    return value, int((batch.targets >= 0).sum()), {}


def work(
    folder: Path, *, steps: int = STEPS, pause: float = 0.0, about: dict[str, Any] | None = None, **plan: Any
) -> None:
    """Train, going on from what is there, and write the masters and moments to final.safetensors."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.randint(4, 30, (15,), generator=generator).tolist()
    examples = [Example(torch.randint(0, 280, (n,), generator=generator).tolist(), [True] * n) for n in lengths]
    batches = ExampleBatches(examples, row_length=32, rows=2, pad=0, seed=2, dtype=torch.bfloat16)

    def batch_at(n: int) -> Batch:
        time.sleep(pause)
        return batches(n)

    model = tiny.model(scale=0.5, dtype=torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), method="muon", weight_decay=0.1)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = batches(0)

    def evaluate() -> dict[str, Any]:  # learning by heart: after step 12 the loss seems to rise
        with torch.no_grad():
            loss, count, _ = next_token_loss(model, held_out)
        return {"all": {"loss": float(loss) / count + max(0, optimizer.steps - 12)}}

    settings = {"lr": 1e-2, "seed": 4, "save_minutes": 1e-9, "eval_every": 4, "keep_best": True}  # saved every step
    done = train(
        model, optimizer, batch_at, noisy_loss, Plan(steps, 2, **settings | plan), folder, evaluate=evaluate,
        sample=lambda: [f"{float(model.lm_head.weight[3, 3]):.6f}"], about=about or {"dtype": "bf16"},
    )  # fmt: skip
    assert done["best_step"] == 12 or steps < 12
    kept = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    save_file({k: v.clone() for k, v in (optimizer.state() | kept).items()}, folder / "final.safetensors")


if __name__ == "__main__":
    try:
        work(Path(sys.argv[1]), pause=0.005)
    except KeyboardInterrupt:
        sys.exit(130)
