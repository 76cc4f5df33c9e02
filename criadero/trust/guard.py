"""Notice while a model writes that it copies a long passage whose licence does not allow that.

A plain object for a sampler or a stream of tokens: ``guard = Guard(index)``, then ``hit = guard.push(token)`` for each token.
What to do with a hit (stop, or ask for other words) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from criadero.errors import UserError
from criadero.trust.asks import asks, forbids
from criadero.trust.search import Index, Interval, Place

PLACES = 1 << 16  # of the places where a run stands, so many are asked for their licence


@dataclass(frozen=True)
class Hit:
    """The last `tokens` tokens stand word for word in `document`, and no document that holds them allows copying."""

    tokens: int
    document: Place

    @property
    def asks(self) -> str:
        return asks(self.document.licence)


def same_words(index: Index, tokenizer: Any) -> None:
    """UserError unless a model's tokens are the index's: it may have more, behind them."""
    ours = index.tokenizer
    if any(
        ours.token_bytes(one) != tokenizer.token_bytes(one) for one in range(min(ours.vocab_size, tokenizer.vocab_size))
    ):
        raise UserError(
            f"{index.path} was made with another tokenizer than the model's, so its tokens cannot be followed: index the same data "
            "packed with the model's own (criadero data pack)"
        )


@dataclass
class _Anchor:
    """A place in the output from which a run is followed."""

    start: int
    found: list[Interval]


@dataclass
class Guard:
    """Follows what is written in `index`; a hit is a run of more than `most` tokens that only documents with a licence
    that `forbidden` says true of hold.

    A run of more than `most` tokens covers one of every ``most // 2`` positions. At those, once `seed` tokens are written, their
    places in the data are looked up, and from then on narrowed token by token: O(log n) a token while text is copied,
    and one look-up every ``most // 2`` tokens while it is not. Exact: no run is missed, and none is reported that is shorter.
    """

    index: Index
    most: int = 50
    forbidden: Callable[[str], bool] = forbids
    seed: int = 8
    ids: list[int] = field(default_factory=list)
    _anchors: list[_Anchor] = field(default_factory=list)

    _free: int | None = (
        None  # the token behind the run in a document that may be copied: while it goes on there, all is well
    )
    _refused: dict[int, bool] = field(default_factory=dict)  # by row of the index

    def __post_init__(self) -> None:
        if self.most < 8:
            raise UserError(f"a guard of {self.most} tokens would stop common phrases: give 8 or more")
        self._stride = self.most // 2
        self.seed = min(self.seed, self.most + 1 - self._stride)

    def push(self, token: int) -> Hit | None:
        """Take the next token; a hit when it makes a run too long. Every further token of the same run is a hit again."""
        if not 0 <= token < self.index.about["vocab_size"]:
            token = self.index.ends[-1]  # one that the model has and the data has not: nothing goes across it
        self.ids.append(token)
        n = len(self.ids)
        kept = []
        for anchor in self._anchors:
            # a run of most + 1 tokens that ends here covers an anchor less than `stride` behind its start: older ones may go
            if anchor.start >= n - self.most - 1 and (
                found := self.index.extend(anchor.found, n - 1 - anchor.start, token)
            ):
                kept.append(_Anchor(anchor.start, found))
        self._anchors = kept
        start = n - self.seed
        if start >= 0 and start % self._stride == 0 and (found := self.index.find(self.ids[start:])):
            self._anchors.append(_Anchor(start, found))
        if self._free is not None:
            self._free = self._free + 1 if int(self.index.tokens[self._free]) == token else None
        if self._free is None and any(n - one.start > self.most - self._stride + 1 for one in self._anchors):
            return self._check(n)
        return None

    def _check(self, n: int) -> Hit | None:
        """A hit when the last most + 1 tokens stand in the data, and only where copying is refused."""
        if n <= self.most:
            return None
        run = self.ids[n - self.most - 1 :]
        found = self.index.find(run)
        if not found:
            return None
        positions = self.index.positions(found, PLACES)
        documents = self.index.document_of(positions)
        free = np.flatnonzero([not self._is_refused(int(self.index.rows[one])) for one in documents.tolist()])
        if free.size:
            self._free = int(positions[free[0]]) + len(run)
            return None
        return Hit(self._run(n), self.index.document(int(documents[0])))

    def _is_refused(self, row: int) -> bool:
        if row not in self._refused:
            self._refused[row] = self.forbidden(self.index.about["rows"][row]["licence"])
        return self._refused[row]

    def _run(self, n: int) -> int:
        """How many of the last tokens stand together in the data."""
        low, high = self.most + 1, n  # of a run that stands, every end of it stands too: bisection
        while low < high:
            middle = (low + high + 1) // 2
            if self.index.find(self.ids[n - middle :]):
                low = middle
            else:
                high = middle - 1
        return low
