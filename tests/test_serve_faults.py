"""What a server goes through: bodies of any shape, and connections that break off. Thousands at once: test_serve_storm.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import HELLO, MODEL, Live, events, half_request, nothing_is_left, serving

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
    nothing_is_left(live, "eva")
