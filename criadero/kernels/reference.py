"""The slow twins of the compiled linear kernels, in plain PyTorch: what they compute, to be read and to be tested against."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from criadero.kernels.formats import QuantTensor, unpack_nibbles

SPAN = 128  # columns of activations that share one scale: csrc/linear.h says why


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 `[M, K]` -> whole numbers in -127..127 as f32 `[M, S, SPAN]`, and scales f32 `[M, S]`, S = ceil(K / SPAN).

    x = q * scale; the last span is filled up with zeros. A span whose largest magnitude is below 1e-30 becomes zero.
    """
    spans = math.ceil(x.shape[1] / SPAN)
    # [M, K] -> [M, S, SPAN], so that one scale stands beside its span
    cut = torch.nn.functional.pad(x.float(), (0, spans * SPAN - x.shape[1])).view(x.shape[0], spans, SPAN)
    top = cut.abs().amax(dim=2)
    tiny = top < 1e-30
    scale = torch.where(tiny, 0.0, top / 127.0)
    # a true division, like the kernels': PyTorch turns 127.0 / top into 127 x (1 / top), which rounds otherwise
    inverse = torch.where(tiny, 0.0, torch.full_like(top, 127.0) / top)
    return (cut * inverse[:, :, None]).round(), scale


def stored_scales(table: np.ndarray, largest: float) -> Tensor:
    """The scales or mins as the kernels keep them: f16 under the power of two that brings `largest` just below 2^15."""
    if largest == 0:
        return torch.from_numpy(table.astype(np.float32))
    up = 15 - math.frexp(largest)[1]
    return torch.from_numpy(np.ldexp(np.ldexp(table.astype(np.float32), up).astype(np.float16).astype(np.float32), -up))


def linear(x: Tensor, weights: QuantTensor | Tensor) -> Tensor:
    """x f32 `[M, K]` times weights `[N, K]`, transposed: f32 `[M, N]`.

    Of a QuantTensor the activations are quantised to 8 bits too, one scale for each row and span of 128 columns; sums within a group are
    exact, and groups and spans are added up from left to right. Of bf16 weights (a bfloat16 tensor) the activations are rounded to bf16
    where the processor multiplies bf16, and stay f32 elsewhere: this one leaves them.
    """
    if isinstance(weights, Tensor):
        return x.float() @ weights.float().T
    rows, columns = weights.shape
    numbers = unpack_nibbles(weights.q) if weights.bits == 4 else weights.q
    w = torch.from_numpy(numbers.astype(np.float32))
    per_row = weights.bits == 8 and weights.group == columns
    if weights.bits == 4 and weights.mins is None:
        w -= 8
    tables = [t for t in (weights.scales, weights.mins) if t is not None]
    largest = max((float(np.abs(t.astype(np.float32)).max()) for t in tables if t.size), default=0.0)
    scales = torch.from_numpy(weights.scales.astype(np.float32)) if per_row else stored_scales(weights.scales, largest)
    mins = None if weights.mins is None else stored_scales(weights.mins, largest)
    q, activation_scales = quantise_activations(x)
    y = torch.zeros(x.shape[0], rows)
    step = SPAN if per_row else math.gcd(weights.group, SPAN)
    for span in range(q.shape[1]):
        f = torch.zeros(x.shape[0], rows)
        for k in range(span * SPAN, min(span * SPAN + SPAN, columns), step):
            part = q[:, span, k - span * SPAN : k - span * SPAN + step]
            width = min(step, columns - k)
            exact = part[:, :width] @ w[:, k : k + width].T  # sums below 2^24: exact in f32
            if per_row:
                f = exact
                continue
            f = f + exact * scales[:, k // weights.group]
            if mins is not None:
                f = f - part.sum(dim=1, keepdim=True) * mins[:, k // weights.group]
        y = y + f * activation_scales[:, span : span + 1]
    return y * scales[:, 0] if per_row else y
