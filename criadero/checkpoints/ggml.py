"""The number formats of GGML tensors: how a row of weights is packed into bytes, and back.

Layouts are those of ggml (``ggml-common.h``, ``ggml-quants.c``): a row is cut into blocks of 32 (or 256) weights, and a
block carries its own float16 scale. All arithmetic is float32 and bit-for-bit that of the ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from criadero.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[Any]  # uint8; its own operations would make mypy doubt it
Floats = NDArray[np.float32]

CHUNK = 1 << 22  # weights packed or unpacked at a time, so that temporaries stay small


class Format(NamedTuple):
    """``block`` weights take ``size`` bytes; ``code`` is the type's number in a GGUF header."""

    code: int
    block: int
    size: int


FORMATS = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "Q4_0": Format(2, 32, 18),
    "Q4_1": Format(3, 32, 20),
    "Q5_0": Format(6, 32, 22),
    "Q5_1": Format(7, 32, 24),
    "Q8_0": Format(8, 32, 34),
    "Q4_K": Format(12, 256, 144),
    "Q5_K": Format(13, 256, 176),
    "Q6_K": Format(14, 256, 210),
    "BF16": Format(30, 1, 2),
}
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}  # bfloat16 as its bits
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # names of torch's dtypes


def _halves(raw: Bytes) -> Floats:
    """Little-endian float16 in the first two bytes of each block ``[N, >= 2]`` -> float32 ``[N, 1]``."""
    return np.ascontiguousarray(raw[:, :2]).view("<f2").astype(np.float32)


