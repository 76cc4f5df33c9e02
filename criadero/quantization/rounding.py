"""Round a matrix to 4 or 8 bits, with the scale of each group chosen so that the squared error is least.

Scales are rounded to what bfloat16 and float16 both hold before the numbers are chosen: whichever of the two a reader computes
in, it computes with the same weights, and the rounding of the scale costs nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, pack_nibbles

CHUNK = 1 << 18  # weights worked on at once: the temporaries stay in the cache
# Fractions of the scale that clips nothing: clipping one far weight a little may serve the others. Tried on trained models.
SHRINK = {4: (0.76, 0.8, 0.84, 0.87, 0.9, 0.93, 0.96, 0.98, 1.0, 1.03), 8: (0.97, 0.985, 1.0)}
RANGE = {4: (-8, 7), 8: (-127, 127)}


def on_grid(scales: Tensor) -> Tensor:
    """The nearest scale that bfloat16 and float16 both hold, as float32."""
    return scales.to(torch.bfloat16).to(torch.float16).float()


def nearest(w: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The whole numbers, as float32, that stand for ``w`` ``[..., n]`` at scales ``[...]``."""
    low, high = RANGE[bits]
    return (w / torch.where(scales == 0, 1.0, scales)[..., None]).round_().clamp_(low, high)


def best_scales(w: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each group: w ``[..., g]`` float32 -> ``[...]`` float32.

    ``importance`` (broadcast against w) weighs the squared errors. A 4-bit scale may be negative: -8 then stands for the
    largest weight, whichever its sign. A group of zeros gets 0.
    """
    low, high = RANGE[bits]
    best, least = torch.full(w.shape[:-1], torch.nan), torch.full(w.shape[:-1], torch.inf)

    def offer(scales: Tensor) -> None:
        nonlocal best, least
        scales = on_grid(scales)
        miss = (w - nearest(w, scales, bits) * scales[..., None]).square_()
        error = (miss if importance is None else miss * importance).sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)

    for sign in (1.0, -1.0) if bits == 4 else (1.0,):
        fits = torch.maximum((w * sign).amax(-1) / high, (w * sign).amin(-1) / low)  # the least that clips nothing
        for part in SHRINK[bits]:
            offer(sign * part * fits)
    q = nearest(w, best, bits)  # least squares for the numbers found
    weighed = q if importance is None else q * importance
    offer((weighed * w).sum(-1) / (weighed * q).sum(-1).clamp(min=1e-30))
    return best


def round_matrix(
    w: Tensor, bits: int, group: int, importance: Tensor | None = None, what: str = "a matrix"
) -> QuantTensor:
    """Round w ``[N, K]`` to the nearest in groups of ``group`` columns. ``importance`` ``[K]`` weighs the columns' errors."""
    columns = w.shape[1]
    numbers, all_scales = [], []
    weigh = None if importance is None else importance.reshape(columns // group, group)
    for part in w.split(max(1, CHUNK // columns)):
        blocks = part.float().reshape(len(part), columns // group, group)  # [n, K/g, g]
        scales = best_scales(blocks, bits, weigh)
        numbers.append(nearest(blocks, scales, bits).to(torch.int8).reshape(len(part), columns))
        all_scales.append(scales)
    return as_quant_tensor(torch.cat(numbers), torch.cat(all_scales), bits, group, what)


def as_quant_tensor(numbers: Tensor, scales: Tensor, bits: int, group: int, what: str = "a matrix") -> QuantTensor:
    """Whole numbers int8 ``[N, K]`` and scales ``[N, K/group]`` that float16 holds -> a `QuantTensor`."""
    if not torch.isfinite(scales).all():
        raise UserError(f"{what} holds values that are not finite or too large to quantise: the model is damaged")
    q = numbers.numpy()
    packed = q if bits == 8 else pack_nibbles((q + 8).astype(np.uint8))
    return QuantTensor(bits, group, packed, scales.numpy().astype(np.float16))
