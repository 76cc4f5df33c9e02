"""/api, as the page uses it: chats, answers, feedback, comparisons, export and deletion; each only its owner's."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import tiny
from test_serve_store import empty

from criadero.engine.llm import LLM
from criadero.serve.keys import hash_key, new_key
from criadero.serve.settings import Settings
from criadero.serve.store import Store, StoreError, open_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("llama", "other")):
        tiny.base(made / name, seed=seed, max_position_embeddings=512)
    return made


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    made = open_store(folder / "criadero.db")
    yield made
    made.close()


@pytest.fixture(scope="module")
def keys(store: Store) -> dict[str, str]:
    found = {}
    for name in ("ana", "eva"):
        secret = new_key()
        store.add_key(hash_key(secret), name=name, hint=secret[-4:], owner=name)
        found[name] = secret
    return found


@pytest.fixture(scope="module")
def address(folder: Path, store: Store) -> Iterator[str]:
    models = (str(folder / "llama"), str(folder / "other"))
    with serving.serving(Settings(models=models, require_key=True, ping_seconds=0.5), store=store) as live:
        yield live.url


@pytest.fixture(scope="module")
def ana(address: str, keys: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {keys['ana']}"}, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def eva(address: str, keys: dict[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers={"x-api-key": keys["eva"]}, timeout=30) as client:
        yield client


def asked(client: httpx.Client, content: str = "Can I pay by card?", **chat: Any) -> tuple[str, str]:
    """A chat with a question: (chat, message)."""
    made = client.post("/api/chats", json={"model": "llama", **chat}).json()["id"]
    said = client.post(f"/api/chats/{made}/messages", json={"parent": None, "content": content})
    assert said.status_code == 200, said.text
    return made, said.json()["id"]


def answer(client: httpx.Client, chat: str, parent: str, **more: Any) -> list[tuple[str, Any]]:
    with client.stream("POST", f"/api/chats/{chat}/answer", json={"parent": parent, **more}) as response:
        assert response.status_code == 200, response.read()
        return list(serving.streamed(response))


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    return str(error["message"])


SHORT = {"max_tokens": 12, "temperature": 1.0}


# --- answers ---


def test_an_answer_streams_and_is_kept(ana: httpx.Client) -> None:
    chat, question = asked(ana, system="Be brief.")
    (start, first), *rest = answer(ana, chat, question, params=SHORT)
    assert start == "start"
    (end, done) = rest[-1]
    assert end == "done"
    message = done["message"]
    assert {name for name, _ in rest[:-1]} <= {"delta", "queue"}
    assert "".join(data["text"] for name, data in rest if name == "delta") == message["content"]
    assert (message["id"], message["seed"]) == (first["message_id"], first["seed"])
    assert (message["parent"], message["role"], message["model"]) == (question, "assistant", "llama")
    assert message["params"] == {**SHORT, "top_p": 0.9, "repetition_penalty": 1.1, "system": "Be brief."}
    assert message["criadero"]["context"]["dropped"] == []
    assert message["criadero"]["receipt"]["id"] == message["receipt_id"]
    assert message["usage"]["completion_tokens"] >= 1
    assert message["finish_reason"] in ("stop", "length")
    assert message["feedback"] is None
    assert message["tokens"] is None
    assert re.fullmatch("[0-9a-f]{64}", message["model_hash"])
    assert ana.get(f"/api/chats/{chat}").json()["messages"][-1] == message


def test_the_answer_is_the_models_own(ana: httpx.Client, folder: Path) -> None:
    chat, question = asked(ana, "Where is the shop?", system="Be brief.")
    message = answer(ana, chat, question, params=SHORT, seed=11)[-1][1]["message"]
    llm = LLM(folder / "llama")
    alone = llm.answer(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the shop?"}],
        **SHORT, top_p=0.9, repetition_penalty=1.1, seed=11,
    )  # fmt: skip
    assert message["content"] == alone.text
    assert message["seed"] == 11


def test_asked_again_it_is_a_branch_and_the_same_seed_the_same_answer(ana: httpx.Client) -> None:
    chat, question = asked(ana)
    one, two, three = (answer(ana, chat, question, params=SHORT, seed=seed)[-1][1]["message"] for seed in (1, 1, 2))
    assert one["content"] == two["content"] != three["content"]
    assert one["parent"] == two["parent"] == question
    follow = ana.post(f"/api/chats/{chat}/messages", json={"parent": three["id"], "content": "And then?"}).json()
    last = answer(ana, chat, follow["id"], params=SHORT)[-1][1]["message"]
    assert last["parent"] == follow["id"]
    assert len(ana.get(f"/api/chats/{chat}").json()["messages"]) == 6


def test_probabilities_are_those_of_the_tokens(ana: httpx.Client, folder: Path) -> None:
    chat, question = asked(ana)
    found = answer(ana, chat, question, params={"max_tokens": 8, "temperature": 0}, probabilities=True, seed=1)
    message = found[-1][1]["message"]
    tokens = message["tokens"]
    assert tokens == [token for name, data in found if name == "delta" for token in data.get("tokens", ())]
    assert len(tokens) == message["usage"]["completion_tokens"] - (message["finish_reason"] == "stop")
    for token in tokens:
        assert len(token["top"]) == 5
        assert token["logprob"] <= 0
        assert token["top"][0][1] == pytest.approx(token["logprob"])  # at temperature 0 the likeliest
    llm = LLM(folder / "llama")
    alone = llm.answer(
        [{"role": "user", "content": "Can I pay by card?"}], max_tokens=8, temperature=0, top_p=0.9, logprobs=5, seed=1
    )
    assert [token["logprob"] for token in tokens] == pytest.approx([one.logprob for one in alone.samples[0].logprobs])


def test_who_leaves_has_what_was_there(ana: httpx.Client) -> None:
    chat, question = asked(ana)
    with ana.stream(
        "POST", f"/api/chats/{chat}/answer",
        json={"parent": question, "params": {"max_tokens": 480, "temperature": 2.0, "stop": ["\0\0never"]}, "seed": 3},
    ) as response:  # fmt: skip
        for name, data in serving.streamed(response):
            if name == "start":
                id = data["message_id"]
            if name == "delta":
                break
    until = time.monotonic() + 20
    while len(messages := ana.get(f"/api/chats/{chat}").json()["messages"]) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert messages[1]["id"] == id
    if messages[1]["finish_reason"] != "stop":  # the model may end by itself
        assert messages[1]["finish_reason"] == "cancelled"
        assert len(messages[1]["content"]) > 0
    metrics = ana.get("/metrics").text
    assert re.search(r"vllm:num_requests_running\S* 0\.0", metrics)


def test_a_long_chat_loses_its_oldest_turns_and_says_so(ana: httpx.Client) -> None:
    chat, parent = asked(ana, "The shop opens at nine. " * 4, system="Be brief.")
    sent = [parent]
    for _ in range(8):
        done = answer(ana, chat, parent, params={"max_tokens": 24, "temperature": 0.5})[-1][1]["message"]
        sent.append(done["id"])
        parent = ana.post(
            f"/api/chats/{chat}/messages", json={"parent": done["id"], "content": "The shop closes at eight. " * 4}
        ).json()["id"]
        sent.append(parent)
    meter = ana.get(f"/api/chats/{chat}/context", params={"leaf": parent, "max_tokens": 24}).json()
    done = answer(ana, chat, parent, params={"max_tokens": 24, "temperature": 0.5})[-1][1]["message"]
    dropped = done["criadero"]["context"]["dropped"]
    assert dropped
    assert dropped == sent[: len(dropped)]
    assert meter["dropped"] == dropped
    assert (meter["limit"], meter["policy"], meter["fits"]) == (512, "oldest", True)
    assert meter["used"] == done["usage"]["prompt_tokens"] <= 512 - 24 < meter["all"]
    # after an answer: what an empty next question would leave
    after = ana.get(f"/api/chats/{chat}/context", params={"leaf": done["id"], "max_tokens": 24}).json()
    assert set(after["dropped"]) >= set(dropped)
    start = ana.get(f"/api/chats/{chat}/context").json()
    assert start["dropped"] == []
    assert 0 < start["used"] < 100


def test_a_message_that_is_too_long_is_refused_before_anything_is_sent(ana: httpx.Client) -> None:
    chat, question = asked(ana, "The shop opens at nine. " * 100)
    response = ana.post(f"/api/chats/{chat}/answer", json={"parent": question})
    refused(response, 400, "context_length_exceeded", "messages")
    meter = ana.get(f"/api/chats/{chat}/context", params={"leaf": question}).json()
    assert meter["fits"] is False
    assert meter["used"] > meter["limit"]


# --- chats ---


def test_a_chat_is_named_changed_found_and_deleted(ana: httpx.Client) -> None:
    chat, _ = asked(ana, "¿Dónde está\nel  almacén?")
    assert ana.get(f"/api/chats/{chat}").json()["title"] == "¿Dónde está el almacén?"
    changed = ana.patch(f"/api/chats/{chat}", json={"title": "Almacén", "params": {"top_k": 5}}).json()
    assert (changed["title"], changed["params"], changed["model"]) == ("Almacén", {"top_k": 5}, "llama")
    assert [one["id"] for one in ana.get("/api/chats", params={"query": "ALMACEN"}).json()["chats"]] == [chat]
    page = ana.get("/api/chats", params={"limit": 1}).json()
    assert page["chats"][0]["id"] == chat
    assert ana.get("/api/chats", params={"limit": 1, "before": page["next"]}).json()["chats"][0]["id"] != chat
    assert ana.delete(f"/api/chats/{chat}").json() == {"id": chat, "deleted": True}
    refused(ana.get(f"/api/chats/{chat}"), 404, "chat_not_found", "id")


def test_me_and_models(ana: httpx.Client) -> None:
    me = ana.get("/api/me").json()
    assert (me["owner"], me["key_required"], me["feedback_consent"]) == ("ana", True, False)
    assert ana.put("/api/me", json={"feedback_consent": True}).json()["feedback_consent"] is True
    ana.put("/api/me", json={"feedback_consent": False})
    models = ana.get("/api/models").json()["models"]
    assert [one["id"] for one in models] == ["llama", "other"]
    assert models[0]["context"] == 512
    assert models[0]["loaded"] is True
    assert models[0]["has_template"] is True
    assert models[0]["memory_bytes"] > 0
    assert models[0]["made_of"] is None  # no passport tells it


# --- feedback and comparisons ---


def test_feedback_is_taken_and_taken_back(ana: httpx.Client) -> None:
    chat, question = asked(ana)
    message = answer(ana, chat, question, params=SHORT)[-1][1]["message"]
    said = ana.put(f"/api/messages/{message['id']}/feedback", json={"rating": -1, "better": "By card, yes."}).json()
    assert said == message | {"feedback": {"rating": -1, "better": "By card, yes."}}
    gone = ana.put(f"/api/messages/{message['id']}/feedback", json={"rating": None, "better": None}).json()
    assert gone == message
    refused(ana.put(f"/api/messages/{question}/feedback", json={"rating": 1}), 404, "message_not_found", "id")
    refused(ana.put(f"/api/messages/{message['id']}/feedback", json={"rating": 2}), 400, "invalid_value", "rating")


def test_a_comparison_is_blind_until_the_vote(ana: httpx.Client, store: Store) -> None:
    ana.put("/api/me", json={"feedback_consent": True})
    chat, question = asked(ana)
    left_first = set()
    for _ in range(12):
        body = {"chat_id": chat, "parent": question, "models": ["llama", "other"], "params": SHORT, "seed": 5}
        id = ana.post("/api/comparisons", json=body).json()["id"]
        found = store.comparison("ana", id)
        assert found
        left_first.add(found["left"])
    assert left_first == {"llama", "other"}  # once in 2,048 runs it is not
    with ana.stream("POST", f"/api/comparisons/{id}/stream", json={}) as response:
        told = list(serving.streamed(response))
    assert "llama" not in str(told)
    assert "other" not in str(told)
    done = {data["side"]: data["message"] for name, data in told if name == "done"}
    starts = [data for name, data in told if name == "start"]
    assert {data["side"] for data in starts} == {"left", "right"}
    assert [data["seed"] for data in starts] == [5, 5]
    for side in ("left", "right"):
        text = "".join(data["text"] for name, data in told if name == "delta" and data["side"] == side)
        assert text == done[side]["content"]
        assert done[side]["model"] is done[side]["criadero"] is done[side]["usage"] is None
    with ana.stream("POST", f"/api/comparisons/{id}/stream", json={}) as response:  # a page that was loaded again
        again = {data["side"]: data["message"] for name, data in serving.streamed(response) if name == "done"}
    assert again == done
    assert len(ana.get(f"/api/chats/{chat}").json()["messages"]) == 1
    told = ana.post(f"/api/comparisons/{id}/vote", json={"winner": "left"}).json()
    assert {told["left"], told["right"]} == {"llama", "other"}
    refused(ana.post(f"/api/comparisons/{id}/vote", json={"winner": "left"}), 409, "not_now", "winner")
    messages = ana.get(f"/api/chats/{chat}").json()["messages"]
    assert [messages[1]["id"], messages[2]["id"]] == [told["left_message"], told["right_message"]]
    assert [one["model"] for one in messages[1:]] == [told["left"], told["right"]]
    assert messages[1]["content"] == done["left"]["content"]
    assert messages[1]["receipt_id"]
    alone = answer(ana, chat, question, model=told["left"], params=SHORT, seed=5)[-1][1]["message"]
    assert alone["content"] == done["left"]["content"]
    (row,) = ana.get("/api/comparisons/tally").json()
    assert (row["a"], row["b"], row["a_wins"] + row["b_wins"], row["ties"]) == ("llama", "other", 1, 0)
    assert row["share"] == (1.0 if told["left"] == "llama" else 0.0)
    assert 0 <= row["low"] <= row["share"] <= row["high"] <= 1


def test_a_comparison_needs_two_models_and_a_question(ana: httpx.Client) -> None:
    chat, question = asked(ana)
    body = {"chat_id": chat, "parent": question, "models": ["llama", "llama"], "params": {}}
    refused(ana.post("/api/comparisons", json=body), 400, "invalid_value", "models")
    refused(ana.post("/api/comparisons", json=body | {"models": ["llama"]}), 400, "out_of_range", "models")
    refused(ana.post("/api/comparisons", json=body | {"models": ["llama", "nobody"]}), 404, "model_not_found", "model")
    id = ana.post("/api/comparisons", json=body | {"models": ["llama", "other"]}).json()["id"]
    refused(ana.post(f"/api/comparisons/{id}/vote", json={"winner": "tie"}), 409, "not_now", "winner")


# --- others, and nobody ---


def test_nothing_of_ana_is_evas(ana: httpx.Client, eva: httpx.Client) -> None:
    """S12: chats, answers, feedback, comparisons, context and traces of others."""
    chat, question = asked(ana, "Zanahoria-7731")
    message = answer(ana, chat, question, params=SHORT)[-1][1]["message"]["id"]
    body = {"chat_id": chat, "parent": question, "models": ["llama", "other"], "params": {}}
    comparison = ana.post("/api/comparisons", json=body).json()["id"]
    before = ana.get("/api/export").json()
    tried = [
        ("GET", f"/api/chats/{chat}", None),
        ("PATCH", f"/api/chats/{chat}", {"title": "x"}),
        ("DELETE", f"/api/chats/{chat}", None),
        ("POST", f"/api/chats/{chat}/messages", {"parent": None, "content": "x"}),
        ("POST", f"/api/chats/{chat}/answer", {"parent": question}),
        ("GET", f"/api/chats/{chat}/context?leaf={question}", None),
        ("PUT", f"/api/messages/{message}/feedback", {"rating": 1}),
        ("POST", "/api/comparisons", body),
        ("POST", f"/api/comparisons/{comparison}/stream", {}),
        ("POST", f"/api/comparisons/{comparison}/vote", {"winner": "tie"}),
    ]
    for method, path, sent in tried:
        response = eva.request(method, path, json=sent)
        assert response.status_code == 404, (method, path, response.text)
        assert response.json()["error"]["code"].endswith("_not_found")
    # a message of ana's is no parent in a chat of eva's either
    own, _ = asked(eva, "mine")
    said = eva.post(f"/api/chats/{own}/messages", json={"parent": message, "content": "x"})
    refused(said, 404, "message_not_found", "id")
    refused(eva.post(f"/api/chats/{own}/answer", json={"parent": question}), 404, "message_not_found", "id")
    assert eva.get("/api/chats", params={"query": "Zanahoria"}).json()["chats"] == []
    assert "Zanahoria" not in eva.get("/api/export").text
    assert eva.get("/api/comparisons/tally").json() == []
    eva.post("/api/delete-everything", json={"confirm": "delete everything"})
    assert ana.get("/api/export").json() | {"exported": 0} == before | {"exported": 0}


def test_every_address_of_the_api_needs_a_key(address: str, store: Store) -> None:
    from criadero.serve import page_answers, page_api

    routes = [*page_api.router.routes, *page_answers.router.routes]
    assert len(routes) >= 18
    for route in routes:
        for method in route.methods:  # type: ignore[attr-defined]
            path = route.path.replace("{id}", "x")  # type: ignore[attr-defined]
            response = httpx.request(method, address + path, headers={"content-type": "application/json"})
            assert response.status_code == 401, (method, path)


def test_export_and_delete_everything(eva: httpx.Client, folder: Path) -> None:
    secret = "Berenjena-9917"
    chat, question = asked(eva, secret, system=secret)
    message = answer(eva, chat, question, params=SHORT)[-1][1]["message"]
    eva.put(f"/api/messages/{message['id']}/feedback", json={"rating": 1, "better": secret})
    response = eva.get("/api/export")
    assert response.headers["content-disposition"] == 'attachment; filename="criadero-export.json"'
    found = response.json()
    assert [one["id"] for one in found["chats"]] == [chat]
    assert len(found["messages"]) == 2
    assert found["feedback"][0]["better"] == secret
    assert found["receipts"]
    assert str(folder) not in response.text
    refused(eva.post("/api/delete-everything", json={"confirm": "yes"}), 400, "invalid_value", "confirm")
    counts = eva.post("/api/delete-everything", json={"confirm": "delete everything"}).json()
    assert (counts["chats"], counts["messages"], counts["feedback"]) == (1, 2, 1)
    assert eva.get("/api/chats").json() == {"chats": [], "next": None}
    if counts["erased"]:
        assert all(secret.encode() not in file.read_bytes() for file in folder.glob("criadero.db*"))
    assert eva.get("/api/me").status_code == 200  # the key goes on


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/api/chats/chat_0", None, 404, "chat_not_found", "id"),
        ("GET", "/api/chats/%00", None, 404, "chat_not_found", "id"),
        ("GET", "/api/chats/..%2f..", None, 404, "not_found", None),
        ("GET", "/api/chats?before=x", None, 400, "invalid_value", "before"),
        ("GET", "/api/chats?limit=0", None, 400, "out_of_range", "query.limit"),
        ("POST", "/api/chats", {"titel": "x"}, 400, "unknown_parameter", "titel"),
        ("POST", "/api/chats", {"title": "x" * 201}, 400, "out_of_range", "title"),
        ("POST", "/api/chats", {"params": {"temperature": 3}}, 400, "out_of_range", "params.temperature"),
        ("POST", "/api/chats", {"params": {"stop": [""]}}, 400, "out_of_range", "params.stop[0]"),
        ("POST", "/api/chats/CHAT/messages", {"parent": None, "content": ""}, 400, "out_of_range", "content"),
        ("POST", "/api/chats/CHAT/messages", {"parent": "QUESTION", "content": "x"}, 400, "invalid_value", "parent"),
        ("POST", "/api/chats/CHAT/messages", {"parent": "msg_0", "content": "x"}, 404, "message_not_found", "id"),
        ("POST", "/api/chats/CHAT/answer", {"parent": "msg_0"}, 404, "message_not_found", "id"),
        ("POST", "/api/chats/CHAT/answer", {"parent": "\0"}, 404, "message_not_found", "id"),
        ("POST", "/api/chats/CHAT/answer", {"parent": "QUESTION", "seed": -1}, 400, "out_of_range", "seed"),
        ("POST", "/api/chats/CHAT/answer", {"parent": "QUESTION", "model": "gpt"}, 404, "model_not_found", "model"),
        ("POST", "/api/comparisons/cmp_0/stream", {}, 404, "comparison_not_found", "id"),
        ("POST", "/api/comparisons/cmp_0/vote", {"winner": "left"}, 404, "comparison_not_found", "id"),
        ("POST", "/api/comparisons/cmp_0/vote", {"winner": "up"}, 400, "invalid_value", "winner"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    ana: httpx.Client, method: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    chat, question = asked(ana)
    body = {key: question if value == "QUESTION" else value for key, value in body.items()} if body else body
    refused(ana.request(method, path.replace("CHAT", chat), json=body), status, code, param)


def test_odd_letters_survive(ana: httpx.Client) -> None:
    text = "a\0b ñ 🦙 \u2028 <script>"
    chat, question = asked(ana, text, title="t\0")
    found = ana.get(f"/api/chats/{chat}").json()
    assert found["messages"][0]["content"] == text
    assert found["title"] == "t"
    assert answer(ana, chat, question, params=SHORT)[-1][0] == "done"


# --- the database's troubles ---


def test_an_answer_that_cannot_be_kept_is_told(ana: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, question = asked(ana)

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("database_full", "the disk that the database lies on is full")

    monkeypatch.setattr(Store, "add_message", full)
    *rest, (end, error) = answer(ana, chat, question, params=SHORT)
    assert (end, error["code"]) == ("error", "database_full")
    assert any(name == "delta" for name, _ in rest)
    monkeypatch.undo()
    assert answer(ana, chat, question, params=SHORT)[-1][0] == "done"


def test_of_a_chat_that_is_deleted_meanwhile_nothing_is_left(ana: httpx.Client, store: Store) -> None:
    chat, question = asked(ana, "Remolacha-2204")
    with ana.stream("POST", f"/api/chats/{chat}/answer", json={"parent": question, "params": SHORT}) as response:
        told = serving.streamed(response)
        assert next(told)[0] == "start"
        ana.delete(f"/api/chats/{chat}")
        end, data = list(told)[-1]
    if end == "error":  # the answer was not faster
        assert data["code"] == "chat_not_found"
    found = ana.get("/api/export").json()
    assert chat not in str(found)
    used = {one["receipt"] for one in found["messages"]} | {
        one[f"{side}_answer"]["receipt_id"] for one in found["comparisons"] for side in ("left", "right") if one[f"{side}_answer"]
    }  # fmt: skip
    assert {one["id"] for one in found["receipts"]} <= used


def test_a_busy_database_is_a_503_with_when_to_come_back(ana: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise StoreError("database_busy", "the database is busy with others; try again")

    monkeypatch.setattr(Store, "chats", busy)
    response = ana.get("/api/chats")
    refused(response, 503, "database_busy")
    assert response.headers["retry-after"] == "5"
    monkeypatch.setattr(Store, "key_by_hash", busy)  # before it is known who asks
    refused(ana.get("/api/me"), 503, "database_busy")


def test_it_is_the_same_over_postgresql(folder: Path, cluster: str) -> None:
    empty(cluster)
    store = open_store(cluster)
    with (
        serving.serving(Settings(models=(str(folder / "llama"),)), store=store) as live,
        httpx.Client(base_url=live.url, timeout=30) as client,
    ):
        chat, question = asked(client, "¿a\0b?")
        message = answer(client, chat, question, params=SHORT, probabilities=True)[-1][1]["message"]
        client.put(f"/api/messages/{message['id']}/feedback", json={"rating": 1})
        found = client.get(f"/api/chats/{chat}").json()
        assert found["messages"][0]["content"] == "¿a\0b?"
        assert found["messages"][1] == message | {"feedback": {"rating": 1, "better": None}}
        assert len(client.get("/api/chats", params={"query": "¿A"}).json()["chats"]) == 1
        body = {"model": "llama", "input": "Why?", "max_output_tokens": 4}
        response = client.post("/v1/responses", json=body).json()
        assert client.get(f"/v1/responses/{response['id']}").json() == response
        assert client.post("/api/delete-everything", json={"confirm": "delete everything"}).json()["erased"] is True
        assert client.get(f"/v1/responses/{response['id']}").status_code == 404
    store.close()
