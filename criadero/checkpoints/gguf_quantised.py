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

Q4_1, Q5_0, Q5_1 and Q5_K have no such form (five bits, or an offset) and become float32 arrays.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from criadero.checkpoints.ggml import CHUNK, FORMATS, PLAIN, Bytes, k_scales, k_values, nibbles, q6_k_values
from criadero.checkpoints.gguf import hf_name, read_gguf_config
from criadero.checkpoints.gguf_file import Header, read_bytes, read_header, read_tensor
from criadero.checkpoints.gguf_vocab import read_gguf_tokenizer
from criadero.checkpoints.states import check_shapes, expected_shapes
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, pack_nibbles
from criadero.model import ModelConfig
from criadero.tokenizer import Tokenizer

KEPT = ("Q4_0", "Q8_0", "Q4_K", "Q6_K")
Weight = QuantTensor | np.ndarray


def is_quantised_gguf(source: Header | str | Path) -> bool:
    """Whether a GGUF file holds weights in another format than F32, F16 and BF16."""
    header = source if isinstance(source, Header) else read_header(source)
    return any(info.kind not in PLAIN for info in header.tensors.values())


def read_gguf_quantised(path: str | Path) -> tuple[ModelConfig, dict[str, Weight], Tokenizer | None]:
    """Configuration, weights by Hugging Face's names, and tokenizer of a Llama GGUF file.

    Matrices in the formats above are `QuantTensor`s, rows of q and k in rotate-half order; BF16 is uint16 that holds its bits,
    F16 and F32 are as stored. UserError: damage, or not a Llama.
    """
    header = read_header(path)
    config = read_gguf_config(header)
    if not header.tensors:
        raise UserError(f"{path}: holds a vocabulary only, no model")
    names = {hf_name(name): name for name in header.tensors if name != "rope_freqs.weight"}
    check_shapes(config, {name: header.tensors[stored].shape for name, stored in names.items()}, str(path))
    state: dict[str, Weight] = {}
    for name, _ in expected_shapes(config):
        weight = read_weight(header, names[name])
        scales = weight.scales if isinstance(weight, QuantTensor) else weight
        finite = np.isfinite(scales).all() if scales.dtype != np.uint16 else ((scales & 0x7F80) != 0x7F80).all()
        if not finite:
            raise UserError(f"{path}: tensor {names[name]!r} holds values that are not finite; get the file again")
        state[name] = _rotate_half(name, weight, config)
    return config, state, read_gguf_tokenizer(header)


def read_weight(header: Header, stored: str) -> Weight:
    """One tensor: a `QuantTensor` where its format allows, else an array (uint16 for BF16)."""
    info = header.tensors[stored]
    if info.kind == "BF16":
        return read_bytes(header, stored).view("<u2").reshape(info.shape)
    if info.kind not in KEPT or len(info.shape) != 2:
        return read_tensor(header, stored).numpy()
    return repack(read_bytes(header, stored), info.kind, info.shape[0], info.shape[1])


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
                q[to], scales[to] = pack_nibbles(nibbles(part[:, 2:])), half
            elif kind == "Q8_0":
                q[to], scales[to] = part[:, 2:], half
            elif kind == "Q4_K":
                assert mins is not None
                six, low = k_scales(part[:, 4:16])  # [n, 8] each
                q[to] = pack_nibbles(k_values(part[:, 16:]).reshape(-1, 256))
                scales[to], mins[to] = half[:, :1].astype(np.float32) * six, half[:, 1:].astype(np.float32) * low
            else:
                q[to] = q6_k_values(part).reshape(-1, 256).view(np.uint8)
                scales[to] = half.astype(np.float32) * part[:, 192:208].view(np.int8).astype(np.float32)
    numbers = q.reshape(rows, columns * bits // 8)
    return QuantTensor(
        bits, group, numbers if bits == 4 else numbers.view(np.int8), scales.reshape(rows, columns // group),
        None if mins is None else mins.reshape(rows, columns // group),
    )  # fmt: skip


def _rotate_half(name: str, weight: Weight, config: ModelConfig) -> Weight:
    """Rows of q and k from GGUF's interleaved order to ours (see `criadero.checkpoints.layout`)."""
    heads = config.num_attention_heads if name.endswith("q_proj.weight") else config.num_key_value_heads
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    # row numbers as [heads, Dh / 2, 2] -> [heads, 2, Dh / 2]
    order = np.arange(weight.shape[0]).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)
    return weight.rows(order) if isinstance(weight, QuantTensor) else weight[order]
