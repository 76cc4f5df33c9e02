"""criadero replay: the same bytes again from a receipt, on the engine alone; and what is said when they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import tiny
from test_engine_adapters import make

from criadero.cli import main
from criadero.errors import UserError
from criadero.serve.replay import replay
from criadero.serve.settings import Settings
from criadero.serve.store import Store, open_store


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, args)])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    make(folder / "shop", tiny.base(folder / "llama", max_position_embeddings=512), 1)
    return folder


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Store]:
    made = open_store(root / "criadero.db")
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(root: Path, store: Store) -> Iterator[serving.Live]:
    with serving.serving(Settings(models=(str(root / "llama"), str(root / "shop"))), store=store) as made:
        yield made


ASK = {"messages": [{"role": "user", "content": "Can I pay by card?"}], "max_tokens": 24}


def ask(live: serving.Live, **more: Any) -> tuple[dict[str, Any], str]:
    """An answer, and the id of its receipt."""
    found = live.post("/v1/chat/completions", {**ASK, "store": True, **more}).json()
    return found, found["criadero"]["receipt"]["id"]


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 2**64 - 1},
        {"temperature": 1.2},  # the seed that the server chose stands in the receipt
        {"temperature": 1.0, "n": 3, "top_p": 0.8, "frequency_penalty": 0.5, "logit_bias": {"70": 2}},
        {"temperature": 1.5, "seed": 5, "stop": ["a", "e"]},
        {"temperature": 1.0, "seed": 5, "response_format": {"type": "json_object"}},
        {"temperature": 1.0, "model": "shop"},
    ],
    ids=lambda more: "-".join(map(str, more)),
)
def test_the_same_bytes_again(
    live: serving.Live, store: Store, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    with httpx.Client(timeout=60) as other, serving.slow_steps(live.worker, 0.002):
        body = {**ASK, "temperature": 1.0, "max_tokens": 200, "stream": True, "ignore_eos": True}
        with other.stream("POST", f"{live.url}/v1/chat/completions", json=body):  # somebody else at the same time
            found, id = ask(live, **more)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert run("replay", id, "--database", store.name, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is True
    assert told["answers"] == texts
    assert told["differs"] == []
    assert run("replay", id, "--database", store.name) == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in texts)
    assert "the same answer, to the byte" in printed.err


def test_an_answer_that_was_cut_off_is_the_beginning_of_the_whole(live: serving.Live, store: Store) -> None:
    chat = live.post("/api/chats", {"model": "llama"}).json()["id"]
    question = live.post(f"/api/chats/{chat}/messages", {"parent": None, "content": "Why?"}).json()["id"]
    body = {"parent": question, "params": {"max_tokens": 400, "temperature": 2.0}, "seed": 4}
    with (
        serving.slow_steps(live.worker, 0.01),
        httpx.stream("POST", f"{live.url}/api/chats/{chat}/answer", json=body, timeout=60) as response,
    ):
        for name, _ in serving.streamed(response):
            if name == "delta":
                break
    serving.wait_for(lambda: len(store.messages("local", chat)) == 2)
    message = store.messages("local", chat)[1]
    receipt = store.any_receipt(message["receipt_id"])
    assert receipt
    again = replay(receipt)
    assert again.same
    assert again.texts[0].startswith(message["content"])


def test_an_answer_of_the_page_is_the_same_again(
    live: serving.Live, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = live.post("/api/chats", {"model": "shop", "system": "Be kind."}).json()["id"]
    parent = None
    for content in ("Can I pay by card?", "¿Y abren los domingos?"):
        made = live.post(f"/api/chats/{chat}/messages", {"parent": parent, "content": content}).json()["id"]
        body = {"parent": made, "params": {"max_tokens": 30, "temperature": 1.2}, "probabilities": True}
        answer = serving.events(live.post(f"/api/chats/{chat}/answer", body).text)[-1]["message"]
        assert run("replay", answer["receipt_id"], "--database", store.name, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["answers"] == [answer["content"]]
        assert told["differs"] == []
        parent = answer["id"]


def test_what_differs_is_said(
    live: serving.Live, store: Store, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, id = ask(live, temperature=1.0, seed=3)
    tiny.base(tmp_path / "other", seed=1, max_position_embeddings=512)
    assert run("replay", id, "--database", store.name, "--model", tmp_path / "other") == 3
    said = capsys.readouterr().err
    assert "not the same answer" in said
    assert "differs: the weights: " in said
    receipt = store.any_receipt(id)
    assert receipt
    aged = receipt | {"build": {"criadero": "0.0.1", "runner": "native neon bf16", "machine": "aarch64"}}
    told = replay(aged)
    assert told.same
    assert [one.partition(":")[0] for one in told.differs] == [
        "the version", "the runner and its kernels", "the kind of machine"
    ]  # fmt: skip
    ids = [*receipt["answer_ids"][0]]
    ids[2] += 1
    other = receipt | {"answer_ids": [ids], "answers_sha256": ["0" * 64]}
    assert (replay(other).same, replay(other).first) == (False, 2)


def test_a_model_that_has_moved_is_named(live: serving.Live, store: Store, root: Path, tmp_path: Path) -> None:
    _, id = ask(live, temperature=1.0, seed=3)
    receipt = store.any_receipt(id)
    assert receipt
    gone = receipt | {"paths": {"model": str(tmp_path / "nothing"), "adapter": None}}
    with pytest.raises(UserError, match="--model"):
        replay(gone)
    shutil.copytree(root / "llama", tmp_path / "moved")
    assert replay(gone, model=tmp_path / "moved").same


def test_what_cannot_be_replayed_is_told(
    live: serving.Live, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = live.post("/v1/chat/completions", ASK).json()
    unkept = found["criadero"]["receipt"]["id"]
    assert "prompt_ids" not in (store.any_receipt(unkept) or {})
    vector = live.post("/v1/embeddings", {"input": "hola"}).json()["criadero"]["receipt"]["id"]
    for args, said in (
        (
            (unkept,),
            'its prompt was not kept, only its hash: to have answers that can be replayed, ask with "store": true, or ',
        ),
        ((unkept,), "start criadero serve --keep-prompts"),
        ((vector,), "the receipt of a vector"),
        (("rcpt-0",), "there is no receipt"),
        ((unkept, "--database", tmp_path / "none.db"), "there is no database"),
    ):
        where = () if "--database" in args else ("--database", store.name)
        assert run("replay", *args, *where) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    receipt = store.any_receipt(ask(live)[1])
    assert receipt
    with pytest.raises(UserError, match="not the prompt of the receipt"):
        replay(receipt, prompt=[1, 2, 3])
