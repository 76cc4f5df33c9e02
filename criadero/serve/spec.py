"""The OpenAPI document as the server answers: FastAPI writes the paths and bodies, and here the errors, streams and answers are told."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

Schema = dict[str, Any]
# addresses whose answer may come as server-sent events, when the body asks for it
STREAMED = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
STREAMS = {"/api/chats/{id}/answer", "/api/comparisons/{id}/stream"}  # and those that have no other
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**53}
BLOCK = {
    "type": "object",
    "description": "what is not as one might think, and what computed it (see docs/reference/api.md)",
}


def _object(**fields: Any) -> Schema:
    """An object that has all of these, and perhaps more."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _only(*values: Any) -> Schema:
    return {"enum": list(values)}


def _or_null(one: Schema) -> Schema:
    return {"anyOf": [one, {"type": "null"}]}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=TEXT))
ANTHROPIC_ERROR = _object(
    type=_only("error"), error=_object(type=TEXT, message=TEXT, code=TEXT, param=_or_null(TEXT)), request_id=TEXT
)
USAGE = _object(prompt_tokens=COUNT, total_tokens=COUNT)
MODEL = _object(
    id=TEXT, object=_only("model"), created=COUNT, owned_by=TEXT, type=_only("model"), display_name=TEXT, created_at=TEXT,
    lifecycle=_only("active"), criadero=BLOCK,
)  # fmt: skip
_REASON = _or_null(_only("stop", "length", "tool_calls", "content_filter"))
_CHAT_MESSAGE = _object(role=_only("assistant"), content=_or_null(TEXT), refusal=_or_null(TEXT))
# the answers of addresses that programs use
ANSWERS: dict[tuple[str, str], Schema] = {
    ("get", "/v1/models"): _object(object=_only("list"), data=_list(MODEL)),
    ("get", "/v1/models/{name}"): MODEL,
    ("post", "/v1/chat/completions"): _object(
        id=TEXT, object=_only("chat.completion"), created=COUNT, model=TEXT, usage=USAGE, criadero=BLOCK,
        choices=_list(_object(index=COUNT, message=_CHAT_MESSAGE, finish_reason=_REASON)),
    ),
    ("post", "/v1/completions"): _object(
        id=TEXT, object=_only("text_completion"), created=COUNT, model=TEXT, usage=USAGE, criadero=BLOCK,
        choices=_list(_object(index=COUNT, text=TEXT, finish_reason=_REASON)),
    ),
    ("post", "/v1/embeddings"): _object(
        object=_only("list"), model=TEXT, usage=USAGE, criadero=BLOCK,
        data=_list(
            _object(index=COUNT, object=_only("embedding"), embedding={"anyOf": [TEXT, _list({"type": "number"})]})
        ),
    ),
    ("post", "/v1/responses"): _object(
        id=TEXT, object=_only("response"), status=_only("completed", "incomplete"), model=TEXT, criadero=BLOCK,
        output=_list(_object(type=TEXT, id=TEXT)),
    ),
    ("post", "/v1/responses/input_tokens"): _object(object=_only("response.input_tokens"), input_tokens=COUNT),
    ("post", "/v1/messages"): _object(
        id=TEXT, type=_only("message"), role=_only("assistant"), model=TEXT, content=_list(_object(type=TEXT)),
        usage=_object(input_tokens=COUNT, output_tokens=COUNT), criadero=BLOCK,
    ),
    ("post", "/v1/messages/count_tokens"): _object(input_tokens=COUNT),
    ("post", "/tokenize"): _object(count=COUNT, max_model_len=COUNT, tokens=_list(COUNT)),
    ("post", "/detokenize"): _object(prompt=TEXT),
    ("get", "/api/comparisons/tally"): _list({"type": "object"}),
}  # fmt: skip


class App(FastAPI):
    """FastAPI with our document."""

    def openapi(self) -> Schema:
        """The document, made once."""
        if self.openapi_schema is None:
            self.openapi_schema = told(super().openapi())
        return self.openapi_schema


def told(document: Schema) -> Schema:
    """``document`` with the answers that there really are: it is changed, and given back."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
    for path, methods in document["paths"].items():
        error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}}
        for method, one in methods.items():
            found: Schema = one["responses"]
            found.pop("422", None)  # FastAPI's own; here what does not fit is a 400
            found["4XX"] = {"description": "it cannot be, and why", "content": content}
            found["5XX"] = {"description": "the server cannot, now or at all", "content": content}
            _right(found["200"], method, path)
    return document


def _right(right: Schema, method: str, path: str) -> None:
    """What comes with 200."""
    events = {"text/event-stream": {"schema": {"type": "object", "properties": {"event": TEXT, "data": TEXT}}}}  # each
    if path in STREAMS:
        right["content"] = events
    elif path == "/metrics":
        right["content"] = {"text/plain": {"schema": TEXT}}
    else:
        right["content"] = {"application/json": {"schema": ANSWERS.get((method, path), {"type": "object"})}}
        if method == "post" and path in STREAMED:
            right["content"] |= events
