"""Measures on texts that several stages share: words, ROUGE-L, words that carry meaning."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from criadero.data.filters import VOTES as STOP_VOTES

_TOKEN = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words and numbers, folded to lower case."""
    return _TOKEN.findall(unicodedata.normalize("NFC", text).casefold())


def positions(a: Sequence[str]) -> dict[str, int]:
    """Where each word stands, as the bits of a number."""
    masks: dict[str, int] = {}
    for i, word in enumerate(a):
        masks[word] = masks.get(word, 0) | 1 << i
    return masks


def lcs(a: dict[str, int], size: int, b: Sequence[str]) -> int:
    """The length of the longest common subsequence of the ``size`` words whose `positions` are ``a`` and of ``b``, exactly.

    Bit-parallel (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): bit i of `row` is 0 where the LCS of the first
    ``i + 1`` words is one longer than that of the first ``i``; one addition of long integers for each element of `b`.
    """
    full = (1 << size) - 1
    row = full
    for word in b:
        match = a.get(word)
        if match:
            both = row & match
            row = ((row + both) | (row - both)) & full
    return size - row.bit_count()


class Pool:
    """Texts seen so far, asked for one that is too alike by ROUGE-L's F1 (Lin 2004, section 3.1, beta = 1): Self-Instruct's filter
    of new instructions."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.entries: list[tuple[list[str], Counter[str]]] = []
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        listed = words(text)
        self.entries.append((listed, Counter(listed)))

    def alike(self, text: str, threshold: float) -> bool:
        """Whether some entry has a ROUGE-L of `threshold` or more with `text`."""
        mine = words(text)
        if not mine:
            return False
        counts, masks, size = Counter(mine), positions(mine), len(mine)
        for theirs, theirs_counts in self.entries:
            total = size + len(theirs)
            # the common subsequence is no longer than the shorter text, nor than what the two have in common in any order
            if 2 * min(size, len(theirs)) < threshold * total:
                continue
            few, many = (counts, theirs_counts) if len(counts) < len(theirs_counts) else (theirs_counts, counts)
            if 2 * sum(min(n, many[word]) for word, n in few.items()) < threshold * total:
                continue
            if 2 * lcs(masks, size, theirs) >= threshold * total:
                return True
        return False


def bare(word: str) -> str:
    """A word without accents."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))


def content_words(text: str) -> list[str]:
    """Words that carry meaning: numbers, and words of three letters and more that are no function words."""
    return [w for w in words(text) if w.isdigit() or (len(w) > 2 and w not in STOP_VOTES)]


def covered(text: str, by: str) -> tuple[float, list[str]]:
    """The share of `text`'s content words that `by` has too, and the words that it has not; 1.0 when there are none.

    Two forms count as one word when they begin alike for at least four letters and three fifths of the longer one: a rough rule,
    but one for Spanish and English (``abre`` and ``abren``, ``deliver`` and ``delivery``). Numbers have to be the same.
    """
    known = {bare(w) for w in words(by)}
    beginnings: dict[str, list[str]] = {}
    for word in known:
        beginnings.setdefault(word[:4], []).append(word)
    mine = content_words(text)
    missing = [w for w in mine if not _has(bare(w), known, beginnings)]
    return (1 - len(missing) / len(mine) if mine else 1.0), missing


def _has(word: str, known: set[str], beginnings: dict[str, list[str]]) -> bool:
    if word in known:
        return True
    if len(word) < 4 or word.isdigit():
        return False
    return any(_common(word, other) >= 0.6 * max(len(word), len(other)) for other in beginnings.get(word[:4], ()))


def _common(a: str, b: str) -> int:
    """The length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
