"""The document table of a dataset, its sorted hash tree, and the ledger of removals."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from criadero.artifact import open_artifact, verify
from criadero.data.build import DataRecipe, Source, build_data, read_dataset
from criadero.data.docset import (
    DocumentSet,
    add_removal,
    document_hash,
    normal_form,
    read_removals,
    read_table,
    write_set,
)
from criadero.data.documents import open_binary
from criadero.errors import UserError
from criadero.merkle import leaf_hash, path_from, set_root, sorted_root, tree_root


def rfc6962(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, written down as it stands there: split at the largest power of two."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + rfc6962(leaves[:k]) + rfc6962(leaves[k:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 255, 256, 257, 600])
def test_the_tree_is_that_of_rfc_6962(tmp_path: Path, count: int) -> None:
    members = sorted(hashlib.sha256(str(n).encode()).digest() for n in range(count))
    tree = rfc6962(members)
    assert tree_root([leaf_hash(one) for one in members]) == tree
    assert write_set(tmp_path / "set", members) == sorted_root(count, tree) == set_root(members[::-1] + members)
    one = DocumentSet(tmp_path / "set")
    assert (len(one), list(one), one.root) == (count, members, sorted_root(count, tree))
    for first in {0, count // 2, count - 1}:
        for positions in ((first,), (first, first + 1)):
            if positions[-1] < count:
                leaves = [(n, leaf_hash(members[n])) for n in positions]
                assert path_from(first, leaves, count, one.siblings(positions)) == tree


def test_a_set_that_was_cut_or_is_empty(tmp_path: Path) -> None:
    write_set(tmp_path / "empty", [])
    assert DocumentSet(tmp_path / "empty").root == set_root([])
    write_set(tmp_path / "set", [bytes(32)])
    (tmp_path / "cut").write_bytes((tmp_path / "set").read_bytes()[:-1])
    for name in ("cut", "absent"):
        with pytest.raises(UserError, match=name):
            DocumentSet(tmp_path / name)


def test_the_normal_form_forgives_layout_and_nothing_else() -> None:
    text = "El ni\u00f1o dijo: \u201cHola\u201d.\n\nY se fue."
    same = 'El nin\u0303o   dijo: "Hola".\r\nY se\u200b fue.  '
    assert normal_form(text) == normal_form(same) == 'El ni\u00f1o dijo: "Hola". Y se fue.'
    assert document_hash(text) != document_hash(text.replace("Y", "y"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    draw = random.Random(1)
    words = "the cat and dog of house that is in a very old town with his friends when they had been there".split()  # noqa: SIM905
    texts = [" ".join(draw.choices(words, k=80)) + "." for _ in range(60)]
    rows = [{"id": f"d{n}", "text": text} for n, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def recipe(root: Path, **more: object) -> DataRecipe:
    one = Source("small", "in.jsonl", "CC0-1.0", lang="en")
    settings = {"quality_filter": False, "near_dedup": 0.0, "language_filter": False, "held_out": 0.1}
    return DataRecipe(source=(one,), root=str(root), **settings, **more)  # type: ignore[arg-type]


def test_every_document_has_its_row_and_its_place(source: Path) -> None:
    made = build_data(recipe(source), source / "out")
    rows = [row for _, row in read_table(made.path)]
    data = made.passport["data"]
    assert data["document_rows"] == len(rows) == 60
    for row in rows:
        with open_binary(made.path / row["shard"]) as file:
            file.read(row["offset"])
            there = json.loads(file.readline())
        assert (there["id"], there["source"], there["licence"]) == (row["id"], row["source"], row["licence"])
        assert document_hash(there["text"]).hex() == row["sha256"]
        assert len(there["text"].encode()) == row["bytes"]
        assert row["shard"].startswith(row["split"])
    train = {bytes.fromhex(row["sha256"]) for row in rows if row["split"] == "train"}
    assert data["documents"] == len(train) < 60
    assert data["doc_root"] == set_root(train) == DocumentSet(made.path / "documents.sha256").root
    assert verify(made.path) == []


def test_a_removed_document_is_gone_and_the_dataset_says_so(source: Path) -> None:
    text = json.loads((source / "in.jsonl").read_text().splitlines()[7])["text"]
    ledger = source / "removals.jsonl"
    add_removal(ledger, text.upper(), reason="another", by="Ana", date="2026-11-01")
    add_removal(ledger, "  " + text.replace(" ", "\n", 3), reason="asked by its author", by="Ana", date="2026-11-02")
    with pytest.raises(UserError, match="listed already"):
        add_removal(ledger, text, reason="again", by="Ana", date="2026-11-03")
    assert [row["reason"] for row in read_removals(ledger).values()] == ["another", "asked by its author"]
    made = build_data(recipe(source, removals=str(ledger), keep_removed=True), source / "out")
    everything = [*read_dataset(made.path, "train"), *read_dataset(made.path, "held_out")]
    assert len(everything) == 59
    assert text not in {document.text for document in everything}
    assert made.passport["data"]["removals"] == {"ledger": "removals.jsonl", "listed": 2, "removed": 1}
    assert made.sources()[0]["removed"] == {"removal_request": 1}
    assert (made.path / "removals.jsonl").read_bytes() == ledger.read_bytes()
    assert ("filtered_by", "removals.jsonl") in [(row["relation"], row["name"]) for row in made.inputs]
    with open_binary(made.path / "removed.jsonl.zst") as file:
        assert text.encode() not in file.read()
    assert open_artifact(made.path).passport["data"]["document_rows"] == 59


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"sha256": "ab", "reason": "r", "date": "d", "by": "b"}, "64 hexadecimal digits"),
        ({"reason": "r", "date": "d", "by": "b"}, "sha256"),
        ({"sha256": "00" * 32, "reason": "", "date": "d", "by": "b"}, "'reason' must say"),
    ],
)
def test_a_bad_ledger_is_refused_with_its_line(source: Path, row: dict[str, str], match: str) -> None:
    (source / "removals.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"removals\.jsonl:2.*" + match):
        build_data(recipe(source, removals=str(source / "removals.jsonl")), source / "out")
    assert not (source / "out").exists()
