"""Queues, limits, disconnects, and the end: who gets a place, and that every place comes back."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from serving import HELLO, MODEL, Live, events, half_request, serving, slow_steps, wait_for

from criadero.serve.keys import Key, hash_key
from criadero.serve.settings import Limits, Settings

LONG = [{"role": "user", "content": "a " * 450}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    settings = Settings(
        models=(MODEL,), sequences=2, chunk=16, limits=Limits(queue=3), ping_seconds=0.1, write_seconds=2.0
    )
    with serving(settings) as made:
        yield made


def test_a_full_queue_is_refused_with_a_time(live: Live) -> None:
    with slow_steps(live.worker, 0.05):
        lines: list[socket.socket] = []
        for number in range(5):  # two are computed, three wait
            body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
            lines.append(half_request(live, "/v1/chat/completions", body))
            wait_for(lambda number=number: live.worker.active == number + 1)
        wait_for(lambda: live.worker.waiting == 3)
        refused = live.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert "limit queue" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        # the last in line is told where it stands
        lines[-1].settimeout(10)
        heard = b""
        while b"queue position=3" not in heard:
            heard += lines[-1].recv(65536)
        assert b"expected_s=" in heard
        for one in lines:
            one.close()
        wait_for(lambda: live.worker.active == 0)
    assert live.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_frees_the_slot_in_the_middle_of_a_prefill(live: Live, stream: bool) -> None:
    engine = live.worker.llm.engine
    with slow_steps(live.worker, 0.05):
        before = engine.steps  # the prompt takes 29 steps of 16 tokens
        one = half_request(live, "/v1/chat/completions", {"messages": LONG, "max_tokens": 30, "stream": stream})
        wait_for(lambda: engine.steps >= before + 3)
        one.close()
        wait_for(lambda: live.worker.active == 0)
        assert engine.steps - before < 25
    wait_for(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
    assert "criadero:client_disconnects_total" in live.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_in_the_line_leaves_it(live: Live, stream: bool) -> None:
    body = {"messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    with slow_steps(live.worker, 0.05):
        lines = [half_request(live, "/v1/chat/completions", body) for _ in range(3)]
        wait_for(lambda: live.worker.active == 3)
        wait_for(lambda: live.worker.waiting == 1)
        for one in lines[:2]:
            one.close()
        wait_for(lambda: live.worker.active == 1 and live.worker.waiting == 0)  # the third has moved up
        lines[2].close()
        wait_for(lambda: live.worker.active == 0)


def test_a_reader_that_reads_nothing_is_cut_off(live: Live) -> None:
    made = half_request(
        live, "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 480, "n": 2, "ignore_eos": True, "stream": True, "logprobs": True, "top_logprobs": 20},
    )  # fmt: skip
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wait_for(lambda: live.worker.active == 0)  # what it asked for is computed or cancelled, but holds no slot
    admission = live.service.admission
    wait_for(lambda: not admission._answers)
    made.close()


def test_every_answer_under_load_is_its_solo_answer(live: Live) -> None:
    def one(seed: int) -> Any:
        return live.chat(temperature=1, seed=seed, max_tokens=10)

    alone = {seed: one(seed).json()["choices"] for seed in range(4)}
    found: list[tuple[int, int, Any]] = []

    def many(seed: int) -> None:
        for _ in range(4):
            answer = one(seed)
            found.append((seed, answer.status_code, answer.json().get("choices")))

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for _, status, _ in found} <= {200, 429}
    assert all(choices == alone[seed] for seed, status, choices in found if status == 200)


class Keys:
    """A store that knows two keys."""

    def __init__(self) -> None:
        self.receipts: list[tuple[str, dict[str, Any]]] = []
        self.full = False

    def key_by_hash(self, sha256: str) -> Key | None:
        known = {
            hash_key("ana-key"): Key("k1", "ana", {"requests_per_minute": 2}),
            hash_key("eva-key"): Key("k2", "eva", {"tokens_per_minute": 100, "concurrent": 1}),
            hash_key("leo-key"): Key("k3", "leo", {"tokens_per_day": 60}),
        }
        return known.get(sha256)

    def add_receipt(self, owner: str, receipt: dict[str, Any]) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.receipts.append((owner, receipt))

    def tokens_since(self, owner: str, key: str, since: float) -> int:
        mine = [one for whose, one in self.receipts if whose == owner and one["key"] == key and one["created"] >= since]
        return sum(one["usage"]["prompt"] + one["usage"]["completion"] for one in mine)


def test_limits_of_keys_and_receipts() -> None:
    store = Keys()
    with serving(Settings(models=(MODEL,), require_key=True), store=store) as live:

        def ask(key: str, **more: Any) -> Any:
            return live.post(
                "/v1/chat/completions", {"messages": HELLO, "max_tokens": 8, "temperature": 0, **more},
                headers={"Authorization": f"Bearer {key}"},
            )  # fmt: skip

        assert ask("no-key").status_code == 401
        first = ask("ana-key")
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert ask("ana-key").status_code == 200
        third = ask("ana-key")
        assert (third.status_code, third.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(third.headers["retry-after"]) <= 31
        # what an answer did not take is given back: 90 were set aside, some 20 used
        assert ask("eva-key", max_tokens=80, stop=["a"]).status_code == 200
        assert ask("eva-key", max_tokens=60, stop=["a"]).status_code == 200
        assert ask("eva-key", max_tokens=95).json()["error"]["code"] == "rate_limit_exceeded"
        for _ in range(3):
            last = ask("leo-key")
        assert last.status_code == 200
        gone = ask("leo-key", max_tokens=400)
        assert (gone.status_code, gone.json()["error"]["code"]) == (429, "token_quota_exceeded")
        assert gone.headers["x-should-retry"] == "false"
        left = re.search(r"has (\d+) of 60 tokens left", gone.json()["error"]["message"])
        assert left
        # receipts are the owner's, and without prompts unless that is asked for
        assert {owner for owner, _ in store.receipts} == {"ana", "eva", "leo"}
        receipt = store.receipts[0][1]
        assert receipt["id"] == first.json()["criadero"]["receipt"]["id"]
        assert first.json()["criadero"]["receipt"]["kept"]
        assert "prompt_ids" not in receipt
        assert "Hola" not in json.dumps(receipt)
        ask("eva-key", store=True, max_tokens=2)
        kept = store.receipts[-1][1]
        assert (
            kept["prompt_ids"]
            == live.post("/tokenize", {"messages": HELLO}, headers={"x-api-key": "ana-key"}).json()["tokens"]
        )
        # a disk that is full costs the receipt, not the answer
        store.full = True
        answer = ask("eva-key", max_tokens=2)
        assert answer.status_code == 200
        assert not answer.json()["criadero"]["receipt"]["kept"]
        assert live.service.admission._answers == {}
    # the day's tokens outlive the process
    with serving(Settings(models=(MODEL,), require_key=True), store=store) as again:
        gone = again.chat(headers={"x-api-key": "leo-key"}, max_tokens=400)
        assert gone.status_code == 429
        assert f"has {left[1]} of 60 tokens left" in gone.json()["error"]["message"]


def test_a_server_that_drains_takes_no_more(live: Live) -> None:
    live.service.admission.draining = True
    try:
        answer = live.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert live.get("/ready").status_code == 503
        assert live.get("/health").status_code == 200
    finally:
        live.service.admission.draining = False


def serve_process(*more: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The verb itself, in a process; its address."""
    made = subprocess.Popen(
        [sys.executable, "-m", "criadero.cli", "serve", MODEL, "--port", "0", "--no-open", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert made.stdout is not None
    said = []
    for line in made.stdout:
        said.append(line)
        if line.startswith("API"):
            break
    assert said, made.communicate()[1]
    assert any("tokens/s" in line and "of memory" in line for line in said)
    return made, said[-1].split()[1].removesuffix("/v1")


def test_what_has_begun_is_finished_when_the_server_goes_down() -> None:
    found: list[str] = []
    with serving() as live, slow_steps(live.worker, 0.01):
        ask = {"stream": True, "max_tokens": 60, "ignore_eos": True}
        thread = threading.Thread(target=lambda: found.append(live.chat(**ask).text))
        thread.start()
        wait_for(lambda: live.worker.active == 1)
        live.server.should_exit = True
        wait_for(lambda: live.service.admission.draining)
        thread.join()
    assert events(found[0])[-1] == "[DONE]"


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_then_ends_the_process(tmp_path: Any) -> None:
    made, url = serve_process("--database", str(tmp_path / "x.db"))
    import httpx

    try:
        body = {"messages": HELLO, "max_tokens": 450, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            made.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert text.rstrip().endswith("data: [DONE]")  # the whole of it, although the server was told to go
        assert made.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        made.kill()
        made.communicate()


def test_what_does_not_end_in_time_is_told(live: Live) -> None:
    """After `drain_seconds`, and on Ctrl-C at once, answers end with an error frame."""
    with slow_steps(live.worker, 0.02):
        timer = threading.Timer(0.3, live.service.pool.cancel_all)
        timer.start()
        found = events(live.chat(stream=True, max_tokens=450, ignore_eos=True).text)
        timer.join()
        assert found[-1]["error"]["code"] == "cancelled"
        timer = threading.Timer(0.3, live.service.pool.cancel_all)
        timer.start()
        answer = live.chat(max_tokens=450, ignore_eos=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cancelled")
