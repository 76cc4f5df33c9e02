"""/v1/messages and /v1/messages/count_tokens: Anthropic's API, so that its clients and the tools built on them work unchanged."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field
from pydantic_core import from_json
from starlette.responses import Response

from criadero.chat import Message
from criadero.engine.llm import Sample
from criadero.engine.request import Output, Usage
from criadero.serve import sse, tools
from criadero.serve.common import json_response, key_of, respond, service_of
from criadero.serve.errors import ApiError
from criadero.serve.openai_chat import (
    CalledFunction,
    ChatMessage,
    JsonSchema,
    ResponseFormat,
    ToolCall,
    messages_of,
    schema_of,
)
from criadero.serve.params import LIMITS, Body, check_limits, honoured, refused, reported
from criadero.serve.responses import count_tokens
from criadero.serve.run import Run, begin_chat
from criadero.serve.settings import Limits

router = APIRouter()
ENDPOINT = "/v1/messages"


class Block(Body):
    """A block of a content: text, a call of a tool, or the result of one."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Annotated[str, Field(max_length=64)]
    text: str | None = None
    id: Annotated[str, Field(max_length=128)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Annotated[str, Field(max_length=128)] | None = None
    content: str | Annotated[list[dict[str, Any]], Field(max_length=LIMITS.parts)] | None = None
    is_error: bool | None = None


Blocks = Annotated[list[Block], Field(max_length=LIMITS.parts)]


class Turn(Body):
    """A message; two of one role after each other are one."""

    role: Literal["user", "assistant"]
    content: str | Blocks


class OutputFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer looks like."""

    format: OutputFormat | None = honoured("JSON of a schema: enforced by a grammar")
    effort: str | None = reported("these models do not think aloud")


class CountRequest(Body):
    """The body of a request to count tokens."""

    model: str | None = honoured("the name of a model or an adapter; empty: the default one", "", max_length=256)
    messages: Annotated[list[Turn], Field(min_length=1, max_length=LIMITS.messages)]
    system: str | Blocks | None = honoured("the system message")
    tools: list[dict[str, Any]] | None = honoured("functions that may be called (limits tools, tool_bytes)")
    tool_choice: dict[str, Any] | None = honoured("auto, any, tool or none: enforced by a grammar")
    output_config: OutputConfig | None = honoured("`format`")
    thinking: dict[str, Any] | None = reported("these models do not think aloud")
    cache_control: dict[str, Any] | None = reported("computed prompts are found by what they say, for each key apart")
    mcp_servers: Any = refused("the server calls no other")
    container: Any = refused("the server runs nothing")
    context_management: Any = refused("a chat that fills the context is refused")
    speed: str | None = reported("there is one speed")
    user_profile_id: str | None = reported("requests are told apart by their keys")
    workspace_id: str | None = reported("requests are told apart by their keys")
    output_format: OutputFormat | None = refused("its newer name is output_config.format")


class MessageRequest(CountRequest):
    """The body of a request for a message."""

    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] = honoured("the longest answer", ...)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = honoured("0 takes the likeliest token; default 1")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = honoured("nucleus sampling; default 1")
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = honoured("keep the k likeliest; 0: all")
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LIMITS.stop_characters)]], Field(max_length=LIMITS.stop)
        ]
        | None
    ) = honoured("texts that end the answer and are not part of it (limits stop, stop_characters)")
    stream: bool | None = honoured("server-sent events")
    metadata: dict[str, Any] | None = reported("requests are told apart by their keys")
    service_tier: str | None = reported("there is one tier")
    diagnostics: Any = reported("the `criadero` block tells what there is")
    inference_geo: str | None = reported("it is computed on this machine")
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = honoured(
        "beyond Anthropic: the same seed gives the same answer"
    )


@router.post(ENDPOINT)
async def create(body: MessageRequest, request: Request) -> Response:
    """Answer, whole or as a stream."""
    service = service_of(request)
    limits = service.settings.limits
    ignored = body.check()
    messages, offered, params = _prepared(body, limits, ignored)
    check_limits(limits, max_tokens=body.max_tokens)
    params |= {"max_tokens": body.max_tokens, "temperature": 1.0 if body.temperature is None else body.temperature}
    params |= {name: getattr(body, name) for name in ("top_p", "top_k", "seed") if getattr(body, name) is not None}
    params["stop"] = body.stop_sequences or []
    run = await begin_chat(
        service, key_of(request), model=body.model, messages=messages, params=params, endpoint=ENDPOINT, ignored=ignored
    )  # fmt: skip
    return await respond(request, run, _Answer(run, offered), body.stream)


@router.post(ENDPOINT + "/count_tokens")
async def count(body: CountRequest, request: Request) -> Response:
    """How many tokens a request's messages, system message and tools have."""
    messages, _, _ = _prepared(body, service_of(request).settings.limits, body.check())
    return json_response({"input_tokens": await count_tokens(request, body.model, messages)})


# -- a request to messages --------------------------------------------------------------------------------------------


def _prepared(
    body: CountRequest, limits: Limits, ignored: list[str]
) -> tuple[list[Message], tools.Tools | None, dict[str, Any]]:
    """Messages for the template, the tools, and what enforces the form of the answer."""
    check_limits(limits, messages=len(body.messages))
    given = [ChatMessage(role="system", content=_text(body.system, "system", ignored))] if body.system else []
    called: set[str] = set()
    for number, turn in enumerate(body.messages):
        for one in _turn(turn, f"messages[{number}]", called, ignored):
            before = given[-1] if given else None
            if before is not None and before.role == one.role != "tool":  # Anthropic joins them, too
                joined = [text for text in (before.content, one.content) if isinstance(text, str) and text]
                calls = [*(before.tool_calls or ()), *(one.tool_calls or ())] or None
                given[-1] = ChatMessage(role=one.role, content="\n\n".join(joined), tool_calls=calls)
            else:
                given.append(one)
    if given[-1].role == "assistant":
        raise ApiError(
            400, "unsupported_content", "messages: the last one must be the user's; to begin the answer for the model is not supported",
            f"messages[{len(body.messages) - 1}].role",
        )  # fmt: skip
    messages = messages_of(given, limits, [])
    offered = _tools(body, limits, ignored)
    schema = _schema(body.output_config, limits, ignored)
    messages, form = tools.enforced(messages, offered, schema)
    return messages, offered, form


def _turn(turn: Turn, place: str, called: set[str], ignored: list[str]) -> Iterator[ChatMessage]:
    """A turn as messages of a chat: results of tools first, then what was said."""
    if isinstance(turn.content, str):
        yield ChatMessage(role=turn.role, content=turn.content)
        return
    texts: list[str] = []
    calls: list[ToolCall] = []
    for number, block in enumerate(turn.content):
        at = f"{place}.content[{number}]"
        _extra(block, at, ignored)
        if block.type == "text" and block.text is not None:
            texts.append(block.text)
        elif block.type == "tool_use" and turn.role == "assistant":
            if block.id is None or block.name is None or block.input is None:
                raise ApiError(400, "missing_parameter", f"{at}: id, name and input must be given", at)
            called.add(block.id)
            function = CalledFunction(name=block.name, arguments=json.dumps(block.input, ensure_ascii=False))
            calls.append(ToolCall(id=block.id, function=function))
        elif block.type == "tool_result" and turn.role == "user":
            if block.tool_use_id not in called:
                text = f"{at}.tool_use_id names no tool_use of the messages before"
                raise ApiError(400, "invalid_value", text, f"{at}.tool_use_id")
            result = _text(_blocks(block.content), f"{at}.content", ignored)
            if block.is_error:
                result = f"error: {result}"
            yield ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=result)
        else:
            raise ApiError(
                400, "unsupported_content", f"{at}: these models read text, not {block.type[:40]} of the {turn.role}", at
            )  # fmt: skip
    text = "".join(texts)
    if text or calls or not any(block.type == "tool_result" for block in turn.content):
        yield ChatMessage(role=turn.role, content=text, tool_calls=calls or None)


