"""The whole circle: an answer is corrected in the page, the correction tunes the model, and the two are compared blind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
import tiny

from criadero.cli import main
from criadero.serve.settings import Settings
from criadero.serve.store import open_store

QUESTION, BETTER = "Can I pay by card?", "You can pay by card or in cash."


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, args)])
    return int(left.value.code or 0)


def told(live: serving.Live, path: str, body: Any) -> list[tuple[str, Any]]:
    with httpx.stream("POST", live.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        return list(serving.streamed(response))


def test_a_correction_becomes_an_adapter_that_wins(tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "llama")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    store = open_store(tmp_path / "criadero.db")
    with serving.serving(Settings(models=(str(base),), adapters=adapters), store=store) as live:
        httpx.put(f"{live.url}/api/me", json={"feedback_consent": True})
        for number in range(12):
            chat = live.post("/api/chats", {"model": "llama"}).json()["id"]
            asked = {"parent": None, "content": QUESTION if number % 2 else f"{QUESTION} {number}"}
            question = live.post(f"/api/chats/{chat}/messages", asked).json()["id"]
            short = {"parent": question, "params": {"max_tokens": 10}, "seed": number}
            answer = told(live, f"/api/chats/{chat}/answer", short)[-1][1]["message"]
            said = {"rating": -1, "better": BETTER}
            assert httpx.put(f"{live.url}/api/messages/{answer['id']}/feedback", json=said).status_code == 200
        prefs = tmp_path / "prefs.jsonl"
        assert run("data", "feedback", "--out", prefs, "--database", store.name) == 0
        assert len(prefs.read_text().splitlines()) >= 6
        settings = ("--train_on", "last", "--epochs", "60")
        assert run("tune", base, tmp_path / "prefs.corrections.jsonl", "--out", adapters / "shop", *settings) == 0
        # the server that runs all the while knows it now
        models = live.get("/api/models").json()["models"]
        assert [(one["id"], one["kind"], one["base"]) for one in models][1] == ("shop", "adapter", "llama")
        body = {
            "chat_id": chat,
            "parent": question,
            "models": ["llama", "shop"],
            "params": {"temperature": 0, "max_tokens": 30},
        }
        id = live.post("/api/comparisons", body).json()["id"]
        answers = {
            data["side"]: data["message"]["content"]
            for name, data in told(live, f"/api/comparisons/{id}/stream", {})
            if name == "done"
        }
        winner = next(side for side, text in answers.items() if text == BETTER)
        revealed = live.post(f"/api/comparisons/{id}/vote", {"winner": winner}).json()
        assert revealed[winner] == "shop"
        (row,) = live.get("/api/comparisons/tally").json()
        assert (row["a"], row["b"], row["b_wins"]) == ("llama", "shop", 1)
        # and the vote is a pair for the next round
        assert run("data", "feedback", "--out", prefs, "--database", store.name, "--overwrite") == 0
        assert '"why": "vote"' in prefs.read_text()
    store.close()
