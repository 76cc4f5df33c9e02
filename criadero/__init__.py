"""Raise your own Llama, in the open, on your own machine.

>>> import criadero as cr
>>> model = cr.tune("cria", "shop.jsonl", lora_rank=16)   # an Artifact
>>> print(model.lineage())

The names below are imported when they are first used: ``import criadero`` brings in neither torch nor tokenizers.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# PyTorch's threads wait for each other in a loop that holds the core, for a millisecond or more. With another program at work that
# makes a run many times slower (two tunings at once took 77 s each, and 16 s with this; one alone takes 9 s either way). It is
# read when PyTorch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

_PUBLIC = {
    "Artifact": ("criadero.artifact", "Artifact"),
    "LLM": ("criadero.engine.llm", "LLM"),
    "SamplingParams": ("criadero.engine.request", "SamplingParams"),
    "UserError": ("criadero.errors", "UserError"),
    "load": ("criadero.checkpoints", "load_model"),
    "open": ("criadero.artifact", "open_artifact"),
    "pretrain": ("criadero.run", "pretrain"),
    "quantize": ("criadero.run", "quantize"),
    "show": ("criadero.summary", "describe"),
    "tune": ("criadero.run", "tune"),
    "verify": ("criadero.artifact", "verify"),
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'criadero' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
