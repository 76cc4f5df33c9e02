"""Choosing tokens from logits, in numpy: what every decoded token pays for, so it is careful with passes over the vocabulary.

A draw is a pure function of the seed, the sample's index and the token's place in the answer, not of a generator's state: what
else is in the batch, a preemption or a rejected draft change nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from criadero.engine.request import SamplingParams, TokenLogprob

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
GREEDY_BELOW = 1e-5  # a temperature this low is 0: the division would overflow
# shares of the likeliest token's probability, tried in turn until what lies above holds all that top_k and top_p keep
_LEVELS = (2e-2, 1e-4, 1e-7)

# (ids or None for the whole vocabulary, weights float64: not normalised)
Distribution = tuple[np.ndarray | None, np.ndarray]


class BadLogits(Exception):
    """Logits from which nothing can be chosen; the message says why."""


class Matcher(Protocol):
    """What a grammar gives the sampler; see `criadero.engine.grammar`."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but an end."""
        ...

    def forbid(self, logits: np.ndarray) -> None:
        """Set to -inf what may not come next."""
        ...

    def accept(self, token: int) -> None:
        """``token`` came next."""
        ...


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key_of(seed: int | None, index: int) -> int:
    """The 64-bit key of sample ``index``'s random stream; without a seed, one from the system."""
    first = secrets.randbits(64) if seed is None else seed & _MASK
    return _mix((_mix((first + _GOLDEN) & _MASK) + (index + 1) * _GOLDEN) & _MASK)


