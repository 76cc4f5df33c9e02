"""Every document that holds a text: what a request for removal, or a lookup, starts from.

Copies need not be whole: a document is found when it holds a run of the text of some length, and its row says how much.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from criadero.data.docset import document_hash
from criadero.errors import UserError
from criadero.trust.search import Index
from criadero.trust.trace import long_matches

MOST = 100_000  # documents; a text that stands in more is no one's in particular


@dataclass(frozen=True)
class Holder:
    """A document that holds at least a part of the text. `share` of the text's tokens stand in it, the longest run has
    `longest` of them. `sha256` names it in tables and ledgers (`criadero.data.docset.document_hash`)."""

    number: int
    document: str
    source: str
    licence: str
    tokens: int
    sha256: str
    share: float
    longest: int


@dataclass(frozen=True)
class Context:
    """One place where a text stands."""

    document: str
    source: str
    licence: str
    before: str
    text: str
    after: str


def search(index: Index, text: str, *, limit: int = 10, context: int = 20) -> tuple[int, list[Context]]:
    """How often a text stands in the data, and `limit` of the places. Both as it is given and behind a space; a text that
    begins or ends within a token of the data is not found there."""
    total, places = 0, []
    for ids in index.ways(text):
        found = index.find(ids)
        total += sum(hi - lo for _, lo, hi in found)
        for at in index.positions(found, limit).tolist() if limit else []:
            one = index.document(int(index.document_of(at)))
            end = at + len(ids)
            places.append(
                Context(
                    one.name, one.source, one.licence, index.text(max(one.start, at - context), at), index.text(at, end),
                    index.text(end, min(one.end, end + context)),
                )
            )  # fmt: skip
    return total, places[:limit]


def holders(index: Index, text: str, *, min_tokens: int = 20, min_share: float = 0.0) -> list[Holder]:
    """The documents that hold a run of `min_tokens` of the text (all of it, when it is shorter), the fullest first.

    A run that stands whole in a document is counted; so is each part of `min_tokens` of one that is cut up there.
    UserError: a text without tokens, one that stands in more than 100,000 documents.
    """
    inside: dict[int, list[tuple[int, int]]] = {}  # document -> ranges of the text
    size = 1
    for ids in index.ways(text):
        least = min(min_tokens, len(ids))
        size = len(ids)
        # every window that stands somewhere, so that a document with only a part of the longest match is found as well
        lengths = long_matches(index, ids, least) if least > 1 else index.longest(ids)
        starts = np.flatnonzero(lengths >= least)
        lo, hi = index.intervals(ids, starts, least)
        for n, start in enumerate(starts.tolist()):
            count = int((hi[n] - lo[n]).sum())
            if count > MOST:
                raise UserError(
                    f"{least} tokens of the text stand in {count:,} places: give a longer text or --min-tokens"
                )
            for shard in np.flatnonzero(hi[n] > lo[n]).tolist():
                entries = np.arange(lo[n, shard], hi[n, shard])
                positions = index.places(entries, np.full(len(entries), shard))
                for number in np.unique(index.document_of(positions)).tolist():
                    runs = inside.setdefault(number, [])
                    if runs and runs[-1][0] < start <= runs[-1][1]:
                        runs[-1] = (runs[-1][0], start + least)
                    else:
                        runs.append((start, start + least))
    found = []
    for number, runs in inside.items():
        mask = np.zeros(size, bool)
        for start, end in runs:
            mask[start:end] = True
        if float(mask.mean()) >= min_share:
            one = index.document(number)
            hashed = (
                one.sha256 or document_hash(index.text(one.start, one.end)).hex()
            )  # no dataset: of what its tokens spell
            found.append(
                Holder(
                    number, one.name, one.source, one.licence, one.end - one.start, hashed,
                    round(float(mask.mean()), 4), max(end - start for start, end in runs),
                )
            )  # fmt: skip
    return sorted(found, key=lambda one: (-one.share, -one.longest, one.number))


def write_holders(found: Iterable[Holder], file: Path, *, reason: str = "", by: str = "") -> None:
    """One JSON object a line. With a reason and who signs it off the file is a ledger, which a data recipe's ``removals`` names."""
    if bool(reason.strip()) != bool(by.strip()):
        raise UserError("a ledger of removals needs a reason and the name of who signs it off: --reason and --by")
    signed = {"reason": reason.strip(), "by": by.strip(), "date": datetime.now(UTC).date().isoformat()} if by else {}
    if file.exists():
        raise UserError(f"{file} exists: choose another name")
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(asdict(one) | signed, ensure_ascii=False) + "\n" for one in found)
