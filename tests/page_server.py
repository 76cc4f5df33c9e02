"""A scripted server for the page: its files, and the page's API from memory, with the same headers as the real one.

The tests need answers that are long, slow, broken or full of formulas, at will; a model gives what it likes. The word a
question begins with chooses the answer (SCRIPTS). `python tests/page_server.py` serves it for working on the page.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

STATIC = Path(__file__).resolve().parents[1] / "criadero" / "serve" / "static"
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
CSP = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
LIMIT = 2048  # the context of its models, in tokens

SHOWCASE = """## La hora de ordeñar

Una llama da **lana**, compañía y *paciencia*. Three things to know:

1. They hum, see [a guide](https://example.org/llamas).
2. They spit when `mood < 0`.
3. They carry up to $\\frac{1}{4}$ of their weight, so for a llama of mass $m$ the load is $w \\le 0.25\\,m$.

$$
\\mathrm{softmax}(z)_i = \\frac{e^{z_i}}{\\sum_{j=1}^{n} e^{z_j}}
$$

| Fibra | Micras | Precio |
|:------|-------:|-------:|
| Alpaca baby | 22 | 38 € |
| Llama | 28 | 12 € |

```python
def load(mass: float) -> float:
    \"\"\"What a llama of this mass carries, in kilograms.\"\"\"
    return 0.25 * mass
```

> A llama that lies down has decided.
"""
HOSTILE = """Before <script>document.title = 'taken'</script><img src=x onerror="document.title='taken'">

![a pixel](https://example.org/pixel.png?leak=1) and [a trap](javascript:document.title='taken') and
[a link](https://example.org/) <a href="https://example.org/" onclick="document.title='taken'">raw</a>
<iframe src="https://example.org/"></iframe><style>body { display: none }</style><form action="https://example.org"><input></form>

$\\href{javascript:alert(1)}{x}$ and $\\undefinedcommand$
"""
SCRIPTS = {
    "markdown": SHOWCASE,
    "hostile": HOSTILE,
    "slow": " ".join(f"word{i}" for i in range(1, 401)),
    "abrimos": "Abrimos de **lunes a sábado**, de 10:00 a 20:00. Los domingos cerramos, salvo los dos anteriores a Navidad.",
}
DEFAULT = "A llama hums to say that it is near. It is a soft sound, and the others answer it from across the field."
MODELS: list[dict[str, Any]] = [
    {
        "id": "cria-chat",
        "kind": "model",
        "base": None,
        "loaded": True,
        "context": LIMIT,
        "memory_bytes": 118_000_000,
        "has_template": True,
        "tokens_per_s": 212.0,
        "made_of": {"kind": "chat", "base": "cria", "tokens": 1_234_567, "sources": 1, "licence": "CC-BY-SA-4.0"},
    },
    {
        "id": "shop",
        "kind": "adapter",
        "base": "cria-chat",
        "loaded": False,
        "context": LIMIT,
        "memory_bytes": 1_900_000,
        "has_template": True,
        "tokens_per_s": None,
        "made_of": {"kind": "adapter", "base": "cria-chat", "tokens": 24_000, "sources": 1, "licence": None},
    },
    {
        "id": "cria",
        "kind": "model",
        "base": None,
        "loaded": False,
        "context": LIMIT,
        "memory_bytes": 118_000_000,
        "has_template": False,
        "tokens_per_s": 212.0,
        "made_of": None,
    },
]


class Gone(Exception):
    """What was asked for is not there, or may not be done."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class World:
    """Everything that the server knows, behind one lock."""

    def __init__(self, key: str | None = None) -> None:
        self.lock = threading.RLock()
        self.key = key
        self.ids = itertools.count(1)
        self.delay = 0.004  # seconds between two pieces of an answer
        self.wipe()

    def wipe(self) -> dict[str, int]:
        counts = {"chats": len(getattr(self, "chats", {})), "messages": len(getattr(self, "messages", {}))}
        self.chats: dict[str, dict[str, Any]] = {}
        self.messages: dict[str, dict[str, Any]] = {}
        self.comparisons: dict[str, dict[str, Any]] = {}
        self.votes: list[dict[str, str]] = []
        self.consent = False
        self.default = "cria-chat"
        self.asked: list[dict[str, Any]] = []  # bodies of requests for answers
        return counts

    def chat(self, **values: Any) -> dict[str, Any]:
        one = {"id": f"chat_{next(self.ids)}", "title": "", "model": "cria-chat", "system": None, "params": {}}
        one |= {key: value for key, value in values.items() if value is not None}
        self.chats[one["id"]] = one | {"updated": time.time()}
        return self.chats[one["id"]]

    def message(self, chat: str, parent: str | None, role: str, content: str, **values: Any) -> dict[str, Any]:
        if chat not in self.chats:
            raise Gone(404, "chat_not_found", f"There is no chat {chat}")
        one = {
            "id": f"msg_{next(self.ids)}",
            "chat": chat,
            "parent": parent,
            "role": role,
            "content": content,
            "created": time.time(),
            "model": None,
            "params": None,
            "seed": None,
            "finish_reason": None,
            "usage": None,
            "criadero": None,
            "receipt_id": None,
            "tokens": None,
            "feedback": None,
            **values,
        }
        self.messages[one["id"]] = one
        self.chats[chat]["updated"] = time.time()
        if role == "user" and not self.chats[chat]["title"]:
            self.chats[chat]["title"] = content[:60]
        return one

    def whole(self, chat: str) -> dict[str, Any]:
        if chat not in self.chats:
            raise Gone(404, "chat_not_found", f"There is no chat {chat}")
        return self.chats[chat] | {"messages": [m for m in self.messages.values() if m["chat"] == chat]}

    def path(self, leaf: str | None) -> list[dict[str, Any]]:
        line: list[dict[str, Any]] = []
        while leaf:
            line.append(self.messages[leaf])
            leaf = line[-1]["parent"]
        return line[::-1]

    def context(self, leaf: str | None) -> dict[str, Any]:
        line = self.path(leaf)
        counts = [max(1, len(m["content"]) // 4) for m in line]
        dropped: list[str] = []
        while sum(counts) > LIMIT - 256 and len(counts) > 1:
            dropped.append(line.pop(0)["id"])
            counts.pop(0)
        return {"limit": LIMIT, "used": sum(counts), "dropped": dropped, "policy": "oldest"}

    def answer(self, parent: str, body: dict[str, Any], model: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events of one answer. The message is kept as far as it came, also when the reader leaves."""
        asked = self.messages[parent]
        text = asked["content"]
        word = text.split()[0].lower().strip(".,:¿?") if text.split() else ""
        seed = body.get("seed") or random.Random(text).randrange(2**31)
        if word == "queue":
            yield "queue", {"position": 3, "expected_s": 12.0}
            time.sleep(0.4)
            yield "queue", {"position": 1, "expected_s": 4.0}
            time.sleep(0.4)
        context = self.context(parent)
        one = self.message(
            asked["chat"],
            parent,
            "assistant",
            "",
            model=model,
            params=body.get("params") or {},
            seed=seed,
            finish_reason="cancelled",
            receipt_id=f"rcpt_{seed:024x}",
            tokens=[] if body.get("probabilities") else None,
        )
        yield "start", {"message_id": one["id"], "seed": seed}
        if word == "fails":
            yield "delta", {"text": "The first words came, and then "}
            del self.messages[one["id"]]
            yield "error", {"code": "model_failed", "message": "The model stopped: its numbers were not finite"}
            return
        words = re.findall(r"\s*\S+|\s+$", SCRIPTS.get(word, DEFAULT))
        if model == "shop":
            words = ["Claro: ", *words]
        for piece in words:
            chance = random.Random(piece + str(seed)).random() ** 0.35
            token = {
                "text": piece,
                "logprob": math.log(chance),
                "top": [
                    [piece, math.log(chance)],
                    [" quizá", math.log(max(1e-6, (1 - chance) * 0.6))],
                    [" llama", math.log(max(1e-6, (1 - chance) * 0.3))],
                ],
            }
            one["content"] += piece
            if one["tokens"] is not None:
                one["tokens"].append(token)
            yield "delta", {"text": piece} | ({"tokens": [token]} if one["tokens"] is not None else {})
            time.sleep(self.delay * (6 if word == "slow" else 1))
        one["finish_reason"] = "stop"
        one["usage"] = {
            "prompt_tokens": context["used"],
            "completion_tokens": len(words),
            "total_tokens": context["used"] + len(words),
        }
        one["criadero"] = {
            "context": {
                "limit": LIMIT,
                "used": context["used"] + len(words),
                "dropped_messages": len(context["dropped"]),
                "policy": "oldest",
            },
            "cached_tokens": 0,
            "queue_ms": 3,
            "ignored": [],
        }
        yield "done", {"message": one}


def call(world: World, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> Any:
    """What the page asks for, apart from streams and files."""
    parts = path.strip("/").split("/")
    match [method, *parts]:
        case ["GET", "api", "me"]:
            return {
                "owner": "local",
                "key_required": world.key is not None,
                "version": "0.1.0",
                "feedback_consent": world.consent,
            }
        case ["PUT", "api", "me"]:
            world.consent = bool(body["feedback_consent"])
            return call(world, "GET", path, query, body)
        case ["GET", "api", "models"]:
            first = world.default
            return {"models": sorted(MODELS, key=lambda one: one["id"] != first), "default": first}
        case ["GET", "api", "chats"]:
            want = query.get("query", "").lower()
            rows = [
                c
                for c in world.chats.values()
                if want in c["title"].lower()
                or any(want in m["content"].lower() for m in world.whole(c["id"])["messages"])
            ]
            rows.sort(key=lambda c: -c["updated"])
            first, most = int(query.get("before", "0")), int(query.get("limit", "50"))
            shown = [{key: c[key] for key in ("id", "title", "model", "updated")} for c in rows[first : first + most]]
            return {"chats": shown, "next": str(first + most) if first + most < len(rows) else None}
        case ["POST", "api", "chats"]:
            return world.whole(world.chat(**body)["id"])
        case ["GET", "api", "chats", chat]:
            return world.whole(chat)
        case ["PATCH", "api", "chats", chat]:
            world.whole(chat)
            world.chats[chat] |= body
            return world.whole(chat)
        case ["DELETE", "api", "chats", chat]:
            world.whole(chat)
            del world.chats[chat]
            world.messages = {key: m for key, m in world.messages.items() if m["chat"] != chat}
            return None
        case ["POST", "api", "chats", chat, "messages"]:
            return world.message(chat, body["parent"], "user", body["content"])
        case ["GET", "api", "chats", _, "context"]:
            return world.context(query.get("leaf"))
        case ["PUT", "api", "messages", message, "feedback"]:
            world.messages[message]["feedback"] = body if body["rating"] or body.get("better") else None
            return world.messages[message]
        case ["POST", "api", "comparisons"]:
            key = f"cmp_{next(world.ids)}"
            left, right = random.sample(body["models"], 2)
            world.comparisons[key] = body | {"left": left, "right": right}
            return {"id": key}
        case ["POST", "api", "comparisons", key, "vote"]:
            one = world.comparisons[key]
            world.votes.append({"a": one["left"], "b": one["right"], "winner": body["winner"]})
            made = {
                f"{side}_message": world.message(
                    one["parent_chat"],
                    one["parent"],
                    "assistant",
                    one["text"][side],
                    model=one[side],
                    finish_reason="stop",
                )["id"]
                for side in ("left", "right")
            }
            return {"left": one["left"], "right": one["right"], **made}
        case ["GET", "api", "comparisons", "tally"]:
            return tally(world)
        case ["GET", "api", "export"]:
            return {"chats": [world.whole(chat) for chat in world.chats]}
        case ["POST", "api", "delete-everything"]:
            if body.get("confirm") != "delete everything":
                raise Gone(400, "not_confirmed", "confirm must be 'delete everything'")
            return world.wipe() | {"erased": True}
        case ["POST", "v1", "trace"]:
            text = body.get("text") or world.messages[body["message_id"]]["content"]
            return traced(text)
    raise Gone(404, "not_found", f"Nothing answers to {method} {path}")


def tally(world: World) -> list[dict[str, Any]]:
    """The server's own, of votes without the answers."""
    from criadero.serve.feedback import tally

    sides = [{"left": vote["a"], "right": vote["b"], "winner": vote["winner"]} for vote in world.votes]
    return tally([one | {"left_answer": {}, "right_answer": {}} for one in sides])


def traced(text: str) -> dict[str, Any]:
    """One span: the words 3 to 9 of the text, said to stand in a book."""
    words = list(re.finditer(r"\S+", text))
    if len(words) < 9:
        return {
            "text": text,
            "tokens": len(words),
            "min_tokens": 8,
            "spans": [],
            "more": 0,
            "covered": {"8": 0.0},
            "longest": None,
            "caution": ["verbatim overlap, not proof of cause"],
        }
    start, end = words[2].start(), words[8].end()
    span = {
        "start": 2,
        "end": 9,
        "from_char": start,
        "to_char": end,
        "text": text[start:end],
        "count": 2,
        "log_prob": -31.4,
        "found": [
            {
                "document": {
                    "number": 4,
                    "name": "gutenberg/1234",
                    "url": "https://example.org/1234",
                    "source": "Project Gutenberg",
                    "licence": "PD-US",
                },
                "before": "and in the morning ",
                "text": text[start:end],
                "after": " as it had always been",
            }
        ],
    }
    return {
        "text": text,
        "tokens": len(words),
        "min_tokens": 8,
        "spans": [span],
        "more": 0,
        "covered": {"8": 0.23, "16": 0.0},
        "longest": span,
        "caution": ["verbatim overlap, not proof of cause", "coincidencia literal, no prueba de causa"],
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    world: World

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        self.reply(status, "application/json", json.dumps(error).encode())

    def stream(self, events: Iterator[tuple[str, dict[str, Any]]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for name, data in events:
            self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
            self.wfile.flush()

    def sides(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        world, one = self.world, self.world.comparisons[key]
        one["text"], one["parent_chat"] = {}, world.messages[one["parent"]]["chat"]
        running = {side: world.answer(one["parent"], one, one[side]) for side in ("left", "right")}
        while running:
            for side in list(running):
                event = next(running[side], None)
                if event is None:
                    del running[side]
                    continue
                name, data = event
                if name == "done":
                    one["text"][side] = data["message"]["content"]
                    del world.messages[data["message"]["id"]]
                    data = {"message": data["message"] | {"model": None, "receipt_id": None}}
                yield name, data | {"side": side}

    def handle_one(self, method: str) -> None:
        url = urlsplit(self.path)
        body: dict[str, Any] = {}
        if length := int(self.headers.get("Content-Length") or 0):
            body = json.loads(self.rfile.read(length))
        try:
            if method == "GET" and not url.path.startswith(("/api/", "/v1/")):
                file = (STATIC / (url.path.lstrip("/") or "index.html")).resolve()
                if not file.is_relative_to(STATIC) or not file.is_file():
                    raise Gone(404, "not_found", "No such file")
                self.reply(200, TYPES.get(file.suffix, "application/octet-stream"), file.read_bytes())
                return
            if self.world.key and self.headers.get("Authorization") != f"Bearer {self.world.key}":
                raise Gone(401, "invalid_api_key", "This server wants a key")
            parts = url.path.strip("/").split("/")
            if method == "POST" and parts[-1] == "answer":
                self.world.asked.append(body)
                self.stream(self.world.answer(body["parent"], body, body["model"]))
                return
            if method == "POST" and parts[-1] == "stream":
                self.stream(self.sides(parts[2]))
                return
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            with self.world.lock:
                found = call(self.world, method, url.path, query, body)
            self.reply(200, "application/json", json.dumps(found).encode())
        except Gone as error:
            self.refuse(error.status, error.code, str(error))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.handle_one("GET")

    def do_POST(self) -> None:
        self.handle_one("POST")

    def do_PUT(self) -> None:
        self.handle_one("PUT")

    def do_PATCH(self) -> None:
        self.handle_one("PATCH")

    def do_DELETE(self) -> None:
        self.handle_one("DELETE")


def start(port: int = 0, key: str | None = None) -> tuple[str, World, ThreadingHTTPServer]:
    """Serve in threads; the address, what the server knows, and the server (`shutdown()` ends it)."""
    world = World(key)
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"world": world}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}", world, server


if __name__ == "__main__":
    address, _, _ = start(int(sys.argv[1]) if len(sys.argv) > 1 else 8437)
    print(address)
    threading.Event().wait()
