"""/v1/responses: OpenAI's newer way to ask, which keeps answers (unless ``store`` is false) so that the next request can go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from criadero.chat import Message, render
from criadero.engine.request import Output, Usage
from criadero.errors import UserError
from criadero.serve import sse, tools
from criadero.serve.common import json_response, key_of, respond, service_of
from criadero.serve.errors import ApiError, of_user_error
from criadero.serve.openai_chat import JsonSchema, ResponseFormat, schema_of
from criadero.serve.params import LIMITS, Body, Sampling, check_limits, honoured, refused, reported
from criadero.serve.query import report
from criadero.serve.response_items import AnswerItems, Item, items_of, messages_from, new_item
from criadero.serve.run import Run, begin_chat
from criadero.serve.settings import Limits
from criadero.serve.store import Store
from criadero.serve.storing import checked_id, is_id, kept, store_of

router = APIRouter()
ENDPOINT = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
CHAIN = 1000  # responses before one, at most
Includable = Literal[
    "message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]  # fmt: skip


class TextFormat(Body):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """How the answer is written."""

    format: TextFormat | None = honoured("text, a JSON object, or JSON of a schema: enforced by a grammar")
    verbosity: str | None = reported("say it in a message")


class ResponseStreamOptions(Body):
    """What a stream says beside the answer."""

    include_obfuscation: bool | None = reported("nothing is padded")


class Asked(Sampling):
    """What a response is asked with, and its input tokens are counted of."""

    input: str | Annotated[list[Item], Field(min_length=1, max_length=LIMITS.messages)] = honoured(
        "a text, or messages, function calls and their results", ...
    )  # fmt: skip
    instructions: str | None = honoured("the system message; not carried over to the next response")
    previous_response_id: Annotated[str, Field(max_length=80)] | None = honoured("go on from a response that was kept")
    text: TextConfig | None = honoured("the format of the answer")
    tools: list[dict[str, Any]] | None = honoured("functions that may be called (limits tools, tool_bytes)")
    tool_choice: str | dict[str, Any] | None = honoured("none, auto, required or a function: enforced by a grammar")
    parallel_tool_calls: bool | None = honoured("false: one call at most; default true")
    truncation: Literal["auto", "disabled"] | None = honoured(
        "auto: what fills the context loses whole turns, the oldest first, which `criadero.context` tells; disabled (the default): refused"
    )
    reasoning: dict[str, Any] | None = reported("these models do not think aloud")
    personality: str | None = reported("say it in instructions")
    conversation: Any = refused("use previous_response_id")


class ResponseRequest(Asked):
    """The body of a request for a response."""

    max_output_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = honoured(
        "the longest answer; default: what the context has room for"
    )
    top_logprobs: Annotated[int, Field(ge=0, le=LIMITS.top_logprobs)] | None = honoured(
        "so many likeliest tokens at each place (limit top_logprobs)"
    )
    include: Annotated[list[Includable], Field(max_length=16)] | None = honoured(
        f"{LOGPROBS}; others have nothing to add here"
    )
    store: bool | None = honoured("keep the response, for its owner alone, until it is deleted; default true")
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = honoured(
        "kept with the response; 16 at most", max_length=16
    )
    stream_options: ResponseStreamOptions | None = honoured("`include_obfuscation`")  # type: ignore[assignment]
    n: Annotated[int, Field(ge=1, le=1)] | None = refused("a response has one answer", 1)
    background: bool | None = refused("requests are answered at once", False)
    background_options: Any = refused("requests are answered at once")
    prompt: Any = refused("the server keeps no prompts to fill in")
    context_management: Any = refused("use truncation")
    moderation: Any = refused("there is no moderation here")
    image: Any = refused("text only")
    max_tool_calls: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = reported(
        "it counts tools that a server runs, and this one runs none"
    )
    service_tier: str | None = reported("there is one tier")
    prompt_cache_key: str | None = reported("computed prompts are found by what they say, for each key apart")
    prompt_cache_retention: str | None = reported("they are kept while there is room")
    prompt_cache_options: dict[str, Any] | None = reported("they are kept while there is room")
    safety_identifier: str | None = reported("requests are told apart by their keys")
    access_programs: Any = reported("there are none here")


# -- asking -----------------------------------------------------------------------------------------------------------


@router.post(ENDPOINT)
async def create(body: ResponseRequest, request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    ignored = body.check()
    store = request.app.state.store if isinstance(request.app.state.store, Store) else None
    if body.store and store is None:
        raise ApiError(
            503, "no_database", "store: this server keeps nothing, it was started without a database", "store"
        )
    keep = store is not None and body.store is not False
    items, messages, offered, params = await _prepared(body, request, ignored)
    run = await begin_chat(
        service, key_of(request), model=body.model, messages=messages, params=params, endpoint=ENDPOINT,
        policy="oldest" if body.truncation == "auto" else "error", ignored=ignored, keep=keep,
    )  # fmt: skip
    answer = _Answer(run, body, offered, items, store if keep else None)
    return await respond(request, run, answer, body.stream)


@router.post(ENDPOINT + "/input_tokens")
async def input_tokens(body: Asked, request: Request) -> Response:
    """How many tokens a response's input would have."""
    ignored = body.check()
    _, messages, _, _ = await _prepared(body, request, ignored)
    count = await count_tokens(request, body.model, messages)
    return json_response({"object": "response.input_tokens", "input_tokens": count})


