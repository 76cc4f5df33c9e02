"""`criadero serve` for the suites of others: the same application, and beside it a list of what was asked and what came of it.

``python tools/conformance/server.py --log FILE [--alias NAME ...] [--drop-refused] [--key KEY]`` prints its address
and serves until it gets SIGTERM. The list is JSON, one request a line. It is the server that users have: nothing within it is changed.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from criadero.serve.app import LOCAL, make_app, make_pool
from criadero.serve.keys import hash_key
from criadero.serve.server import Server, listen
from criadero.serve.settings import Limits, Settings
from criadero.serve.store import Store, open_store

# what is left of a request without one of these is another request
NEEDED = {
    "/v1/chat/completions": {"model", "messages"}, "/v1/completions": {"model", "prompt"}, "/v1/embeddings": {"model", "input"},
    "/v1/responses": {"model", "input"}, "/v1/responses/input_tokens": {"model", "input"},
    "/v1/messages": {"model", "messages", "max_tokens"},
}  # fmt: skip
BARE = ("/chat/completions", "/embeddings", "/models", "/responses", "/messages")


class Tap:
    """Writes down each request with a JSON body: its address, its parameters, the status, and of a refusal code and parameter.

    With ``drop`` a request that is refused for one of its parameters is asked again without it, and what was left out is written down:
    so a suite that sends all parameters at once tells of those that are honoured too. With ``bare`` addresses need
    no /v1 in front.
    """

    def __init__(self, app: Any, chosen: argparse.Namespace, store: Store | None) -> None:
        self.app, self.log, self.drop, self.bare = app, chosen.log, chosen.drop_refused, chosen.bare
        self.store, self.made_up = store, chosen.made_up
        self._row: Any = None
        self._lock = threading.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.time()
        if self.bare and scope["path"].startswith(BARE):
            scope = {**scope, "path": "/v1" + scope["path"], "raw_path": b"/v1" + scope["raw_path"]}
        if self.made_up and scope["path"].startswith("/v1/responses"):
            await self._make_up()
        body, parts = b"", []
        while scope["method"] == "POST":
            message = await receive()
            parts.append(message)
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        try:
            sent = json.loads(body) if body else None
        except (ValueError, RecursionError):
            sent = None
        refusals: list[dict[str, Any]] = []
        while True:
            queue = list(parts)

            async def again(queue: list[Any] = queue) -> Any:
                return queue.pop(0) if queue else await receive()

            status, held = await self._answer(scope, again, send)
            refusal = None if held is None else refusal_of(held)
            if refusal is not None:
                refusals.append(refusal)
            name = (refusal or {}).get("param") or ""
            name = name.partition(".")[0].partition("[")[0]
            if held is None or not (
                self.drop and isinstance(sent, dict) and name in sent and name not in NEEDED.get(scope["path"], sent)
            ):
                break
            sent = {key: value for key, value in sent.items() if key != name}
            data = json.dumps(sent).encode()
            headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(data)).encode())]}
            parts = [{"type": "http.request", "body": data, "more_body": False}]
        for message in held or ():
            await send(message)
        names = sorted(key for key, value in sent.items() if value is not None) if isinstance(sent, dict) else []
        line = {
            "began": began, "ended": time.time(), "request": f"{scope['method']} {scope['path']}", "sent": names,
            "status": status, "refusals": refusals,
        }  # fmt: skip
        with self._lock, self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    async def _make_up(self) -> None:
        """See that the responses are there that a suite asks for, as its mock server has any: each is a real one under another id."""
        assert self.store is not None
        if self._row is None:
            where = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1")
            async with where as client:
                made = await client.post("/v1/responses", json={"input": "Hola", "max_output_tokens": 4})
            self._row = self.store.response(LOCAL.owner, made.json()["id"])
        for id in self.made_up:
            if self.store.response(LOCAL.owner, id) is None:
                body = {**self._row["body"], "id": id}
                self.store.add_response(LOCAL.owner, id=id, previous=None, input=self._row["input"], body=body)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> tuple[int, list[Any] | None]:
        """The status, and if it is 400 or more the answer's messages, not sent yet; None when they were sent on as they came."""
        held: list[Any] = []
        status = 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if status >= 400:
                held.append(message)
            else:
                await send(message)

        await self.app(scope, receive, sending)
        return status, held if status >= 400 else None


def refusal_of(messages: list[Any]) -> dict[str, Any]:
    """Status, code, parameter and text of an error's answer."""
    try:
        body = json.loads(b"".join(one.get("body", b"") for one in messages))
        error = body["error"]
        return {
            "status": messages[0]["status"], "code": error.get("code"), "param": error.get("param"),
            "message": error.get("message"),
        }  # fmt: skip
    except (ValueError, KeyError, TypeError):
        return {"status": messages[0]["status"], "code": None, "param": None, "message": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--model", default="cria-chat")
    parser.add_argument("--alias", action="append", default=[], help="another name of the model")
    parser.add_argument("--drop-refused", action="store_true")
    parser.add_argument("--bare", action="store_true", help="take addresses without /v1 too, as llama.cpp does")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--database", help="an SQLite file: responses are kept")
    parser.add_argument(
        "--made-up", action="append", default=[], help="an id of a response that is there whenever it is asked for"
    )
    parser.add_argument("--key", help="required of every request")
    parser.add_argument("--requests-per-minute", type=int)
    parser.add_argument("--sequences", type=int, default=8)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    settings = Settings(
        models=(chosen.model,), host=chosen.host, port=chosen.port, sequences=chosen.sequences, database=chosen.database,
        require_key=bool(chosen.key), key_hashes=(hash_key(chosen.key),) if chosen.key else (), threads=1,
        limits=Limits(requests_per_minute=chosen.requests_per_minute),
    )  # fmt: skip
    pool = make_pool(settings)
    for name in chosen.alias:  # the first one is what answers call the model
        pool.add(chosen.model, name)
    store: Store | None = open_store(chosen.database) if chosen.database else None
    made = listen(settings)
    app = make_app(settings, store=store, pool=pool)
    url = "http://{}:{}".format(*made.getsockname()[:2])
    server = Server(app, on_start=lambda: print(url, flush=True))
    server.config.app = Tap(app, chosen, store)
    server.run(sockets=[made])


if __name__ == "__main__":
    main()
