"""Thousands of requests of all kinds at once, from two people, while the database is locked and its disk full now and then: nothing falls,
nothing stays taken, nobody gets what is another's, and every answer is the one that its request gives alone. And SIGTERM in the middle."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from serving import MODEL, Live, events, nothing_is_left, serving, wait_for

from criadero.serve import tables
from criadero.serve.keys import hash_key
from criadero.serve.settings import Limits, Settings
from criadero.serve.store import Store, open_store

OWNERS = ("ana", "eva")
SEEDS = 4
FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["sí", "no", "quizás", "mañana"]}}}
LATER = ("database_busy", "database_full", "database_unreachable")  # what a 503 may say here
HOSTILE = (
    {"$ref": "#"}, {"type": 3}, {"pattern": "(a{9,9999}){9,9999}", "type": "string"}, {"pattern": "(a|a)*$(?=b)", "type": "string"},
    {"enum": ["x" * 60_000]}, {"enum": list(range(9000))}, {"minLength": 10**9, "type": "string"}, {"not": {"not": {"not": {}}}},
    {"type": "array", "minItems": 10**7, "items": {"type": "array", "minItems": 10**7}}, {"$ref": "https://127.0.0.1/x.json"},
    {"allOf": [{"type": "string"}, {"type": "object"}]}, {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"},
)  # fmt: skip
TEMPLATES = (
    "{{ ''.__class__.__mro__ }}",
    "{% for x in range(10**9) %}x{% endfor %}",
    "{{ cycler.__init__.__globals__ }}",
    "<|user|>",
)


def deep(levels: int) -> str:
    """A schema within a schema, as JSON: Python itself could not write it."""
    return '{"properties": {"x": ' * levels + "{}" + '}, "required": ["x"]}' * levels


class Storm:
    """Requests of all kinds against one server, and what came of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.address = (url.split("/")[2].split(":")[0], int(url.split(":")[2]))
        self.seen: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.kept: list[tuple[str, str, bool]] = []  # owner, receipt, and whether the answer said that it was kept
        self.chats: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.local = threading.local()
        self.ending = False  # the server was told to go: connections may be refused
        self.solo = {
            (kind, owner, seed): self.answer(kind, owner, seed)
            for kind in ("whole", "stream", "form", "template", "page") for owner in OWNERS for seed in range(SEEDS)
        }  # fmt: skip
        assert not self.wrong, self.wrong

    @property
    def client(self) -> httpx.Client:
        if not hasattr(self.local, "client"):
            self.local.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        return self.local.client  # type: ignore[no-any-return]

    def post(self, path: str, body: Any, owner: str) -> httpx.Response:
        return self.client.post(path, json=body, headers={"x-api-key": owner})

    # --- answers that have to be those of their requests alone ---

    def answer(self, kind: str, owner: str, seed: int) -> str | None:
        """The text of an answer; None when it was refused for now, as it may be."""
        said = TEMPLATES[seed % len(TEMPLATES)] if kind == "template" else f"Hola, soy {owner}."
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": said}],
            "temperature": 1,
            "seed": seed,
            "max_tokens": 12,
        }
        if kind == "page":
            return self._page(owner, seed, said)
        if kind == "form":
            body["response_format"] = FORM
        if kind == "template":
            body["store"] = True
        if kind in ("whole", "form", "template"):
            response = self.post("/v1/chat/completions", body, owner)
            if self._later(kind, response):
                return None
            found = response.json()
            text: str = found["choices"][0]["message"]["content"]
        else:
            response = self.post("/v1/chat/completions", {**body, "stream": True}, owner)
            if self._later(kind, response):
                return None
            parts = events(response.text)
            if "error" in parts[-1]:
                return self._cut(kind, parts[-1]["error"])
            if parts[-1] != "[DONE]":
                self.wrong.append((kind, "no end", response.text[-200:]))
                return None
            text = "".join(one["delta"].get("content") or "" for part in parts[:-1] for one in part["choices"])
            found = parts[-2]
        receipt = found["criadero"]["receipt"]
        self.kept.append((owner, receipt["id"], receipt["kept"]))
        return text

    def _page(self, owner: str, seed: int, said: str) -> str | None:
        made = self.post("/api/chats", {"model": MODEL}, owner)
        if self._later("page", made):
            return None
        chat = made.json()["id"]
        self.chats.append((owner, chat))
        asked = self.post(f"/api/chats/{chat}/messages", {"parent": None, "content": said}, owner)
        if self._later("page", asked):
            return None
        body = {"parent": asked.json()["id"], "params": {"max_tokens": 12, "temperature": 1}, "seed": seed}
        response = self.post(f"/api/chats/{chat}/answer", body, owner)
        if self._later("page", response):
            return None
        last = events(response.text)[-1]
        if "message" not in last or "content" not in last["message"]:
            return self._cut("page", last)
        if last["message"]["finish_reason"] == "cancelled":  # what there was is kept, and says so
            return self._cut("page", {"code": "cancelled"})
        return str(last["message"]["content"])

    def _later(self, kind: str, response: httpx.Response) -> bool:
        """Whether it was refused for now, with a time to come back."""
        if response.status_code == 200:
            return False
        code = response.json()["error"]["code"]
        fine = response.status_code == 429 or (
            response.status_code == 503 and (code in LATER or (self.ending and code in ENDING))
        )
        if not fine or "retry-after" not in response.headers:
            self.wrong.append((kind, response.status_code, response.text))
        return True

    def _cut(self, kind: str, error: dict[str, Any]) -> None:
        if not (error["code"] in LATER or (self.ending and error["code"] in ENDING)):
            self.wrong.append((kind, error))

    # --- what clients do besides ---

    def one(self, kind: str, rng: random.Random, owner: str) -> str:
        """A request; what came of it."""
        if kind in ("whole", "stream", "form", "template", "page"):
            seed = rng.randrange(SEEDS)
            text, alone = self.answer(kind, owner, seed), self.solo[kind, owner, seed]
            if text is not None and text != alone:
                self.wrong.append((kind, owner, seed, text, alone))
            return "later" if text is None else "answered"
        if kind in ("leave", "leave whole", "trickle", "stall"):
            return self._raw(kind, rng, owner)
        if kind == "another's" and self.chats:
            whose, chat = rng.choice(self.chats)
            response = self.client.get(f"/api/chats/{chat}", headers={"x-api-key": owner})
            if response.status_code not in ((200, 503) if whose == owner else (404, 503)):
                self.wrong.append((kind, whose, owner, response.status_code, response.text))
            return str(response.status_code)
        head = {"x-api-key": "nobody" if kind == "nobody" else owner, "Content-Type": "application/json"}
        body: Any = {"messages": [{"role": "user", "content": "Hola"}], "max_tokens": 3}
        expected = (401,) if kind == "nobody" else (400,)
        if kind == "malformed":
            text = rng.choice(
                (b"{", b"[]", b'{"messages": 3}', b"\xff\xfe", b"[" * 90_000, b'{"messages": [{"role": 7}]}', b"null")
            )
        else:
            if kind == "numbers":
                number = rng.choice((10 ** rng.randrange(9, 300), -(2**63), 1e308, -1, 2**64))
                body[rng.choice(("n", "max_tokens", "top_k", "top_logprobs", "seed", "temperature", "top_p"))] = number
                expected = (200, 400, 429)
            elif kind == "schema":
                body["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"schema": rng.choice((*HOSTILE, "DEEP", "DEEP"))},
                }
                expected = (200, 400, 429)
            elif kind == "own template":
                body[rng.choice(("chat_template", "chat_template_kwargs", "template"))] = rng.choice(TEMPLATES)
            text = json.dumps(body).replace('"DEEP"', deep(rng.randrange(2, 9000))).encode()
        response = self.client.post("/v1/chat/completions", content=text, headers=head)
        if response.status_code not in (*expected, 503):
            self.wrong.append((kind, text[:200], response.status_code, response.text))
        elif response.status_code == 503:
            self._later(kind, response)
        return str(response.status_code)

    def _raw(self, kind: str, rng: random.Random, owner: str) -> str:
        seed = rng.randrange(SEEDS)
        body = {
            "messages": [{"role": "user", "content": f"Hola, soy {owner}."}],
            "temperature": 1,
            "seed": seed,
            "max_tokens": 12,
        }
        if kind != "trickle":
            body |= {"max_tokens": 400, "ignore_eos": True}
        data = json.dumps({**body, "stream": kind != "leave whole"}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nx-api-key: {owner}\r\n"
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            made.settimeout(60)
            made.connect(self.address)
            made.sendall(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
            if kind == "stall":
                time.sleep(rng.random() * 2)  # reads nothing: the server gives up on it after a second
                return "left"
            if kind != "trickle":
                made.settimeout(rng.random() * 0.3 + 0.001)
                with contextlib.suppress(TimeoutError):
                    made.recv(1)
                return "left"
            parts = []
            while part := made.recv(64):
                parts.append(part)
                time.sleep(0.001)
        return self._trickled(b"".join(parts), owner, seed)

    def _trickled(self, answer: bytes, owner: str, seed: int) -> str:
        top, _, rest = answer.partition(b"\r\n\r\n")
        status = top.split()[1].decode()
        if status != "200":
            if status not in ("429", "503"):
                self.wrong.append(("trickle", answer))
            return status
        if b"0\r\n\r\n" not in rest[-10:]:
            return "cut off"  # it read too slowly
        text = ""
        while rest and (size := int(rest.split(b"\r\n", 1)[0], 16)):
            rest = rest.split(b"\r\n", 1)[1]
            text, rest = text + rest[:size].decode(), rest[size + 2 :]
        last = events(text)[-1]
        if "error" in last:
            self._cut("trickle", last["error"])
            return "later"
        parts = [part["choices"] for part in events(text)[:-1]]
        said = "".join(part[0]["delta"].get("content") or "" for part in parts if part)
        if said != self.solo["stream", owner, seed]:
            self.wrong.append(("trickle", owner, seed, said))
        return "answered"

    # --- all of it ---

    def blow(self, clients: int, more: Callable[[], bool]) -> None:
        """``clients`` threads, until ``more`` says no."""

        def client(number: int) -> None:
            rng = random.Random(number)
            while more():
                kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    came = self.one(kind, rng, OWNERS[number % 2])
                except (httpx.TransportError, OSError) as error:
                    came = "gone" if self.ending else "raised"
                    if not self.ending:
                        self.wrong.append((kind, repr(error)))
                except Exception as error:
                    came = "raised"
                    self.wrong.append((kind, repr(error)))
                with self.lock:
                    self.seen[f"{kind} {came}"] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


KINDS = {
    "whole": 3, "stream": 3, "form": 2, "template": 1, "page": 2, "leave": 2, "leave whole": 2, "trickle": 1, "stall": 0.3,
    "malformed": 2, "numbers": 2, "schema": 2, "own template": 1, "nobody": 1, "another's": 2,
}  # fmt: skip
ENDING = ("shutting_down", "cancelled")  # what a server says that is going down


class Trouble:
    """A database that others lock, and a disk that is full, now and then."""

    def __init__(self, file: Path, store: Store) -> None:
        self.file, self.full, self.stop = file, False, threading.Event()
        self.times: Counter[str] = Counter()

        @sa.event.listens_for(store.engine, "begin")
        def begin(connection: sa.Connection) -> None:
            cursor = connection.connection.cursor()
            cursor.execute(f"PRAGMA max_page_count = {1 if self.full else 2**30}")  # 1: as many as there are now
            cursor.close()

        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        rng = random.Random(0)
        while not self.stop.wait(rng.random() * 0.5):
            if rng.random() < 0.5:
                with contextlib.closing(sqlite3.connect(self.file, timeout=10, isolation_level=None)) as other:
                    other.execute("BEGIN EXCLUSIVE")
                    self.stop.wait(rng.random() * 0.6)
                    other.execute("ROLLBACK")
                self.times["locked"] += 1
            else:
                self.full = True
                self.stop.wait(rng.random() * 0.3)
                self.full = False
                self.times["full"] += 1

    def end(self) -> None:
        self.stop.set()
        self.thread.join()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BUSY", 200)  # ms: so that a lock is often waited for in vain
        made = open_store(tmp_path_factory.mktemp("storm") / "criadero.db")
    for name in OWNERS:
        made.add_key(hash_key(name), name=name, hint="", owner=name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(store: Store) -> Iterator[Live]:
    limits = Limits(queue=12, tokens_per_day=10**9)
    made = Settings(models=(MODEL,), require_key=True, sequences=8, limits=limits, write_seconds=1.0)
    with serving(made, store=store) as one:
        yield one


def storm(live: Live, store: Store, count: int, clients: int) -> Counter[str]:
    work = iter(range(count))
    lock = threading.Lock()

    def more() -> bool:
        with lock:
            return next(work, None) is not None

    blown = Storm(live.url)
    trouble = Trouble(Path(store.name), store)
    try:
        blown.blow(clients, more)
    finally:
        trouble.end()
    assert not blown.wrong, (len(blown.wrong), blown.wrong[:5])
    nothing_is_left(live, "eva")
    for owner, id, kept in blown.kept:
        other = OWNERS[1 - OWNERS.index(owner)]
        assert (store.receipt(owner, id) is not None) == kept, (owner, id, kept)
        assert store.receipt(other, id) is None
    for owner, chat in blown.chats:
        said = [one["content"] for one in store.messages(owner, chat)]
        assert all(text == f"Hola, soy {owner}." for text in said[:1])
        assert store.chat(OWNERS[1 - OWNERS.index(owner)], chat) is None
    return blown.seen + trouble.times


def test_a_storm(live: Live, store: Store) -> None:
    storm(live, store, 100, 12)


@pytest.mark.slow
def test_a_long_storm(live: Live, store: Store) -> None:
    began = time.monotonic()
    seen = storm(live, store, 10_000, 24)
    print(f"\n{time.monotonic() - began:.0f} s", json.dumps(dict(sorted(seen.items())), ensure_ascii=False))
    assert sum(count for what, count in seen.items() if what.endswith(" answered")) > 1000
    assert seen["locked"] > 10
    assert seen["full"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("drain", ["30", "0.5"])
def test_sigterm_in_a_storm(tmp_path: Path, drain: str) -> None:
    file = tmp_path / "criadero.db"
    with contextlib.closing(open_store(file)) as store:
        for name in OWNERS:
            store.add_key(hash_key(name), name=name, hint="", owner=name)
    command = [
        sys.executable,
        "-m",
        "criadero.cli",
        "serve",
        MODEL,
        "--port",
        "0",
        "--no-open",
        "--require-key",
        "--queue",
        "12",
    ]
    command += ["--database", str(file), "--sequences", "8", "--drain", drain]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        try:
            assert made.stdout
            url = next(line for line in made.stdout if line.startswith("API")).split()[1].removesuffix("/v1")
            wait_for(lambda: httpx.get(url + "/ready").status_code == 200)
            blown = Storm(url)
            end = threading.Event()

            def terminate() -> None:
                time.sleep(4)
                blown.ending = True
                made.send_signal(signal.SIGTERM)
                time.sleep(2)
                end.set()

            killer = threading.Thread(target=terminate)
            killer.start()
            blown.blow(12, lambda: not end.is_set())
            killer.join()
            assert made.wait(40) == 0
            assert made.stderr
            log = made.stderr.read()
            assert "Traceback" not in log, log
        finally:
            made.kill()
    assert not blown.wrong, (len(blown.wrong), blown.wrong[:5])
    assert sum(count for what, count in blown.seen.items() if what.endswith(" answered")) > 20
    assert sqlite3.connect(file).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    with contextlib.closing(open_store(file)) as store:
        for owner, id, kept in blown.kept:
            assert (store.receipt(owner, id) is not None) == kept
    print(f"\n{json.dumps(dict(sorted(blown.seen.items())), ensure_ascii=False)}")