async def count_tokens(request: Request, model: str | None, messages: list[Message]) -> int:
    """Tokens of a chat as its model reads it, with what precedes the answer."""
    pool = service_of(request).pool
    entry = pool.find(model)
    template = entry.template
    if template is None:
        raise of_user_error(UserError(entry.template_problem))
    async with pool.lease(entry) as worker:
        try:
            words = worker.llm.tokenizer
            return len((await asyncio.to_thread(render, messages, words, template, add_generation_prompt=True)).ids)
        except UserError as error:
            raise of_user_error(error) from None


async def _prepared(
    body: Asked, request: Request, ignored: list[str]
) -> tuple[list[dict[str, Any]], list[Message], tools.Tools | None, dict[str, Any]]:
    """The request's own items, messages for the template, the tools, and sampling parameters."""
    limits = service_of(request).settings.limits
    if body.text is not None:
        ignored += [f"text.{name}" for name in body.text.check()]
    items = items_of(body.input, ignored)
    before = await _before(body.previous_response_id, request) if body.previous_response_id else []
    messages = messages_from([*before, *items], body.instructions, limits, len(before))
    offered = _tools(body, limits, ignored)
    params = body.sampling()
    if isinstance(body, ResponseRequest):
        ignored += [f"include.{name}" for name in body.include or () if name != LOGPROBS]
        check_limits(limits, top_logprobs=body.top_logprobs or 0, max_tokens=body.max_output_tokens or 0)
        if body.max_output_tokens is not None:
            params["max_tokens"] = body.max_output_tokens
        if LOGPROBS in (body.include or ()) or body.top_logprobs:
            params["logprobs"] = body.top_logprobs or 0
    schema = _schema(body.text, limits)
    messages, form = tools.enforced(messages, offered, schema, params)
    return items, messages, offered, params | form


def _tools(body: Asked, limits: Limits, ignored: list[str]) -> tools.Tools | None:
    """Functions, whose fields stand beside ``type`` here and within ``function`` in a chat."""
    given = []
    for number, tool in enumerate(body.tools or ()):
        inner = {name: tool[name] for name in ("name", "description", "parameters") if name in tool}
        given.append({"type": tool.get("type"), "function": inner})
        ignored += [f"tools[{number}].{name}" for name in sorted(tool.keys() - inner.keys() - {"type", "strict"})]
    try:
        return tools.read_tools(given, body.tool_choice, body.parallel_tool_calls, limits)
    except ApiError as error:
        param = error.param and error.param.replace(".function", "")
        raise ApiError(error.status, error.code, error.message.replace("].function", "]"), param) from None


