"""The two orders of a head's rows under rotary embedding.

Meta's checkpoints and GGUF rotate neighbouring pairs (0, 1), (2, 3), ... ("interleaved"); Hugging Face's, and ours,
rotate a row with the one half a head further ("rotate-half"). Only the rows of ``q_proj`` and ``k_proj`` differ, head by
head, so a weight is reordered once, where it enters or leaves. With grouped-query attention k has fewer heads than q:
using q's number for both gives a model that still speaks, but nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Rows = TypeVar("Rows", "Tensor", np.ndarray)


def to_rotate_half(weight: Rows, heads: int) -> Rows:
    """Interleaved -> rotate-half. ``weight`` ``[heads * Dh, D]``."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_interleaved(weight: Rows, heads: int) -> Rows:
    """Rotate-half -> interleaved; undoes `to_rotate_half`."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
