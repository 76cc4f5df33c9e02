"""/api: answers and blind comparisons, as server-sent events.

An answer is computed and kept by a task of its own, so that what was there when a reader went away is kept, with finish_reason
"cancelled".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.engine.request import Output, TokenLogprob
from criadero.serve import sse
from criadero.serve.common import json_response, key_of, service_of, usage_of
from criadero.serve.errors import ApiError
from criadero.serve.openai_chat import token_text
from criadero.serve.page_api import ANSWER, PageParams, dropped_ids, messages_for, owner_of
from criadero.serve.params import Body
from criadero.serve.run import Run, begin_chat
from criadero.serve.store import SIDES, Store, new_id
from criadero.serve.storing import checked_id, kept, missing, store_of

log = logging.getLogger("criadero.serve")
router = APIRouter(prefix="/api")
TOP = 5  # likeliest tokens beside each, when probabilities are asked for
_tasks: set[asyncio.Task[None]] = set()  # a loop holds its tasks weakly

Seed = Annotated[int, Field(ge=0, le=2**53)]  # numbers that JavaScript keeps whole


class AnswerRequest(Body):
    """What is to be answered, and how."""

    parent: str
    model: Annotated[str, Field(max_length=256)] | None = None
    params: PageParams = Field(default_factory=PageParams)
    seed: Seed | None = None
    probabilities: bool = False


class ComparisonRequest(Body):
    """Two models for one question."""

    chat_id: str
    parent: str
    models: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(min_length=2, max_length=2)]
    params: PageParams = Field(default_factory=PageParams)
    seed: Seed | None = None


class Vote(Body):
    """Which answer is better."""

    winner: Literal["left", "right", "tie"]


def sampling(params: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams, with the page's defaults."""
    temperature = params.get("temperature", 0.3)
    defaults = {
        "temperature": temperature,
        "top_p": 0.9,
        "repetition_penalty": 1.1 if temperature else 1.0,
        "max_tokens": ANSWER,
    }
    return defaults | params


Out = asyncio.Queue[tuple[str, dict[str, Any]] | None]  # (event, data); None at the end


class Answering:
    """One answer under way: a task of its own computes it and tells ``out`` of it, under the name of its ``side`` in a comparison."""

    def __init__(
        self, run: Run, message: dict[str, Any], dropped: list[str], out: Out, side: str | None, probabilities: bool
    ) -> None:  # fmt: skip
        self.run, self.message, self.dropped, self.out, self.side = run, message, dropped, out, side
        self.probabilities = probabilities
        self.tokens: list[dict[str, Any]] = []

    async def compute(self) -> dict[str, Any]:
        """The message, whole or as far as it came. ApiError: the model could not go on."""
        run = self.run
        try:
            async for event in run.events():
                if isinstance(event, Output):
                    delta: dict[str, Any] = {"text": event.text}
                    if self.probabilities and event.logprobs:
                        delta["tokens"] = [self._token(one) for one in event.logprobs]
                        self.tokens += delta["tokens"]
                    if event.text or "tokens" in delta:
                        _tell(self.out, self.side, "delta", **delta)
                elif run.waiting is not None:
                    place, seconds = run.waiting.position, round(run.waiting.expected, 1)
                    _tell(self.out, self.side, "queue", position=place, expected_s=seconds)
            if run.failed is not None:
                raise run.failed
            block = await run.finish()
        finally:
            run.close()
        sample, receipt = run.result.samples[0], block["receipt"]
        block["context"]["dropped"] = self.dropped
        return self.message | {
            "content": sample.text, "finish_reason": sample.finish_reason, "usage": usage_of(run.result.usage), "criadero": block,
            "receipt_id": receipt["id"] if receipt["kept"] else None, "model": run.entry.name,
            "model_hash": receipt["adapter_sha256"] or receipt["weights_sha256"], "tokens": self.tokens or None,
        }  # fmt: skip

    def _token(self, one: TokenLogprob) -> dict[str, Any]:
        def said(id: int, logprob: float) -> tuple[str, float]:
            return token_text(self.run.worker.llm.tokenizer, id)[0], max(logprob, -9999.0)

        text, logprob = said(one.id, one.logprob)
        return {"text": text, "logprob": logprob, "top": [list(said(id, value)) for id, value in one.top]}