def _schema(text: TextConfig | None, limits: Limits) -> dict[str, Any] | None:
    form = text.format if text is not None else None
    if form is None:
        return None
    named = None
    if form.type == "json_schema":
        if form.schema_ is None:
            raise ApiError(400, "missing_parameter", "text.format.schema must be given", "text.format.schema")
        named = JsonSchema(name=form.name or "", schema=form.schema_)
    try:
        return schema_of(ResponseFormat(type=form.type, json_schema=named), limits)
    except ApiError as error:
        place = "response_format.json_schema"
        param = error.param and error.param.replace(place, "text.format.schema")
        raise ApiError(error.status, error.code, error.message.replace(place, "text.format.schema"), param) from None


async def _before(id: str, request: Request) -> list[dict[str, Any]]:
    """The items of a response and of all before it."""
    store, owner = store_of(request), request.state.owner
    found: list[list[dict[str, Any]]] = []
    at: str | None = id
    while at is not None:
        row = await kept(store.response, owner, at) if is_id(at) else None
        if row is None or len(found) >= CHAIN:
            why = (
                f"there is no response {at!r} to go on from"
                if row is None
                else f"more than {CHAIN} responses go before"
            )
            raise ApiError(400, "previous_response_not_found", why, "previous_response_id")
        found.append([*row["input"], *row["body"]["output"]])
        at = row["previous"]
    return [item for items in reversed(found) for item in items]


# -- the answer -------------------------------------------------------------------------------------------------------


