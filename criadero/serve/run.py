"""The one way from a checked request to tokens: find the model, render, ask for a place, compute, and say what was done.

``run = await begin_chat(service, key, ...)`` renders, checks and puts the request in line; what is wrong with it is an `ApiError` there,
before anything is sent. Then ``async for event in run.events()`` until it ends, ``await run.finish()`` for the `criadero` block, and
``run.close()`` in any case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from criadero.chat import Message, Template, render
from criadero.engine.llm import Building, Result
from criadero.engine.request import Output, Request, SamplingParams, sampling_params
from criadero.errors import UserError
from criadero.serve.admission import Admission, Ticket
from criadero.serve.errors import ApiError, of_user_error
from criadero.serve.keys import Key, KeyStore
from criadero.serve.metrics import Metrics
from criadero.serve.models import Entry, Pool
from criadero.serve.settings import Settings
from criadero.serve.store import StoreError
from criadero.serve.telemetry import CARRIED, Telemetry
from criadero.serve.worker import Channel, Event, Started, Waiting, Worker
from criadero.tokenizer import Tokenizer

log = logging.getLogger("criadero.serve")
Policy = Literal["error", "oldest"]
LEAST_ANSWER = 16  # tokens that `fit_messages` leaves for an answer when the last question takes nearly all


class Store(KeyStore, Protocol):
    """What is kept on disk, as far as this file is concerned."""

    def add_receipt(self, owner: str, receipt: dict[str, Any]) -> None:
        """Keep a receipt; it has an ``id``."""
        ...

    def tokens_since(self, owner: str, key: str, since: float) -> int:
        """Tokens of a key's receipts since a time (seconds since 1970)."""
        ...


@dataclass
class Service:
    """What all handlers share: ``app.state.service``."""

    settings: Settings
    pool: Pool
    admission: Admission
    metrics: Metrics
    store: Store | None = None
    telemetry: Telemetry | None = None


@dataclass(frozen=True)
class Fitted:
    """A chat that fits the context: its ids, and which messages had to be left out (indices)."""

    ids: list[int]
    dropped: tuple[int, ...]


