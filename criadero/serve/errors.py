"""What goes wrong with a request, as the client sees it: a status, a stable code, one line, the parameter. Never a traceback or
a path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from criadero.errors import UserError

# an absolute path of two parts at least, or one on a Windows drive; a URL's path follows its host and does not match
_PATH = re.compile(r"(?<![\w:/.])(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?")
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error", 409: "conflict_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
# Anthropic's names where they differ
_ANTHROPIC = {413: "request_too_large", 503: "overloaded_error", 500: "api_error", 415: "invalid_request_error"}


class ApiError(Exception):
    """Answer with ``status``. ``code`` never changes for one cause; ``param`` names what was wrong."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, public(message)
        self.param = None if param is None else public(param)
        self.headers = dict(headers or {})

    def body(self, *, anthropic: bool = False, request_id: str = "") -> dict[str, Any]:
        """OpenAI's shape, or Anthropic's."""
        kind = _TYPES.get(self.status, "server_error")
        if anthropic:
            kind = _ANTHROPIC.get(self.status, kind if self.status in _TYPES else "api_error")
            inner = {"type": kind, "message": self.message, "code": self.code, "param": self.param}
            return {"type": "error", "error": inner, "request_id": request_id}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def public(message: str) -> str:
    """A message for people elsewhere: one line, at most 1,000 characters, paths cut to their last part."""
    line = " ".join(message.split())
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], line)[:1000]


def of_user_error(error: UserError, prompt: str = "messages") -> ApiError:
    """A `UserError` of the layers below as a 400; ``prompt`` is what the endpoint calls its prompt."""
    text = str(error)
    if "the model's context is" in text:
        return ApiError(400, "context_length_exceeded", text, prompt)
    if "there is no adapter" in text:
        return ApiError(404, "model_not_found", text, "model")
    if "do not fit the cache" in text:
        return ApiError(400, "cache_too_small", text, "max_tokens")
    for name in ("json_schema", "regex", "grammar"):
        if text.startswith((f"{name}:", f"{name} ")):
            return ApiError(400, "invalid_grammar", text, name)
    if text.startswith("chat template"):
        return ApiError(400, "template_refused", text, "messages")
    if "has no chat template" in text:
        return ApiError(400, "no_chat_template", text, "model")
    return ApiError(400, "invalid_request", text)
