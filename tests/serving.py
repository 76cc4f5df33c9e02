"""A real server in a thread of the test: the application over a socket, as clients meet it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn

from criadero.serve.app import make_app
from criadero.serve.settings import Settings


@contextlib.contextmanager
def serving(settings: Settings, store: Any = None) -> Iterator[str]:
    """Its address, once the default model is loaded."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        app = make_app(settings, store=store)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            until = time.monotonic() + 60
            while httpx.get(f"{address}/ready", timeout=10).status_code != 200:
                assert time.monotonic() < until, "the model was not loaded"
                time.sleep(0.02)
            yield address
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) of a stream, as they come; an event without a name is "message"."""
    name, data = "message", []
    for line in response.iter_lines():
        if not line:
            if data:
                text = "\n".join(data)
                yield name, text if text == "[DONE]" else json.loads(text)
            name, data = "message", []
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].strip())