def fit_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, template: Template, context: int, answer: int, policy: Policy
) -> Fitted:
    """The ids of a chat. With ``policy`` "oldest" whole turns are left out, the oldest first, until ``answer`` tokens (at most half
    the context) have room; a system message in front stays. UserError when the last question alone is too long."""
    ids = render(messages, tokenizer, template, add_generation_prompt=True).ids
    room = context - min(answer, context // 2)
    if policy == "error" or len(ids) <= room:
        return Fitted(ids, ())
    first = 1 if messages[0]["role"] == "system" else 0
    # a turn begins with a message of the user's; the last one stays
    starts = [at for at in range(first + 1, len(messages)) if messages[at]["role"] == "user"]
    best: Fitted | None = None
    low, high = 0, len(starts) - 1
    while low <= high:  # the fewest turns to leave out: the length falls with each
        middle = (low + high) // 2
        kept = [*messages[:first], *messages[starts[middle] :]]
        these = render(kept, tokenizer, template, add_generation_prompt=True).ids
        last = middle == len(starts) - 1 and len(these) + LEAST_ANSWER <= context
        if len(these) <= room or last:
            best, high = Fitted(these, tuple(range(first, starts[middle]))), middle - 1
        else:
            low = middle + 1
    if best is not None:
        return best
    if not starts and len(ids) + LEAST_ANSWER <= context:
        return Fitted(ids, ())
    raise UserError(
        f"the last message takes too many tokens ({len(ids)} with all) and the model's context is {context}; shorten it"
    )


@dataclass
class Run:
    """One request under way. ``result`` grows as events are read; it is whole when `events` has ended."""

    service: Service
    key: Key
    entry: Entry
    worker: Worker
    request: Request
    endpoint: str
    policy: Policy = "error"
    dropped: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()
    prompts: int = 1  # of its request, if it is the first of them; 0: another
    keep: bool = False  # the receipt holds the ids of prompt and answer
    result: Result = field(init=False)
    done: bool = False
    failed: ApiError | None = None
    receipt_id: str = ""
    waiting: Waiting | None = None
    _id: int = 0
    _ticket: Ticket | None = None
    _closed: bool = False

    def __post_init__(self) -> None:
        params = self.request.params
        self._building = Building(1 if self.request.pooling else params.n, len(self.dropped))
        self.result = self._building.result()
        guarding = None if self.request.pooling else self.entry.guarding
        self.watch = None if guarding is None else guarding.watch()
        self._channel = Channel(asyncio.get_running_loop())
        self.arrived = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.ended: float | None = None
        self._latest: dict[int, float] = {}
        self._cancelled = False
        self.left = False  # the client went away
        self.carried = CARRIED.get()

    # --- its life ---

    async def start(self) -> None:
        """Ask for a place and put it in line. ApiError: it is refused."""
        params, prompt = self.request.params, len(self.request.prompt)
        context = self.worker.llm.context
        answers = 1 if self.request.pooling else params.n
        most = prompt + (0 if self.request.pooling else answers * min(params.max_tokens, max(1, context - prompt)))
        await self._count_before()
        self._ticket = self.service.admission.enter(
            self.key, self.worker, answers=answers, tokens=most, prompts=self.prompts
        )
        try:
            await asyncio.to_thread(self._submit)
        except UserError as error:
            raise of_user_error(
                error, "input" if self.request.pooling else "prompt" if self.request.continues else "messages"
            ) from None

    async def _count_before(self) -> None:
        """What its key has used today before this server was started counts too."""
        admission, store = self.service.admission, self.service.store
        if store is not None and (since := admission.uncounted_since(self.key)) is not None:
            used = 0
            try:
                used = await asyncio.to_thread(store.tokens_since, self.key.owner, self.key.id, since)
            except Exception as error:  # as with receipts: the database's trouble does not take the answer with it
                log.error(
                    "the tokens of a key could not be counted: %s", error, exc_info=not isinstance(error, StoreError)
                )
            admission.count_before(self.key, used)

    def _submit(self) -> None:
        self._id = self.worker.submit(self.request, self._channel)
        if self._cancelled:  # meanwhile
            self.worker.cancel(self._id)

    async def events(self, ping: float | None = None) -> AsyncIterator[Event | None]:
        """What happens to it, until it has ended; None after ``ping`` seconds of silence. A failure is the last `Output`'s ``error``,
        and `failed`."""
        seconds = ping or self.service.settings.ping_seconds
        while not self.done:
            event = await self._channel.get(seconds)
            if isinstance(event, Output):
                if self.watch is not None:
                    event = self.watch.look(event)
                self._took(event)
                if self.watch is not None and self.watch.over(self.request.params.n):
                    self.cancel()
            elif isinstance(event, Started):
                self.started = event.at
                self.waiting = None
            elif isinstance(event, Waiting):
                self.waiting = event
            if event is not None or ping is not None:
                yield event

    async def wait(self) -> Result:
        """Until it has ended."""
        async for _ in self.events():
            pass
        return self.result

    def check(self) -> None:
        """ApiError: it has failed, or was cancelled."""
        error = self.failed
        if error is None and any(sample.finish_reason == "cancelled" for sample in self.result.samples):
            error = cancelled()
        if error is not None:
            raise error

    def cancelled_error(self, output: Output) -> ApiError | None:
        """What a stream says when ``output`` ends with a cancellation."""
        return cancelled() if output.finish_reason == "cancelled" else None

    def cancel(self) -> None:
        """End it: its slot is free at once, or after the step that is being computed."""
        self._cancelled = True
        if self._id and not self.done:
            self.worker.cancel(self._id)

    def gone(self) -> None:
        """The client went away."""
        if not self.done:
            self.left = True
            self.service.metrics.gone.labels(self.entry.name).inc()
            self.cancel()

    def close(self) -> None:
        """Give everything back; cancels what is not through. To be called once or more."""
        if self._closed:
            return
        self._closed = True
        self.cancel()
        if self._ticket is not None:
            used = self.result.usage
            tokens = used.prompt + used.completion if self.done else self._so_far() if self._id else 0
            self.service.admission.leave(self._ticket, tokens)
        self.service.pool.release(self.entry)
        if self._id and self.service.telemetry is not None:
            self.service.telemetry.record(self)

    def _so_far(self) -> int:
        return len(self.request.prompt) + sum(len(sample.ids) for sample in self.result.samples)

    def _took(self, output: Output) -> None:
        now = time.monotonic()
        metrics, name = self.service.metrics, self.entry.name
        if output.ids or output.embedding is not None:
            if self.first is None:
                self.first = now
                metrics.first_token.labels(name).observe(now - self.arrived)
            before = self._latest.get(output.index)
            if before is not None and output.ids:
                metrics.between_tokens.labels(name).observe((now - before) / len(output.ids))
            self._latest[output.index] = now
        self._building.add(output)
        if output.error:
            log.error("%s", output.error)
            self.failed = ApiError(500, "generation_failed", "the model could not go on: " + output.error)
        if output.finish_reason is not None:
            metrics.success.labels(name, output.finish_reason).inc()
        if output.done:
            self.done, self.ended = True, now
            self.result = self._building.result()
            usage = self.result.usage
            metrics.prompt_tokens.labels(name).inc(usage.prompt)
            metrics.generation_tokens.labels(name).inc(usage.completion)
            metrics.prompt_size.labels(name).observe(usage.prompt)
            metrics.answer_size.labels(name).observe(usage.completion)
            metrics.whole.labels(name).observe(now - self.arrived)
            metrics.queued.labels(name).observe((self.started or now) - self.arrived)
            metrics.cache_queries.labels(name).inc(usage.prompt)
            metrics.cache_hits.labels(name).inc(usage.cached)
            if self.first is not None and len(self.result.samples) == 1:
                metrics.saw_speed(name, len(self.result.ids) - 1, now - self.first)

    # --- what is said of it ---

    @property
    def headers(self) -> dict[str, str]:
        """For its response."""
        found = dict(self._ticket.headers) if self._ticket else {}
        if self.watch is not None:
            found["X-Criadero-Guard"] = "stopped" if self.watch.stopped else "on"
        if self.ignored:
            shown = self.ignored[:20]  # clients bound a header's length; the block has all
            found["X-Criadero-Ignored"] = ", ".join(shown) + (", ..." if len(shown) < len(self.ignored) else "")
        return found

    @property
    def queue_ms(self) -> int:
        """How long it has waited for its start."""
        until = self.started or self.ended or time.monotonic()
        return max(0, round(1000 * (until - self.arrived)))

    async def finish(self) -> dict[str, Any]:
        """The `criadero` block; the receipt is kept first. To be called once, when it has ended."""
        receipt = self.receipt()
        kept = False
        if self.service.store is not None:
            try:
                await asyncio.to_thread(self.service.store.add_receipt, self.key.owner, receipt)
                kept = True
            except Exception as error:  # a full or locked disk must not take the answer with it: the block says it
                log.error("a receipt could not be kept: %s", error, exc_info=not isinstance(error, StoreError))
                self.service.metrics.receipts_lost.inc()
        return self.block(kept)

    def block(self, kept: bool = False) -> dict[str, Any]:
        """Everything that is not as one might think, and what computed it. The same shape in every response."""
        entry, usage = self.entry, self.result.usage
        longest = max((len(sample.ids) for sample in self.result.samples), default=0)
        reasons = [sample.finish_reason for sample in self.result.samples]
        return {
            "context": {
                "limit": self.worker.llm.context, "used": len(self.request.prompt) + longest, "filled": "context" in reasons,
                "dropped_messages": len(self.dropped), "dropped": list(self.dropped), "policy": self.policy,
            },
            "cached_tokens": usage.cached, "queue_ms": self.queue_ms, "ignored": list(self.ignored),
            "seed": self.request.params.seed, "guard": None if self.watch is None else self.watch.as_dict(),
            "receipt": {
                "id": self.receipt_id, "kept": kept, "model": entry.base or entry.name, "weights_sha256": entry.body.weights_sha256,
                "template_sha256": entry.template_sha256, "adapter": entry.name if entry.adapter else None,
                "adapter_sha256": entry.adapter_sha256, "passport": entry.passport_id, "build": self.service.pool.build(entry),
            },
        }  # fmt: skip

    def receipt(self) -> dict[str, Any]:
        """What `criadero replay` needs, but for the prompt, of which it has the hash; with `Settings.keep_prompts` the ids too."""
        self.receipt_id = self.receipt_id or "rcpt-" + uuid.uuid4().hex
        answers = [sample.ids for sample in self.result.samples]
        entry = self.entry
        found: dict[str, Any] = {
            **{key: value for key, value in self.block()["receipt"].items() if key != "kept"},
            "paths": {"model": str(entry.body.path), "adapter": str(entry.path) if entry.adapter else None},
            "created": int(time.time()), "key": self.key.id, "endpoint": self.endpoint, "params": plain_params(self.request.params),
            "continues": self.request.continues, "pooling": self.request.pooling, "usage": dataclasses.asdict(self.result.usage),
            "finish_reasons": [sample.finish_reason for sample in self.result.samples],
            "prompt_sha256": ids_sha256(self.request.prompt), "answers_sha256": [ids_sha256(ids) for ids in answers],
            "answer_tokens": [len(ids) for ids in answers],
            "guard": None if self.watch is None else self.watch.as_dict(),
        }  # fmt: skip
        if self.keep or self.service.settings.keep_prompts:
            found |= {"prompt_ids": list(self.request.prompt), "answer_ids": answers}
        return found


def cancelled() -> ApiError:
    """What a client is told whose answer was cut off, as when the server goes down."""
    return ApiError(503, "cancelled", "the answer was cancelled", headers={"Retry-After": "1"})


def ids_sha256(ids: Sequence[int]) -> str:
    """Hash of token ids, written as decimal numbers with blanks between."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def plain_params(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters as JSON: what is not the default, and always the seed; ``SamplingParams(**them)`` is the same again."""
    found: dict[str, Any] = {"seed": params.seed}
    for one in dataclasses.fields(params):
        value = getattr(params, one.name)
        default = () if one.name in ("stop", "stop_ids") else {} if one.name == "logit_bias" else one.default
        if one.name != "seed" and value != default:
            found[one.name] = list(value) if isinstance(value, tuple) else value
    if "logit_bias" in found:
        found["logit_bias"] = {str(id): bias for id, bias in params.logit_bias.items()}
    return found


# --- beginning ---


async def begin_chat(
    service: Service, key: Key, *, model: str | None, messages: Sequence[Message], params: Mapping[str, Any], endpoint: str,
    policy: Policy = "error", ignored: Sequence[str] = (), keep: bool = False,
) -> Run:  # fmt: skip
    """Answer a chat. ``params`` are fields of `SamplingParams`; without ``max_tokens`` the answer may fill the context."""

    def make(worker: Worker, entry: Entry) -> tuple[Request, tuple[int, ...]]:
        llm = worker.llm
        if entry.template is None:
            raise UserError(entry.template_problem)
        sampling = _sampling(params, llm.context)
        fitted = fit_messages(messages, llm.tokenizer, entry.template, llm.context, sampling.max_tokens, policy)
        return _request(entry, fitted.ids, sampling, key), fitted.dropped

    return await _begin(service, key, model, make, endpoint, policy, ignored, keep)


async def begin_text(
    service: Service, key: Key, *, model: str | None, prompt: str | Sequence[int], params: Mapping[str, Any], endpoint: str,
    ignored: Sequence[str] = (), pooling: Literal["mean", "last"] | None = None, keep: bool = False,
    prompts: int = 1,
) -> Run:  # fmt: skip
    """Go on from a text or from token ids; with ``pooling`` make a vector of it. Of a request's several prompts the first says how many
    they are, the others 0."""

    def make(worker: Worker, entry: Entry) -> tuple[Request, tuple[int, ...]]:
        llm = worker.llm
        sampling = _sampling(params, llm.context)
        request = _request(entry, llm.ids(prompt), sampling, key)
        return dataclasses.replace(request, continues=True, pooling=pooling), ()

    return await _begin(service, key, model, make, endpoint, "error", ignored, keep, prompts)


async def _begin(
    service: Service, key: Key, model: str | None, make: Callable[[Worker, Entry], tuple[Request, tuple[int, ...]]], endpoint: str,
    policy: Policy, ignored: Sequence[str], keep: bool, prompts: int = 1,
) -> Run:  # fmt: skip
    entry = service.pool.find(model)
    worker = await service.pool.acquire(entry)
    try:
        request, dropped = await asyncio.to_thread(make, worker, entry)
        run = Run(service, key, entry, worker, request, endpoint, policy, dropped, tuple(ignored), prompts, keep)
    except UserError as error:
        service.pool.release(entry)
        raise of_user_error(error) from None
    except BaseException:
        service.pool.release(entry)
        raise
    try:
        await run.start()
    except BaseException:
        run.close()
        raise
    return run


def _sampling(params: Mapping[str, Any], context: int) -> SamplingParams:
    values = {"max_tokens": context, **params}
    if values.get("seed") is None:
        values["seed"] = secrets.randbits(
            48
        )  # a number that JSON readers keep whole, so that any answer can be had again
    if values["max_tokens"] > context:
        values["max_tokens"] = context
    return sampling_params(values)


def _request(entry: Entry, ids: list[int], params: SamplingParams, key: Key) -> Request:
    if entry.end_ids and not params.ignore_eos:
        params = dataclasses.replace(params, stop_ids=(*params.stop_ids, *entry.end_ids))
    return Request(ids, params, entry.name if entry.adapter else None, tenant=key.id)
