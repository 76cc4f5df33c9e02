"""Which documents a dataset holds: one row a document, and their sorted hashes, from which membership can be proved.

``documents.jsonl.zst`` has a row for every document of every split: id, source, licence, sha256 of its normal form, language,
bytes, split, shard and byte offset in the unpacked shard. ``documents.sha256`` holds the hashes of the training documents,
sorted, each once, with a level of the hash tree over them, so that a proof reads a few kilobytes. Only exact copies of a
document, up to its normal form, share its hash: near copies are the training-data index's business.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from criadero.data.documents import Document
from criadero.data.filters import normalise_text
from criadero.errors import UserError
from criadero.merkle import (
    EMPTY,
    WIDTH,
    leaf_hash,
    level_above,
    missing_siblings,
    sorted_root,
    split_hashes,
    tree_root,
)  # fmt: skip

ROWS, SET = "documents.jsonl.zst", "documents.sha256"
NORMAL_FORM = "nfc-quotes-spaces/1"  # the name under which the passport says what was hashed
_MAGIC, _HEAD, _BLOCK = b"CRDOCS1\n", 16, 6  # 2**6 leaves under each stored node


def normal_form(text: str) -> str:
    """The text that is hashed: NFC, straight quotes, no control or zero-width characters, each run of blanks one space."""
    return " ".join(normalise_text(text, plain_quotes=True)[0].split())


def document_hash(text: str) -> bytes:
    """sha256 of the normal form: how a document is named in tables, ledgers and proofs."""
    return hashlib.sha256(normal_form(text).encode()).digest()


class DocumentTable:
    """Write the rows as a dataset is built; :meth:`close` writes the sorted hashes and gives what the passport says."""

    def __init__(self, folder: Path) -> None:
        import zstandard

        self.folder, self.rows, self.training = folder, 0, bytearray()
        self.file = zstandard.ZstdCompressor(level=9).stream_writer((folder / ROWS).open("wb"), closefd=True)

    def add(self, document: Document, *, split: str, shard: str, offset: int) -> None:
        """One document, written at `offset` bytes of the unpacked `shard`."""
        hashed = document_hash(document.text)
        if split == "train":
            self.training += hashed
        self.rows += 1
        row = {
            "id": document.id, "source": document.source, "licence": document.licence, "sha256": hashed.hex(),
            "lang": document.lang, "bytes": len(document.text.encode()), "split": split, "shard": shard, "offset": offset,
        }  # fmt: skip
        self.file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")

    def close(self) -> dict[str, Any]:
        """``document_rows``, ``documents`` (different ones, in training), ``doc_root``, ``normal_form``."""
        self.file.close()
        members = sorted({bytes(one) for one in split_hashes(bytes(self.training))})
        root = write_set(self.folder / SET, members)
        return {"document_rows": self.rows, "documents": len(members), "doc_root": root, "normal_form": NORMAL_FORM}


def read_table(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(FILE:LINE, row)`` of a dataset's document table."""
    from criadero.data.documents import read_rows

    return read_rows(folder / ROWS)


# -- the sorted set ---------------------------------------------------------------------------------------------------


def write_set(path: Path, members: Sequence[bytes]) -> str:
    """Write sorted, different 32-byte hashes, then the tree's nodes of height 6, and return the set's root."""
    level: Sequence[bytes] = [leaf_hash(one) for one in members]
    for _ in range(_BLOCK):
        if len(level) > 1:
            level = level_above(level)
    with path.open("wb") as file:
        file.write(_MAGIC + len(members).to_bytes(8, "big"))
        file.writelines(members)
        file.writelines(level)
    return sorted_root(len(members), tree_root(level))


class DocumentSet:
    """A dataset's ``documents.sha256``, opened: membership, neighbours and proofs. UserError for a file that is not one."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        self.count = int.from_bytes(self.data[8:_HEAD], "big")
        blocks = -(-self.count // 2**_BLOCK)
        if self.data[:8] != _MAGIC or len(self.data) != _HEAD + WIDTH * (self.count + blocks):
            raise UserError(f"{path}: is not a sorted set of document hashes, or is cut short")
        self.levels = [split_hashes(self.data[_HEAD + WIDTH * self.count :])]  # that height and up
        while len(self.levels[-1]) > 1:
            self.levels.append(level_above(self.levels[-1]))
        self.root = sorted_root(self.count, self.levels[-1][0] if self.count else EMPTY)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> bytes:
        if not 0 <= position < self.count:
            raise IndexError(position)
        at = _HEAD + WIDTH * position
        return self.data[at : at + WIDTH]

    def place(self, member: bytes) -> int:
        """The position of a hash, or where it would stand."""
        return bisect_left(self, member)

    def siblings(self, positions: Iterable[int]) -> list[bytes]:
        """The hashes that :func:`criadero.merkle.path_from` needs besides these leaves, in its order."""
        known, found = set(positions), []
        size, height = self.count, 0
        below: dict[int, bytes] = {}  # the nodes of this height in the blocks concerned
        if known:
            low = min(known) >> _BLOCK << _BLOCK
            high = min(self.count, ((max(known) >> _BLOCK) + 1) << _BLOCK)
            below = {n: leaf_hash(self[n]) for n in range(low, high)}
        while size > 1:
            for position in missing_siblings(known, size):
                found.append(below[position] if height < _BLOCK else self.levels[height - _BLOCK][position])
            known = {position // 2 for position in known}
            if height < _BLOCK:
                first = min(below)
                below = dict(enumerate(level_above([below[n] for n in sorted(below)]), first // 2))
            size, height = (size + 1) // 2, height + 1
        return found


# -- the ledger of removals -------------------------------------------------------------------------------------------


def read_removals(path: str | Path) -> dict[bytes, dict[str, Any]]:
    """The rows of a ledger by document hash: ``sha256``, ``reason``, ``date``, ``by``. UserError naming the line."""
    from criadero.data.documents import read_rows

    found = {}
    for where, row in read_rows(path):
        try:
            hashed = bytes.fromhex(str(row["sha256"]).removeprefix("sha256:"))
            if len(hashed) != WIDTH:
                raise ValueError
        except (KeyError, ValueError):
            raise UserError(f"{where}: 'sha256' must be the 64 hexadecimal digits of a document's hash") from None
        absent = [name for name in ("reason", "date", "by") if not str(row.get(name) or "").strip()]
        if absent:
            raise UserError(f"{where}: {absent[0]!r} must say why, when and by whom a document is removed")
        found[hashed] = row
    return found


def add_removal(path: Path, text: str, *, reason: str, by: str, date: str) -> Mapping[str, str]:
    """Sign a document off: append its hash, the reason and the name to a ledger. UserError when it stands there already."""
    hashed = document_hash(text)
    if path.exists() and hashed in read_removals(path):
        raise UserError(f"{path}: the document {hashed.hex()[:12]} is listed already")
    row = {"sha256": hashed.hex(), "reason": reason.strip(), "date": date, "by": by.strip()}
    if not row["reason"] or not row["by"]:
        raise UserError("a removal needs a reason and the name of who signs it off: --reason and --by")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row
