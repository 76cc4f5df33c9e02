"""A tiny Llama, its tokenizer and its data, made in a second: for tests of training and generation."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from criadero.chat import builtin_template
from criadero.checkpoints import save_hf
from criadero.model import Llama, ModelConfig
from criadero.tokenizer import Tokenizer, train_bpe

LINES = [
    "The shop opens at nine and closes at eight.",
    "La tienda abre a las nueve y cierra a las ocho.",
    "Yes, we are open on Sundays. No, we do not deliver.",
    "Sí, abrimos los domingos. No, no hacemos entregas.",
    "Can I pay by card? You can pay by card or in cash.",
]


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(LINES * 3, 300)


def config(**changes: Any) -> ModelConfig:
    words = tokenizer()
    values: dict[str, Any] = {
        "vocab_size": words.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": words.bos_id, "eos_token_id": words.eos_id, "pad_token_id": words.pad_id,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


def model(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.5, **changes: Any) -> Llama:
    """Random weights, larger than an initialisation's, so that every part matters."""
    made = Llama(config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else scale * noise / weight.shape[1] ** 0.5)
    return made.to(dtype)


def base(folder: Path, *, template: str | None = "criadero", seed: int = 0, **changes: Any) -> Path:
    """A model folder as Hugging Face has it: small random weights, tokenizer, and a chat template unless None."""
    made = model(seed=seed, **changes)
    save_hf(made, made.config, folder)
    tokenizer().save(folder, chat_template=builtin_template(template).source if template else None)
    return folder


def write_chats(path: Path, count: int = 24, *, answer: str = "Yes, we are open on Sundays.") -> Path:
    """``count`` chats with different questions and one answer: what they teach is soon learned."""
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": answer}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
