"""Speculation: guess a few tokens cheaply, let the model check them all in one step (arXiv 2211.17192; 2302.01318).

A step's rows cost little more than one row while decoding waits for memory. Two guessers: `PromptLookup` copies what followed the
last tokens when they stood there before (prompt lookup), `DraftModel` asks a small model of the same vocabulary.

The answers keep their distribution, and greedy ones their tokens. A copied guess is certain of itself, and for such the rule of
Leviathan and others comes to this: choose as ever, and if the choice is the guess, go on with the next row. So with prompt
lookup even sampled answers are the same tokens, seed for seed, as without. A draft model's samples are taken with probability
min(1, p / q), else replaced by one of the distribution max(0, p - q).
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from criadero.engine.cache import Pages
from criadero.engine.runner import Runner, StepBatch
from criadero.engine.sampler import Distribution, Sampler, draw, uniform
from criadero.engine.scheduler import Sequence
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer

TOKENS = 4  # guessed a step: each is one more row
MOST = 16
_GUESS, _ACCEPT, _INSTEAD = 1, 2, 3  # streams of `uniform`; 0 is the sampler's own


class Speculator(Protocol):
    """Guesses for sequences that are decoding."""

    def propose(self, sequences: ListOf[Sequence]) -> None:
        """Fill ``draft`` (and ``draft_distributions``, where the guesses were drawn) of each, perhaps with nothing."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """It has ended."""
        ...


def _room(sequence: Sequence, tokens: int) -> int:
    """How many guesses can be of use: none past the end, where the last token is not guessed."""
    wanted = sequence.request.draft_tokens
    return max(0, min(tokens if wanted is None else min(wanted, MOST), sequence.limit - len(sequence.tokens) - 1))


# --- copying ---


class PromptLookup:
    """Guess that what followed the last ``longest`` (or fewer, at least ``shortest``) tokens before follows them again."""

    def __init__(self, tokens: int = TOKENS, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= tokens <= MOST or not 1 <= shortest <= longest:
            raise UserError(f"speculation: 1 to {MOST} tokens a step can be guessed, not {tokens}")
        self.tokens, self.sizes = tokens, tuple(range(longest, shortest - 1, -1))
        # of each sequence: how many tokens are indexed, and where each run of tokens was last followed by something
        self._places: dict[tuple[int, int], tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, sequences: ListOf[Sequence]) -> None:
        """See `Speculator`."""
        for sequence in sequences:
            tokens = sequence.tokens
            done, places = self._places.get(sequence.order, (1, {}))
            for end in range(done, len(tokens)):  # tokens[end] followed what ends before it
                for size in self.sizes:
                    if size <= end:
                        places[tuple(tokens[end - size : end])] = end
            self._places[sequence.order] = (len(tokens), places)
            room = _room(sequence, self.tokens)
            at = next(
                (places[run] for s in self.sizes if (run := tuple(tokens[-s:])) in places and s <= len(tokens)), None
            )
            sequence.draft = [] if at is None else tokens[at : at + room]

    def drop(self, sequence: Sequence) -> None:
        """See `Speculator`."""
        self._places.pop(sequence.order, None)


# --- a small model ---


@dataclass
class _State:
    """What the draft model has of one sequence: keys and values of ``computed`` tokens, the last ``draft`` after ``base``."""

    pages: list[int] = field(default_factory=list)
    computed: int = 0
    base: int = 0
    draft: list[int] = field(default_factory=list)


class DraftModel:
    """Guesses of a small model with a paged cache of its own."""

    def __init__(self, runner: Runner, tokens: int = TOKENS, *, chunk: int = 512) -> None:
        if not 1 <= tokens <= MOST:
            raise UserError(f"speculation: 1 to {MOST} tokens a step can be guessed, not {tokens}")
        self.runner, self.tokens, self.chunk = runner, tokens, chunk
        self.pages = Pages(runner.pages, runner.page)
        self._states: dict[tuple[int, int], _State] = {}

    def propose(self, sequences: ListOf[Sequence]) -> None:
        """See `Speculator`."""
        ready: list[tuple[Sequence, _State, int]] = []
        for sequence in sequences:
            sequence.draft, sequence.draft_distributions = [], []
            room = _room(sequence, self.tokens)
            state = self._states.setdefault(sequence.order, _State())
            agreed = 0
            while agreed < len(state.draft) and state.base + agreed < len(sequence.tokens):
                if sequence.tokens[state.base + agreed] != state.draft[agreed]:
                    break
                agreed += 1
            state.computed = min(state.computed, state.base + agreed, len(sequence.tokens) - 1)
            state.base, state.draft = len(sequence.tokens), []
            needed = -(-(len(sequence.tokens) + room) // self.pages.page) - len(state.pages)
            context = self.runner.config.max_position_embeddings
            if room == 0 or len(sequence.tokens) + room > context:
                continue
            taken = self.pages.take(needed) if needed > 0 else []
            if taken is not None:  # without pages it decodes without guesses
                state.pages += taken
                ready.append((sequence, state, room))
        self._catch_up(ready)
        while ready:
            rows = [(sequence.tokens + state.draft)[state.computed :] for sequence, state, _ in ready]
            logits = self._step([state for _, state, _ in ready], rows)
            assert logits is not None
            for (sequence, state, _), row in zip(ready, logits, strict=True):
                self._guess(sequence, state, row)
            ready = [(sequence, state, room) for sequence, state, room in ready if len(state.draft) < room]
        for sequence in sequences:
            sequence.draft = list(self._states[sequence.order].draft)

    def drop(self, sequence: Sequence) -> None:
        """See `Speculator`."""
        state = self._states.pop(sequence.order, None)
        if state is not None:
            self.pages.release(state.pages)

    def _catch_up(self, ready: ListOf[tuple[Sequence, _State, int]]) -> None:
        """Compute what the draft model has not seen, but for the last token, in chunks."""
        while True:
            budget, states, rows = self.chunk, [], []
            for sequence, state, _ in ready:
                missing = sequence.tokens[state.computed : min(len(sequence.tokens) - 1, state.computed + budget)]
                # one or two tokens (after a guess that was right) go with the next step
                if len(sequence.tokens) - 1 - state.computed > 1 and missing:
                    states.append(state)
                    rows.append(missing)
                    budget -= len(missing)
            if not states:
                return
            self._step(states, rows, logits=False)

    def _guess(self, sequence: Sequence, state: _State, row: np.ndarray) -> None:
        sampler = sequence.sampler
        assert sampler is not None
        if not np.isfinite(row.max()):
            row = np.zeros_like(row)  # a spoilt draft model guesses badly, and does no harm
        distribution = sampler.distribution(row)
        if sampler.greedy:
            token = draw(distribution, 0.0)
        else:
            token = draw(distribution, uniform(sampler.key, sampler.place + len(state.draft), _GUESS))
            sequence.draft_distributions.append(distribution)
        state.draft.append(token)

    def _step(self, states: ListOf[_State], rows: ListOf[list[int]], *, logits: bool = True) -> np.ndarray | None:
        counts = [len(one) for one in rows]
        starts = np.cumsum([0, *counts])
        lengths = [state.computed + count for state, count in zip(states, counts, strict=True)]
        tables = np.zeros((len(states), max(len(state.pages) for state in states)), np.int32)
        for table, state in zip(tables, states, strict=True):
            table[: len(state.pages)] = state.pages
        positions = [p for length, count in zip(lengths, counts, strict=True) for p in range(length - count, length)]
        batch = StepBatch(
            np.array([id for one in rows for id in one], np.int32), np.array(positions, np.int32), starts.astype(np.int32),
            np.array(lengths, np.int32), tables, None, (starts[1:] - 1 if logits else starts[:0]).astype(np.int32), logits,
        )  # fmt: skip
        for state, length in zip(states, lengths, strict=True):
            state.computed = length
        return self.runner.step(batch)[0]


def verify(sampler: Sampler, row: np.ndarray, guess: int, drawn_from: Distribution) -> int:
    """The next token, given that ``guess`` was drawn from q: it with probability min(1, p / q), else a draw from max(0, p - q),
    normalised (arXiv 2211.17192, section 2.3). ``row`` are the model's logits float32 ``[V]``, which are changed."""
    p = _dense(sampler.distribution(sampler.adjust(row)), len(row))
    q = _dense(drawn_from, len(row))
    if uniform(sampler.key, sampler.place, _ACCEPT) * q[guess] < p[guess]:
        return guess
    rest = np.maximum(p - q, 0.0)
    if not rest.any():  # p equals q but for rounding
        rest = p
    return draw((None, rest), uniform(sampler.key, sampler.place, _INSTEAD))


def _dense(distribution: Distribution, vocab: int) -> np.ndarray:
    """Probabilities float64 ``[V]``."""
    ids, weights = distribution
    dense = np.zeros(vocab)
    dense[slice(None) if ids is None else ids] = weights / weights.sum()
    return dense


def check_same_words(main: Tokenizer, draft: Tokenizer, vocab: int, draft_vocab: int) -> None:
    """UserError unless both models number the same tokens: a draft's ids must mean the same to the model that checks them."""
    if vocab != draft_vocab:
        raise UserError(
            f"the draft model has {draft_vocab} tokens and the model {vocab}: a draft needs the same vocabulary; choose another"
        )

    def words(tokenizer: Tokenizer) -> Iterable[bytes]:
        return (tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size))

    if main.vocab_size != draft.vocab_size or main.special != draft.special or any(
        one != other for one, other in zip(words(main), words(draft), strict=True)
    ):  # fmt: skip
        raise UserError(
            "the draft model's vocabulary is not the model's: a draft needs the same tokens; choose another"
        )
