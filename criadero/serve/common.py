"""What handlers share: their service, who asks, JSON, usage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from criadero.engine.request import Usage
from criadero.serve import sse
from criadero.serve.keys import Key
from criadero.serve.run import Run, Service
from criadero.serve.runs import Runs


def service_of(request: Request) -> Service:
    """What the handlers share."""
    found: Service = request.app.state.service
    return found


def key_of(request: Request) -> Key:
    """Who asks."""
    found: Key = request.state.key
    return found


def json_response(body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """As JSON; half characters become U+FFFD."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=dict(headers or {}))


class Answer(Protocol):
    """An answer in the making, in the words of one API."""

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        ...

    def stream(self) -> AsyncIterator[bytes]:
        """Piece by piece."""
        ...


async def respond(request: Request, run: Run | Runs, answer: Answer, stream: bool | None) -> Response:
    """``answer`` as events or as one body. ``run`` is closed when it is through, whatever happens."""
    if stream:
        seconds = service_of(request).settings.write_seconds
        return sse.EventStream(
            answer.stream(), gone=run.gone, close=run.close, write_seconds=seconds, headers=run.headers
        )
    try:
        async with sse.watched(request, run.gone):
            return json_response(await answer.whole(), run.headers)
    finally:
        run.close()


def usage_of(*usages: Usage) -> dict[str, Any]:
    """OpenAI's usage of one or more requests."""
    prompt, completion = sum(one.prompt for one in usages), sum(one.completion for one in usages)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in usages)},
    }  # fmt: skip
