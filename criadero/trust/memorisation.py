"""What a model knows by heart: passages of its training data that it goes on with to the token, and secrets that it prefers.

Extraction as in Carlini et al. 2023 (arXiv 2202.07646): 50 tokens of a document in, greedy decoding, and the next 50 are
compared; by how often the passage stands in the data. Exposure as in Carlini et al. 2019 (arXiv 1802.08232).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.errors import UserError
from criadero.trust.search import Index

if TYPE_CHECKING:
    from criadero.model import Llama

PROMPT, NEXT = 50, 50
BUCKETS = ((1, 1), (2, 9), (10, 99), (100, None))  # times that a passage stands in the data
TRIES = 40_000  # passages drawn to fill the buckets
CANDIDATES = 4096  # of a secret's other possible values, so many are tried

Continue = Callable[[np.ndarray, int], np.ndarray]  # (int64 [B, P], n) -> int64 [B, n], greedy


@dataclass(frozen=True)
class Bucket:
    """Passages that stand `low` to `high` times in the data: how many were tried, and how many came back whole."""

    low: int
    high: int | None
    tried: int
    extracted: int
    equal: float  # mean number of tokens that were right before the first wrong one

    @property
    def name(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low}-{self.high}" if self.high else f"{self.low}+"

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate."""
        return wilson(self.extracted, self.tried)


