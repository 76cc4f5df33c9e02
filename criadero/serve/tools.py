"""Functions that a model may call: how they are told to it, what grammar its answer follows, and how calls are read back.

The wording is ours and goes through the model's own template as part of the system message: no template comes from a request. A call is
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the Hermes format, which Llamas tuned for tools often know). The grammar makes
sure that what begins as a call is one, with arguments that follow the function's schema.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from criadero.chat import Message
from criadero.serve.errors import ApiError
from criadero.serve.settings import Limits

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 8  # in one answer
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*')
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # a function without parameters


@dataclass(frozen=True)
class Tools:
    """The functions of a request, checked. ``choice`` is one of the words, or the name of the function to call."""

    functions: tuple[dict[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def offered(self) -> tuple[dict[str, Any], ...]:
        """Those that may be called."""
        if self.choice == "none":
            return ()
        named = tuple(one for one in self.functions if one["name"] == self.choice)
        return named or self.functions

    @property
    def must(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice not in ("none", "auto")


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
    limits: Limits,
) -> Tools | None:
    """OpenAI's ``tools``, ``tool_choice`` and ``parallel_tool_calls``; None when there are no tools. ApiError: what is wrong."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "invalid_value", "tool_choice needs tools", "tool_choice")
        return None
    if len(tools) > limits.tools:
        raise ApiError(400, "out_of_range", f"tools: {len(tools)} are more than {limits.tools} (limit tools)", "tools")
    if len(json.dumps(tools)) > limits.tool_bytes:
        raise ApiError(
            400, "out_of_range", f"tools take more than {limits.tool_bytes:,} bytes as JSON (limit tool_bytes)", "tools"
        )
    functions: list[dict[str, Any]] = []
    for number, tool in enumerate(tools):
        function, place = tool.get("function"), f"tools[{number}]"
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ApiError(
                400,
                "unsupported_tool",
                f"{place}: only tools of type function are known here: nothing is run by the server",
                place,
            )
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ApiError(
                400,
                "invalid_value",
                f"{place}.function.name: letters, digits, _ and -, at most 64",
                f"{place}.function.name",
            )
        if any(one["name"] == name for one in functions):
            raise ApiError(
                400, "invalid_value", f"{place}: there are two functions of the name {name!r}", f"{place}.function.name"
            )
        if not isinstance(parameters, dict | None):
            raise ApiError(
                400,
                "invalid_type",
                f"{place}.function.parameters must be a JSON schema",
                f"{place}.function.parameters",
            )
        if not isinstance(about := function.get("description"), str | None):
            raise ApiError(
                400, "invalid_type", f"{place}.function.description must be a text", f"{place}.function.description"
            )
        check_depth(parameters, limits, f"{place}.function.parameters")
        functions.append({"name": name, "description": about or "", "parameters": parameters or NOTHING})
    word = choice or "auto"
    if isinstance(word, Mapping):
        inner = word.get("function")
        found = inner.get("name") if isinstance(inner, Mapping) else word.get("name")
        if word.get("type") != "function" or not isinstance(found, str):
            raise ApiError(
                400, "invalid_value", 'tool_choice: "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
                "tool_choice",
            )  # fmt: skip
        word = found
        if all(one["name"] != word for one in functions):
            raise ApiError(
                400, "invalid_value", f"tool_choice names {word!r:.80}, which is not among the tools", "tool_choice"
            )
    elif word not in ("none", "auto", "required"):
        raise ApiError(
            400, "invalid_value", f"tool_choice {word!r:.80}: none, auto, required, or a function", "tool_choice"
        )
    return Tools(tuple(functions), word, parallel is not False)


def check_depth(schema: Any, limits: Limits, param: str) -> None:
    """400 when a schema is nested deeper than limit schema_depth."""
    todo = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > limits.schema_depth:
            raise ApiError(
                400,
                "out_of_range",
                f"{param} is nested more than {limits.schema_depth} deep (limit schema_depth)",
                param,
            )
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(one, depth + 1) for one in inner]


def instructions(tools: Tools) -> str:
    """What the model is told of its functions."""
    lines = "\n".join(json.dumps(one, ensure_ascii=False) for one in tools.offered)
    several = "one or more functions" if tools.parallel else "one function"
    when = (
        f"Answer by calling {several}."
        if tools.must
        else f"When it helps to answer, call {several}; else answer in words."
    )
    return (
        f"You can call functions. These are there, one a line, with a JSON schema of their parameters:\n{lines}\n{when} A call is "
        f'written {OPEN}{{"name": "NAME", "arguments": {{...}}}}{CLOSE}, and then you wait for its result.'
    )


def with_instructions(messages: Sequence[Message], text: str) -> list[Message]:
    """The chat with ``text`` at the end of its system message, or as one."""
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": messages[0]["content"] + "\n\n" + text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def enforced(
    messages: Sequence[Message], offered: Tools | None, schema: Mapping[str, Any] | None, params: Mapping[str, Any] = {}
) -> tuple[list[Message], dict[str, Any]]:
    """The chat in which the functions are told, and what enforces the form of the answer (fields of `SamplingParams`). ApiError:
    ``params`` enforce another."""
    if offered is not None and offered.offered:
        if params.get("regex") or params.get("grammar"):
            raise ApiError(400, "invalid_value", "regex and grammar cannot go with tools", "tools")
        return with_instructions(messages, instructions(offered)), {"grammar": answer_grammar(offered, schema)}
    return list(messages), {} if schema is None else compact(schema)


def compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of a schema, without blanks or further properties that a small model could go on writing for ever."""
    return {"json_schema": {**closed(schema), "x-guidance": {"whitespace_flexible": False}}}


def closed(schema: Any) -> Any:
    """``schema`` where an object whose properties are listed has no others, unless it says that it may: as clients mean it, and as other
    servers take it. What comes out is right by the schema as it was given."""
    if '"allOf"' in json.dumps(schema):  # parts of one object would shut each other out
        return schema
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(found.get(key), dict):
            found[key] = {name: _closed(one) for name, one in found[key].items()}
    for key in ("items", "prefixItems", "anyOf", "oneOf"):
        if key in found:
            found[key] = _closed(found[key])
    listed, needed = found.get("properties"), found.get("required", [])
    # an object put together of several schemas, or with rules for names, is left as it is
    others = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "minProperties"}
    others |= {"anyOf", "oneOf", "$ref", "if", "not", "dependentSchemas", "dependentRequired"}
    if not isinstance(listed, dict) or not isinstance(needed, list) or others & found.keys():
        return found
    if all(isinstance(name, str) and name in listed for name in needed):
        found["additionalProperties"] = False
    return found


def call_text(name: str, arguments: str) -> str:
    """A call as the model wrote it."""
    try:
        arguments = json.dumps(json.loads(arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'{OPEN}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CLOSE}'


def result_text(name: str, content: str) -> str:
    """The result of a call, as the model is told it."""
    return f"Result of {name}: {content}"


def answer_grammar(tools: Tools, schema: Mapping[str, Any] | None = None) -> str:
    """The Lark grammar of an answer: calls, or, where it may be, words (with ``schema``: JSON of that shape)."""
    rules, names = [], []
    for number, one in enumerate(tools.offered):
        inner = _moved(closed(one["parameters"]), "#/properties/arguments")
        whole = {
            "type": "object", "properties": {"name": {"const": one["name"]}, "arguments": inner},
            "required": ["name", "arguments"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False},
        }  # fmt: skip
        names.append(f"f{number}")
        rules.append(f"f{number}: %json {json.dumps(whole)}")
    calls = f"call{{1,{MOST_CALLS}}}" if tools.parallel else "call"
    start = [f"start: {calls}" if tools.must else f"start: {calls} | words"]
    if not tools.must:
        if schema is None:
            start += ["words: TEXT", f"TEXT: /(?s:.*)/ & ~/(?s:{OPEN}.*)/"]
        else:
            start.append(f"words: %json {json.dumps(compact(schema)['json_schema'])}")
    return "\n".join([*start, f'call: "{OPEN}" function "{CLOSE}"', "function: " + " | ".join(names), *rules])


def _moved(schema: Any, place: str) -> Any:
    """``schema`` to stand at ``place`` of another: its references to itself go there."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(one, place) for one in schema] if isinstance(schema, list) else schema


@dataclass
class Call:
    """A call as it is being written."""

    index: int
    name: str = ""
    arguments: str = ""
    id: str = field(default_factory=lambda: "call_" + uuid.uuid4().hex[:24])

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's shape."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Piece:
    """What new text came to: words, or a part of a call (its ``name`` the first time)."""

    text: str = ""
    call: Call | None = None
    begins: bool = False
    arguments: str = ""


class CallReader:
    """Text of one answer, as it comes, to words and calls. Nothing of a call is ever given as words."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._held = ""
        self._state: Literal["start", "words", "between", "head", "arguments", "tail"] = "start"
        self._depth, self._quoted, self._escaped = 0, False, False

    def push(self, text: str) -> list[Piece]:
        """What ``text`` adds."""
        self._held += text
        found: list[Piece] = []
        while self._held and self._step(found):
            pass
        return found

    def flush(self) -> list[Piece]:
        """At the end: what was held back as it might have begun a call. The head of a call that was cut off is words."""
        held, self._held = self._held, ""
        if not held or self._state in ("between", "tail"):
            return []
        return [Piece(text=OPEN + held if self._state == "head" else held)]

    def _step(self, found: list[Piece]) -> bool:
        """One transition; False when more text is needed."""
        held = self._held
        if self._state in ("start", "between"):
            plain = held.lstrip() if self._state == "between" or self.calls else held
            if plain.startswith(OPEN):
                self._held, self._state = plain[len(OPEN) :], "head"
                return True
            if OPEN.startswith(plain):
                return False
            self._state = "words"
            return True
        if self._state == "words":
            found.append(Piece(text=held))
            self._held = ""
            return False
        if self._state == "head":
            match = _HEAD.match(held)
            if not match or match.end() == len(held):
                return False
            call = Call(len(self.calls), json.loads(f'"{match[1]}"'))
            self.calls.append(call)
            found.append(Piece(call=call, begins=True))
            self._held, self._state = held[match.end() :], "arguments"
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        if self._state == "arguments":
            end = self._value_end(held)
            part = held[:end]
            if part:
                self.calls[-1].arguments += part
                found.append(Piece(call=self.calls[-1], arguments=part))
            self._held = held[end:]
            if end < len(held):
                self._state = "tail"
            return end < len(held)
        at = held.find(CLOSE)  # tail
        if at < 0:
            return False
        self._held, self._state = held[at + len(CLOSE) :], "between"
        return True

    def _value_end(self, text: str) -> int:
        """Where the arguments end in ``text``: before the brace that closes what is around them."""
        for at, letter in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._quoted = False
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                if self._depth == 0:
                    return at
                self._depth -= 1
        return len(text)
