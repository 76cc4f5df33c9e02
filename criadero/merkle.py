"""Hash trees: one over the chunks of an artifact's files, one over the sorted hashes of a dataset's documents.

Both are the tree of RFC 6962, section 2.1 (leaves and nodes hashed with different first bytes, an odd node goes up
unpaired). The first lets a few chunks of a large folder be checked without reading the rest; the second lets anyone
who holds only its root be shown that a document is, or is not, in the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from criadero.recipe import canonical_json

CHUNK = 1 << 22  # 4 MiB
WIDTH = 32  # bytes of a sha256
EMPTY = hashlib.sha256(b"").digest()  # the root of a tree without leaves


def leaf_hash(data: bytes | memoryview) -> bytes:
    """The hash of a leaf: sha256 of a zero byte and the data."""
    total = hashlib.sha256(b"\0")
    total.update(data)
    return total.digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node: sha256 of a one byte and its two children."""
    return hashlib.sha256(b"\1" + left + right).digest()


def level_above(level: Sequence[bytes]) -> list[bytes]:
    """One level of the tree from the level below it; an odd last node goes up as it is."""
    above = [hashlib.sha256(b"\1" + level[n] + level[n + 1]).digest() for n in range(0, len(level) - 1, 2)]
    if len(level) % 2:
        above.append(level[-1])
    return above


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes."""
    level = leaves
    while len(level) > 1:
        level = level_above(level)
    return level[0] if level else EMPTY


def split_hashes(packed: bytes) -> list[bytes]:
    """Hashes that lie end to end, one by one."""
    return [packed[at : at + WIDTH] for at in range(0, len(packed), WIDTH)]


# -- the chunks of files ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileHash:
    """What one pass over a file gives: its size in bytes, its sha256 (hexadecimal), its chunks' leaf hashes end to end."""

    size: int
    sha256: str
    leaves: bytes


def chunks_of(size: int, chunk: int = CHUNK) -> int:
    """How many chunks a file of `size` bytes has."""
    return -(-size // chunk)


def hash_file(path: str | Path, chunk: int = CHUNK) -> FileHash:
    """Read a file once for both its sha256 and its chunk hashes.

    The two are computed side by side in two threads (hashlib lets go of the interpreter's lock), while a third reads on.
    """
    total, leaves, size, turn = hashlib.sha256(), [], 0, 0
    buffers = [memoryview(bytearray(chunk)), memoryview(b"")]
    with open(path, "rb", buffering=0) as file:
        view = _fill(file, buffers[0])
        if len(view) < chunk:  # one chunk: no threads
            leaves = [leaf_hash(view)] if len(view) else []
            return FileHash(len(view), hashlib.sha256(view).hexdigest(), b"".join(leaves))
        buffers[1] = memoryview(bytearray(chunk))
        with ThreadPoolExecutor(2) as pool:
            while len(view):
                size += len(view)
                whole, part = pool.submit(total.update, view), pool.submit(leaf_hash, view)
                turn = 1 - turn
                following = _fill(file, buffers[turn])
                leaves.append(part.result())
                whole.result()
                view = following
    return FileHash(size, total.hexdigest(), b"".join(leaves))


def sha256_file(path: str | Path) -> str:
    """``sha256:`` and the hexadecimal digest of a file's bytes."""
    total = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return f"sha256:{total.hexdigest()}"


def _fill(file: FileIO, buffer: memoryview) -> memoryview:
    """Fill the buffer from the file; what was read, which is shorter at the file's end only."""
    at = 0
    while at < len(buffer) and (count := file.readinto(buffer[at:])):
        at += count
    return buffer[:at]


def chunk_leaf(path: Path, number: int, chunk: int = CHUNK) -> bytes:
    """The leaf hash of one chunk, read from the file alone."""
    with open(path, "rb", buffering=0) as file:
        file.seek(number * chunk)
        return leaf_hash(_fill(file, memoryview(bytearray(chunk))))


def folder_root(files: Iterable[tuple[str, int, bytes]]) -> str:
    """``sha256:`` and the root over (path, size, packed chunk hashes) of files, in their order.

    A file's leaf is the canonical JSON of its path, size and the root over its own chunks, so that neither names nor
    borders can be moved.
    """
    leaves = [
        leaf_hash(canonical_json([path, size, tree_root(split_hashes(packed)).hex()])) for path, size, packed in files
    ]
    return "sha256:" + tree_root(leaves).hex()


# -- sorted hashes, with proofs ---------------------------------------------------------------------------------------


def sorted_root(count: int, tree: bytes) -> str:
    """``sha256:`` and the root of a sorted set: its size is bound to the tree, so that positions in it can be proved."""
    return "sha256:" + hashlib.sha256(b"\2" + count.to_bytes(8, "big") + tree).hexdigest()


def set_root(members: Iterable[bytes]) -> str:
    """The root over a set of 32-byte hashes: sorted, each once."""
    ordered = sorted(set(members))
    return sorted_root(len(ordered), tree_root([leaf_hash(one) for one in ordered]))


def path_from(index: int, leaves: list[tuple[int, bytes]], count: int, siblings: Iterable[bytes]) -> bytes:
    """The tree's root, computed from one leaf hash, or two neighbours, and the siblings on the way up.

    `leaves` are (position, leaf hash) in order, `index` the first position. Siblings are taken left before right, level by
    level, where the known nodes lack them. ValueError when there are too few or too many, or positions are out of range.
    """
    known = dict(leaves)
    if not known or min(known) != index or max(known) >= count or max(known) - index > 1:
        raise ValueError("positions out of range")
    given, size = iter(siblings), count
    while size > 1:
        for position in missing_siblings(known, size):
            if (one := next(given, None)) is None:
                raise ValueError("too few siblings")
            known[position] = one
        above = {}
        for position in {position // 2 for position in known}:
            left, right = known[2 * position], known.get(2 * position + 1)
            above[position] = left if right is None else node_hash(left, right)
        known, size = above, (size + 1) // 2
    if next(given, None) is not None:
        raise ValueError("too many siblings")
    return known[0]


def missing_siblings(known: Iterable[int], size: int) -> list[int]:
    """The positions of a level that are needed, besides the known ones, to compute the level above."""
    have = set(known)
    return sorted({position ^ 1 for position in have if position ^ 1 < size} - have)
