"""Where did this answer come from? The parts of a text that stand word for word in a model's training data.

As OLMoTrace does (Liu et al. 2025, arXiv 2504.07096): the longest match from every position, spans that no other contains,
the rarest of them by their tokens' frequency, and some documents for each. It shows overlap, and never says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from criadero.artifact import Artifact, open_artifact, read_passport, resolve, short_id
from criadero.errors import UserError
from criadero.trust.asks import asks
from criadero.trust.grams import GRAM
from criadero.trust.licence_names import relations
from criadero.trust.search import Index, Interval, Place, open_index, tokens_id

CAUTION = ("verbatim overlap, not proof of cause", "coincidencia literal, no prueba de causa")
LENGTHS = (8, 16, 32)  # the share of an answer in copied runs is told for these, in tokens
MOST_SPANS = 200
CJK = 0x2E80  # from here on, scripts that write no spaces: a word may begin anywhere


@dataclass(frozen=True)
class Found:
    """A place in a document where a span stands, with the words around it."""

    document: Place
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class Span:
    """A part of the answer that stands in the data: tokens `start` to `end`, characters `from_char` to `to_char`."""

    start: int
    end: int
    from_char: int
    to_char: int
    text: str
    count: int  # how often it stands in the data
    log_prob: float  # of its tokens, were they drawn one by one: the lower, the rarer
    found: list[Found] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """What :func:`trace` found. `covered` is the share of the text's tokens in copied runs of so many tokens and more."""

    text: str
    tokens: int
    min_tokens: int
    spans: list[Span]  # the rarest, in the order of the text
    more: int  # spans that were not kept
    covered: dict[int, float]
    longest: Span | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        values = dataclasses.asdict(self)
        values["covered"] = {str(length): round(share, 4) for length, share in self.covered.items()}
        values["longest_asks"] = licences_of(self.longest) if self.longest else []
        return {**values, "caution": list(CAUTION)}


def trace(
    index: Index, text: str, *, min_tokens: int = 8, most_documents: int = 10, context: int = 20
) -> Trace:  # fmt: skip
    """Trace a text of any length in `index`: spans of `min_tokens` and more that begin and end with a word.

    Kept are the ceil(0.05 tokens) rarest, at least 3 and at most 200, each with up to `most_documents` documents and
    `context` tokens on both sides. UserError: a text without tokens, fewer than 2 tokens asked for.
    """
    if min_tokens < 2:
        raise UserError(f"min_tokens must be 2 or more, not {min_tokens}: single tokens stand everywhere")
    ids, offsets = index.encode_with_offsets(text)
    lengths, spaced = matches(index, ids, text, min_tokens)
    runs = maximal(lengths, np.arange(len(ids)), len(ids), min_tokens)
    borders = word_starts(text, offsets)
    spans = [
        make_span(index, ids, spaced, offsets, text, start, end)
        for start, end in maximal(lengths, np.flatnonzero(borders[:-1]), len(ids), min_tokens, borders)
    ]
    keep = min(max(3, math.ceil(0.05 * len(ids))), MOST_SPANS)
    chosen = sorted(sorted(spans, key=lambda one: one.log_prob)[:keep], key=lambda one: one.start)
    longest = max(runs, key=lambda run: run[1] - run[0], default=None)
    return Trace(
        text, len(ids), min_tokens,
        [with_documents(index, ids, spaced, one, most_documents, context) for one in chosen],
        len(spans) - len(chosen),
        {length: share(runs, len(ids), length) for length in sorted({min_tokens, *LENGTHS}) if length >= min_tokens},
        with_documents(index, ids, spaced, make_span(index, ids, spaced, offsets, text, *longest), most_documents, context)
        if longest else None,
    )  # fmt: skip


def matches(index: Index, ids: list[int], text: str, at_least: int) -> tuple[np.ndarray, list[int] | None]:
    """How many tokens stand in the data from each position, int64 [tokens]; 0 when they are fewer than `at_least`.

    The second value is the text's tokens with a space before its first word, when that changes only the first token: a
    quotation from within a sentence begins so. Then the first position's length is the larger of the two.
    """
    lengths = long_matches(index, ids, at_least)
    ways = index.ways(text, ids)
    spaced = ways[1] if len(ways) > 1 and ways[1][1:] == ids[1:] else None
    if spaced is not None:
        first = int(index.longest(spaced, [0])[0])
        if first >= at_least:
            lengths[0] = max(lengths[0], first)
    return lengths, spaced


