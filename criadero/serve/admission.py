"""Who may start: a bounded queue for each model, and requests, tokens and answers at once for each key. Refusals say when to come back.

All in one event loop's thread, in this process: a server is one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from criadero.serve.errors import ApiError
from criadero.serve.keys import Key
from criadero.serve.settings import Limits
from criadero.serve.worker import Worker

DAY = 86_400


@dataclass
class _Bucket:
    """A token bucket that holds a minute's worth and fills evenly."""

    limit: int
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level = min(float(self.limit), self.level + (now - self.at) * self.limit / 60)
        self.at = now

    def wait(self, amount: float) -> float:
        """Seconds until ``amount`` is there; 0 when it is."""
        return max(0.0, (min(amount, self.limit) - self.level) * 60 / self.limit)


@dataclass
class _Usage:
    """What one key has under way and has used."""

    active: int = 0
    buckets: dict[str, _Bucket] = field(default_factory=dict)
    day: int = 0
    day_tokens: int = 0


@dataclass
class Ticket:
    """A place that was given to a request; `Admission.leave` takes it back."""

    key: Key
    worker: Worker
    answers: int
    tokens: int
    headers: dict[str, str]
    requests: int = 1
    left: bool = False


class Admission:
    """Counts by key and by model."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.draining = False
        self._answers: dict[int, int] = {}  # id of a worker -> answers it owes
        self._usage: dict[str, _Usage] = {}
        self._counted: set[str] = set()  # ids of keys whose tokens of today are known from before this process too

    def uncounted_since(self, key: Key) -> float | None:
        """From when on (seconds since 1970) `count_before` has to be told what ``key`` used; None when that does not matter."""
        if key.id in self._counted or self._limit(key, "tokens_per_day") is None:
            return None
        return float(time.time() // DAY * DAY)

    def count_before(self, key: Key, tokens: int) -> None:
        """``tokens`` of ``key`` today, before its first request here; only the first call counts."""
        if key.id not in self._counted:
            self._counted.add(key.id)
            self._today(key).day_tokens += tokens

    def _today(self, key: Key) -> _Usage:
        usage, today = self._usage.setdefault(key.id, _Usage()), int(time.time() // DAY)
        if usage.day != today:
            usage.day, usage.day_tokens = today, 0
        return usage

    def enter(self, key: Key, worker: Worker, *, answers: int, tokens: int, prompts: int = 1) -> Ticket:
        """A place for so many answers, of ``tokens`` at most; 429 or 503 with ``Retry-After`` otherwise. The first of a request's
        ``prompts`` asks for all of them; the others say 0, and count as tokens only."""
        if self.draining:
            raise ApiError(503, "shutting_down", "the server is shutting down", headers=_after(5))
        slots = worker.llm.engine.scheduler.sequences
        owed = self._answers.get(id(worker), 0)
        behind = owed - slots
        if owed and prompts and behind + answers * prompts > self.limits.queue:
            expected = worker.expected_wait(max(1, behind))
            raise ApiError(
                429, "queue_full",
                f"{max(0, behind)} answers wait already and at most {self.limits.queue} may (limit queue); expect a place in about "
                f"{max(1, math.ceil(expected))} s", headers=_after(expected),
            )  # fmt: skip
        headers = self._check_key(key, tokens, min(prompts, 1))
        self._answers[id(worker)] = owed + answers
        return Ticket(key, worker, answers, tokens, headers, min(prompts, 1))

    def leave(self, ticket: Ticket, used: int) -> None:
        """The request is over, and took ``used`` tokens: what it was charged beyond them is given back."""
        if ticket.left:
            return
        ticket.left = True
        self._answers[id(ticket.worker)] -= ticket.answers
        if not self._answers[id(ticket.worker)]:
            del self._answers[id(ticket.worker)]
        usage = self._usage[ticket.key.id]
        usage.active -= ticket.requests
        back = ticket.tokens - used
        usage.day_tokens = max(0, usage.day_tokens - back)
        if (bucket := usage.buckets.get("tokens_per_minute")) is not None:
            bucket.level = min(float(bucket.limit), bucket.level + back)

    def _limit(self, key: Key, name: str) -> int | None:
        own: Mapping[str, int | None] = key.limits
        value: int | None = own[name] if own.get(name) is not None else getattr(self.limits, name)
        return value

    def _check_key(self, key: Key, tokens: int, requests: int) -> dict[str, str]:
        usage, now = self._today(key), time.monotonic()
        most = self._limit(key, "concurrent")
        if most is not None and requests and usage.active >= most:
            raise ApiError(
                429, "too_many_at_once", f"this key has {usage.active} requests under way, the most it may (limit concurrent)",
                headers=_after(1),
            )  # fmt: skip
        quota = self._limit(key, "tokens_per_day")
        if quota is not None and usage.day_tokens + tokens > quota:
            raise ApiError(
                429, "token_quota_exceeded",
                f"this key has {max(0, quota - usage.day_tokens):,} of {quota:,} tokens left today (limit tokens_per_day) and the "
                f"request may take {tokens:,}", headers={**_after(DAY - time.time() % DAY), "x-should-retry": "false"},
            )  # fmt: skip
        headers: dict[str, str] = {}
        for name, amount in (("requests_per_minute", requests), ("tokens_per_minute", tokens)):
            limit = self._limit(key, name)
            if limit is None:
                continue
            bucket = usage.buckets.get(name)
            if bucket is None or bucket.limit != limit:
                bucket = usage.buckets[name] = _Bucket(limit, float(limit), now)
            bucket.refill(now)
            if (wait := bucket.wait(amount)) > 0:
                raise ApiError(
                    429, "rate_limit_exceeded", f"this key may have {limit:,} {name.replace('_', ' ')} (limit {name})",
                    headers=_after(wait),
                )  # fmt: skip
        for name, amount in (("requests_per_minute", requests), ("tokens_per_minute", tokens)):
            if (bucket := usage.buckets.get(name)) is not None and self._limit(key, name) is not None:
                bucket.level -= amount
                what = name.split("_")[0]
                headers[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level)))
        usage.day_tokens += tokens
        usage.active += requests
        return headers


def _after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
