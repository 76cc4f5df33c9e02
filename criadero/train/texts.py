"""Plain documents to examples of which every token is learned: continued pretraining as a kind of tuning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from criadero.chat import Example
from criadero.data.documents import read_documents
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """One document and where it stands."""

    text: str
    place: str


def read_texts(path: Path, split: str, *, skip_bad: bool) -> tuple[list[Text], list[str]]:
    """The documents of a file or folder (.txt, .md, or rows with ``text``), or of a ``dataset`` artifact's split, and the complaints
    about bad rows. UserError when there are none."""
    bad: list[str] = []
    sealed = path.is_dir() and (path / "passport.json").is_file()
    files = sorted(path.glob(f"{split}-*.jsonl.zst")) if sealed else [path]
    found = [
        Text(document.text, document.id)
        for file in files
        for document in read_documents(file, source="", licence="", skip_bad=skip_bad, bad=bad)
    ]
    if not found:
        raise UserError(f"{path}: no document in it; give text or Markdown files, or rows with a field 'text'")
    return found, bad


def keep_apart(texts: Sequence[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """A share of the documents kept apart by a hash of their text, so that equal ones fall on the same side."""
    kept: list[Text] = []
    apart: list[Text] = []
    for one in texts:
        number = int.from_bytes(hashlib.sha256(f"{seed}\n{one.text.strip()}".encode()).digest()[:8], "big")
        (apart if number < share * 2**64 else kept).append(one)
    return kept, apart


def pieces_of(text: str, tokenizer: Tokenizer, length: int) -> list[Example]:
    """A document as examples of at most ``length`` tokens. A piece begins with the token that the one before it ended with, so
    that every token is predicted, once; the last one ends with EOS where the vocabulary has it."""
    ids = tokenizer.encode(text, bos=tokenizer.bos_id is not None, eos=tokenizer.eos_id is not None)
    starts = range(0, max(1, len(ids) - 1), length - 1)
    parts = [ids[start : start + length] for start in starts]
    return [Example(part, [False] + [True] * (len(part) - 1)) for part in parts if len(part) > 1]