def _blocks(content: str | list[dict[str, Any]] | None) -> str | list[Block] | None:
    if not isinstance(content, list):
        return content
    return [Block.model_construct(type=str(one.get("type")), text=one.get("text")) for one in content]


def _text(content: str | Sequence[Block] | None, place: str, ignored: list[str]) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, block in enumerate(content):
        at = f"{place}[{number}]"
        _extra(block, at, ignored)
        if block.type != "text" or not isinstance(block.text, str):
            raise ApiError(400, "unsupported_content", f"{at}: these models read text, not {block.type[:40]}", at)
        texts.append(block.text)
    return "".join(texts)


def _extra(block: Block, place: str, ignored: list[str]) -> None:
    """What stands in a block beyond what is read, such as ``cache_control``."""
    ignored += [f"{place}.{name}" for name in sorted(block.model_extra or ())]


def _tools(body: CountRequest, limits: Limits, ignored: list[str]) -> tools.Tools | None:
    """Anthropic's ``tools`` and ``tool_choice`` in OpenAI's words."""
    given = []
    for number, tool in enumerate(body.tools or ()):
        if tool.get("type") not in (None, "custom"):
            place = f"tools[{number}]"
            raise ApiError(
                400,
                "unsupported_tool",
                f"{place}: only tools of type custom are known: nothing is run by the server",
                place,
            )
        inner = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
        }
        given.append({"type": "function", "function": inner})
        read = {"type", "name", "description", "input_schema", "strict"}
        ignored += [f"tools[{number}].{name}" for name in sorted(tool.keys() - read)]
    choice = body.tool_choice or {}
    kind = choice.get("type", "auto")
    words: dict[Any, Any] = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        words["tool"] = {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in words:
        raise ApiError(
            400, "invalid_value", f"tool_choice.type {kind!r:.40}: auto, any, tool or none", "tool_choice.type"
        )
    try:
        return tools.read_tools(given, words[kind], not choice.get("disable_parallel_tool_use"), limits)
    except ApiError as error:
        param, text = error.param or "", error.message
        for old, new in ((".function.parameters", ".input_schema"), (".function", "")):
            param, text = param.replace(old, new), text.replace("]" + old, "]" + new)
        raise ApiError(error.status, error.code, text, param or None) from None


def _schema(config: OutputConfig | None, limits: Limits, ignored: list[str]) -> dict[str, Any] | None:
    if config is None:
        return None
    ignored += [f"output_config.{name}" for name in config.check()]
    if config.format is None:
        return None
    try:
        return schema_of(
            ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=config.format.schema_)), limits
        )
    except ApiError as error:
        place = "output_config.format.schema"
        text = error.message.replace("response_format.json_schema", place)
        raise ApiError(error.status, error.code, text, place) from None


