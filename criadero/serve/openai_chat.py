"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.chat import Message
from criadero.engine.request import Output, TokenLogprob
from criadero.serve import sse, tools
from criadero.serve.common import key_of, respond, service_of, usage_of
from criadero.serve.errors import ApiError
from criadero.serve.params import LIMITS, Body, Sampling, check_limits, honoured, refused, reported
from criadero.serve.run import Run, begin_chat
from criadero.serve.settings import Limits
from criadero.tokenizer import Tokenizer

router = APIRouter()
ENDPOINT = "/v1/chat/completions"


class Part(Body):
    """A part of a content: text only."""

    type: str
    text: str | None = None
    model_config = Body.model_config | {"extra": "allow"}


class CalledFunction(Body):
    """The function of a call."""

    name: Annotated[str, Field(max_length=64)]
    arguments: str


class ToolCall(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=LIMITS.parts)] | None = honoured(
        "a text, or a list of text parts"
    )
    name: str | None = reported("templates have no place for it")
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = honoured("the assistant's calls")
    tool_call_id: str | None = honoured("of the call whose result this is")
    refusal: str | None = reported("templates have no place for it")
    audio: Any = refused("text only")
    function_call: Any = refused("use tool_calls")
    annotations: Any = reported("templates have no place for it")


class JsonSchema(Body):
    """A named schema."""

    name: Annotated[str, Field(max_length=64)] = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampling):
    """The body of a request for a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=LIMITS.messages)] = honoured(
        "the chat; system and developer messages after each other are one", ...
    )
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = honoured(
        "the longest answer; default: what the context has room for"
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = honoured(
        "the same, its newer name"
    )
    logprobs: bool | None = honoured("the log-probability of each token")
    top_logprobs: Annotated[int, Field(ge=0, le=LIMITS.top_logprobs)] | None = honoured(
        "so many likeliest tokens at each place (limit top_logprobs)"
    )
    response_format: ResponseFormat | None = honoured("text, a JSON object, or JSON of a schema: enforced by a grammar")
    tools: list[dict[str, Any]] | None = honoured("functions that may be called (limits tools, tool_bytes)")
    tool_choice: str | dict[str, Any] | None = honoured("none, auto, required or a function: enforced by a grammar")
    parallel_tool_calls: bool | None = honoured("false: one call at most; default true")
    truncate: Literal["error", "oldest"] | None = honoured(
        "what to do with a chat that fills the context: refuse it (the default), or leave out whole turns, the oldest first, "
        "which `criadero.context` tells"
    )
    # without a counterpart here
    metadata: dict[str, Any] | None = reported("nothing is kept beside the receipt")
    store: bool | None = honoured(
        "the receipt holds the prompt and the answer, so that anybody with the model can replay it"
    )
    service_tier: str | None = reported("there is one tier")
    reasoning_effort: str | None = reported("these models do not think aloud")
    verbosity: str | None = reported("say it in a message")
    prompt_cache_key: str | None = reported("computed prompts are found by what they say, for each key apart")
    prompt_cache_retention: str | None = reported("they are kept while there is room")
    prompt_cache_options: dict[str, Any] | None = reported("they are kept while there is room")
    safety_identifier: str | None = reported("requests are told apart by their keys")
    modalities: list[str] | None = refused("text only", ["text"])
    audio: Any = refused("text only")
    prediction: Any = refused("nothing is predicted by the client")
    web_search_options: Any = refused("the server fetches nothing")
    moderation: Any = refused("there is no moderation here")
    functions: Any = refused("use tools")
    function_call: Any = refused("use tool_choice")


@router.post(ENDPOINT)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a chat, whole or as a stream."""
    service = service_of(request)
    ignored = body.check()
    messages, offered, params = _prepared(body, service.settings.limits, ignored)
    run = await begin_chat(
        service, key_of(request), model=body.model, messages=messages, params=params, endpoint=ENDPOINT,
        policy=body.truncate or "error", ignored=ignored, keep=bool(body.store),
    )  # fmt: skip
    return await respond(request, run, _Answer(run, body, offered), body.stream)


