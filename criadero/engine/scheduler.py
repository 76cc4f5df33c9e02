"""Which rows the next step computes: continuous batching with prefill in chunks (Orca, OSDI 2022; Sarathi, arXiv 2308.16369).

The rules, in order; nothing else decides, so the same requests give the same steps:

1. Whoever is decoding gets a row (and rows for its draft), the oldest first. Where no page is left, the youngest running
   sequence is preempted: its pages are given back and it is computed again later; nothing that was said is lost.
2. What is left of the step's budget goes to prompts that have begun, the oldest first.
3. Then the oldest waiting one is admitted, if its whole prompt finds pages beside what the running ones may soon need. If
   it does not fit, those behind it wait too.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import numpy as np

from criadero.engine.cache import Name, Pages, extend
from criadero.engine.request import Request
from criadero.engine.sampler import Distribution, Sampler
from criadero.engine.text import TextStream

ALL_ROWS_CHUNK = 64  # rows a step of a prompt whose every row is wanted: logits of a large vocabulary take memory
# While somebody decodes, prompts get an eighth of the step's budget, so that answers keep flowing: with 64 rows beside four
# decoding ones a step of a 1.1B model took 0.18 s and read 361 tokens of prompts a second; 128 rows 0.33 s and 384,
# 32 rows 0.11 s and 304 (two cores).
BUSY_SHARE = 8


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. ``tokens`` is prompt and answer; keys and values of the first ``computed`` lie in ``pages``."""

    id: int
    index: int
    request: Request
    tokens: list[int]
    prompt: int  # tokens of prompt
    limit: int  # tokens of prompt and answer at most
    salt: Name
    adapter: int
    ends: frozenset[int]
    whole: bool  # every row of the prompt is wanted: no prefix is reused
    sampler: Sampler | None = None  # None: an embedding is wanted
    text: TextStream | None = None
    running: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(8, np.int32))
    names: list[Name] = field(default_factory=list)
    published: int = 0  # pages offered for reuse
    cached: int = -1  # tokens found computed when first admitted
    draft: list[int] = field(default_factory=list)
    draft_distributions: list[Distribution] = field(default_factory=list)
    collected: list = field(default_factory=list)  # of the prompt: its log-probabilities so far
    pooled: np.ndarray | None = None  # sum of hidden states, float64
    pooled_rows: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Age: requests in the order they came, their samples in theirs."""
        return self.id, self.index

    @property
    def left(self) -> int:
        """Tokens that have no keys and values yet."""
        return len(self.tokens) - self.computed


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


class Scheduler:
    """Waiting and running sequences, each list oldest first, and the pages they own."""

    def __init__(self, pages: Pages, *, sequences: int, chunk: int) -> None:
        self.pages, self.sequences, self.chunk = pages, sequences, chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Let it wait, in its order of age."""
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or is cancelled: its pages are free at once."""
        if sequence.running:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step and how many rows each gets; every row has its page."""
        work: list[tuple[Sequence, int]] = []
        for sequence in tuple(self.running):
            if sequence.running and sequence.left == 1 and self._make_room(sequence):
                work.append((sequence, 1 + len(sequence.draft)))
        budget = max(1, self.chunk // BUSY_SHARE) if work else self.chunk
        for sequence in self.running:
            if budget > 0 and sequence.left > 1:
                budget -= self._prefill(work, sequence, budget)
        while budget > 0 and self.waiting and len(self.running) < self.sequences and self._admit(self.waiting[0]):
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            sequence.running = True
            budget -= self._prefill(work, sequence, budget)
        return work

    def commit(self, sequence: Sequence, computed: int) -> None:
        """Keys and values of the first ``computed`` tokens are there; full pages may be found by others."""
        sequence.computed = computed
        page = self.pages.page
        if (sequence.published + 1) * page <= computed:
            extend(sequence.names, sequence.salt, sequence.tokens, page, computed)
            while (sequence.published + 1) * page <= computed:
                self.pages.publish(sequence.pages[sequence.published], sequence.names[sequence.published])
                sequence.published += 1

    def _prefill(self, work: list[tuple[Sequence, int]], sequence: Sequence, budget: int) -> int:
        count = min(sequence.left, budget, ALL_ROWS_CHUNK if sequence.whole else budget)
        work.append((sequence, count))
        return count

    def _admit(self, sequence: Sequence) -> bool:
        page = self.pages.page
        needed = -(-len(sequence.tokens) // page)
        if self.pages.available() < needed - len(sequence.names):  # not even if all of it were found
            return False
        extend(sequence.names, sequence.salt, sequence.tokens, page, len(sequence.tokens))
        fresh = sequence.whole and len(sequence.collected) < sequence.prompt
        # one token at least has to be computed, to know what follows it
        found = [] if fresh else self.pages.find(sequence.names[: (len(sequence.tokens) - 1) // page])
        taken = None
        if self.pages.available() >= needed - len(found) + len(self.running):
            taken = self.pages.take(needed - len(found))
        if taken is None:
            self.pages.release(found)
            return False
        sequence.computed = len(found) * page
        sequence.published = len(found)
        if sequence.cached < 0:
            sequence.cached = sequence.computed
        self._own(sequence, found + taken)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for its next row and its draft; False when it had to be preempted itself."""
        if self._grow(sequence, sequence.computed + 1 + len(sequence.draft)):
            return True
        sequence.draft, sequence.draft_distributions = [], []  # a guess preempts nobody
        while not self._grow(sequence, sequence.computed + 1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        missing = -(-tokens // self.pages.page) - len(sequence.pages)
        if missing <= 0:
            return True
        taken = self.pages.take(missing)
        if taken is None:
            return False
        self._own(sequence, taken)
        return True

    def _own(self, sequence: Sequence, pages: ListOf[int]) -> None:
        have = len(sequence.pages)
        sequence.pages.extend(pages)
        if len(sequence.pages) > len(sequence.table):
            table = np.zeros(2 * len(sequence.pages), np.int32)
            table[:have] = sequence.table[:have]
            sequence.table = table
        sequence.table[have : len(sequence.pages)] = pages

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.running = False
        sequence.computed = sequence.published = 0
        sequence.draft, sequence.draft_distributions = [], []
