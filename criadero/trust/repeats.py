"""Text that stands in the training data more than once, to the token (Lee et al. 2022, arXiv 2107.06499, ExactSubstr).

A passage that is repeated is learned by heart sooner. The ranges found are those of every copy but the first: they are
counted, written, and left out when clean tokens are asked for (stage ``unique``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from criadero.artifact import Artifact, create, open_artifact
from criadero.errors import UserError
from criadero.trust.search import Index, open_index, tokens_id

PIECE = 1 << 20  # tokens looked at together


@dataclass(frozen=True)
class Repeats:
    """`ranges` int64 [n, 2]: start and end of the text that stood in an earlier place already, in the order of the index."""

    length: int
    ranges: np.ndarray
    again: int  # tokens that lie in some repeated sequence, the first copies included

    @property
    def tokens(self) -> int:
        """Tokens in `ranges`."""
        return int((self.ranges[:, 1] - self.ranges[:, 0]).sum())


def repeats(index: Index, length: int = 50) -> Repeats:
    """Every sequence of `length` tokens and more that stands at least twice in documents of the index.

    A sequence of `length` covers one of every length/2 positions with length/2 + 1 tokens from there: those are counted, and
    only around the ones that stand twice every position is. UserError for a length below 8.
    """
    if length < 8:
        raise UserError(f"a length of {length} tokens finds common phrases: give 8 or more")
    stride = length // 2
    marks, firsts = [], []
    low: dict[
        tuple[int, int], int
    ] = {}  # the first place of a sequence, by its interval in the first shard that has it
    for begin in range(0, index.size, PIECE):
        end = min(begin + PIECE, index.size)
        # the piece, and enough behind it for the sequences that begin in it
        ids = index.tokens[begin : min(index.size, end + length + stride)].astype(np.int64)
        coarse = np.arange(0, min(end - begin + stride, len(ids)), stride)
        seeds = coarse[index.counts(ids, coarse, length - stride + 1) > 1]
        # those that cover a seed at most stride - 1 tokens from their start
        near = np.unique((seeds[:, None] - np.arange(stride)).ravel())  # [seeds * stride]
        near = near[(near >= 0) & (near < end - begin)]
        lo, hi = index.intervals(ids, near, length)
        twice = (hi - lo).sum(1) > 1
        near, lo, hi = near[twice], lo[twice], hi[twice]
        marks.append(near + begin)
        firsts.append(_first(index, lo, hi, low))
    starts, first = np.concatenate(marks), np.concatenate(firsts)
    again = _join(starts, length)
    return Repeats(length, _join(starts[first != starts], length), int((again[:, 1] - again[:, 0]).sum()))


def _first(index: Index, lo: np.ndarray, hi: np.ndarray, known: dict[tuple[int, int], int]) -> np.ndarray:
    """The first position of each sequence: shards lie in the order of the data, so that of the first shard that has it."""
    out = np.empty(len(lo), np.int64)
    shard = (hi > lo).argmax(1)
    for n, number in enumerate(shard.tolist()):
        key = (number, int(lo[n, number]))
        if key not in known:
            entries = np.arange(key[1], int(hi[n, number]))
            known[key] = int(index.places(entries, np.full(len(entries), number)).min())
        out[n] = known[key]
    return out


def _join(starts: np.ndarray, length: int) -> np.ndarray:
    """int64 [n, 2]: the ranges of `length` from each start (in order), those that touch made one."""
    if not len(starts):
        return np.empty((0, 2), np.int64)
    gaps = np.flatnonzero(np.diff(starts) > length)
    return np.stack([starts[np.append(0, gaps + 1)], starts[np.append(gaps, len(starts) - 1)] + length], 1)


def by_source(index: Index, found: Repeats) -> list[dict[str, Any]]:
    """One row a source: its tokens, and how many of them had stood before."""
    rows: dict[str, dict[str, Any]] = {}
    inside = np.zeros(index.documents, np.int64)
    if len(found.ranges):  # a range lies within one document: no sequence goes across two, but ranges may touch
        for start, end in found.ranges.tolist():
            first, last = index.document_of(np.array([start, end - 1])).tolist()
            for number in range(first, last + 1):
                inside[number] += min(end, int(index.borders[number + 1])) - max(start, int(index.borders[number]))
    sizes = np.diff(index.borders.astype(np.int64))
    for number, row in enumerate(index.about["rows"]):
        mine = index.rows == number
        one = rows.setdefault(row["name"], {"source": row["name"], "documents": 0, "tokens": 0, "repeated": 0})
        one["documents"] += int(mine.sum())
        one["tokens"] += int(sizes[mine].sum())
        one["repeated"] += int(inside[mine].sum())
    return list(rows.values())


def write_ranges(found: Repeats, file: Path) -> None:
    """One JSON list [start, end] a line: tokens from the start of the training split."""
    if file.exists():
        raise UserError(f"{file} exists: choose another name")
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(f"[{start}, {end}]\n" for start, end in found.ranges.tolist())


@dataclass(frozen=True)
class UniqueRecipe:
    """Which tokens to take repeated passages out of."""

    tokens: str = field(metadata={"help": "a tokens artifact"})
    index: str = field(metadata={"help": "its index (criadero data index)"})
    length: int = field(
        default=50, metadata={"help": "take out sequences of so many tokens and more that stood before"}
    )


def build_unique(recipe: UniqueRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """The same tokens without what stood before: a ``tokens`` artifact; documents of which nothing is left go. Counts are
    in its ``data`` and metrics; the held-out split is not touched."""
    tokens, index = open_artifact(recipe.tokens), open_index(recipe.index)
    if tokens_id(open_artifact(recipe.index)) != tokens.id:
        raise UserError(f"{recipe.index} is not an index of {recipe.tokens}: build one (criadero data index)")
    with create(out, kind="tokens", recipe=recipe, overwrite=overwrite) as draft:
        draft.add_input("converted_from", recipe.tokens)
        draft.add_input("contains", recipe.index)
        found = repeats(index, recipe.length)
        about = json.loads((tokens.path / "tokens.json").read_text(encoding="utf-8"))
        dtype = np.dtype(about["dtype"]).newbyteorder("<")
        ids = np.memmap(tokens.path / "train.bin", dtype, "r")
        table = np.load(tokens.path / "train.docs.npy", allow_pickle=False)
        borders, at = [], 0
        counts = [{"documents": 0, "tokens": 0} for _ in about["sources"]]
        with (draft.path / "train.bin").open("wb") as file:
            for (start, end, source), keep in zip(table.tolist(), kept(table, found.ranges), strict=True):
                if int(keep.sum()) <= 2 < end - start:  # bos and eos only
                    continue
                part = ids[start:end][keep]
                file.write(np.ascontiguousarray(part, dtype).tobytes())
                borders.append((at, at + len(part), source))
                at += len(part)
                counts[source]["documents"] += 1
                counts[source]["tokens"] += len(part)
        if not borders:
            raise UserError(f"{recipe.tokens}: nothing is left")
        np.save(draft.path / "train.docs.npy", np.asarray(borders, np.uint64).reshape(-1, 3), allow_pickle=False)
        for name in sorted(file.name for file in tokens.path.iterdir() if file.is_file()):
            if name.startswith(("held_out.", "tokenizer", "special_tokens", "chat_template")):
                (draft.path / name).write_bytes((tokens.path / name).read_bytes())
        removed: dict[str, int] = {}
        for row, count in zip(about["sources"], counts, strict=True):
            removed[row["name"]] = removed.get(row["name"], 0) + row["train"]["tokens"] - count["tokens"]
            share = count["tokens"] / max(1, row["train"]["tokens"])
            row["train"] |= {**count, "bytes": round(row["train"]["bytes"] * share)}
        from criadero.data.pack import by

        about |= {"by_language": by(about["sources"], "lang"), "by_kind": by(about["sources"], "kind")}
        (draft.path / "tokens.json").write_text(
            json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        draft.data["by_source"] = [
            {
                **row, "repeated_tokens": removed.get(row["name"], 0),
                "tokens": row.get("tokens", 0) - removed.get(row["name"], 0),
                "train_tokens": row.get("train_tokens", 0) - removed.get(row["name"], 0),
            }
            for row in tokens.sources()
        ]  # fmt: skip
        draft.data |= {"by_language": about["by_language"], "by_kind": about["by_kind"]}
        draft.metrics += [
            {"name": "train tokens", "value": at},
            {"name": "repeated tokens removed", "value": len(ids) - at},
        ]
    return open_artifact(out)


def kept(table: np.ndarray, ranges: np.ndarray) -> Iterator[np.ndarray]:
    """For each document of `table` (start, end, ...) which of its tokens lie in none of `ranges`: bool [tokens]."""
    n = 0
    for start, end in table[:, :2].astype(np.int64).tolist():
        mask = np.ones(end - start, bool)
        while n < len(ranges) and ranges[n, 1] <= start:
            n += 1
        m = n
        while m < len(ranges) and ranges[m, 0] < end:
            mask[max(0, int(ranges[m, 0]) - start) : int(ranges[m, 1]) - start] = False
            m += 1
        yield mask