def long_matches(index: Index, ids: list[int], at_least: int) -> np.ndarray:
    """`index.longest` at every position, where it is `at_least` and more; 0 elsewhere.

    Few positions are looked at. A match of n tokens covers one of every n/2 positions, with n/2 + 1 tokens from there. And
    the end of the longest match never moves back from one position to the next: where it is the same at two, it is so between.
    The index's filter leaves out shards in which no match of `at_least` covers a position: such a match has a gram at one of the
    coarse positions, and the lengths of others are not told.
    """
    stride = max(1, at_least // 2)
    within = index.covering(ids, at_least) if at_least >= stride + GRAM - 1 else None

    def longest(where: np.ndarray) -> np.ndarray:
        return index.longest(ids, where, None if within is None else within[where])

    out = np.zeros(len(ids), np.int64)
    coarse = np.arange(0, len(ids), stride)
    out[coarse] = longest(coarse)
    reach = coarse + out[coarse]
    before = np.concatenate([[-1], reach[:-1]])
    between = -np.arange(1, stride)  # the positions that lie before a coarse one
    same = coarse[(reach == before) & (out[coarse] > at_least - stride)]
    inner = (same[:, None] + between).ravel()  # [same * (stride - 1)]
    out[inner] = np.repeat(same + out[same], stride - 1) - inner
    open_ = coarse[(reach != before) & (out[coarse] > at_least - stride)]
    fine = (open_[:, None] + between).ravel()
    fine = fine[fine >= 0]
    if fine.size:
        out[fine] = longest(fine)
    out[out < at_least] = 0
    return out


def maximal(
    lengths: np.ndarray, starts: np.ndarray, end: int, at_least: int, borders: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """(start, end) of the matches that no other one contains; with `borders` each is first cut back to where a word ends."""
    kept: list[tuple[int, int]] = []
    furthest = 0
    ends = np.flatnonzero(borders) if borders is not None else np.arange(end + 1)
    for start in starts[lengths[starts] >= at_least].tolist():
        stop = int(ends[np.searchsorted(ends, start + int(lengths[start]), "right") - 1])
        if stop - start >= at_least and stop > furthest:
            kept.append((start, stop))
            furthest = stop
    return kept


def word_starts(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """bool [tokens + 1]: whether a word may begin at each token; the last one is the end of the text."""
    out = np.ones(len(offsets) + 1, bool)
    for n, (start, _) in enumerate(offsets):
        if 0 < start < len(text):
            within = text[start - 1].isalnum() and text[start].isalnum() and ord(text[start]) < CJK
            out[n] = not within and (n == 0 or offsets[n - 1][0] != start)  # two tokens may share one character
    return out


def share(runs: list[tuple[int, int]], tokens: int, length: int) -> float:
    """The share of `tokens` that lie in a run of `length` and more."""
    inside = np.zeros(tokens + 1, np.int64)
    for start, end in runs:
        if end - start >= length:
            inside[start] += 1
            inside[end] -= 1
    return float((np.cumsum(inside)[:tokens] > 0).mean()) if tokens else 0.0


def make_span(
    index: Index, ids: list[int], spaced: list[int] | None, offsets: list[tuple[int, int]], text: str, start: int, end: int
) -> Span:  # fmt: skip
    first, last = offsets[start][0], offsets[end - 1][1]
    count = sum(hi - lo for _, lo, hi in places(index, ids, spaced, start, end))
    rarity = float(index.log_probs[ids[start:end]].sum())
    return Span(start, end, first, last, text[first:last], count, rarity)


def places(index: Index, ids: list[int], spaced: list[int] | None, start: int, end: int) -> list[Interval]:
    """Where ids[start:end] stands, and at the start of the text also with a space before it."""
    found = index.find(ids[start:end])
    return found + index.find(spaced[:end]) if start == 0 and spaced is not None else found


def with_documents(
    index: Index, ids: list[int], spaced: list[int] | None, span: Span, most: int, context: int
) -> Span:  # fmt: skip
    """The span with up to `most` documents that hold it."""
    positions = index.positions(places(index, ids, spaced, span.start, span.end), 4 * most)
    found: list[Found] = []
    for at, number in zip(positions.tolist(), index.document_of(positions).tolist(), strict=True):
        if len(found) == most:
            break
        if any(one.document.number == number for one in found):
            continue
        place = index.document(number)
        end = at + span.tokens
        before, after = index.text(max(place.start, at - context), at), index.text(end, min(place.end, end + context))
        if before and int(index.tokens[at - 1]) in index.special:  # the span begins a turn of a chat
            before += "\n"
        if after and int(index.tokens[end]) in index.special:
            after = "\n" + after
        found.append(Found(place, before, index.text(at, end), after))
    return dataclasses.replace(span, found=found)


def licences_of(span: Span) -> list[dict[str, str]]:
    """The licences of a span's documents, and what each asks of somebody who copies it."""
    return [
        {"licence": one, "asks": asks(one)} for one in dict.fromkeys(found.document.licence for found in span.found)
    ]


# -- which index is a model's own -------------------------------------------------------------------------------------


def data_of(model: str | Path | Artifact) -> tuple[str, dict[str, str]]:
    """A model's name, and all that it learned from: ids, with the names of those that nothing stands behind ("" for others).

    What it was measured on is left out, and so is the tokenizer. UserError for a model that says nothing of its origin.
    """
    path = resolve(model)
    passport = read_passport(path) if path.is_dir() else None
    if passport is None:
        raise UserError(
            f"{path} has no passport: nobody knows what it was trained on, so no index can be its own; "
            "look a text up in any index with criadero data search INDEX TEXT"
        )
    artifact = Artifact(path, passport)
    return artifact.name, _learned(artifact)


def _learned(artifact: Artifact) -> dict[str, str]:
    kinds = relations()["relations"]
    known = {one["id"]: one for one in artifact.ancestors()}
    found: dict[str, str] = {}
    todo = [artifact.passport]
    while todo:
        for row in todo.pop().get("inputs") or []:
            if row["id"] in found or kinds.get(row["relation"]) in ("none", "tool", "component"):
                continue
            behind = known.get(row["id"])
            found[row["id"]] = "" if behind and behind.get("inputs") else str(row.get("name"))
            todo += [behind] if behind else []
    return found


def index_for(model: str | Path | Artifact, given: str | Path | None = None) -> Index:
    """The index of a model's own training data: the one `given`, or the fullest that lies beside the model, here, or under out/.

    It is the model's own when the tokens, the dataset or each file that it was made of is among what the model and its
    ancestors learned from. Where it holds only a part of that, stderr says which. UserError when it is of anything else.
    """
    name, learned = data_of(model)
    if given is not None:
        opened = open_index(given)
        artifact = open_artifact(given)
        if not _is_part(artifact, learned):
            raise UserError(
                f"{opened.path} is an index of tokens {short_id(tokens_id(artifact))}, and {name} was not made of those: a trace in "
                "it would say nothing; give the index of the model's own data"
            )
    else:
        artifact = _nearest_index(resolve(model).parent, learned, name)
        opened = open_index(artifact)
    if absent := absent_from(artifact, learned):
        some = ", ".join(absent[:3]) + (" ..." if len(absent) > 3 else "")
        print(
            f"note: {opened.path} holds a part of what {name} learned from; not in it: {some} ({len(absent)} of "
            f"{sum(map(bool, learned.values()))})", file=sys.stderr,
        )  # fmt: skip
    return opened


def _nearest_index(beside: Path, learned: dict[str, str], name: str) -> Artifact:
    found: list[Artifact] = []
    for file in (
        *beside.glob("*/passport.json"),
        *Path().glob("*/passport.json"),
        *Path("out").glob("*/*/passport.json"),
    ):
        with contextlib.suppress(UserError):
            one = open_artifact(file.parent)
            if one.kind == "index" and _is_part(one, learned):
                found.append(one)
    if not found:
        raise UserError(
            f"no index of what {name} was trained on lies beside it: build one (criadero data index TOKENS --out DIR) and "
            "give it with --index DIR"
        )
    return min(found, key=lambda one: len(absent_from(one, learned)))


def _is_part(index: Artifact, learned: dict[str, str]) -> bool:
    """Whether all that an index was made of is something that a model learned from: the same tokens, dataset or files."""
    known = {one["id"]: one for one in index.ancestors()}
    todo, seen = [tokens_id(index)], set[str]()
    while todo:
        if (id := todo.pop()) in learned or id in seen:
            continue
        seen.add(id)
        rows = (known.get(id) or {}).get("inputs") or []
        behind = [row["id"] for row in rows if row["relation"] in ("converted_from", "contains")]
        if not behind:
            return False
        todo += behind
    return True


def absent_from(index: Artifact, learned: dict[str, str]) -> list[str]:
    """The names of what a model learned from, as far back as it is known, that an index does not hold."""
    held = {tokens_id(index), *_learned(index)}
    return sorted({name for id, name in learned.items() if name and id not in held})
