"""A training step of the bundled model's shape: ours beside a plain transformers loop, in one run, interleaved.

    python benchmarks/train_step.py [--rounds 5] [--json]

Both train the same random weights on the same packed rows (context 512, 8192 tokens a step, bf16 weights, float32 masters in the
optimizer, AdamW): transformers' ``LlamaForCausalLM`` with its own attention (SDPA) and loss, and ours. Each side runs in a process of
its own, so that our allocator settings do not help the peer; a second peer run has them set from outside (GLIBC_TUNABLES). The
last rows measure attention alone: torch's flash kernel against two matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

SHAPE = {
    "vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 7, "num_attention_heads": 5,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, LENGTH = 16, 512
KEEP = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def ours(steps: int) -> list[float]:
    """Seconds of each step of our loop's parts: batch, loss, backward, AdamW."""
    import torch

    from criadero.config import ModelConfig
    from criadero.model import Llama
    from criadero.train.batches import Batch
    from criadero.train.hardware import keep_memory
    from criadero.train.loss import next_token_loss
    from criadero.train.optim import Optimizer

    keep_memory()
    model = Llama(ModelConfig(**SHAPE))  # type: ignore[arg-type]
    model.initialise(0)
    model.to(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.1)
    seconds = []
    for step in range(steps):
        ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        began = time.perf_counter()
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(positions), positions, torch.bfloat16)
        loss, count, _ = next_token_loss(model, batch)
        loss.backward()
        optimizer.collect()
        optimizer.step(1e-3, divide_by=count, clip=1.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def peer(steps: int) -> list[float]:
    """The same with transformers and torch's AdamW on float32 masters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)  # type: ignore[arg-type]
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=True)
    seconds = []
    for step in range(steps):
        ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        began = time.perf_counter()
        logits = model(ids[:, :-1].contiguous()).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        seconds.append(time.perf_counter() - began)
    return seconds


def attention(rounds: int) -> dict[str, list[float]]:
    """Milliseconds, forward and backward, of one layer's attention both ways."""
    import torch

    from criadero.model import causal
    from criadero.train.hardware import keep_memory
    from criadero.train.loss import BlockAttention

    keep_memory()
    out: dict[str, list[float]] = {}
    for rows, length in ((16, 256), (8, 512)):
        q, k, v = (torch.randn(rows, 5, length, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        block = BlockAttention(torch.zeros(rows, length, dtype=torch.int64), torch.bfloat16)
        for _ in range(rounds + 2):
            for name, attend in (("flash kernel", causal), ("two products", block)):
                began = time.perf_counter()
                got = attend(0, q, k, v)
                got.backward(torch.ones_like(got))
                out.setdefault(f"attention {rows}x5x{length}: {name}", []).append((time.perf_counter() - began) * 1e3)
    return {name: times[2:] for name, times in out.items()}


def main() -> None:
    """Interleave the sides and print tokens a second with the spread, and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps((ours if arguments.side == "ours" else peer)(5)[2:]))  # the first two warm up
        return
    sides = {"Criadero": ("ours", ""), "transformers": ("peer", ""), "transformers, allocator tuned": ("peer", KEEP)}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, (side, tunables) in sides.items():
            env = dict(os.environ) | ({"GLIBC_TUNABLES": tunables} if tunables else {})
            command = [sys.executable, __file__, "--side", side]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            speeds[name] += [ROWS * LENGTH / s for s in json.loads(done.stdout.strip().splitlines()[-1])]
    times = attention(arguments.rounds * 3)
    if arguments.json:
        print(json.dumps({"machine": platform.processor(), "tokens_per_second": speeds, "milliseconds": times}))
        return
    base = statistics.median(speeds["Criadero"])
    print("| | tokens/s, median (least - most) | Criadero is |\n|---|---|---|")
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:,.0f} ({min(values):,.0f} - {max(values):,.0f}) | {base / middle:.2f}x |")
    print("\n| | ms forward + backward, median (least - most) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f}) |")


if __name__ == "__main__":
    main()