class _Answer:
    """One response in the making."""

    def __init__(
        self, run: Run, body: ResponseRequest, offered: tools.Tools | None, items: list[dict[str, Any]], store: Store | None
    ) -> None:  # fmt: skip
        self.run, self.body, self.items, self.store = run, body, items, store
        reader = tools.CallReader() if offered is not None and offered.offered else None
        self.answer = AnswerItems(run.worker.llm.tokenizer, reader, run.request.params.logprobs is not None)
        form: dict[str, Any] = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            form = body.text.format.model_dump(by_alias=True, exclude_none=True)
        self.body_out: dict[str, Any] = {
            "id": new_item("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None, "status": "in_progress",
            "background": False, "error": None, "incomplete_details": None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "max_tool_calls": None, "model": run.entry.name, "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key, "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier, "service_tier": "default", "store": store is not None,
            "temperature": run.request.params.temperature, "text": {"format": form}, "tool_choice": body.tool_choice or "auto",
            "tools": [{"description": None, "parameters": None, "strict": True, **tool} for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0, "top_p": run.request.params.top_p, "truncation": body.truncation or "disabled",
            "presence_penalty": run.request.params.presence_penalty, "frequency_penalty": run.request.params.frequency_penalty,
            "usage": None, "user": body.user, "metadata": body.metadata or {},
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        result = await self.run.wait()
        self.run.check()
        sample = result.samples[0]
        for _ in self.answer.push(sample.text, sample.logprobs):
            pass
        for _ in self.answer.finish(self._complete()):
            pass
        return await self._ended()

    def _complete(self) -> bool:
        return self.run.result.samples[0].finish_reason == "stop"

    async def _ended(self) -> dict[str, Any]:
        """The response with its end, kept if it is to be."""
        out, complete = self.body_out, self._complete()
        guarded = self.run.result.samples[0].finish_reason == "guard"
        why = None if complete else {"reason": "content_filter" if guarded else "max_output_tokens"}
        out |= {
            "status": "completed" if complete else "incomplete", "completed_at": int(time.time()) if complete else None,
            "incomplete_details": why, "output": self.answer.output,
            "usage": _usage(self.run.result.usage), "criadero": await self.run.finish(),
        }  # fmt: skip
        if self.store is not None:
            try:
                await kept(
                    self.store.add_response, self.run.key.owner, id=out["id"], previous=self.body.previous_response_id,
                    input=self.items, body=out,
                )  # fmt: skip
            except ApiError as error:  # the answer is there all the same, and says that it was not kept
                out["store"] = False
                out["criadero"]["not_kept"] = {"code": error.code, "message": error.message}
        return out

    async def stream(self) -> AsyncIterator[bytes]:
        """Piece by piece, in OpenAI's order."""
        number = 0

        def sent(event: dict[str, Any]) -> bytes:
            nonlocal number
            number += 1
            return sse.event({**event, "sequence_number": number - 1}, event["type"])

        run = self.run
        yield sent({"type": "response.created", "response": self.body_out})
        yield sent({"type": "response.in_progress", "response": self.body_out})
        async for event in run.events(run.service.settings.ping_seconds):
            if event is None:
                yield sse.PING
            elif isinstance(event, Output):
                if (failed := run.failed or run.cancelled_error(event)) is not None:
                    error = {"code": "server_error", "message": failed.message}
                    done = {**self.body_out, "status": "failed", "error": error, "output": self.answer.output}
                    yield sent({"type": "response.failed", "response": done})
                    return
                for one in self.answer.push(event.text, event.logprobs):
                    yield sent(one)
            elif run.waiting is not None:
                yield sse.queued(run.waiting)
        for one in self.answer.finish(self._complete()):
            yield sent(one)
        done = await self._ended()
        yield sent({"type": f"response.{done['status']}", "response": done})
        yield sse.DONE


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt, "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }  # fmt: skip


# -- those that are kept ----------------------------------------------------------------------------------------------


async def _kept(id: str, request: Request) -> dict[str, Any]:
    found = await kept(store_of(request).response, request.state.owner, checked_id(id, "response"))
    if found is None:
        raise ApiError(404, "response_not_found", "there is no such response", "response_id")
    return found


@router.get(ENDPOINT + "/{id}")
async def retrieve(
    id: str,
    request: Request,
    include: Annotated[list[Includable] | None, Query(description="without effect: it is as it was made")] = None,
    included: Annotated[list[Includable] | None, Query(alias="include[]", description="the same")] = None,
    stream: Annotated[bool, Query(description="refused when true: the response is whole")] = False,
    starting_after: Annotated[int | None, Query(description="refused: it is for streams")] = None,
    include_obfuscation: Annotated[bool | None, Query(description="without effect: it is for streams")] = None,
) -> Response:
    """A response that was kept."""
    for name, given in (("stream", stream), ("starting_after", starting_after is not None)):
        if given:
            raise ApiError(400, "unsupported_parameter", f"{name} is not supported: the response is whole", name)
    without_effect = {"include": include, "include[]": included, "include_obfuscation": include_obfuscation}
    report(request, *(name for name, given in without_effect.items() if given is not None))
    return json_response((await _kept(id, request))["body"])


@router.delete(ENDPOINT + "/{id}")
async def delete(id: str, request: Request) -> Response:
    """Delete a response, its input, and the receipt with their text."""
    await _kept(id, request)
    await kept(store_of(request).delete_response, request.state.owner, id)
    return json_response({"id": id, "object": "response", "deleted": True})


@router.post(ENDPOINT + "/{id}/cancel")
async def cancel(id: str, request: Request) -> Response:
    """Nothing runs in the background, so there is nothing to cancel."""
    await _kept(id, request)
    raise ApiError(
        400,
        "not_in_background",
        "only responses in the background can be cancelled, and there are none here",
        "response_id",
    )


@router.get(ENDPOINT + "/{id}/input_items")
async def input_items(
    id: str,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="so many at most")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="oldest or newest first")] = "desc",
    after: Annotated[str | None, Query(max_length=128, description="those behind this item")] = None,
    include: Annotated[list[Includable] | None, Query(description="without effect: items are whole")] = None,
    included: Annotated[list[Includable] | None, Query(alias="include[]", description="the same")] = None,
) -> Response:
    """The items that a response was given, those of the responses before it too."""
    report(request, *(name for name, given in (("include", include), ("include[]", included)) if given is not None))
    found = await _kept(id, request)
    before = await _before(found["previous"], request) if found["previous"] else []
    items: Sequence[dict[str, Any]] = [*before, *found["input"]]
    items = items if order == "asc" else items[::-1]
    if after is not None:
        at = next((number for number, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise ApiError(400, "invalid_value", "after names no item of this response", "after")
        items = items[at + 1 :]
    page = items[:limit]
    return json_response(
        {
            "object": "list", "data": page, "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )  # fmt: skip
