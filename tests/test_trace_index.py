"""The index of training tokens: every count and length against going through the tokens one by one."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from criadero.errors import UserError
from criadero.trust.grams import GRAM, blocks_for, filter_of, hashes, in_runs, shards_with
from criadero.trust.index import cut, write_documents, write_index
from criadero.trust.search import Index
from criadero.trust.trace import long_matches

pytest.importorskip("pydivsufsort", reason="criadero[trace] is not installed")
BOS, EOS = 0, 1


def index_of(folder: Path, texts: list[list[int]], vocab: int, *, shard_bytes: int = 1 << 20) -> Index:
    """An index of documents [bos, text, eos], without tokenizer and passport."""
    folder.mkdir(parents=True)
    ids: list[int] = []
    borders = []
    for n, text in enumerate(texts):
        start = len(ids)
        ids += [BOS, *text, EOS]
        borders.append((start, len(ids), n % 2))
    table = np.asarray(borders, np.uint64)
    array = np.asarray(ids, np.uint16 if vocab < 65536 else np.uint32)
    sources = [{"name": name, "lang": "en", "kind": "text"} for name in ("a", "b")]
    rows = write_documents(folder, table, sources, [{"name": "a", "licence": "CC0-1.0"}], None)
    about = write_index(folder, array, table[:, :2], vocab, (BOS, EOS), shard_bytes=shard_bytes)
    return Index(folder, about | rows)


def some_texts(seed: int, letters: int, n: int = 60) -> list[list[int]]:
    """Texts of few letters, so that long sequences come again, and some copies of whole parts."""
    random = np.random.default_rng(seed)
    texts = [random.integers(2, 2 + letters, random.integers(1, 90)).tolist() for _ in range(n)]
    for _ in range(n // 3):
        source, target = (texts[int(random.integers(n))] for _ in range(2))
        target[: len(target) // 2] = source
    return texts


def brute(texts: list[list[int]], part: list[int]) -> int:
    k = len(part)
    return sum(text[i : i + k] == part for text in texts for i in range(len(text) - k + 1))


def brute_longest(texts: list[list[int]], query: list[int], start: int) -> int:
    best = 0
    for text in texts:
        for i in range(len(text)):
            k = 0
            while i + k < len(text) and start + k < len(query) and text[i + k] == query[start + k]:
                k += 1
            best = max(best, k)
    return best


@pytest.mark.parametrize(("vocab", "letters", "shard_bytes"), [(300, 3, 1 << 20), (300, 3, 500), (40_000, 900, 400)])
@pytest.mark.parametrize("wide", [False, True])
def test_counts_and_lengths_are_those_of_going_through_the_tokens(
    tmp_path: Path, vocab: int, letters: int, shard_bytes: int, wide: bool
) -> None:
    texts = some_texts(letters, letters)
    if wide:  # tokens of 4 bytes, numbers on both sides of 65,536
        vocab, shard_bytes = vocab + 90_000, shard_bytes * 2
        texts = [[token * 97 if token % 2 else token for token in text] for text in texts]
    index = index_of(tmp_path / "index", texts, vocab, shard_bytes=shard_bytes)
    assert (len(index.sizes) > 3) == (shard_bytes < 2000)
    random = np.random.default_rng(7)
    parts = [
        text[a : a + int(random.integers(1, 40))] for text in texts for a in random.integers(0, len(text), 2).tolist()
    ]
    parts += [[*part[:-1], 2 + letters] for part in parts[:20]]  # its last token never occurs
    for part in parts:
        assert index.count(part) == brute(texts, part)
        found = index.positions(index.find(part))
        assert all(index.tokens[at : at + len(part)].tolist() == part for at in found.tolist())
        assert len(found) == brute(texts, part)
    query = [*texts[3][5:40], 5, *texts[9], EOS, *texts[4][:20], 2 + letters, *texts[5][3:]]
    expected = [brute_longest(texts, query, start) for start in range(len(query))]
    where = [start for start, token in enumerate(query) if token != EOS]
    end = query.index(EOS)
    bounded = [min(expected[start], end - start) if start < end else expected[start] for start in where]
    assert index.longest(query, where).tolist() == bounded
    assert index.longest(query, [end]).tolist() == [0]
    for length in (1, 2, 5, 17):
        counts = index.counts(query, range(len(query)), length)
        for start in where:
            part = query[start : start + length]
            assert counts[start] == (brute(texts, part) if len(part) == length and EOS not in part else 0)


def test_extending_a_place_token_by_token_is_finding_the_whole(tmp_path: Path) -> None:
    texts = some_texts(1, 3)
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=700)
    places = index.find(texts[2][:1])
    for depth in range(1, min(20, len(texts[2]))):
        places = index.extend(places, depth, texts[2][depth])
        assert places == index.find(texts[2][: depth + 1])
    assert index.extend(index.find(texts[2][:1]), 1, EOS) == []


def test_a_document_of_every_position(tmp_path: Path) -> None:
    texts = some_texts(2, 4, n=600)  # names stand in several compressed blocks
    index = index_of(tmp_path / "index", texts, 300)
    borders = index.borders.tolist()
    assert [b - a - 2 for a, b in pairwise(borders)] == [len(text) for text in texts]
    for number in (0, 1, 255, 256, 599):
        place = index.document(number)
        assert (place.number, place.name) == (number, f"{'ab'[number % 2]} #{number}")
        assert place.licence == ("CC0-1.0", "unknown")[number % 2]
        assert index.document_of([place.start, place.end - 1]).tolist() == [number, number]
    with pytest.raises(IndexError):
        index.document(600)


def test_a_sequence_that_no_index_can_hold(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", [[2, 3, 4], [5]], 300)
    assert index.count([2, 3, 4]) == 1
    assert index.count([EOS]) == 0
    assert index.count([4, EOS]) == 0
    assert index.count([2] * 1000) == 0
    assert index.longest([2]).tolist() == [1]
    with pytest.raises(UserError, match="nothing to look for"):
        index.find([])
    for ids in ([300], [-1], [70_000]):
        with pytest.raises(UserError, match="is not one of the 300"):
            index.find(ids)
    for intervals in ([], index.find([2])):
        assert len(index.positions(intervals)) == len(intervals)


def test_a_million_tokens_are_looked_for_in_pieces(tmp_path: Path) -> None:
    texts = some_texts(3, 3)
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=1000)
    one = texts[7] + [299]
    query = one * (100_000 // len(one))
    got = index.longest(query)
    assert got.reshape(-1, len(one)).tolist() == [got[: len(one)].tolist()] * (len(query) // len(one))
    assert got[0] >= len(texts[7])


def test_shards_end_where_documents_end() -> None:
    table = np.array([[0, 10], [10, 15], [15, 40], [40, 41]], np.uint64)
    assert cut(table, 100) == [(0, 41)]
    assert cut(table, 25) == [(0, 15), (15, 25), (40, 1)]
    even = np.array([[n * 10, n * 10 + 10] for n in range(21)], np.uint64)
    assert cut(even, 200) == [
        (0, 110),
        (110, 100),
    ]  # not 200 and 10: a filter is as large as the largest shard asks for
    with pytest.raises(UserError, match="document 2 has 25 tokens"):
        cut(table, 20)


def test_few_of_many_places(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", [[2] * 50 for _ in range(20)], 300, shard_bytes=300)
    intervals = index.find([2, 2])
    assert sum(hi - lo for _, lo, hi in intervals) == 20 * 49
    few = index.positions(intervals, 10)
    assert len(set(few.tolist())) == 10
    assert set(few.tolist()) <= set(index.positions(intervals).tolist())


@pytest.mark.parametrize("shards", [1, 5])
def test_the_filter_never_denies_a_gram_and_seldom_affirms_another(tmp_path: Path, shards: int) -> None:
    texts = [np.random.default_rng(n).integers(2, 200, 400).tolist() for n in range(40)]
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=(1 << 20) if shards == 1 else 2 * 402 * 8)
    assert len(index.sizes) == shards
    table = (tmp_path / "index" / "grams.bin").read_bytes()
    right = np.zeros(shards, int)
    for shard, (start, size) in enumerate(zip(index.starts.tolist(), index.sizes.tolist(), strict=True)):
        ids = index.tokens[start : start + size].astype(np.int64)
        present = index._present(hashes(ids))
        assert present[:, shard].all()
        right += present.sum(0)
        one = filter_of(ids, index._blocks)  # what stands in the file, between the other shards'
        assert np.frombuffer(table, np.uint8).reshape(-1, shards, 64)[:, shard].tobytes() == one.tobytes()
        for at in range(0, size - GRAM + 1, 50):  # one at a time, in whole numbers of Python
            assert (
                shards_with(ids[at : at + GRAM].tolist(), index._blocks, shards, table)
                == np.flatnonzero(present[at]).tolist()
            )
    absent = index._present(hashes(np.random.default_rng(99).integers(200, 300, 10_000)))
    assert absent.mean() < 0.12
    assert index._blocks == blocks_for(int(index.sizes.max()))
    assert len(hashes(np.arange(4))) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 46])
def test_runs_are_those_of_going_through_them(length: int) -> None:
    random = np.random.default_rng(length)
    for n in (0, 1, 5, 60):
        present = random.random((n, 3)) < 0.8
        expected = np.zeros_like(present)
        for begin in range(n - length + 1):
            expected[begin : begin + length] |= present[begin : begin + length].all(0)
        assert (in_runs(present, length) == expected).all()


@pytest.mark.parametrize("shard_bytes", [1 << 20, 900])
def test_an_index_without_a_filter_says_the_same(tmp_path: Path, shard_bytes: int) -> None:
    texts = some_texts(11, 6)
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=shard_bytes)
    (tmp_path / "index" / "grams.bin").unlink()  # as those were that the first version built
    old = Index(tmp_path / "index", {key: value for key, value in index.about.items() if key != "grams"})
    query = [
        *texts[3][:40],
        5,
        *texts[9],
        EOS,
        *texts[4][:20],
        2,
        *texts[5][3:],
        *np.random.default_rng(1).integers(2, 8, 300).tolist(),
    ]
    for at_least in (5, 8, 9, 20):
        assert long_matches(index, query, at_least).tolist() == long_matches(old, query, at_least).tolist()
        starts = np.arange(len(query))
        assert index.counts(query, starts, at_least).tolist() == old.counts(query, starts, at_least).tolist()
    for start in range(0, len(query) - 12, 3):
        for size in (3, 5, 6, 12):
            assert index.find(query[start : start + size]) == old.find(query[start : start + size])
    assert old.covering(query, 8) is None
    covering = index.covering(query, 8)
    assert covering is not None
    assert covering.shape == (len(query), len(index.sizes))


def test_a_filter_of_a_newer_version_is_a_line(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", some_texts(2, 3), 300)
    with pytest.raises(UserError, match="newer version"):
        Index(tmp_path / "index", index.about | {"grams": {**index.about["grams"], "tokens": 6}})


@pytest.mark.parametrize("name", ["tokens.bin", "suffixes.bin", "keys.bin", "documents.bin", "rows.bin", "grams.bin"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    index = index_of(tmp_path / "index", some_texts(5, 3), 300)
    bad = shutil.copytree(tmp_path / "index", tmp_path / "bad")
    with (bad / name).open("r+b") as file:
        file.truncate((bad / name).stat().st_size - 3)
    with pytest.raises(UserError, match=rf"cut short: {name}"):
        Index(bad, index.about)
    (bad / name).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        Index(bad, index.about)


def test_pointers_that_lead_nowhere_are_a_line_and_not_a_crash(tmp_path: Path) -> None:
    index = index_of(tmp_path / "index", some_texts(5, 3), 300)
    bad = tmp_path / "index"
    (bad / "suffixes.bin").write_bytes(b"\xff" * (bad / "suffixes.bin").stat().st_size)
    damaged = Index(bad, index.about)
    with pytest.raises(UserError, match="damaged"):
        damaged.longest([2, 3, 4, 2])
    damaged.find([2, 3, 4, 2])  # bisects over nothing, but reads inside the file
    (bad / "names.bin").write_bytes(b"no zstd")
    with pytest.raises(UserError, match=r"names\.bin is damaged"):
        damaged.document(0)
    (bad / "unigrams.bin").write_bytes(bytes(8 * 300))
    with pytest.raises(UserError, match=r"unigrams\.bin is damaged"):
        Index(bad, index.about)
