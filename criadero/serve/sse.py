"""Server-sent events: a response that ends when the client goes away, and pings while there is nothing to say."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from criadero.serve.worker import Waiting

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One event; ``data`` becomes one line of JSON."""
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {line}\n\n".encode("utf-8", "replace")


def comment(text: str) -> bytes:
    """What clients skip."""
    return f": {text}\n\n".encode()


def queued(waiting: Waiting) -> bytes:
    """The place in line."""
    return comment(f"queue position={waiting.position} expected_s={waiting.expected:.1f}")


class EventStream(Response):
    """Sends what ``pieces`` yields. When the client goes away, or reads nothing for ``write_seconds``, ``gone`` is called at once,
    whatever ``pieces`` waits for; ``close`` is called in the end, in any case."""

    media_type = "text/event-stream"

    def __init__(
        self, pieces: AsyncIterator[bytes], *, gone: Callable[[], None], close: Callable[[], None], write_seconds: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.status_code, self.background = 200, None
        self._pieces, self._gone, self._close, self._seconds = pieces, gone, close, write_seconds
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        """As a response without a length."""
        self.body = b""
        super().init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_until_gone(receive, self._gone))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces:
                async with asyncio.timeout(self._seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (OSError, TimeoutError):
            self._gone()
        finally:
            watcher.cancel()
            with contextlib.suppress(BaseException):
                await self._pieces.aclose()  # type: ignore[attr-defined]
            self._close()


async def _until_gone(receive: Receive, gone: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


@contextlib.asynccontextmanager
async def watched(request: Request, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Calls ``gone`` if the client of an answer that is not streamed goes away while the block runs."""
    watcher = asyncio.create_task(_until_gone(request.receive, gone))
    try:
        yield
    finally:
        watcher.cancel()
