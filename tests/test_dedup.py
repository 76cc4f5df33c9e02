"""Deduplication against exact Jaccard similarity, computed with Python sets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from criadero.data import dedup
from criadero.data.documents import Document
from criadero.data.filters import Tally


def document(text: str, name: str = "1", **meta: object) -> Document:
    return Document(name, text, "en", "s", "CC0-1.0", meta)


def grams(text: str, size: int = 5) -> set[tuple[str, ...]]:
    words = dedup.key(text).split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def jaccard(a: str, b: str) -> float:
    return len(grams(a) & grams(b)) / max(len(grams(a) | grams(b)), 1)


def variants(seed: int, words: int = 400) -> tuple[str, list[str]]:
    """A text and copies of it with 0, 1, 2, 4 ... 128 words replaced."""
    rng = random.Random(seed)
    base = [f"w{rng.randrange(5000)}" for _ in range(words)]
    copies = []
    for changes in (0, 1, 2, 4, 8, 16, 32, 64, 128):
        copy = list(base)
        for i in rng.sample(range(words), changes):
            copy[i] = f"x{rng.randrange(10**9)}"
        copies.append(" ".join(copy))
    return " ".join(base), copies


def test_exact_ignores_case_space_and_punctuation_only() -> None:
    tally = Tally()
    texts = ["Hola, mundo.", "hola   MUNDO!", "Hola, mundos.", "ﬁn", "fin"]
    assert [d.text for d in dedup.exact(map(document, texts), tally)] == ["Hola, mundo.", "Hola, mundos.", "ﬁn"]
    assert tally.by_reason("s") == {"duplicate": 2}


def test_minhash_estimates_jaccard() -> None:
    """Each of the 128 minima agrees with probability J: the mean error over many pairs stays within what that gives."""
    minhash = dedup.MinHash()
    errors = []
    for seed in range(10):
        base, copies = variants(seed)
        signature = minhash.signature(base)
        for copy in copies:
            true = jaccard(base, copy)
            error = dedup.similarity(signature, minhash.signature(copy)) - true
            assert abs(error) <= 5 * max((true * (1 - true) / 128) ** 0.5, 1e-9)
            errors.append(error)
    assert abs(float(np.mean(errors))) < 0.01


def test_near_finds_what_exact_jaccard_finds() -> None:
    """Of random pairs: every one above 0.9 is removed, none below 0.5, as by comparing all pairs of sets."""
    for seed in range(20):
        base, copies = variants(seed)
        for copy in copies:
            removed = len(list(dedup.near([document(base), document(copy)], Tally()))) == 1
            true = jaccard(base, copy)
            if true > 0.9:
                assert removed
            if true < 0.5:
                assert not removed


def test_near_on_real_text_against_all_pairs(shared: Path) -> None:
    """OneStopEnglish rewrites each article twice: what is removed and kept agrees with brute force on all pairs."""
    from criadero.data.documents import read_rows

    rows = [
        row["text"]
        for _, row in read_rows(shared / "pretrain/small_clean_en.jsonl.zst")
        if "OneStopEnglish" in row["src"]
    ][:160]
    documents = [document(text, str(n)) for n, text in enumerate(rows)]
    kept = {int(d.id) for d in dedup.near(documents, Tally(), threshold=0.7)}
    sets = [grams(text) for text in rows]
    for n in range(len(rows)):
        best = max((len(sets[n] & sets[m]) / max(len(sets[n] | sets[m]), 1) for m in kept if m < n), default=0.0)
        if best > 0.85:
            assert n not in kept
        if best < 0.55:
            assert n in kept


def test_order_of_words_counts_and_short_texts_work() -> None:
    minhash = dedup.MinHash()

    def alike(a: str, b: str) -> float:
        return dedup.similarity(minhash.signature(a), minhash.signature(b))

    assert alike("a b c d e f", "f e d c b a") == 0.0
    assert alike("hola", "Hola!") == 1.0
    assert alike("", "hola") == 0.0
    assert len(list(dedup.near([document(""), document("hola"), document("adiós")], Tally()))) == 3


def test_signature_of_a_long_text_is_that_of_its_pieces() -> None:
    text = " ".join(f"w{i}" for i in range(5000))
    minhash = dedup.MinHash()
    x = dedup.shingles(text)
    whole = ((minhash.a[:, None] * x[None, :] + minhash.b[:, None]) >> np.uint64(32)).min(axis=1).astype(np.uint32)
    assert (minhash.signature(text) == whole).all()


def test_paragraphs_find_a_book_cut_at_other_places() -> None:
    lines = [f"This is sentence {n} of the book, " + " ".join(f"word{n}x{i}" for i in range(12)) for n in range(40)]
    first, second = "\n\n".join(lines[:20]), "\n\n".join(lines[20:])
    shifted = "\n\n".join([*lines[10:30]])
    mostly_new = "\n\n".join([lines[0], *(line.replace("word", "other") for line in lines[:10])])
    tally = Tally()
    kept = list(dedup.paragraphs(map(document, [first, second, shifted, mostly_new]), tally))
    assert [d.text for d in kept] == [first, second, mostly_new.split("\n\n", 1)[1]]
    assert tally.by_reason("s") == {"repeated_paragraphs": 1}
    assert tally.changes("s") == {"paragraphs_cut": 1}
    chat = document(first, messages=[{"role": "user", "content": first}])
    assert list(dedup.paragraphs([document(first), chat], Tally()))[1] == chat