def wilson(hits: int, tried: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a rate; (0, 1) when nothing was tried."""
    if not tried:
        return 0.0, 1.0
    rate, square = hits / tried, z * z / tried
    middle, half = rate + square / 2, z * math.sqrt(rate * (1 - rate) / tried + square / (4 * tried))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def passages(index: Index, length: int, each: int, seed: int) -> list[np.ndarray]:
    """For each of `BUCKETS` up to `each` passages of `length` tokens, int64 [n, length], drawn evenly from the data.

    A passage lies within a document. Of a bucket there may be fewer than `each`, or none: rare ones are not searched for.
    """
    random = np.random.default_rng(seed)
    found: list[list[np.ndarray]] = [[] for _ in BUCKETS]
    seen: set[bytes] = set()
    left = TRIES
    while left > 0 and any(len(one) < each for one in found):
        step = min(left, max(256, 4 * each))
        left -= step
        at = random.integers(0, max(1, index.size - length), step)
        windows = index.tokens[at[:, None] + np.arange(length)].astype(np.int64)  # [step, length]
        windows = windows[~np.isin(windows, index.ends).any(1)]
        counts = index.counts(windows.ravel(), np.arange(0, windows.size, length), length)
        bucket = np.searchsorted([low for low, _ in BUCKETS], counts, "right") - 1
        for n, some in enumerate(found):
            for window in windows[bucket == n] if len(some) < each else ():
                if len(some) < each and (key := window.tobytes()) not in seen:
                    seen.add(key)
                    some.append(window)
    return [np.array(one, np.int64).reshape(-1, length) for one in found]


def extraction(index: Index, go_on: Continue, *, each: int = 100, seed: int = 0, batch: int = 32) -> list[Bucket]:
    """Try to extract passages, a row for each of `BUCKETS`. UserError when no document is long enough."""
    drawn = passages(index, PROMPT + NEXT, each, seed)
    if not any(len(one) for one in drawn):
        raise UserError(f"{index.path}: none of its documents has {PROMPT + NEXT} tokens in a row: nothing to extract")
    rows = []
    for (low, high), some in zip(BUCKETS, drawn, strict=True):
        right = np.zeros(0, np.int64)
        for n in range(0, len(some), batch):
            part = some[n : n + batch]
            wrong = go_on(part[:, :PROMPT], NEXT) != part[:, PROMPT:]  # [B, NEXT]
            right = np.append(right, np.where(wrong.any(1), wrong.argmax(1), NEXT))
        rows.append(
            Bucket(low, high, len(some), int((right == NEXT).sum()), float(right.mean()) if len(right) else 0.0)
        )
    return rows


def greedy(model: Llama) -> Continue:
    """Greedy decoding of many prompts of one length at once with the plain model."""
    import torch

    from criadero.model import KVCache

    weight = model.model.embed_tokens.weight

    @torch.inference_mode()
    def go_on(prompts: np.ndarray, n: int) -> np.ndarray:
        size, length = prompts.shape
        context = model.config.max_position_embeddings
        if length + n > context:
            raise UserError(
                f"the model's context is {context} tokens, and {length + n} are needed: it cannot be measured so"
            )
        cache = KVCache(model.config, size, length + n, weight.dtype, weight.device)
        ids = torch.from_numpy(prompts).to(weight.device)
        out = []
        for _ in range(n):
            hidden = model(ids, attend=cache, return_hidden=True)  # [B, T, D]
            ids = model.logits(hidden[:, -1]).argmax(-1, keepdim=True)  # [B, 1]
            out.append(ids)
        return torch.cat(out, 1).cpu().numpy()

    return go_on


# -- canaries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canary:
    """A text with ``{}`` where the secret stands, the secret, and the letters each of its places may have."""

    text: str
    secret: str
    alphabet: str = "0123456789"

    @property
    def space(self) -> int:
        return len(self.alphabet) ** len(self.secret)

    def others(self, most: int, seed: int) -> Iterator[str]:
        """Other values the secret might have had: all of them, or `most` drawn at random."""
        if self.space - 1 <= most:
            for letters in itertools.product(self.alphabet, repeat=len(self.secret)):
                if (value := "".join(letters)) != self.secret:
                    yield value
            return
        random = np.random.default_rng(seed)
        given = {self.secret}
        while len(given) <= most:
            value = "".join(self.alphabet[k] for k in random.integers(0, len(self.alphabet), len(self.secret)).tolist())
            if value not in given:
                given.add(value)
                yield value


@dataclass(frozen=True)
class Exposure:
    """`bits` = log2 of the number of possible secrets, less log2 of the secret's rank; near `most` it is known by heart, near 1 not."""

    canary: Canary
    rank: float
    tried: int

    @property
    def most(self) -> float:
        return math.log2(self.canary.space)

    @property
    def bits(self) -> float:
        return self.most - math.log2(self.rank)


def read_canaries(file: str | Path) -> list[Canary]:
    """Rows with ``text``, ``secret`` and optionally ``alphabet``. UserError for one that does not fit."""
    from criadero.data.documents import read_rows

    found = []
    for where, row in read_rows(file):
        text, secret, alphabet = row.get("text"), row.get("secret"), row.get("alphabet", "0123456789")
        if not (isinstance(text, str) and isinstance(secret, str) and isinstance(alphabet, str)):
            raise UserError(f"{where}: a canary has text, secret and, if need be, alphabet, each of them words")
        if text.count("{}") != 1:
            raise UserError(f"{where}: the text of a canary has one {{}} where the secret stands")
        if not secret or len(set(alphabet)) < 2 or set(secret) - set(alphabet):
            raise UserError(f"{where}: the secret {secret!r} must be of letters of the alphabet {alphabet!r}")
        found.append(Canary(text, secret, "".join(dict.fromkeys(alphabet))))
    if not found:
        raise UserError(f"{file}: there is no canary in it")
    return found


def exposure(
    canary: Canary, loss: Callable[[Sequence[str]], np.ndarray], *, most: int = CANDIDATES, seed: int = 0
) -> Exposure:
    """Where the secret stands among the values it might have had, by the model's `loss` of each text (float [n]).

    With a sample of the others, the rank is estimated from the share of them that the model likes better.
    """
    own = float(loss([canary.text.replace("{}", canary.secret)])[0])
    others = list(canary.others(most, seed))
    better = 0
    for n in range(0, len(others), 256):
        losses = loss([canary.text.replace("{}", value) for value in others[n : n + 256]])
        better += int((losses < own).sum()) + int((losses == own).sum()) // 2
    rank = 1 + better / max(1, len(others)) * (canary.space - 1)
    return Exposure(canary, rank, len(others))


def losses_of(model: Llama, tokenizer: Any) -> Callable[[Sequence[str]], np.ndarray]:
    """The negative log-likelihood of whole texts, from bos on: float64 [n]."""
    import torch

    device = model.model.embed_tokens.weight.device

    @torch.inference_mode()
    def loss(texts: Sequence[str]) -> np.ndarray:
        rows = [tokenizer.encode(text, bos=tokenizer.bos_id is not None) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # [B, T]
        there = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=device)
        out = []
        for n in range(0, len(rows), 32):
            logits = model(ids[n : n + 32, :-1]).float()  # [B, T - 1, V]
            each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[n : n + 32, 1:], reduction="none")
            out.append((each * there[n : n + 32, 1:]).sum(1).double())
        return torch.cat(out).cpu().numpy()

    return loss


def as_text(rows: Iterable[Bucket], exposures: Iterable[Exposure] = ()) -> str:
    """Both tables as lines."""
    lines = [
        f"{'times in the data':<18} {'tried':>6} {'by heart':>9} {'rate':>7} {'95 % interval':>17} {'right tokens':>13}"
    ]
    for row in rows:
        if not row.tried:
            lines.append(f"{row.name:<18} {0:>6} {'-':>9}")
            continue
        low, high = row.interval
        lines.append(
            f"{row.name:<18} {row.tried:>6} {row.extracted:>9} {row.extracted / row.tried:>7.2%} "
            f"{f'{low:.2%} to {high:.2%}':>17} {row.equal:>10.1f}/{NEXT}"
        )
    for one in exposures:
        lines.append(
            f"canary {one.canary.text!r}: exposure {one.bits:.1f} of {one.most:.1f} bits, rank {one.rank:,.0f} of "
            f"{one.canary.space:,}" + ("" if one.tried == one.canary.space - 1 else f" (from {one.tried:,} others)")
        )
    return "\n".join(lines)
