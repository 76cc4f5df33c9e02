"""Deduplication: exact, repeated paragraphs, and near duplicates by MinHash. Each is a filter as in ``filters.py``.

Keeps the first of a group in the order given: put the cleaner source first.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from criadero.data.documents import Document
from criadero.data.filters import Tally

_NOT_WORDS = re.compile(r"[\W_]+")
_SEED = 20_240_229


def key(text: str) -> str:
    """What ``exact`` compares: NFKC, lower case, runs of anything but letters and digits made one blank."""
    return _NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def exact(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Remove documents whose ``key`` was seen (``duplicate``). 16 bytes of sha256 a document are kept in memory."""
    seen: set[bytes] = set()
    for document in documents:
        digest = _digest(key(document.text))
        if digest in seen:
            tally.drop(document, "duplicate")
        else:
            seen.add(digest)
            yield document


def paragraphs(
    documents: Iterable[Document], tally: Tally, *, min_words: int = 12, min_left: float = 0.5
) -> Iterator[Document]:
    """Take out paragraphs (lines) of ``min_words`` words and more that an earlier document had (CCNet, Wenzek et al. 2020,
    arXiv 1911.00359, section 3.1: hashes of paragraphs).

    It finds the same book cut into pieces at other places, which MinHash of whole documents cannot. A document of which less than
    ``min_left`` of its characters is left is removed (``repeated_paragraphs``). Chats are passed through: a stock answer is no duplicate.
    """
    seen: set[bytes] = set()
    for document in documents:
        if "messages" in document.meta:
            yield document
            continue
        kept, new, cut = [], [], 0
        for line in document.text.split("\n"):
            words = key(line)
            if words.count(" ") + 1 >= min_words:
                digest = _digest(words)
                if digest in seen:
                    cut += len(line)
                    continue
                new.append(digest)
            kept.append(line)
        if cut > (1 - min_left) * len(document.text):
            tally.drop(document, "repeated_paragraphs")
            continue
        seen.update(new)
        if cut:
            tally.change(document, "paragraphs_cut")
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
            yield replace(document, text=text)
        else:
            yield document


# --- near duplicates -------------------------------------------------------------------------------------------------


def shingles(text: str, size: int = 5) -> np.ndarray:
    """Hashes (uint64 ``[n]``, unique) of the word ``size``-grams of ``key(text)``; a shorter text is one shingle."""
    words = key(text).split()
    if not words:
        return np.zeros(0, np.uint64)
    ids = np.fromiter((_word_hash(word) for word in words), np.uint64, len(words))
    size = min(size, len(words))
    total = np.zeros(len(words) - size + 1, np.uint64)
    for i in range(size):
        # a polynomial of the words' hashes modulo 2**64: the order of words counts
        total = total * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + len(total)]
    return np.unique(_mix(total))


_WORDS: dict[str, int] = {}


def _word_hash(word: str) -> int:
    found = _WORDS.get(word)
    if found is None:
        found = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(_WORDS) < 1_000_000:
            _WORDS[word] = found
    return found


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, so that the high bits depend on all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class MinHash:
    """Signatures of ``bands * rows`` minima; two texts share a band with probability ``1 - (1 - J**rows)**bands``.

    Broder 1997; the hash family is multiply-shift (Dietzfelbinger et al. 1997): the high 32 bits of ``a*x + b`` modulo 2**64, a odd.
    """

    def __init__(self, *, bands: int = 16, rows: int = 8, size: int = 5, seed: int = _SEED) -> None:
        random = np.random.default_rng(seed)
        self.bands, self.rows, self.size = bands, rows, size
        self.a = random.integers(0, 2**63, bands * rows, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.b = random.integers(0, 2**63, bands * rows, dtype=np.uint64)

    def signature(self, text: str) -> np.ndarray:
        """uint32 ``[bands * rows]``. An empty text has the signature of all ones."""
        least = np.full(len(self.a), 2**32 - 1, np.uint32)
        x = shingles(text, self.size)
        for start in range(0, len(x), 2048):  # in pieces, so that a book does not take gigabytes
            hashed = (self.a[:, None] * x[None, start : start + 2048] + self.b[:, None]) >> np.uint64(32)
            np.minimum(least, hashed.min(axis=1).astype(np.uint32), out=least)
        return least

    def band_keys(self, signature: np.ndarray) -> list[bytes]:
        return [bytes([i]) + signature[i * self.rows : (i + 1) * self.rows].tobytes() for i in range(self.bands)]


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """The share of equal minima: an unbiased estimate of the Jaccard similarity of the shingles."""
    return float((a == b).mean())


def near(
    documents: Iterable[Document],
    tally: Tally,
    *,
    threshold: float = 0.7,
    bands: int = 16,
    rows: int = 8,
    size: int = 5,
) -> Iterator[Document]:
    """Remove documents whose word 5-grams are at least ``threshold`` alike, by estimate, to an earlier kept one (``near_duplicate``).

    With 16 bands of 8 a pair of similarity 0.8 is found with probability 0.95, one of 0.9 always, one of 0.5 in 6 of 100 and then
    refused by the estimate. Memory: about 3 kB a document.
    """
    minhash = MinHash(bands=bands, rows=rows, size=size)
    signatures: list[np.ndarray] = []
    table: dict[bytes, list[int]] = {}
    for document in documents:
        signature = minhash.signature(document.text)
        keys = minhash.band_keys(signature)
        candidates = {n for k in keys for n in table.get(k, ())}
        if _alike(signature, signatures, candidates, threshold):
            tally.drop(document, "near_duplicate")
            continue
        for k in keys:
            table.setdefault(k, []).append(len(signatures))
        signatures.append(signature)
        yield document


def _alike(signature: np.ndarray, others: Sequence[np.ndarray], candidates: Iterable[int], threshold: float) -> bool:
    return any(similarity(signature, others[n]) >= threshold for n in candidates)
