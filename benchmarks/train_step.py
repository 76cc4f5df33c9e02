"""A training step: ours beside transformers, as it comes and at its best, in one run, interleaved.

    python benchmarks/train_step.py [--shape cria|15m|135m] [--rounds 3] [--only TEXT] [--dtype float32] [--peer-dtype float32] [--json]

All train random weights of the same shape on the same rows (8192 tokens a step, of 135m 4096; whole rows of one document, AdamW on float32
masters): transformers' ``LlamaForCausalLM`` plainly (bf16 weights unless told otherwise, SDPA), and at its best, compiled by
torch.compile. Each side runs in a process of its own, so that our allocator settings do not help the peer; "tuned" rows have them set from
outside (GLIBC_TUNABLES). Memory is the most that the process used. The slow twin is our own model without the compiled kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

SHAPES = {
    "cria": {
        "vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 7, "num_attention_heads": 5,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
    "15m": {
        "vocab_size": 4096, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "max_position_embeddings": 256, "tie_word_embeddings": True,
    },
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
TOKENS = {"cria": 8192, "15m": 8192, "135m": 4096}  # a step
KEEP = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"


def ours(shape: dict, steps: int, tokens: int, dtype: str) -> list[float]:
    """Seconds of each step of our loop's parts: batch, loss, backward, AdamW."""
    import torch

    from criadero.config import ModelConfig
    from criadero.model import Llama
    from criadero.train.batches import Batch
    from criadero.train.hardware import keep_memory
    from criadero.train.loss import next_token_loss
    from criadero.train.optim import Optimizer

    keep_memory()
    length = shape["max_position_embeddings"]
    model = Llama(ModelConfig(**shape))
    model.initialise(0)
    model.to(getattr(torch, dtype))
    optimizer = Optimizer(model.named_parameters(), method="adamw", weight_decay=0.1)
    seconds = []
    for step in range(steps):
        ids = torch.randint(
            0, shape["vocab_size"], (tokens // length, length + 1), generator=torch.Generator().manual_seed(step)
        )
        began = time.perf_counter()
        positions = torch.arange(length).expand(len(ids), -1)
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros_like(positions), positions, getattr(torch, dtype))
        loss, count, _ = next_token_loss(model, batch)
        loss.backward()
        optimizer.collect()
        optimizer.step(1e-3, divide_by=count, clip=1.0)
        seconds.append(time.perf_counter() - began)
    return seconds


def peer(shape: dict, steps: int, tokens: int, dtype: str, compiled: bool) -> list[float]:
    """The same with transformers and torch's AdamW on float32 masters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    length = shape["max_position_embeddings"]
    model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False)).to(getattr(torch, dtype))

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids[:, :-1].contiguous()).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if compiled else loss_of
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1, fused=True)
    seconds = []
    for step in range(steps):
        ids = torch.randint(
            0, shape["vocab_size"], (tokens // length, length + 1), generator=torch.Generator().manual_seed(step)
        )
        began = time.perf_counter()
        step_loss(ids).backward()
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


def main() -> None:
    """Interleave the sides and print tokens a second with the spread, and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="cria")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each side in a round")
    parser.add_argument("--only", default="", help="measure only the sides whose name holds this text, and ours")
    for name, whose in (("--dtype", "ours"), ("--peer-dtype", "the peer's")):
        parser.add_argument(name, choices=["bfloat16", "float32"], default="bfloat16", help=f"to compute in, {whose}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=["ours", "peer", "compiled"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.side:
        steps = arguments.steps + 2  # the first two warm up, and compile
        tokens = TOKENS[arguments.shape]
        if arguments.side == "ours":
            seconds = ours(shape, steps, tokens, arguments.dtype)
        else:
            seconds = peer(shape, steps, tokens, arguments.peer_dtype, arguments.side == "compiled")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds[2:], "peak_gb": peak}))
        return
    tuned = {"GLIBC_TUNABLES": KEEP}
    sides: dict[str, tuple[str, dict[str, str]]] = {
        "Criadero": ("ours", {}),
        "Criadero, slow twin": ("ours", {"CRIADERO_KERNELS": "reference"}),
        "transformers": ("peer", {}),
        "transformers, allocator tuned": ("peer", tuned),
        "transformers, compiled, allocator tuned": ("compiled", tuned),
    }
    sides = {name: side for name, side in sides.items() if arguments.only in name or name == "Criadero"}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0.0)
    for _ in range(arguments.rounds):
        for name, (side, changes) in sides.items():
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--shape",
                arguments.shape,
                "--steps",
                str(arguments.steps),
                "--dtype",
                arguments.dtype,
                "--peer-dtype",
                arguments.peer_dtype,
            ]
            done = subprocess.run(command, env=os.environ | changes, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            speeds[name] += [TOKENS[arguments.shape] / s for s in found["seconds"]]
            peaks[name] = max(peaks[name], found["peak_gb"])
    if arguments.json:
        what = {"machine": platform.processor(), "shape": arguments.shape}
        print(json.dumps(what | {"tokens_per_second": speeds, "peak_gb": peaks}))
        return
    base = statistics.median(speeds["Criadero"])
    print("| | tokens/s, median (least - most) | peak GB | Criadero is |\n|---|---|---|---|")
    for name, values in speeds.items():
        middle = statistics.median(values)
        speed = f"{middle:,.0f} ({min(values):,.0f} - {max(values):,.0f})"
        print(f"| {name} | {speed} | {peaks[name]:.1f} | {base / middle:.2f}x |")


if __name__ == "__main__":
    main()
