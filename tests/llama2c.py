"""Reads the two files of karpathy/llama2.c's trained models (legacy format), for tests.

Model: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size or its negative when untied, seq_len), then
float32 tensors kind by kind. Rotary pairs are interleaved, as in Meta's files. Tokenizer: the longest piece's length, then
score, length and bytes of each piece.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch

from criadero.model import ModelConfig


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaved rows -> rotate-half rows, written otherwise than in the package: even rows of a head, then odd ones."""
    return torch.cat([torch.cat((head[0::2], head[1::2])) for head in weight.chunk(heads)])


def read_model(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy())
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return numbers[at - size : at].view(shape)

    kv = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(abs(vocab), dim)}
    for name, shape in (
        ("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)), ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)), ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)), ("mlp.up_proj", (hidden, dim)),
    ):  # fmt: skip
        for layer, weight in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                weight = halves(weight, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    take(2, length, dim // heads // 2)  # cosines and sines, which follow from the configuration
    if vocab < 0:
        state["lm_head.weight"] = take(-vocab, dim)
    assert at == len(numbers)
    config = ModelConfig(
        vocab_size=abs(vocab), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length,
        tie_word_embeddings=vocab > 0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return config, state


def read_vocabulary(path: Path, size: int) -> list[tuple[bytes, float]]:
    """Piece and score of each token."""
    data, at, pieces = path.read_bytes(), 4, []
    for _ in range(size):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    assert at == len(data)
    return pieces
