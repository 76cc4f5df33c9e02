"""Model files of real shapes with random weights, for benchmarks: speed does not depend on what the weights are.

    python benchmarks/shapes.py SHAPE TYPE FILE.gguf [words]
    # tinyllama-1.1b | llama-2-7b | llama-135m | llama-15m;  Q4_0 | Q4_K_M | Q8_0 | BF16

The types of the tensors are those that llama.cpp's own quantiser chooses: Q4_K_M holds some of its matrices, and both 4-bit types
their output layer, in Q6_K (Q8_0 where a row is no multiple of 256). With "words" the file has a vocabulary too, so that servers take
text: made of all short strings of letters, in no language.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

SHAPES = {
    "llama-15m": {"hidden": 288, "layers": 6, "heads": 6, "kv": 6, "ffn": 768, "vocab": 32000, "context": 2048},
    "llama-135m": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "ffn": 1536, "vocab": 49152, "context": 2048},
    "tinyllama-1.1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv": 4, "ffn": 5632, "vocab": 32000, "context": 2048},
    "llama-2-7b": {"hidden": 4096, "layers": 32, "heads": 32, "kv": 32, "ffn": 11008, "vocab": 32000, "context": 4096},
}  # fmt: skip
BYTES = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210), "BF16": (1, 2)}


def scale(rows: int, blocks: int, random: np.random.Generator, size: float) -> np.ndarray:
    """A float16 factor for each block as two bytes, ``[rows, blocks, 2]``."""
    values = (size * (1 + 0.2 * random.random((rows, blocks)))).astype(np.float16)
    return values.view(np.uint8).reshape(rows, blocks, 2)


def tensor(rows: int, columns: int, kind: str, random: np.random.Generator) -> np.ndarray:
    """Random weights of standard deviation near 0.02 as GGUF bytes, ``[rows, bytes of a row]``."""
    if kind == "BF16":
        wide = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, columns * 2)
    length, size = BYTES[kind]
    blocks = columns // length
    body = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    if kind == "Q4_0":
        body[..., :2] = scale(rows, blocks, random, 0.02 / 4.6)
    elif kind == "Q8_0":
        body[..., :2] = scale(rows, blocks, random, 0.02 / 74)
    elif kind == "Q4_K":  # d, dmin, 12 bytes of six-bit scales and minima, 128 bytes of nibbles
        body[..., :2] = scale(rows, blocks, random, 0.02 / 4.6 / 32)
        body[..., 2:4] = scale(rows, blocks, random, 0.02 / 4.6 / 32 * 7.5)
        body[..., 4:12], body[..., 12:16] = (
            32,
            0,
        )  # six-bit scales and minima of 32 (the last four bytes hold others' low bits)
    else:  # Q6_K: 128 bytes of low bits, 64 of high bits, 16 int8 scales, d
        body[..., 192:208] = 64
        body[..., 208:] = scale(rows, blocks, random, 0.02 / 18 / 64)
    return body.reshape(rows, blocks * size)


def more_bits(layer: int, layers: int) -> bool:
    """The layers whose attn_v and ffn_down llama.cpp's Q4_K_M stores in Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level vocabulary (in GPT-2's alphabet for bytes) of ``size``: two special tokens, the bytes, then
    strings of two, three and four letters, the first of which may be a space."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(ord("a") + number) for number in range(26)]
    tokens = ["<s>", "</s>", *map(chr, plain), *(chr(256 + number) for number in range(len(others)))]
    pairs = [(one, two) for one in [chr(256 + 32), *letters] for two in letters]  # chr(288) stands for a space
    merges = [
        *pairs,
        *((a + b, c) for a, b in pairs for c in letters),
        *((a + b, c + d) for a, b in pairs for c, d in pairs[26:]),
    ]
    merges = merges[: size - len(tokens)]
    return tokens + [a + b for a, b in merges], [f"{a} {b}" for a, b in merges]


def write(shape: str, kind: str, path: Path, *, words: bool = False) -> Path:
    """Write the file unless it is there."""
    from gguf import GGMLQuantizationType, GGUFWriter

    if path.exists():
        return path
    s, random = SHAPES[shape], np.random.default_rng(0)
    small = s["hidden"] % 256 or s["ffn"] % 256
    base = {"Q4_K_M": "Q8_0" if small else "Q4_K"}.get(kind, kind)
    best = {"Q4_K_M": "Q6_K", "Q4_0": "Q6_K"}.get(kind, kind)
    partial = path.with_suffix(".partial")
    out = GGUFWriter(str(partial), "llama")
    out.add_block_count(s["layers"])
    out.add_context_length(s["context"])
    out.add_embedding_length(s["hidden"])
    out.add_feed_forward_length(s["ffn"])
    out.add_head_count(s["heads"])
    out.add_head_count_kv(s["kv"])
    out.add_rope_dimension_count(s["hidden"] // s["heads"])
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(s["vocab"])
    out.add_file_type({"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}[kind])  # OpenVINO GenAI wants to know
    if words:
        tokens, merges = vocabulary(s["vocab"])
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("llama-bpe")
        out.add_token_list(tokens)
        out.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
        out.add_token_merges(merges)
        out.add_bos_token_id(0)
        out.add_eos_token_id(1)
        out.add_add_bos_token(True)
    else:
        out.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int, type: str) -> None:
        if type in ("Q6_K", "Q4_K") and columns % 256:
            type = "Q8_0"
        out.add_tensor(name, tensor(rows, columns, type, random), raw_dtype=GGMLQuantizationType[type])

    def norm(name: str) -> None:
        out.add_tensor(name, np.ones(s["hidden"], np.float32))

    width = s["hidden"] // s["heads"] * s["kv"]
    matrix("token_embd.weight", s["vocab"], s["hidden"], base)
    norm("output_norm.weight")
    matrix("output.weight", s["vocab"], s["hidden"], best)
    for layer in range(s["layers"]):
        name = f"blk.{layer}."
        finer = best if kind == "Q4_K_M" and more_bits(layer, s["layers"]) else base
        norm(name + "attn_norm.weight")
        norm(name + "ffn_norm.weight")
        matrix(name + "attn_q.weight", s["hidden"], s["hidden"], base)
        matrix(name + "attn_k.weight", width, s["hidden"], base)
        matrix(name + "attn_v.weight", width, s["hidden"], finer)
        matrix(name + "attn_output.weight", s["hidden"], s["hidden"], base)
        matrix(name + "ffn_gate.weight", s["ffn"], s["hidden"], base)
        matrix(name + "ffn_up.weight", s["ffn"], s["hidden"], base)
        matrix(name + "ffn_down.weight", s["hidden"], s["ffn"], finer)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    partial.rename(path)
    return path


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], Path(sys.argv[3]), words=sys.argv[4:] == ["words"])
