"""How quantised weights lie in memory: what the quantiser writes, the engine computes with, and nobody needs torch to read.

A `QuantTensor` stands for a matrix `[N, K]` (out features, in features) of 4-bit or 8-bit numbers in groups of `group`
columns; each group of each row has one scale, and, in GGUF's Q4_K, one minimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix of N rows and K columns. Arrays may be memory-mapped and read-only.

    bits 8: `q` int8 `[N, K]`; w = q * scale.
    bits 4: `q` uint8 `[N, K/2]`, column 2j in the low nibble and 2j + 1 in the high one, each 0..15; w = (u - 8) * scale,
    or, with `mins`, w = u * scale - min.
    `scales` (and `mins`): float16 or float32 `[N, K/group]`.
    Raises ValueError when the arrays do not fit together, so that whoever holds one can trust its sizes.
    """

    bits: int
    group: int
    q: np.ndarray
    scales: np.ndarray
    mins: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: {self.bits}; 4 and 8 are known")
        want = np.uint8 if self.bits == 4 else np.int8
        if self.q.ndim != 2 or self.q.dtype != want:
            raise ValueError(f"q: {self.q.dtype} with {self.q.ndim} dimensions; a matrix of {np.dtype(want)} is needed")
        rows, columns = self.shape
        if self.group <= 0 or columns == 0 or columns % self.group or (self.bits == 4 and self.group % 2):
            raise ValueError(f"group: {self.group} does not divide {columns} columns")
        for name, array in (("scales", self.scales), ("mins", self.mins)):
            if array is None:
                continue
            if array.dtype not in (np.float16, np.float32):
                raise ValueError(f"{name}: {array.dtype}; float16 and float32 are known")
            if array.shape != (rows, columns // self.group):
                raise ValueError(f"{name}: shape {array.shape}; {(rows, columns // self.group)} is needed")
        if self.mins is not None and self.bits != 4:
            raise ValueError("mins: only 4-bit tensors have them")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): out features, in features."""
        return self.q.shape[0], self.q.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers and their scales and minimums."""
        return self.q.nbytes + self.scales.nbytes + (0 if self.mins is None else self.mins.nbytes)

    def rows(self, index: "slice | Sequence[int] | np.ndarray") -> "QuantTensor":
        """The rows `index` selects, in its order (a slice is a view): to permute, cut or look up rows without unpacking."""
        index = index if isinstance(index, slice) else np.asarray(index)
        mins = None if self.mins is None else self.mins[index]
        return QuantTensor(self.bits, self.group, self.q[index], self.scales[index], mins)

    def dequantise(self) -> np.ndarray:
        """The matrix as float32 `[N, K]`."""
        rows, columns = self.shape
        numbers = unpack_nibbles(self.q) if self.bits == 4 else self.q
        # [N, K] -> [N, K/group, group], so that one scale stands beside its group
        w = numbers.astype(np.float32).reshape(rows, columns // self.group, self.group)
        if self.bits == 4 and self.mins is None:
            w -= np.float32(8)
        w *= self.scales.astype(np.float32)[:, :, None]
        if self.mins is not None:
            w -= self.mins.astype(np.float32)[:, :, None]
        return w.reshape(rows, columns)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8 `[N, K/2]` -> uint8 `[N, K]` of 0..15; column 2j was the low nibble."""
    out = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    out[:, 0::2] = packed & 15
    out[:, 1::2] = packed >> 4
    return out


def pack_nibbles(numbers: np.ndarray) -> np.ndarray:
    """uint8 `[N, K]` of 0..15, K even -> uint8 `[N, K/2]`. The values are not looked at: they must be below 16."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def floats(weight: QuantTensor | np.ndarray) -> np.ndarray:
    """Any weight as float32, contiguous; an array of uint16 holds the bits of bfloat16."""
    if isinstance(weight, QuantTensor):
        return weight.dequantise()
    if weight.dtype == np.uint16:
        return (weight.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(weight, np.float32)


def bf16(weight: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16 as uint16, to nearest, ties to even."""
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(weight), np.uint16(0x7FC0), rounded)


def describe(tensor: Any) -> str:
    """`int4 g32`, `int4 g32 with minimums`, `int8 g128`, `int8 per row`; `float32` and the like for an array."""
    if not isinstance(tensor, QuantTensor):
        return str(tensor.dtype).removeprefix("torch.")
    group = "per row" if tensor.group == tensor.shape[1] else f"g{tensor.group}"
    return f"int{tensor.bits} {group}" + (" with minimums" if tensor.mins is not None else "")
