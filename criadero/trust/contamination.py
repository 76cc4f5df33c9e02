"""Has the model read the exam? How much of each item of a benchmark stands in the training data, and the scores without it.

Two rules, on tokens of the index's own vocabulary. GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix C): an item is
touched when 13 of its tokens in a row stand in the data (they count words). Llama 2's (Touvron et al. 2023, arXiv 2307.09288,
appendix A.6): a token is contaminated when it lies in a match of 10 tokens and more with one document, in which up to 4 later
tokens may differ (a skipgram budget); an item is clean below 20 % of such tokens and dirty from 80 % on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from criadero.data.documents import read_rows
from criadero.errors import UserError
from criadero.trust.search import Index, Interval

NGRAM = 13
MATCH = 10
BUDGET = 4
CLEAN, DIRTY = 0.2, 0.8
PLACES = 200  # of the places where 10 tokens stand, so many are followed: boilerplate stands everywhere


@dataclass(frozen=True)
class Item:
    """One item of a benchmark. `share` is the share of its tokens that are contaminated, `touched` GPT-3's rule."""

    where: str
    tokens: int
    share: float
    touched: bool
    document: str  # one that holds a part of it
    score: float | None = None

    @property
    def clean(self) -> bool:
        return self.share < CLEAN

    @property
    def dirty(self) -> bool:
        return self.share >= DIRTY


def read_items(
    file: str | Path, fields: Sequence[str] = (), score: str = ""
) -> Iterator[tuple[str, str, float | None]]:
    """(where, text, score) of each row: the named fields joined by a blank, or all fields that are text, in order.

    UserError: a field that a row does not have, a score that is no number, a row without text.
    """
    for where, row in read_rows(file):
        for name in (*fields, *([score] if score else [])):
            if name not in row:
                raise UserError(f"{where}: no field {name!r}; it has {', '.join(map(str, row))}")
        wanted = list(fields) or [name for name in row if name != score]
        text = " ".join(part for name in wanted for part in _texts(row[name]))
        if not text.strip():
            raise UserError(f"{where}: no text in it; name the fields with --fields")
        try:
            value = float(row[score]) if score else None
        except (TypeError, ValueError):
            raise UserError(f"{where}: {score} is {row[score]!r}, not a number") from None
        yield where, text, value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [part for one in value.values() for part in _texts(one)]
    return [part for one in value for part in _texts(one)] if isinstance(value, list) else []


def check(index: Index, items: Iterable[tuple[str, str, float | None]]) -> list[Item]:
    """How far each (where, text, score) stands in the data. What could stand behind a space is looked for in both ways."""
    found = []
    for where, text, score in items:
        best: tuple[float, bool, str, int] = (-1.0, False, "", 0)
        for ids in index.ways(text):
            mask, document = contaminated(index, ids)
            touched = bool(index.counts(ids, np.arange(max(0, len(ids) - NGRAM + 1)), NGRAM).any())
            name = index.document(document).name if document is not None else ""
            best = max(best, (float(mask.mean()), touched, name, len(ids)))
        found.append(Item(where, best[3], best[0], best[1], best[2], score))
    return found


def contaminated(index: Index, ids: Sequence[int]) -> tuple[np.ndarray, int | None]:
    """Llama 2's rule: bool [tokens], and the number of a document with the most of them.

    A match is aligned: it starts with `MATCH` equal tokens, and goes on to the right token by token, with up to `BUDGET` that
    differ, none of them last. The tokens that differ are not contaminated by it.
    """
    query = np.asarray(ids, np.int64)
    mask = np.zeros(len(query), bool)
    starts = np.arange(max(0, len(query) - MATCH + 1))
    lo, hi = index.intervals(query, starts, MATCH)
    most, document = 0, None
    followed: dict[int, int] = {}  # alignment (place - start) -> the first token that differs from there
    for start in starts[(hi > lo).any(1)].tolist():
        shards = np.flatnonzero(hi[start] > lo[start]).tolist()
        places = [Interval(shard, int(lo[start, shard]), int(hi[start, shard])) for shard in shards]
        positions = index.positions(places, PLACES)
        ends = index.borders[index.document_of(positions) + 1].astype(np.int64) - 1  # at eos
        for at, end in zip(positions.tolist(), ends.tolist(), strict=True):
            if start < followed.get(at - start, 0):
                continue  # this match has been followed from its first token
            n = min(len(query) - start, end - at)
            equal = index.tokens[at : at + n] == query[start : start + n]
            wrong = np.flatnonzero(~equal)
            followed[at - start] = start + int(wrong[0] if len(wrong) else n)
            if len(wrong) > BUDGET:
                equal = equal[: wrong[BUDGET]]
            mask[start : start + len(equal)] |= equal
            if int(equal.sum()) > most:
                most, document = int(equal.sum()), int(index.document_of(at))
    return mask, document


def summary(items: Sequence[Item]) -> dict[str, Any]:
    """Counts, and where there are scores their means over the parts: the table of Llama 2's appendix.

    ``clean`` < 20 %, ``not clean`` >= 20 %, ``not dirty`` < 80 %, ``dirty`` >= 80 %; ``z`` says by how many standard errors
    a part's mean lies off the mean of all, had its items been drawn at random.
    """
    if not items:
        raise UserError("there is no item to check: the file is empty")
    parts = {
        "all": items,
        "clean": [one for one in items if one.clean],
        "not clean": [one for one in items if not one.clean],
        "not dirty": [one for one in items if not one.dirty],
        "dirty": [one for one in items if one.dirty],
    }
    scores = [one.score for one in items if one.score is not None]
    table: dict[str, Any] = {}
    for name, part in parts.items():
        row: dict[str, Any] = {
            "items": len(part),
            "share": float(np.mean([one.share for one in part])) if part else None,
        }
        if scores:
            row["score"] = float(np.mean([one.score for one in part])) if part else None
            row["z"] = z_score(scores, [one.score for one in part if one.score is not None])
        table[name] = row
    return {
        "parts": table,
        "touched": sum(one.touched for one in items),
        "ngram": NGRAM,
        "match": MATCH,
        "budget": BUDGET,
    }


def z_score(scores: Sequence[float], part: Sequence[float]) -> float | None:
    """(mean of the part - mean of all) / (standard deviation / sqrt(n)); None where it says nothing."""
    if not part or len(part) == len(scores):
        return None
    spread = float(np.std(scores))
    return float((np.mean(part) - np.mean(scores)) / (spread / math.sqrt(len(part)))) if spread else None


def as_text(items: Sequence[Item], worst: int = 5) -> str:
    """The summary as lines, and the items with the largest share."""
    table = summary(items)
    lines = [
        f"{'':<10} {'items':>7} {'of it read':>11}" + (f" {'score':>8} {'z':>6}" if items[0].score is not None else "")
    ]
    for name, row in table["parts"].items():
        line = f"{name:<10} {row['items']:>7} " + (
            f"{row['share']:>11.1%}" if row["share"] is not None else f"{'-':>11}"
        )
        if "score" in row:
            line += f" {row['score']:>8.4f}" if row["score"] is not None else f" {'-':>8}"
            line += f" {row['z']:>6.2f}" if row["z"] is not None else f" {'-':>6}"
        lines.append(line)
    lines.append(f"{table['touched']} of {len(items)} items have {NGRAM} tokens in a row that stand in the data")
    for one in sorted(items, key=lambda item: -item.share)[:worst]:
        if one.share > 0:
            lines.append(f"  {one.where}: {one.share:.0%} of {one.tokens} tokens, as in {one.document}")
    return "\n".join(lines)
