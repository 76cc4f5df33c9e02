"""/v1/trace: the spans of an answer that stand in the model's training data, asked over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import tiny
from test_trace import FILLER, POEM, built  # noqa: F401  a fixture

from criadero.artifact import create
from criadero.serve.keys import hash_key
from criadero.serve.settings import Settings
from criadero.serve.store import Store, open_store
from criadero.trust.search import open_index
from criadero.trust.trace import trace

KEYS = {"ana": "a" * 40, "eva": "e" * 40}


@pytest.fixture(scope="module")
def root(built: Path) -> Path:  # noqa: F811
    """The folder, with a model that has weights and was made of the index's tokens, and one that has no index."""
    with create(built / "served", kind="base", config={}) as draft:
        tiny.base(draft.path)
        draft.add_input("trained_on", built / "tokens")
    tiny.base(built / "stray")
    return built


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    made = open_store(root / "criadero.db")
    for name, secret in KEYS.items():
        made.add_key(hash_key(secret), name=name, hint="", owner=name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(root: Path, store: Store) -> Iterator[serving.Live]:
    settings = Settings(models=(str(root / "served"), str(root / "stray")), require_key=True)
    with serving.serving(settings, store=store) as made:
        yield made


def ask(live: serving.Live, body: dict[str, Any], who: str = "ana") -> httpx.Response:
    return live.post("/v1/trace", body, headers={"Authorization": f"Bearer {KEYS[who]}"})


def test_a_trace_is_that_of_the_library(live: serving.Live, root: Path) -> None:
    text = f"They say: {POEM} And {FILLER[3]}"
    found = ask(live, {"model": "served", "text": text}).json()
    expected = trace(open_index(root / "index"), text).as_dict()
    assert found["spans"]
    assert {name: found[name] for name in expected} == httpx.Response(200, json=expected).json()
    assert (found["model"], found["index"]) == ("served", "index")
    assert found["learned_from"]["not_in_the_index"] == 0
    assert found["caution"][0] == "verbatim overlap, not proof of cause"
    assert str(root) not in str(found)
    assert ask(live, {"text": text, "min_tokens": 1000}).json()["spans"] == []


def test_an_answer_is_traced_by_its_id_and_by_its_owner_only(live: serving.Live, store: Store) -> None:
    """S12: traces of others' answers."""
    chat = store.add_chat("ana")["id"]
    user = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "?"})
    assert user
    message = {"parent": user["id"], "role": "assistant", "content": POEM, "model": "served"}
    answer = store.add_message("ana", chat, message)
    assert answer
    found = ask(live, {"message_id": answer["id"]}).json()
    assert found["text"] == POEM
    assert found["longest"]["text"]
    assert found["longest_asks"]
    refused = ask(live, {"message_id": answer["id"]}, "eva")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "message_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_value", "text"),
        ({"text": "x", "message_id": "msg_1"}, 400, "invalid_value", "text"),
        ({"text": ""}, 400, "out_of_range", "text"),
        ({"text": "x" * 200_001}, 400, "out_of_range", "text"),
        ({"text": "x", "min_tokens": 1}, 400, "out_of_range", "min_tokens"),
        ({"message_id": "../x"}, 404, "message_not_found", "id"),
        ({"model": "nobody", "text": "x"}, 404, "model_not_found", "model"),
        ({"model": "stray", "text": "x"}, 404, "no_index", "model"),
    ],
)
def test_what_is_wrong_is_said(live: serving.Live, root: Path, body: Any, status: int, code: str, param: str) -> None:
    response = ask(live, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert str(root) not in error["message"]
    assert "--index" not in error["message"]
