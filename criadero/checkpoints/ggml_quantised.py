"""GGUF weights as `QuantTensor`s, number for number: what ggml packed is repacked, never dequantised and rounded again.

ggml puts a block's numbers and scale together and orders the numbers its own way (``ggml-quants.c``); a `QuantTensor` has
the numbers of a row in order and the scales beside them. Both mean the same weights, to the last bit of float32:

========  =======================================  ====================================================
ggml      weight                                   here
========  =======================================  ====================================================
Q4_0      d * (u - 8), 32 share d                  4 bits, group 32, scales float16
Q8_0      d * q, 32 share d                        8 bits, group 32, scales float16
Q4_K      d * s * u - dmin * m, 32 share s and m   4 bits, group 32, scales and minimums float32
Q6_K      d * s * q, 16 share s, q in -32..31      8 bits, group 16, scales float32
========  =======================================  ====================================================

Q4_1, Q5_0, Q5_1 and Q5_K have no such form here (five bits, or an offset).
"""

from __future__ import annotations

import numpy as np

from criadero.checkpoints.ggml import FORMATS, Bytes, k_scales, q6_k_values
from criadero.kernels.formats import QuantTensor, unpack_nibbles

KEPT = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
CHUNK = 1 << 20  # weights repacked at a time, so that temporaries stay in the cache


def repack(raw: Bytes, kind: str, rows: int, columns: int) -> QuantTensor:
    """The blocks of a tensor ``[rows, columns]`` in a format of `KEPT` -> the same weights as a `QuantTensor`."""
    block, size = FORMATS[kind].block, FORMATS[kind].size
    blocks = raw.reshape(-1, size)
    bits, group = (4, 32) if kind in ("Q4_0", "Q4_K") else (8, 16 if kind == "Q6_K" else 32)
    wide = kind in ("Q4_K", "Q6_K")
    q = np.empty((len(blocks), block * bits // 8), np.uint8)
    scales = np.empty((len(blocks), block // group), np.float32 if wide else np.float16)
    mins = np.empty_like(scales) if kind == "Q4_K" else None
    step = CHUNK // block
    for start in range(0, len(blocks), step):
        part, to = blocks[start : start + step], slice(start, start + step)
        half = np.ascontiguousarray(part[:, 208:] if kind == "Q6_K" else part[:, : 4 if kind == "Q4_K" else 2]).view(
            "<f2"
        )
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale; the caller looks for that
            if kind == "Q4_0":
                q[to], scales[to] = _in_order(part[:, 2:]), half
            elif kind == "Q8_0":
                q[to], scales[to] = part[:, 2:], half
            elif kind == "Q4_K":
                assert mins is not None
                six, low = k_scales(part[:, 4:16])  # [n, 8] each
                q[to] = _in_order(part[:, 16:].reshape(-1, 32)).reshape(-1, 128)  # runs of 32 bytes
                scales[to], mins[to] = half[:, :1].astype(np.float32) * six, half[:, 1:].astype(np.float32) * low
            else:
                q[to] = q6_k_values(part).reshape(-1, 256).view(np.uint8)
                scales[to] = half.astype(np.float32) * part[:, 192:208].view(np.int8).astype(np.float32)
    numbers = q.reshape(rows, columns * bits // 8)
    return QuantTensor(
        bits, group, numbers if bits == 4 else numbers.view(np.int8), scales.reshape(rows, columns // group),
        None if mins is None else mins.reshape(rows, columns // group),
    )  # fmt: skip


def _in_order(runs: Bytes) -> Bytes:
    """Runs ``[N, n]`` whose low nibbles are the first n numbers and whose high ones the next n -> neighbours in one byte."""
    pairs = np.ascontiguousarray(runs).view("<u2")  # [N, n / 2]: two bytes at once, in four shifts
    out = np.empty(runs.shape, np.uint8)
    half = runs.shape[1] // 2
    out[:, :half] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    out[:, half:] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    return out


def own_kind(weight: QuantTensor) -> str | None:
    """The ggml format that holds a `QuantTensor` as it is, scales repeated where its groups are larger; None: there is none."""
    whole = weight.group % 32 == 0 and weight.scales.dtype == np.float16 and weight.mins is None
    return {4: "Q4_0", 8: "Q8_0"}[weight.bits] if whole else None


def blocks(weight: QuantTensor, kind: str) -> Bytes:
    """The bytes of a tensor in ``kind``, which is its `own_kind`, or Q8_0 for one whose own is Q4_0 (its numbers fit)."""
    rows, columns = weight.shape
    out = np.empty((rows, columns // 32, FORMATS[kind].size), np.uint8)
    scales = np.repeat(weight.scales, weight.group // 32, axis=1).astype("<f2")  # [N, K / 32]
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        to = slice(start, start + step)
        out[to, :, :2] = scales[to, :, None].view(np.uint8)
        numbers = weight.q[to] if weight.bits == 8 else unpack_nibbles(weight.q[to])
        numbers = numbers.reshape(len(numbers), columns // 32, 32)
        if kind == "Q4_0":  # number j beside number j + 16
            out[to, :, 2:] = numbers[..., :16] | (numbers[..., 16:] << 4)
        else:
            out[to, :, 2:] = (numbers if weight.bits == 8 else numbers.astype(np.int8) - 8).view(np.uint8)
    return out.reshape(-1)
