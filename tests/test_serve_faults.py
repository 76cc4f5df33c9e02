"""What a server goes through: bodies of any shape, and thousands of requests with clients that leave, lie, and read slowly."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import HELLO, MODEL, Live, events, half_request, serving, wait_for

from criadero.serve.embeddings import EmbeddingRequest
from criadero.serve.keys import Key, hash_key
from criadero.serve.openai_chat import ChatRequest
from criadero.serve.openai_completions import CompletionRequest
from criadero.serve.settings import Limits, Settings

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
    | st.sampled_from(["user", "function", "json_schema", "required", "text", MODEL, "", "\ud800", "\x00"])
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "content", "type", "function", "name", "parameters", "schema", "json_schema", "$ref", "x"]
)
ANY = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=4) | st.dictionaries(KEYS, one, max_size=4), max_leaves=12
)
BODIES = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/embeddings": EmbeddingRequest,
}  # fmt: skip


class Receipts:
    """Two keys, and a database that fails now and then."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, dict[str, Any]]] = []
        self.calls = 0

    def key_by_hash(self, sha256: str) -> Key | None:
        return {hash_key(name): Key(name, name) for name in ("ana", "eva")}.get(sha256)

    def add_receipt(self, owner: str, receipt: dict[str, Any]) -> None:
        self.calls += 1
        if self.calls % 7 == 0:
            raise OSError("database is locked")
        self.kept.append((owner, receipt))

    def tokens_since(self, owner: str, key: str, since: float) -> int:
        raise OSError("database is locked")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    made = Settings(models=(MODEL,), require_key=True, sequences=8, limits=Limits(queue=12), write_seconds=1.0)
    with serving(made, store=Receipts()) as one:
        yield one


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_the_servers_fault(live: Live, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    right = {"messages": HELLO, "prompt": "Hola", "input": "Hola", "max_tokens": 2}
    names = list(BODIES[path].model_fields)
    body = {name: value for name, value in right.items() if name in names}
    for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
        body[name] = data.draw(ANY)
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    head = {"Content-Type": "application/json", "x-api-key": "ana"}
    answer = httpx.post(live.url + path, content=text, headers=head, timeout=60)
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif "data: " in answer.text:
        assert events(answer.text)[-1] == "[DONE]", (body, answer.text)


def _storm(live: Live, count: int, clients: int) -> Counter[str]:
    """``count`` requests of all kinds from ``clients`` threads; what came of them."""
    solo = {
        seed: live.chat(headers={"x-api-key": "ana"}, temperature=1, seed=seed, max_tokens=12).json()["choices"][0][
            "message"
        ]["content"]
        for seed in range(6)
    }
    seen: Counter[str] = Counter()
    wrong: list[Any] = []
    work = iter(range(count))
    lock = threading.Lock()

    def client(number: int) -> None:
        rng = random.Random(number)
        owner = ("ana", "eva")[number % 2]
        head = {"x-api-key": owner}
        while True:
            with lock:
                if next(work, None) is None:
                    return
            kind = rng.choice(("whole", "stream", "leave", "leave whole", "bad", "huge", "schema", "nobody", "slow"))
            try:
                status = one(kind, rng, head)
            except Exception as error:
                wrong.append((kind, repr(error)))
                status = "raised"
            with lock:
                seen[f"{kind} {status}"] += 1

    def one(kind: str, rng: random.Random, head: dict[str, str]) -> str:
        seed = rng.randrange(6)
        ask = {"messages": HELLO, "temperature": 1, "seed": seed, "max_tokens": 12}
        if kind in ("whole", "stream"):
            answer = live.chat(headers=head, **ask, stream=kind == "stream")
            if answer.status_code == 200:
                if kind == "whole":
                    text = answer.json()["choices"][0]["message"]["content"]
                else:
                    parts = [event["choices"] for event in events(answer.text)[:-1]]
                    text = "".join(part[0]["delta"].get("content") or "" for part in parts if part)
                if text != solo[seed]:
                    wrong.append((kind, seed, text, solo[seed]))
            elif answer.status_code != 429 or "retry-after" not in answer.headers:
                wrong.append((kind, answer.status_code, answer.text))
            return str(answer.status_code)
        if kind in ("leave", "leave whole", "slow"):
            long = {**ask, "max_tokens": 400, "ignore_eos": True, "stream": kind != "leave whole"}
            data = json.dumps(long).encode()
            made = socket.create_connection(live.address)
            top = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            top += f"x-api-key: {head['x-api-key']}\r\n"
            made.sendall(f"{top}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            made.settimeout(rng.random() * 0.3)
            try:
                if kind == "slow":
                    made.recv(16)
                made.recv(1)
            except TimeoutError:
                pass
            made.close()
            return "left"
        if kind == "bad":
            text = rng.choice(
                (
                    b"{",
                    b"[]",
                    b'{"messages": 3}',
                    b"\xff\xfe",
                    b'{"messages": [{"role": "user", "content": "x"}], "n": "2"}',
                )
            )
            answer = httpx.post(
                live.url + "/v1/chat/completions", content=text, headers={**head, "Content-Type": "application/json"}
            )
        elif kind == "huge":
            answer = live.chat(
                headers=head, **{rng.choice(("n", "max_tokens", "top_k", "top_logprobs")): 10 ** rng.randrange(9, 60)}
            )
        elif kind == "schema":
            schema = rng.choice(({"$ref": "#"}, {"pattern": "(a{9,9999}){9,9999}", "type": "string"}, {"type": 3}))
            form = {"type": "json_schema", "json_schema": {"schema": schema}}
            answer = live.chat(headers=head, response_format=form, max_tokens=3)
        else:
            answer = live.chat(headers={"x-api-key": "nobody"})
        if answer.status_code not in ((401,) if kind == "nobody" else (200, 400, 429)):
            wrong.append((kind, answer.status_code, answer.text))
        return str(answer.status_code)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]
    return seen


def _nothing_is_left(live: Live) -> None:
    wait_for(lambda: live.worker.active == 0)
    wait_for(lambda: live.service.admission._answers == {})
    stats = live.worker.llm.engine.stats()
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == 0
    assert all(usage.active == 0 for usage in live.service.admission._usage.values())
    wait_for(lambda: live.service.pool.entries[MODEL].body.users == 0)
    assert live.chat(headers={"x-api-key": "eva"}).status_code == 200


def test_a_storm(live: Live) -> None:
    _storm(live, 100, 12)
    _nothing_is_left(live)


@pytest.mark.slow
def test_a_long_storm(live: Live) -> None:
    seen = _storm(live, 5000, 24)
    assert sum(count for what, count in seen.items() if what in ("whole 200", "stream 200")) > 300
    _nothing_is_left(live)
    store: Any = live.service.store
    assert {owner for owner, _ in store.kept} == {"ana", "eva"}


def test_half_a_head_and_half_a_body_hold_nothing(live: Live) -> None:
    for text in (
        b"POST /v1/chat",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{",
        b"\x16\x03\x01\x00",
    ):
        made = socket.create_connection(live.address)
        made.sendall(text)
        made.close()
    half_request(live, "/v1/chat/completions", {"messages": HELLO}).close()
    _nothing_is_left(live)
