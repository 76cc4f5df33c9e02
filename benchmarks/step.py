"""Where the time of a native step goes: tokens a second and milliseconds by part, on random weights of real shapes.

    python benchmarks/step.py [--shape 1.1b|15m|7b] [--weights int4|int8|bf16|f32] [--kv f16] [--batch 1 4 8 16] [--prefill 512]

Needs the compiled kernels and no torch.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from criadero.kernels import level, native, pack, physical_cores
from criadero.kernels.formats import QuantTensor

SHAPES = {  # hidden, intermediate, layers, heads, kv_heads, head_dim, vocab
    "15m": (288, 768, 6, 6, 6, 48, 32000),
    "1.1b": (2048, 5632, 22, 32, 4, 64, 32000),
    "7b": (4096, 11008, 32, 32, 32, 128, 32000),
}


def random_matrix(random: np.random.Generator, rows: int, columns: int, kind: str, threads: int) -> Any:
    if kind in ("int4", "int8"):
        bits = 4 if kind == "int4" else 8
        q = np.frombuffer(random.bytes(rows * columns * bits // 8), np.uint8 if bits == 4 else np.int8)
        scale = 0.02 / (7 if bits == 4 else 127)
        scales = np.full((rows, columns // 32), scale, np.float16)
        return pack(QuantTensor(bits, 32, q.reshape(rows, -1), scales), threads)
    if kind == "bf16":
        w = np.frombuffer(random.bytes(rows * columns * 2), np.uint16) & 0x807F | 0x3C00  # +-2^-7 to 2^-6
        return pack(w.reshape(rows, columns), threads)
    return pack((0.02 * random.standard_normal((rows, columns), np.float32)), threads)


def build(shape: str, kind: str, threads: int) -> tuple[Any, int]:
    """The model and the bytes of its matrices that a token reads."""
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = SHAPES[shape]
    model = native().Model(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, 1e-5, threads)
    random, size = np.random.default_rng(0), 0
    sizes = {
        "q": (heads * head_dim, hidden), "k": (kv_heads * head_dim, hidden), "v": (kv_heads * head_dim, hidden),
        "o": (hidden, heads * head_dim), "gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate),
    }  # fmt: skip
    for layer in range(layers):
        for norm in ("input", "post"):
            model.set_norm(layer, norm, np.ones(hidden, np.float32))
        for slot, (rows, columns) in sizes.items():
            w = random_matrix(random, rows, columns, kind, threads)
            size += w.nbytes
            model.set_linear(layer, slot, w)
    head = random_matrix(random, vocab, hidden, kind, threads)
    model.set_head(head)
    model.set_embedding_linear(head)
    model.set_norm(0, "final", np.ones(hidden, np.float32))
    model.set_rope((1.0 / 10000 ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32), 1.0)
    return model, size + head.nbytes


class Play:
    """Requests of equal length over a cache."""

    def __init__(self, model: Any, shape: str, kv: str, requests: int, room: int, page: int = 32) -> None:
        _, _, layers, _, kv_heads, head_dim, self.vocab = SHAPES[shape]
        width = -(-room // page)
        self.model, self.requests = model, requests
        self.cache = native().Cache(layers, requests * width, page, kv_heads, head_dim, kv)
        self.tables = np.random.default_rng(1).permutation(requests * width).astype(np.int32).reshape(requests, width)
        self.logits = np.empty((requests, self.vocab), np.float32)
        self.length = 0

    def step(self, tokens: int) -> float:
        """``tokens`` more of each request; logits of the last. Seconds of the call."""
        count = self.requests * tokens
        ids = np.random.default_rng(self.length).integers(0, self.vocab, count).astype(np.int32)
        positions = np.tile(np.arange(self.length, self.length + tokens, dtype=np.int32), self.requests)
        starts = np.arange(0, count + 1, tokens, dtype=np.int32)
        self.length += tokens
        lengths = np.full(self.requests, self.length, np.int32)
        rows = starts[1:] - 1
        start = time.perf_counter()
        self.model.step(self.cache, ids, positions, starts, lengths, self.tables, None, rows, self.logits, None)
        return time.perf_counter() - start


def report(name: str, model: Any, seconds: float, steps: int, tokens: int, size: int) -> None:
    """``seconds`` is the median step's (prefill: the best of three); the parts are means, so that disturbances show in them."""
    parts = {part: spent / steps * 1e3 for part, spent in model.profile(False)}
    each = "  ".join(f"{part} {spent:.3f}" for part, spent in parts.items() if spent > 0)
    print(f"{name}: {tokens / seconds:.0f} tokens/s, {seconds * 1e3:.3f} ms a step", end="")
    print(f", weights at {size / seconds / 1e9:.1f} GB/s" if tokens <= 16 else "")
    print(f"    ms by part: {each}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--weights", choices=("int4", "int8", "bf16", "f32"), default="int4")
    parser.add_argument("--kv", choices=("f32", "f16", "bf16", "int8"), default="f16")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--context", type=int, default=128, help="tokens before the decoding starts")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-parts", action="store_true", help="do not measure the parts, which costs a little time")
    args = parser.parse_args()
    model, size = build(args.shape, args.weights, args.threads)
    print(
        f"{args.shape} {args.weights}, cache {args.kv}, {args.threads} threads, {level()}, {size / 1e6:.0f} MB of weights a token"
    )
    kernels, t = native(), args.threads
    peaks = ", ".join(f"{kind} {kernels.peak(kind, t, 0.2) / 1e9:.0f} GOP/s" for kind in ("int8", "bf16", "f32"))
    print(f"this machine now: {peaks}, reads {kernels.bandwidth(2**28, t, 0.5) / 1e9:.1f} GB/s", flush=True)
    if args.prefill:
        play = Play(model, args.shape, args.kv, 1, args.prefill * 3)
        play.step(args.prefill)
        best = float("inf")
        for _ in range(3):
            play.length = 0
            model.profile(not args.no_parts)
            best = min(best, play.step(args.prefill))
        report(f"prefill {args.prefill}", model, best, 1, args.prefill, size)
    for requests in args.batch:
        play = Play(model, args.shape, args.kv, requests, args.context + args.steps + 8)
        play.step(args.context)
        for _ in range(4):
            play.step(1)
        model.profile(not args.no_parts)
        took = [play.step(1) for _ in range(args.steps)]
        report(f"decode batch {requests}", model, float(np.median(took)), args.steps, requests, size)


if __name__ == "__main__":
    main()