def _prepared(
    body: ChatRequest, limits: Limits, ignored: list[str]
) -> tuple[list[Message], tools.Tools | None, dict[str, Any]]:
    """Messages for the template, the tools, and sampling parameters."""
    check_limits(limits, messages=len(body.messages), n=body.n or 1, top_logprobs=body.top_logprobs or 0)
    messages = messages_of(body.messages, limits, ignored)
    offered = tools.read_tools(body.tools, body.tool_choice, body.parallel_tool_calls, limits)
    params = body.sampling()
    most = body.max_completion_tokens or body.max_tokens
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise ApiError(
            400, "invalid_value", "max_tokens and max_completion_tokens differ: give one of them", "max_tokens"
        )
    if most is not None:
        check_limits(limits, max_tokens=most)
        params["max_tokens"] = most
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    schema = schema_of(body.response_format, limits)
    messages, form = tools.enforced(messages, offered, schema, params)
    return messages, offered, params | form


def schema_of(form: ResponseFormat | None, limits: Limits) -> dict[str, Any] | None:
    """The JSON schema that ``response_format`` asks for; None for text."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    place = "response_format.json_schema"
    if form.json_schema is None:
        raise ApiError(400, "missing_parameter", f"{place} must be given", place)
    schema = form.json_schema.schema_
    if schema is None or schema is True:
        return {}
    if schema is False:
        raise ApiError(400, "invalid_grammar", f"{place}.schema is false: nothing can match it", place)
    tools.check_depth(schema, limits, place)
    if len(json.dumps(schema)) > limits.schema_bytes:
        raise ApiError(
            400, "out_of_range", f"{place} has more than {limits.schema_bytes:,} bytes (limit schema_bytes)", place
        )
    return schema


def text_of(content: str | Sequence[Part] | None, place: str) -> str:
    """A content as one text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise ApiError(
                400,
                "unsupported_content",
                f"{place}[{number}]: these models read text, not {part.type[:40]}",
                f"{place}[{number}]",
            )
        texts.append(part.text)
    return "".join(texts)


def messages_of(given: Sequence[ChatMessage], limits: Limits, ignored: list[str]) -> list[Message]:
    """The chat as templates know it: system, user and assistant. Calls and results become text (see `tools`)."""
    messages: list[Message] = []
    called: dict[str, str] = {}  # id of a call -> name
    after_result = False
    for number, one in enumerate(given):
        place = f"messages[{number}]"
        ignored += [f"{place}.{name}" for name in one.check()]
        text = text_of(one.content, f"{place}.content")
        if one.role in ("user", "system", "developer") and one.content is None:
            raise ApiError(400, "missing_parameter", f"{place}.content must be given", f"{place}.content")
        if one.role == "tool":
            name = called.get(one.tool_call_id or "")
            if name is None:
                raise ApiError(
                    400,
                    "invalid_value",
                    f"{place}.tool_call_id names no call of the messages before",
                    f"{place}.tool_call_id",
                )
            text = tools.result_text(name, text)
        elif one.tool_calls:
            if one.role != "assistant":
                raise ApiError(
                    400, "invalid_value", f"{place}: only the assistant calls functions", f"{place}.tool_calls"
                )
            called |= {call.id: call.function.name for call in one.tool_calls}
            text += "".join(tools.call_text(call.function.name, call.function.arguments) for call in one.tool_calls)
        if one.role in ("tool", "user") and after_result and messages[-1]["role"] == "user":
            messages[-1] = {"role": "user", "content": messages[-1]["content"] + "\n" + text}  # turns have to alternate
        elif one.role in ("system", "developer") and messages and messages[-1]["role"] == "system":
            messages[-1] = {"role": "system", "content": messages[-1]["content"] + "\n\n" + text}  # templates know one
        else:
            role: Literal["system", "user", "assistant"] = (
                "user" if one.role in ("tool", "user") else "assistant" if one.role == "assistant" else "system"
            )
            messages.append({"role": role, "content": text})
        after_result = one.role == "tool"
    return messages


# --- the answer ---


def token_text(tokenizer: Tokenizer, id: int) -> tuple[str, list[int]]:
    """A token as text and as bytes; half a character is told as its bytes, so that no two tokens look the same."""
    data = tokenizer.token_bytes(id)
    try:
        return data.decode("utf-8"), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob] | None) -> list[dict[str, Any]]:
    """OpenAI's shape for chats."""

    def one(id: int, logprob: float) -> dict[str, Any]:
        text, data = token_text(tokenizer, id)
        return {"token": text, "logprob": _finite(logprob), "bytes": data}

    return [{**one(t.id, t.logprob), "top_logprobs": [one(id, value) for id, value in t.top]} for t in tokens or ()]


