"""The linear kernels beside what the machine allows: ``python benchmarks/kernels.py [--threads N] [--quick]``.

For each shape [N, K], format and number of rows M: the time of one product from f32 rows to f32 results (the quantising of
the activations counted), with weights that come from memory (copies are used in turn); GB/s of packed weights, GOP/s, and
the share of the limit, which is the larger of the times that reading the weights and multiplying would take at the peak
and at the bandwidth measured just before and after (on shared machines it moves by half).
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from criadero import kernels
from criadero.kernels.formats import QuantTensor

SHAPES = [(5632, 2048), (2048, 5632), (4096, 11008)]
FORMATS = ["int4 g32", "int4 g128", "int8", "int8 g32", "bf16"]
ROWS = [1, 4, 8, 16, 512]


def weights(name: str, rows: int, columns: int, rng: np.random.Generator) -> QuantTensor | np.ndarray:
    """Random weights; the values do not matter for the time."""
    if name == "bf16":
        return (rng.standard_normal((rows, columns), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = int(name[3])
    group = int(name.split("g")[1]) if " g" in name else columns
    q = rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    scales = np.full((rows, columns // group), 0.01, dtype=np.float16)
    return QuantTensor(bits, group, q if bits == 4 else q.view(np.int8), scales)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=kernels.physical_cores())
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="comma-separated")
    given = parser.parse_args()
    native = kernels.native()
    if native is None:
        raise SystemExit("the compiled kernels are missing")
    threads, rng = given.threads, np.random.default_rng(0)
    bandwidth = native.bandwidth(400 << 20, threads, 0.5)
    peaks = {kind: native.peak(kind, threads, 0.3) for kind in ("int8", "bf16", "f32")}
    print(f"level {kernels.level()}, {threads} threads; limits: {bandwidth / 1e9:.1f} GB/s", end="")
    print("".join(f", {kind} {value / 1e9:.0f} GOP/s" for kind, value in peaks.items() if value))
    print(f"{'format':10} {'N x K':>12} {'M':>4} {'ms':>8} {'GB/s':>6} {'GOP/s':>6}  of the limit")
    for rows, columns in SHAPES[:1] if given.quick else SHAPES:
        for name in given.formats.split(","):
            tensor = weights(name, rows, columns, rng)
            first = kernels.pack(tensor, threads)
            copies = [first] + [kernels.pack(tensor, threads) for _ in range(max(1, (300 << 20) // first.nbytes) - 1)]
            compute = peaks["int8"] if name.startswith("int") else peaks["bf16"] or peaks["f32"]
            for m in map(int, given.rows.split(",")):
                used = copies if m <= 16 else copies[:2]
                x = rng.standard_normal((m, columns), dtype=np.float32)
                bandwidth = native.bandwidth(400 << 20, threads, 0.05)
                times = [native.time_products(used, x, threads) / len(used) for _ in range(5 if m <= 16 else 3)]
                bandwidth = max(bandwidth, native.bandwidth(400 << 20, threads, 0.05))
                seconds = statistics.median(times)
                operations = 2.0 * rows * columns * m
                limit = max(first.nbytes / bandwidth, operations / compute if compute else 0.0)
                what = "bandwidth" if limit == first.nbytes / bandwidth else "peak"
                print(
                    f"{name:10} {f'{rows} x {columns}':>12} {m:4} {seconds * 1e3:8.3f} {first.nbytes / seconds / 1e9:6.1f}"
                    f" {operations / seconds / 1e9:6.0f}  {limit / seconds:4.0%} of {what}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
