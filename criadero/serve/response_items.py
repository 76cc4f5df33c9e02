"""Items of /v1/responses: those of a request to messages, and an answer as it comes to items and the events that tell of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from criadero.chat import Message
from criadero.engine.request import TokenLogprob
from criadero.serve import tools
from criadero.serve.errors import ApiError
from criadero.serve.openai_chat import CalledFunction, ChatMessage, ToolCall, chat_logprobs, messages_of
from criadero.serve.params import LIMITS, Body
from criadero.serve.settings import Limits
from criadero.tokenizer import Tokenizer

Event = dict[str, Any]
_TEXTS = ("input_text", "output_text", "text")


class Item(Body):
    """An item of the input: a message, a function call that the model made, or the result of one."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Annotated[str, Field(max_length=64)] = "message"
    id: Annotated[str, Field(max_length=128)] | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Annotated[list[dict[str, Any]], Field(max_length=LIMITS.parts)] | None = None
    call_id: Annotated[str, Field(max_length=128)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    arguments: str | None = None
    output: str | Annotated[list[dict[str, Any]], Field(max_length=LIMITS.parts)] | None = None


_PLAIN = {*Item.model_fields, "status", "phase"}  # what is read, and what says nothing


def new_item(kind: str) -> str:
    """An id: ``msg``, ``fc``, ``resp`` and 32 digits."""
    return f"{kind}_{uuid.uuid4().hex}"


def items_of(given: str | Sequence[Item], ignored: list[str]) -> list[dict[str, Any]]:
    """The input as plain items, each with an id. What is in them and has no effect is added to ``ignored``."""
    if isinstance(given, str):
        part = {"type": "input_text", "text": given}
        return [{"id": new_item("msg"), "type": "message", "role": "user", "status": "completed", "content": [part]}]
    found = []
    for number, item in enumerate(given):
        ignored += [f"input[{number}].{name}" for name in sorted((item.model_extra or {}).keys() - _PLAIN)]
        plain = {"type": item.type, **item.model_dump(exclude_none=True, include=_PLAIN)}
        plain["id"] = item.id or new_item({"message": "msg", "function_call": "fc"}.get(item.type, "item"))
        found.append(plain)
    return found


def messages_from(
    items: Sequence[dict[str, Any]], instructions: str | None, limits: Limits, first: int = 0
) -> list[Message]:
    """Messages for the template. ``first``: where the request's own items begin, after those of the responses before it; errors name
    its places. ApiError: an item that is no text, a result without its call."""
    given: list[ChatMessage] = []
    called: set[str] = set()
    opening = [instructions] if instructions else []
    for number, item in enumerate(items):
        place = f"input[{number - first}]" if number >= first else "previous_response_id"
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if role is None or item.get("content") is None:
                missing = f"{place}.{'role' if role is None else 'content'}"
                raise ApiError(400, "missing_parameter", f"{missing} must be given", missing)
            text = _text(item["content"], f"{place}.content")
            if role in ("system", "developer") and not given:
                opening.append(text)  # one system message: templates take no two
            else:
                given.append(ChatMessage(role=role, content=text))
        elif kind == "function_call":
            call = _call(item, place)
            called.add(call.id)
            if given and given[-1].role == "assistant":
                given[-1] = ChatMessage(
                    role="assistant", content=given[-1].content, tool_calls=[*(given[-1].tool_calls or ()), call]
                )
            else:
                given.append(ChatMessage(role="assistant", tool_calls=[call]))
        elif kind == "function_call_output":
            id = item.get("call_id")
            if id not in called:
                text = f"{place}.call_id names no call of the items before"
                raise ApiError(400, "invalid_value", text, f"{place}.call_id")
            given.append(
                ChatMessage(role="tool", tool_call_id=id, content=_text(item.get("output"), f"{place}.output"))
            )
        else:
            raise ApiError(
                400, "unsupported_content",
                f"{place}: items are message, function_call and function_call_output here, not {kind[:40]!r}", f"{place}.type",
            )  # fmt: skip
    if opening:
        given.insert(0, ChatMessage(role="system", content="\n\n".join(opening)))
    if len(given) > limits.messages:
        raise ApiError(
            400, "out_of_range", f"input: {len(given):,} messages, with those before, are more than {limits.messages:,} (limit messages)",
            "input",
        )  # fmt: skip
    return messages_of(given, limits, [])


def _call(item: dict[str, Any], place: str) -> ToolCall:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise ApiError(400, "missing_parameter", f"{place}.{name} must be given", f"{place}.{name}")
    return ToolCall(id=item["call_id"], function=CalledFunction(name=item["name"], arguments=item["arguments"]))


def _text(content: Any, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        text = part.get("refusal") if kind == "refusal" else part.get("text")
        if kind not in (*_TEXTS, "refusal") or not isinstance(text, str):
            at = f"{place}[{number}]"
            raise ApiError(400, "unsupported_content", f"{at}: these models read text, not {str(kind)[:40]}", at)
        texts.append(text)
    return "".join(texts)


class AnswerItems:
    """The text of an answer, as it comes, to output items; every change gives events, in OpenAI's order."""

    def __init__(self, tokenizer: Tokenizer, reader: tools.CallReader | None, logprobs: bool) -> None:
        self.output: list[dict[str, Any]] = []
        self._tokenizer, self._reader, self._logprobs = tokenizer, reader, logprobs
        self._pending: list[TokenLogprob] = []  # of text that was held back
        self._open: dict[str, Any] | None = None

    def push(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[Event]:
        """What ``text`` adds."""
        self._pending += logprobs or ()
        pieces = self._reader.push(text) if self._reader is not None else [tools.Piece(text=text)] if text else []
        for piece in pieces:
            yield from self._piece(piece)

    def finish(self, whole: bool) -> Iterator[Event]:
        """The end; an answer without a word is an empty message. ``whole`` is False for one that was cut off."""
        for piece in self._reader.flush() if self._reader is not None else ():
            yield from self._piece(piece)
        if not self.output:
            yield from self._begin_message()
        yield from self._close("completed" if whole else "incomplete")

    def _piece(self, piece: tools.Piece) -> Iterator[Event]:
        if piece.call is None:
            if piece.text:
                if self._open is None or self._open["type"] != "message":
                    yield from self._begin_message()
                yield from self._words(piece.text)
        elif piece.begins:
            yield from self._close("completed")
            call = piece.call
            named = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield self._add({"id": new_item("fc"), "type": "function_call", "status": "in_progress", **named})
        elif self._open is not None:
            self._open["arguments"] += piece.arguments
            yield self._event("response.function_call_arguments.delta", delta=piece.arguments)

    def _begin_message(self) -> Iterator[Event]:
        yield from self._close("completed")
        yield self._add(
            {"id": new_item("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        )
        assert self._open is not None
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open["content"].append(part)
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _words(self, text: str) -> Iterator[Event]:
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        told = chat_logprobs(self._tokenizer, self._pending) if self._logprobs else []
        part["logprobs"] += told
        self._pending = []
        yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=told)

    def _close(self, status: str) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        if item["type"] == "message":
            part = item["content"][0]
            if self._logprobs and self._pending:  # of tokens that gave no text
                part["logprobs"] += chat_logprobs(self._tokenizer, self._pending)
                self._pending = []
            yield self._event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            yield self._event("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        item["status"] = status
        self._open = None
        yield {"type": "response.output_item.done", "output_index": len(self.output) - 1, "item": _copy(item)}

    def _add(self, item: dict[str, Any]) -> Event:
        self.output.append(item)
        self._open = item
        return {"type": "response.output_item.added", "output_index": len(self.output) - 1, "item": _copy(item)}

    def _event(self, type: str, **more: Any) -> Event:
        assert self._open is not None
        return {"type": type, "item_id": self._open["id"], "output_index": len(self.output) - 1, **_copy(more)}


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    """As it is now: the item goes on growing."""
    copied: dict[str, Any] = json.loads(json.dumps(value))
    return copied
