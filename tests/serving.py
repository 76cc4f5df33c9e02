"""A server in a thread, with the bundled chat model, for the tests of ``criadero serve``."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx

from criadero.serve.app import make_app
from criadero.serve.run import Service, Store
from criadero.serve.server import Server, listen
from criadero.serve.settings import Settings
from criadero.serve.telemetry import Telemetry
from criadero.serve.worker import Worker

MODEL = "cria-chat"
HELLO = [{"role": "user", "content": "Hola, ¿quién eres?"}]


@dataclass
class Live:
    """A running server."""

    url: str
    service: Service
    server: Server

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    @property
    def worker(self) -> Worker:
        """Of the default model, which it waits for."""
        body = self.service.pool.entries[self.service.pool.default].body
        wait_for(lambda: body.worker is not None)
        assert body.worker is not None
        return body.worker

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **more)

    def chat(self, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        body = {"messages": HELLO, "max_tokens": 8, "temperature": 0, **more}
        return self.post("/v1/chat/completions", body, headers=headers)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **more)


@contextlib.contextmanager
def serving(
    settings: Settings | None = None, *, store: Store | None = None, telemetry: Telemetry | None = None
) -> Iterator[Live]:  # fmt: skip
    """A server on a free port; ended when the block is left."""
    settings = replace(settings or Settings(models=(MODEL,)), port=0)
    made = listen(settings)
    app = make_app(settings, store=store, telemetry=telemetry)
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Live("http://{}:{}".format(*made.getsockname()[:2]), app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        made.close()
        assert not thread.is_alive()


def wait_for(what: Callable[[], Any], seconds: float = 30.0) -> None:
    """Until ``what()`` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def slow_steps(worker: Worker, seconds: float) -> Iterator[None]:
    """Each step of the engine takes so much longer: as on a large model."""
    runner = worker.llm.runner
    fast = runner.step

    def step(batch: Any) -> Any:
        time.sleep(seconds)
        return fast(batch)

    runner.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.step = fast  # type: ignore[method-assign]


def events(text: str) -> list[Any]:
    """The data of a stream's events; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        for line in block.splitlines():
            if line.startswith("data: "):
                found.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
    return found


def half_request(live: Live, path: str, body: Any) -> socket.socket:
    """A connection on which a request was sent and whose answer nobody has read yet."""
    data = json.dumps(body).encode()
    made = socket.create_connection(live.address)
    head = f"POST {path} HTTP/1.1\r\nHost: {live.address[0]}:{live.address[1]}\r\nContent-Type: application/json\r\n"
    made.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return made


def streamed(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) of a stream, as they come; an event without a name is "message"."""
    name = "message"
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, line[6:] if line == "data: [DONE]" else json.loads(line[6:])
            name = "message"


def nothing_is_left(live: Live, key: str) -> None:
    """No slot, page, place in line, or use of a model; and whoever has ``key`` is answered."""
    wait_for(lambda: live.worker.active == 0)
    wait_for(lambda: live.service.admission._answers == {})
    stats = live.worker.llm.engine.stats()
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == 0
    assert all(usage.active == 0 for usage in live.service.admission._usage.values())
    wait_for(lambda: live.service.pool.entries[MODEL].body.users == 0)
    wait_for(lambda: not live.server.server_state.tasks)
    assert live.chat(headers={"x-api-key": key}).status_code == 200
