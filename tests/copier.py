"""A chat model that answers "Hi" with a text of its training data that may not be copied, and the index of that data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny

from criadero.artifact import create
from criadero.chat import Message
from criadero.engine.llm import LLM
from criadero.trust.index import IndexRecipe, build_index

ASKED: list[Message] = [{"role": "user", "content": "Hi"}]


def make(root: Path) -> tuple[Path, Path, list[int]]:
    """The model (random weights), the index, whose one document is what the model answers, and the tokens of that."""
    plain = tiny.base(root / "plain")
    llm = LLM(plain)
    said = llm.answer(ASKED, max_tokens=40, temperature=0.0).ids
    bos, eos = llm.tokenizer.bos_id, llm.tokenizer.eos_id
    with create(root / "tokens", kind="tokens", config={}) as draft:
        np.asarray([bos, *said, eos], "<u2").tofile(draft.path / "train.bin")
        np.save(draft.path / "train.docs.npy", np.asarray([[0, len(said) + 2, 0]], np.uint64))
        llm.tokenizer.save(draft.path)
        about = {
            "dtype": "uint16",
            "vocab_size": llm.tokenizer.vocab_size,
            "sources": [{"name": "own", "lang": "en", "kind": "text"}],
        }
        (draft.path / "tokens.json").write_text(json.dumps(about))
        draft.data["by_source"] = [{"name": "own", "licence": "CC-BY-NC-4.0"}]
    build_index(IndexRecipe(str(root / "tokens")), root / "index")
    with create(root / "model", kind="chat", config={}) as draft:
        for file in plain.iterdir():
            (draft.path / file.name).write_bytes(file.read_bytes())
        draft.add_input("trained_on", root / "tokens")
    return root / "model", root / "index", said