def nibbles(raw: Bytes) -> Bytes:
    """``[N, 16]`` bytes -> ``[N, 32]`` values below 16: low halves first, then high halves."""
    return np.concatenate((raw & 0x0F, raw >> 4), axis=1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """Four bytes of 32 single bits -> ``[N, 32]`` of 0 or 16."""
    return np.unpackbits(raw, axis=1, bitorder="little") << 4


def _unpack_q8_0(raw: Bytes) -> Floats:
    return _halves(raw) * raw[:, 2:].view(np.int8).astype(np.float32)


def _unpack_q4_0(raw: Bytes) -> Floats:
    return _halves(raw) * (nibbles(raw[:, 2:]).astype(np.int8) - 8).astype(np.float32)


def _unpack_q4_1(raw: Bytes) -> Floats:
    return _halves(raw) * nibbles(raw[:, 4:]).astype(np.float32) + _halves(raw[:, 2:])


def _unpack_q5_0(raw: Bytes) -> Floats:
    values = (nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).astype(np.int8) - 16
    return _halves(raw) * values.astype(np.float32)


def _unpack_q5_1(raw: Bytes) -> Floats:
    values = nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return _halves(raw) * values.astype(np.float32) + _halves(raw[:, 2:])


def k_scales(raw: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and eight 6-bit minimums from 12 bytes: ``[N, 8]`` each."""
    low, middle, high = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scales = np.concatenate((low & 0x3F, (high & 0x0F) | (low >> 6 << 4)), axis=1)
    minimums = np.concatenate((middle & 0x3F, (high >> 4) | (middle >> 6 << 4)), axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def k_values(raw: Bytes) -> Bytes:
    """128 bytes -> ``[N, 8, 32]`` values below 16: each run of 32 bytes holds two sub-blocks, low halves first."""
    runs = raw.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[None, None, :, None]
    return (runs & 0x0F).reshape(-1, 8, 32)


def _unpack_q4_k(raw: Bytes, values: Bytes | None = None) -> Floats:
    scales, minimums = k_scales(raw[:, 4:16])
    values = k_values(raw[:, 16:]) if values is None else values
    scale, minimum = (_halves(raw) * scales)[..., None], (_halves(raw[:, 2:]) * minimums)[..., None]
    return (scale * values.astype(np.float32) - minimum).reshape(-1, 256)


def _unpack_q5_k(raw: Bytes) -> Floats:
    bits = (raw[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1  # [N, 8, 32]
    return _unpack_q4_k(raw, k_values(raw[:, 48:]) | (bits << 4))


def q6_k_values(raw: Bytes) -> NDArray[np.int8]:
    """Blocks of 210 bytes ``[N, 210]`` -> ``[N, 16, 16]`` numbers of -32..31."""
    # two halves of 128 weights; a half has 64 bytes of low nibbles and 32 bytes of upper bit pairs
    low, high = raw[:, :128].reshape(-1, 2, 1, 64), raw[:, 128:192].reshape(-1, 2, 1, 32)
    low = (low >> np.array([0, 4], np.uint8)[None, None, :, None]) & 0x0F  # [N, 2, 2, 64]
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]) & 3  # [N, 2, 4, 32]
    return (low.reshape(-1, 16, 16) | (high.reshape(-1, 16, 16) << 4)).astype(np.int8) - 32


def _unpack_q6_k(raw: Bytes) -> Floats:
    scales = _halves(raw[:, 208:]) * raw[:, 192:208].view(np.int8).astype(np.float32)  # [N, 16]
    return (scales[..., None] * q6_k_values(raw).astype(np.float32)).reshape(-1, 256)


def _pack_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    values = np.copysign(whole + (size - whole >= 0.5), scaled).astype(np.int8)  # half away from zero, as roundf
    return np.concatenate((scale.astype("<f2").view(np.uint8), values.view(np.uint8)), axis=1)


def _pack_q4_0(blocks: Floats) -> Bytes:
    # the weight of largest size, with its sign, becomes -8: the end of the range that has one step more
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    # float64 stands in for the fused multiply-add of the C code
    values = np.trunc(blocks.astype(np.float64) * inverse.astype(np.float64) + 8.5).clip(0, 15).astype(np.uint8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), values[:, :16] | (values[:, 16:] << 4)), axis=1)


UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": _unpack_q4_0,
    "Q4_1": _unpack_q4_1,
    "Q5_0": _unpack_q5_0,
    "Q5_1": _unpack_q5_1,
    "Q8_0": _unpack_q8_0,
    "Q4_K": _unpack_q4_k,
    "Q5_K": _unpack_q5_k,
    "Q6_K": _unpack_q6_k,
}
PACK: dict[str, Callable[[Floats], Bytes]] = {"Q4_0": _pack_q4_0, "Q8_0": _pack_q8_0}
WRITABLE = (*PLAIN, *PACK)


def unpack_array(raw: Bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of one tensor -> an array of ``shape``: as stored for F32, F16 and BF16 (its bits, uint16), else float32."""
    if kind in PLAIN:
        return raw.view(PLAIN[kind]).reshape(shape)
    block, size = FORMATS[kind].block, FORMATS[kind].size
    blocks = raw.reshape(-1, size)
    out = np.empty((len(blocks), block), np.float32)
    step = CHUNK // block
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite; the caller looks for that
        for start in range(0, len(blocks), step):
            out[start : start + step] = UNPACK[kind](blocks[start : start + step])
    return out.reshape(shape)


def unpack(raw: Bytes, kind: str, shape: tuple[int, ...]) -> Tensor:
    """The same as a tensor, BF16 as bfloat16."""
    import torch

    tensor = torch.from_numpy(unpack_array(raw, kind, shape))
    return tensor.view(torch.bfloat16) if kind == "BF16" else tensor


def finite(array: np.ndarray) -> bool:
    """Whether no number of an array (uint16: bits of bfloat16) is infinite or NaN."""
    kind, top = {2: (np.uint16, 0x7F80 if array.dtype == np.uint16 else 0x7C00), 4: (np.uint32, 0x7F800000)}[
        array.itemsize
    ]
    bits = array.reshape(-1).view(kind)
    # on the bits: float16 has no instructions here; a stretch at a time, which stays in the cache
    return all(bool(((bits[at : at + CHUNK] & top) < top).all()) for at in range(0, len(bits), CHUNK))


def pack(tensor: Tensor, kind: str, name: str) -> Bytes:
    """A tensor -> the bytes of its rows in format ``kind``. ``name`` is for the message when it cannot be done."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds values that are not finite: the model is damaged, and nothing was written")
    if kind in PLAIN:
        out = tensor.to(getattr(torch, TORCH[kind]))
        if not torch.isfinite(out).all():
            raise UserError(f"{name} holds values too large for {kind}: choose type BF16 or F32")
        return out.reshape(-1).view(torch.uint8).numpy()
    block, size = FORMATS[kind].block, FORMATS[kind].size
    if tensor.shape[-1] % block:
        raise UserError(f"{name} has rows of {tensor.shape[-1]}; {kind} needs a multiple of {block}: choose type F16")
    blocks = tensor.float().numpy().reshape(-1, block)
    out_bytes = np.empty((len(blocks), size), np.uint8)
    step = CHUNK // block
    with np.errstate(over="ignore"):
        for start in range(0, len(blocks), step):
            out_bytes[start : start + step] = PACK[kind](blocks[start : start + step])
    if not np.isfinite(_halves(out_bytes)).all():
        raise UserError(f"{name} holds values too large for {kind}: choose type BF16 or F32")
    return out_bytes.reshape(-1)