def _tell(out: Out, side: str | None, kind: str, **data: Any) -> None:
    out.put_nowait((kind, data if side is None else {"side": side, **data}))


async def _begin(
    request: Request, chat: dict[str, Any], path: list[dict[str, Any]], *, model: str, params: dict[str, Any], seed: int | None,
    endpoint: str, out: Out, side: str | None = None, probabilities: bool = False,
) -> Answering:  # fmt: skip
    """Put an answer to the end of ``path`` in line."""
    wanted = sampling(params)
    asked = wanted | ({"logprobs": TOP} if probabilities else {}) | ({} if seed is None else {"seed": seed})
    run = await begin_chat(
        service_of(request), key_of(request), model=model, messages=messages_for(chat["system"], path), params=asked, endpoint=endpoint,
        policy="oldest", keep=True,
    )  # fmt: skip
    message = {
        "id": None if side else new_id("msg"), "parent": path[-1]["id"], "role": "assistant", "seed": run.request.params.seed,
        "params": wanted | ({"system": chat["system"]} if chat["system"] else {}),
    }  # fmt: skip
    _tell(out, side, "start", message_id=message["id"], seed=message["seed"])
    return Answering(run, message, dropped_ids(run.dropped, path, chat["system"]), out, side, probabilities)


async def _guarded(work: Coroutine[Any, Any, None], out: Out, side: str | None = None) -> None:
    """Do it, and tell what goes wrong."""
    try:
        await work
    except ApiError as error:
        _tell(out, side, "error", code=error.code, message=error.message)
    except Exception:
        log.exception("an answer was lost")
        _tell(out, side, "error", code="internal_error", message="something went wrong in the server")


