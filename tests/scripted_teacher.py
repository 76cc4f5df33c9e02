"""A teacher for tests: a local HTTP server that speaks OpenAI's chat completions and answers as a function says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[
    [str, int], Any
]  # (the last user turn, the number of the request) -> text, or (status, headers, body bytes)


class Scripted:
    """Where the teacher is (``url``), and every request it got (``requests``, ``headers``)."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.now = 0


@contextmanager
def scripted_teacher(script: Script, *, usage: bool = True) -> Iterator[Scripted]:
    seen = Scripted()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.requests)
                seen.requests.append(body)
                seen.headers.append(dict(self.headers))
                seen.now += 1
                seen.most_at_once = max(seen.most_at_once, seen.now)
            try:
                said = script(body["messages"][-1]["content"], number)
            finally:
                with lock:
                    seen.now -= 1
            if isinstance(said, tuple):
                status, headers, raw = said
            else:
                text, finish = said if isinstance(said, list) else (said, "stop")
                reply: dict[str, Any] = {
                    "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
                }
                if usage:
                    reply["usage"] = {"prompt_tokens": 100, "completion_tokens": 50}
                status, headers, raw = 200, {}, json.dumps(reply).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:  # who asked did not wait
                pass

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