def _finite(value: float) -> float:
    return max(value, -9999.0)  # OpenAI's number for what is as good as impossible; JSON has no infinity


def reason_of(reason: str | None, called: bool) -> str | None:
    """OpenAI's word."""
    if reason in ("length", "context"):
        return "length"
    if reason == "guard":
        return "content_filter"
    return "tool_calls" if called and reason == "stop" else reason


class _Answer:
    """One response in the making."""

    def __init__(self, run: Run, body: ChatRequest, offered: tools.Tools | None) -> None:
        self.run, self.body = run, body
        self.readers = [tools.CallReader() for _ in range(body.n or 1)] if offered and offered.offered else None
        self.head = {
            "id": "chatcmpl-" + uuid.uuid4().hex, "created": int(time.time()), "model": run.entry.name,
            "system_fingerprint": "fp_" + (run.entry.body.weights_sha256 or "0")[:12],
        }  # fmt: skip
        self._roles: set[int] = set()

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        run = self.run
        result = await run.wait()
        run.check()
        choices = []
        for sample in result.samples:
            message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None, "annotations": []}
            called = False
            if self.readers is not None:
                reader = self.readers[sample.index]
                pieces = [*reader.push(sample.text), *reader.flush()]
                words = "".join(piece.text for piece in pieces)
                message["content"] = words if words or not reader.calls else None
                if reader.calls:
                    called = True
                    message["tool_calls"] = [call.as_dict() for call in reader.calls]
            logprobs = None
            if self.body.logprobs:
                logprobs = {"content": chat_logprobs(run.worker.llm.tokenizer, sample.logprobs), "refusal": None}
            choices.append(
                {
                    "index": sample.index, "message": message, "logprobs": logprobs,
                    "finish_reason": reason_of(sample.finish_reason, called),
                }
            )  # fmt: skip
        block = await run.finish()
        return {
            **self.head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage_of(result.usage),
            "criadero": block,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Piece by piece."""
        run = self.run
        ended = 0
        seconds = run.service.settings.ping_seconds
        async for event in run.events(seconds):
            if event is None:
                yield sse.PING
            elif isinstance(event, Output):
                if (failed := run.failed or run.cancelled_error(event)) is not None:
                    yield sse.event(failed.body())
                    return
                for choice in self._choices(event):
                    ended += choice["finish_reason"] is not None
                    if event.done and ended == len(run.result.samples) and choice["finish_reason"] is not None:
                        yield self._chunk([choice], criadero=await run.finish())
                    else:
                        yield self._chunk([choice])
            elif run.waiting is not None:
                yield sse.queued(run.waiting)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._chunk([], usage=usage_of(run.result.usage))
        yield sse.DONE

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            more.setdefault("usage", None)
        return sse.event({**self.head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _choices(self, output: Output) -> list[dict[str, Any]]:
        """What one output adds to its answer."""
        index = output.index
        deltas: list[dict[str, Any]] = []
        if index not in self._roles:
            self._roles.add(index)
            deltas.append({"role": "assistant", "content": "" if self.readers is None else None})
        called = False
        if self.readers is None:
            if output.text:
                deltas.append({"content": output.text})
        else:
            reader = self.readers[index]
            pieces = reader.push(output.text)
            if output.finish_reason is not None:
                pieces += reader.flush()
            deltas += [_delta(piece) for piece in pieces]
            called = bool(reader.calls)
        found: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if self.body.logprobs and output.logprobs:
            if not deltas or "role" in deltas[-1]:
                found.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": None})
            found[-1]["logprobs"] = {
                "content": chat_logprobs(self.run.worker.llm.tokenizer, output.logprobs),
                "refusal": None,
            }
        if output.finish_reason is not None:
            reason = reason_of(output.finish_reason, called)
            found.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return found


def _delta(piece: tools.Piece) -> dict[str, Any]:
    if piece.call is None:
        return {"content": piece.text}
    if piece.begins:
        call = {"index": piece.call.index, "id": piece.call.id, "type": "function"}
        return {"tool_calls": [{**call, "function": {"name": piece.call.name, "arguments": ""}}]}
    return {"tool_calls": [{"index": piece.call.index, "function": {"arguments": piece.arguments}}]}