async def _question(store: Store, owner: str, chat_id: str, parent: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The chat, and its messages down to the user's message ``parent``."""
    chat = await kept(store.chat, owner, checked_id(chat_id, "chat"))
    path = await kept(store.path, owner, chat_id, checked_id(parent, "message"))
    if chat is None or not path:
        raise missing("chat" if chat is None else "message")
    if path[-1]["role"] != "user":
        raise ApiError(
            400, "invalid_value", "parent must be a message of the user's: that is what is answered", "parent"
        )
    return chat, path


async def _forget(store: Store, owner: str, message: dict[str, Any]) -> None:
    """The receipt of an answer that is not kept goes too: it holds its text."""
    if message["receipt_id"] is not None:
        with contextlib.suppress(ApiError):  # what is wrong with the database is told already
            await kept(store.delete_receipt, owner, message["receipt_id"])


def _start(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def _stream(request: Request, out: Out, gone: Callable[[], None]) -> sse.EventStream:
    """What ``out`` is told, until it is told None; ``gone`` when the reader went away, or at the end."""
    settings = service_of(request).settings

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(settings.ping_seconds):
                    item = await out.get()
            except TimeoutError:
                yield sse.PING
                continue
            if item is None:
                return
            yield sse.event(item[1], item[0])

    return sse.EventStream(pieces(), gone=gone, close=gone, write_seconds=settings.write_seconds)


# -- one answer -------------------------------------------------------------------------------------------------------


@router.post("/chats/{id}/answer")
async def answer(id: str, body: AnswerRequest, request: Request) -> Response:
    """Answer a message of the user's; asked again, it is another branch."""
    store, owner = store_of(request), owner_of(request)
    chat, path = await _question(store, owner, id, body.parent)
    out: Out = asyncio.Queue()
    going = await _begin(
        request, chat, path, model=body.model or chat["model"] or "", params=chat["params"] | body.params.given(), seed=body.seed,
        endpoint="/api/chats/answer", out=out, probabilities=body.probabilities,
    )  # fmt: skip

    async def compute() -> None:
        message = await going.compute()
        added = None
        try:
            added = await kept(store.add_message, owner, id, message)
        finally:
            if added is None:
                await _forget(store, owner, message)
        if added is None:
            raise ApiError(404, "chat_not_found", "the chat was deleted meanwhile")
        _tell(out, None, "done", message=added)

    async def work() -> None:
        await _guarded(compute(), out)
        out.put_nowait(None)

    _start(work())
    return _stream(request, out, going.run.gone)


# -- comparisons ------------------------------------------------------------------------------------------------------


@router.post("/comparisons")
async def new_comparison(body: ComparisonRequest, request: Request) -> Response:
    """Begin a blind comparison; which model stands on which side is drawn here, and told at the vote."""
    store, owner, pool = store_of(request), owner_of(request), service_of(request).pool
    chat, _ = await _question(store, owner, body.chat_id, body.parent)
    names = [pool.find(name).name for name in body.models]
    if names[0] == names[1]:
        raise ApiError(400, "invalid_value", "models must be two different ones", "models")
    if secrets.randbits(1):
        names.reverse()
    made = await kept(
        store.add_comparison, owner, chat=body.chat_id, parent=body.parent, left=names[0], right=names[1],
        params=chat["params"] | body.params.given(), seed=secrets.randbits(48) if body.seed is None else body.seed,
    )  # fmt: skip
    if made is None:
        raise missing("message")
    return json_response({"id": made})


class Empty(Body):
    """Nothing is asked."""


@router.post("/comparisons/{id}/stream")
async def stream_comparison(id: str, body: Empty, request: Request) -> Response:
    """Both answers, with the same seed. Asked again, answers that are there are told again."""
    store, owner = store_of(request), owner_of(request)
    found = await kept(store.comparison, owner, checked_id(id, "comparison"))
    if found is None:
        raise missing("comparison")
    chat, path = await _question(store, owner, found["chat"], found["parent"])
    out: Out = asyncio.Queue()
    begun: dict[str, Answering] = {}
    left = False

    async def begin(side: str) -> None:
        begun[side] = await _begin(
            request, chat, path, model=found[side], params=found["params"], seed=found["seed"], endpoint="/api/comparisons", out=out,
            side=side,
        )  # fmt: skip

    async def compute(side: str) -> None:
        if side not in begun:
            await begin(side)
            if left:
                begun[side].run.gone()
        message = await begun[side].compute()
        # one that was cut off is computed again when it is asked for again
        done = message["finish_reason"] != "cancelled" and await kept(store.set_answer, owner, id, side, message)
        if not done:
            await _forget(store, owner, message)
        _tell(out, side, "done", message=blinded(message))

    todo = [side for side in SIDES if found[f"{side}_answer"] is None]
    for side in SIDES:
        if side not in todo:
            _tell(out, side, "start", message_id=None, seed=found["seed"])
            _tell(out, side, "done", message=blinded(found[f"{side}_answer"]))
    try:
        for side in todo:
            try:
                await begin(side)
            except ApiError as error:
                if error.code != "models_busy" or not begun:  # memory holds one of them: the other comes after it
                    raise
    except BaseException:
        for going in begun.values():
            going.run.close()
        raise

    async def work() -> None:
        later = [side for side in todo if side not in begun]
        await asyncio.gather(*(_guarded(compute(side), out, side) for side in todo if side in begun))
        for side in later:
            if not left:
                await _guarded(compute(side), out, side)
        out.put_nowait(None)

    def gone() -> None:
        nonlocal left
        left = True
        for going in begun.values():
            going.run.gone()

    _start(work())
    return _stream(request, out, gone)


def blinded(message: dict[str, Any]) -> dict[str, Any]:
    """An answer without anything that tells whose it is."""
    names = ("id", "model", "model_hash", "criadero", "receipt_id", "usage", "tokens", "feedback", "created")
    return message | dict.fromkeys(names)


@router.post("/comparisons/{id}/vote")
async def vote(id: str, body: Vote, request: Request) -> Response:
    """Say which is better, and learn which is which; both answers are in the chat from now on."""
    try:
        done = await kept(store_of(request).vote, owner_of(request), checked_id(id, "comparison"), body.winner)
    except ValueError as error:
        raise ApiError(409, "not_now", str(error), "winner") from None
    if done is None:
        raise missing("comparison")
    return json_response({name: done[name] for name in ("left", "right", "left_message", "right_message")})
