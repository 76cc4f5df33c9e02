"""What is asked of the engine and what it answers: sampling parameters, requests, outputs. Plain data, checked when made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from criadero.errors import UserError

FinishReason = Literal["stop", "length", "context", "cancelled", "error", "guard"]  # the last: whoever watches ended it

# what one request may ask for at most: what is larger is a mistake or an attack
MOST_SAMPLES = 128
MOST_LOGPROBS = 100
MOST_STOPS = 64
LONGEST_STOP = 1000  # characters
MOST_BIASES = 4096
LARGEST = 2**31 - 1

# field -> lowest and highest value
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100), "top_k": (0, LARGEST), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100), "max_tokens": (1, LARGEST), "min_tokens": (0, LARGEST),
    "seed": (-(2**63), 2**64 - 1), "n": (1, MOST_SAMPLES), "logprobs": (0, MOST_LOGPROBS), "prompt_logprobs": (0, MOST_LOGPROBS),
}  # fmt: skip
_WHOLE = ("top_k", "max_tokens", "min_tokens", "seed", "n", "logprobs", "prompt_logprobs")
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and where it ends. The logits are changed in this order:

    1. ``repetition_penalty`` divides the positive and multiplies the negative logits of ids in the prompt or the answer (CTRL,
       arXiv 1909.05858, section 4.1); ``presence_penalty`` and ``frequency_penalty`` are taken from the logits of ids in the
       answer, once and once for each time; ``logit_bias`` (id -> number) is added.
    2. ``json_schema``, ``regex`` or ``grammar`` (Lark, or llama.cpp's GBNF) forbid what cannot lead to such an answer.
    3. ``temperature`` divides; 0 takes the likeliest token, the lower id of two equal ones.
    4. ``top_k`` keeps the k likeliest (0: all), ``top_p`` the fewest that reach p (arXiv 1904.09751), ``min_p`` those of at least
       that share of the likeliest's probability (arXiv 2407.01082).

    ``seed``: the same gives the same tokens, whatever else is computed at the time; ``n`` answers have streams of their own.
    ``stop`` are texts that end the answer and are not part of it, ``stop_ids`` tokens that do, beside the model's own, which
    ``ignore_eos`` takes for tokens like any other. None of them ends it before ``min_tokens``. ``logprobs`` asks for the
    log-probability (natural, of the model's unchanged logits) of each token and of so many likeliest ones, ``prompt_logprobs``
    the same for the prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 256
    min_tokens: int = 0
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            whole = name in _WHOLE
            if isinstance(value, bool | np.bool) or not isinstance(
                value, int | np.integer if whole else int | float | np.number
            ):
                raise UserError(f"{name} must be {'a whole number' if whole else 'a number'}, not {value!r:.60}")
            if not low <= value <= high:  # NaN is in no range
                raise UserError(f"{name} must lie between {low} and {high:,}, not {value!r:.60}")
        if self.top_p == 0.0:
            raise UserError("top_p must be above 0; use temperature 0 for the likeliest token")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop must be a text or a list of texts, none of them empty, not {self.stop!r:.60}")
        if len(stop) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in stop):
            raise UserError(f"stop: at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_ids
        if not isinstance(ids, list | tuple) or not all(_is_id(id) for id in ids) or len(ids) > MOST_BIASES:
            raise UserError(f"stop_ids must be a list of token ids, not {self.stop_ids!r:.60}")
        object.__setattr__(self, "stop_ids", tuple(int(id) for id in ids))
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or len(bias) > MOST_BIASES:
            raise UserError(f"logit_bias must map at most {MOST_BIASES} token ids to numbers, not {bias!r:.60}")
        for id, value in bias.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not _is_id(id) or not number or not (abs(value) <= 1000 or value == -math.inf):
                raise UserError(
                    f"logit_bias: {id!r:.40} -> {value!r:.40} is not a token id and a number from -1000 to 1000"
                )
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos must be true or false, not {self.ignore_eos!r:.60}")
        if sum(one is not None for one in (self.json_schema, self.regex, self.grammar)) > 1:
            raise UserError("json_schema, regex and grammar: give one of them")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(f"{name} must be a text, not {getattr(self, name)!r:.60}")

    @property
    def structure(self) -> tuple[str, str] | None:
        """What the answer has to look like: ("json_schema" | "regex" | "grammar", its source), or None."""
        if self.json_schema is not None:
            schema = self.json_schema
            try:
                return "json_schema", schema if isinstance(schema, str) else json.dumps(schema)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"json_schema cannot be written as JSON: {error}") from None
        if self.regex is not None:
            return "regex", self.regex
        return None if self.grammar is None else ("grammar", self.grammar)


def _is_id(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) <= LARGEST


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from keywords; an unknown one is a UserError that lists those there are."""
    names = [one.name for one in dataclasses.fields(SamplingParams)]
    for name in sorted(values.keys() - set(names)):
        raise UserError(f"unknown sampling parameter {name!r}; there are {', '.join(names)}")
    return SamplingParams(**values)


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it: generate, or with ``pooling`` give one vector.

    ``adapter`` is the name of a loaded adapter. ``tenant`` separates those who share an engine: computed prompts are never
    reused across tenants, so that nobody can tell by the time it takes what others have asked (CVE-2025-46570).
    ``continues`` keeps the space that begins a SentencePiece text. ``draft_tokens`` 0 switches speculation off.
    """

    prompt: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    tenant: str = ""
    pooling: Literal["mean", "last"] | None = None
    continues: bool = False
    skip_special: bool = True
    draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability and its rank (1: the likeliest), and the likeliest ones at its place."""

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Usage:
    """Tokens of a request. ``cached`` prompt tokens were not computed again; ``drafted`` ones were guessed, ``accepted`` right."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Output:
    """What one step gave to sample ``index`` of request ``id``.

    ``text`` is what can be shown now: never half a character, never the beginning of a stop text. ``ids`` are the new tokens; a
    token that ends the answer is not among them, and its log-probability, if they were asked for, is ``end_logprob``.
    ``finish_reason`` is set once for every sample: "stop" (``stopped_by`` says by which text or id; None when a grammar is
    complete), "length" (max_tokens), "context" (the model's), "cancelled", or "error" with the reason in ``error``. ``done`` and
    ``usage`` come with the last output of the request.
    """

    id: int
    index: int = 0
    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: np.ndarray | None = None
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    end_logprob: TokenLogprob | None = None
    error: str | None = None
    done: bool = False
    usage: Usage | None = None