def uniform(key: int, place: int, stream: int = 0) -> float:
    """A number in [0, 1) for one of four uses (``stream``) at a token's place: SplitMix64 (Steele and others, OOPSLA 2014)."""
    return (_mix((key + (4 * place + stream + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def draw(distribution: Distribution, u: float) -> int:
    """The id at ``u`` in [0, 1) of the cumulative distribution."""
    ids, weights = distribution
    heights = np.cumsum(weights)
    at = min(int(heights.searchsorted(u * heights[-1], side="right")), len(heights) - 1)
    while weights[at] == 0.0 and at > 0:  # the last ones may have no weight at all
        at -= 1
    return at if ids is None else int(ids[at])


class Sampler:
    """The choices of one answer: its parameters, what it has seen, its random stream, and its grammar's state."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], *, vocab: int, ends: Iterable[int] = (), index: int = 0,
        matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self.params, self.matcher, self.place = params, matcher, 0
        self.key = key_of(params.seed, index)
        self.greedy = params.temperature < GREEDY_BELOW
        self._ends = np.array(sorted(ends), np.int64)
        self._bias = np.array(list(params.logit_bias), np.int64), np.array(list(params.logit_bias.values()), np.float32)
        self._repetition = params.repetition_penalty != 1.0
        self._counting = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self._slots: dict[int, int] = {}  # id -> where it stands in the two arrays
        self._seen, self._counts = np.zeros(64, np.int64), np.zeros(64, np.float32)
        if self._repetition:
            for token in dict.fromkeys(prompt):
                self._slot(token)
        self._plain = not (self._repetition or self._counting or params.logit_bias or params.min_tokens or matcher)

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._seen):
            self._seen = np.concatenate((self._seen, np.zeros_like(self._seen)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._seen[slot] = token
        return slot

    def accept(self, token: int) -> None:
        """``token`` is the answer's next one."""
        self.place += 1
        if self._repetition or self._counting:
            slot = self._slot(token)  # may replace the array
            self._counts[slot] += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Penalties, biases and what is forbidden, in place: float32 ``[V]``."""
        if self._plain:
            return logits
        params, seen = self.params, len(self._slots)
        if seen:
            ids, counts = self._seen[:seen], self._counts[:seen]
            picked = logits[ids]
            if self._repetition:
                penalty = np.float32(params.repetition_penalty)
                picked = np.where(picked > 0, picked / penalty, picked * penalty)
            if self._counting:
                picked -= (
                    np.float32(params.presence_penalty) * (counts > 0) + np.float32(params.frequency_penalty) * counts
                )
            logits[ids] = picked
        if len(self._bias[0]):
            logits[self._bias[0]] += self._bias[1]
        if self.matcher is not None:
            self.matcher.forbid(logits)
        if self.place < params.min_tokens and len(self._ends):
            kept = logits[self._ends]
            logits[self._ends] = -np.inf
            if self.matcher is not None and logits.max() == -np.inf:
                logits[self._ends] = kept  # the grammar is complete: nothing else may follow
        return logits

    def choose(self, logits: np.ndarray) -> int:
        """The next token from logits float32 ``[V]``, which are changed. BadLogits: NaN, infinity, or nothing is allowed."""
        self.adjust(logits)
        if not self.greedy:
            return draw(self.distribution(logits), uniform(self.key, self.place))
        token = int(logits.argmax())  # of NaN, it gives the first
        if not math.isfinite(logits[token]):
            raise BadLogits(_why(logits))
        return token

    def distribution(self, logits: np.ndarray) -> Distribution:
        """What `choose` draws from, of logits that `adjust` has seen: ids and their weights, the likeliest first.

        Greedy is all weight on one id.
        """
        params = self.params
        peak = logits.max()
        if not math.isfinite(peak):
            raise BadLogits(_why(logits))
        if self.greedy:
            return np.array([logits.argmax()]), np.ones(1)
        with np.errstate(over="ignore"):  # what is that far below the likeliest becomes -inf
            scaled = logits - peak
            scaled /= np.float32(params.temperature)
        weights = np.exp(scaled)  # the likeliest has 1
        k = params.top_k if params.top_k < len(weights) else 0
        if not k and params.top_p == 1.0:
            if params.min_p == 0.0:
                return None, weights.astype(np.float64)
            ids = np.flatnonzero(weights >= np.float32(params.min_p))
            return ids, weights[ids].astype(np.float64)
        return _truncate(scaled, weights, k, params.top_p, params.min_p)


def _truncate(scaled: np.ndarray, weights: np.ndarray, k: int, p: float, min_p: float) -> Distribution:
    """Top-k (ties with the k-th stay), then top-p of what is left, then min-p; only the ids that can matter are sorted."""
    total = 0.0 if k else float(weights.sum(dtype=np.float64))
    ids = None
    for level in _LEVELS:
        above = np.flatnonzero(weights > np.float32(level))
        if len(above) >= k if k else float(weights[above].sum(dtype=np.float64)) >= p * total:
            ids = above
            break
    if ids is None:
        ids = np.arange(len(weights))
    heights = scaled[ids]
    if k and len(ids) > 4 * k + 256:  # a flat distribution: find the k-th before sorting
        ids = ids[heights >= np.partition(heights, len(heights) - k)[len(heights) - k]]
        heights = scaled[ids]
    order = np.argsort(-heights, kind="stable")  # equal ones by id
    if k:
        order = order[: np.searchsorted(-heights[order], -heights[order[k - 1]], side="right")]
    ids = ids[order]
    kept = weights[ids].astype(np.float64)
    if p < 1.0:
        sums = np.cumsum(kept)
        reach = p * (float(sums[-1]) if k else total)
        kept = kept[: int(sums.searchsorted(reach, side="left")) + 1]
    if min_p > 0.0:
        kept = kept[: max(1, int(np.searchsorted(-kept, -np.float64(np.float32(min_p)), side="right")))]
    return ids[: len(kept)], kept


def _why(logits: np.ndarray) -> str:
    if np.isnan(logits).any():
        return "the model gave NaN for a logit"
    if np.isposinf(logits).any():
        return "the model gave an infinite logit"
    return "no token is allowed: what is asked for (logit_bias, grammar) forbids them all"


def log_normaliser(logits: np.ndarray) -> float:
    """log(sum(exp(logits))) of float32 ``[V]``, summed in float64."""
    peak = float(logits.max())
    return peak + math.log(float(np.exp(logits - np.float32(peak)).sum(dtype=np.float64)))


def logprob_of(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The log-probability of ``token`` and of the ``top`` likeliest, from the model's own logits float32 ``[V]``."""
    normaliser = log_normaliser(logits)
    rank = 1 + int(np.count_nonzero(logits > logits[token]))
    likeliest: np.ndarray = np.zeros(0, np.int64)
    if top:
        top = min(top, len(logits))
        # all that reach the last place, then in order, equal ones by id
        level = np.partition(logits, len(logits) - top)[len(logits) - top]
        near = np.flatnonzero(logits >= level)
        likeliest = near[np.argsort(-logits[near], kind="stable")][:top]
    pairs = tuple((int(id), float(logits[id]) - normaliser) for id in likeliest)
    return TokenLogprob(token, float(logits[token]) - normaliser, rank, pairs)