# -- the answer -------------------------------------------------------------------------------------------------------


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what was read from a cache apart."""
    return {
        "input_tokens": usage.prompt - usage.cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }  # fmt: skip


class _Answer:
    """One message in the making."""

    def __init__(self, run: Run, offered: tools.Tools | None) -> None:
        self.run = run
        self.reader = tools.CallReader() if offered is not None and offered.offered else None
        self.head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": run.entry.name}
        self.content: list[dict[str, Any]] = []
        self._open = ""  # the type of the block that is being written
        self._arguments = ""

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        result = await self.run.wait()
        self.run.check()
        for _ in self._push(result.samples[0].text, last=True):
            pass
        return {
            **self.head, "content": self.content, **self._stopped(result.samples[0]), "usage": _usage(result.usage),
            "criadero": await self.run.finish(),
        }  # fmt: skip

    def _stopped(self, sample: Sample) -> dict[str, Any]:
        """Why it ended, in Anthropic's words."""
        by = sample.stopped_by if isinstance(sample.stopped_by, str) else None
        words = {"length": "max_tokens", "context": "model_context_window_exceeded", "guard": "refusal"}
        reason = words.get(str(sample.finish_reason)) or ("stop_sequence" if by is not None else "end_turn")
        if reason == "end_turn" and self.reader is not None and self.reader.calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": by}

    async def stream(self) -> AsyncIterator[bytes]:
        """Piece by piece, in Anthropic's order."""
        run = self.run
        usage = {**_usage(Usage(prompt=len(run.request.prompt))), "output_tokens": 0}
        message: dict[str, Any] = {
            **self.head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event("message_start", message=message)
        async for event in run.events(run.service.settings.ping_seconds):
            if event is None:
                yield _event("ping")
            elif isinstance(event, Output):
                if (failed := run.failed or run.cancelled_error(event)) is not None:
                    yield sse.event(failed.body(anthropic=True), "error")
                    return
                for data in self._push(event.text, last=event.finish_reason is not None):
                    yield data
            elif run.waiting is not None:
                yield sse.queued(run.waiting)
        block = await run.finish()
        delta = self._stopped(run.result.samples[0])
        yield _event("message_delta", delta=delta, usage=_usage(run.result.usage), criadero=block)
        yield _event("message_stop")

    def _push(self, text: str, *, last: bool) -> Iterator[bytes]:
        """What new text adds to the blocks, and the events that tell of it."""
        if self.reader is None:
            pieces = [tools.Piece(text=text)] if text else []
        else:
            pieces = self.reader.push(text)
            if last:
                pieces += self.reader.flush()
        for piece in pieces:
            if piece.call is None:
                if self._open != "text":
                    yield from self._close()
                    yield self._begin({"type": "text", "text": ""})
                self.content[-1]["text"] += piece.text
                yield self._delta({"type": "text_delta", "text": piece.text})
            elif piece.begins:
                yield from self._close()
                id = piece.call.id.replace("call_", "toolu_")
                yield self._begin({"type": "tool_use", "id": id, "name": piece.call.name, "input": {}})
            else:
                self._arguments += piece.arguments
                yield self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        if last:
            if not self.content:
                yield self._begin({"type": "text", "text": ""})
            yield from self._close()

    def _begin(self, block: dict[str, Any]) -> bytes:
        self.content.append(block)
        self._open, self._arguments = block["type"], ""
        return _event("content_block_start", index=len(self.content) - 1, content_block=dict(block))

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self.content) - 1, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if not self._open:
            return
        if self._open == "tool_use":
            # one that max_tokens cut off is read as far as it goes, as the client's library does
            self.content[-1]["input"] = from_json(self._arguments or "{}", allow_partial=True)
        self._open = ""
        yield _event("content_block_stop", index=len(self.content) - 1)


def _event(type: str, **data: Any) -> bytes:
    return sse.event({"type": type, **data}, type)
