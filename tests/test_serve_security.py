"""Incidents of other servers, each with the test that it must not happen here. S1 to S16: what happened there stands in each test.

Some are held by the layers below and tested there; then the test here asks the server the same.
"""

from __future__ import annotations

import ast
import json
import re
import socket
import struct
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from serving import HELLO, MODEL, Live, serving
from starlette.routing import BaseRoute

from criadero.errors import UserError
from criadero.serve.app import PUBLIC, PUBLIC_FOLDERS, key_required
from criadero.serve.errors import ApiError, public
from criadero.serve.keys import hash_key, new_key
from criadero.serve.models import Pool
from criadero.serve.settings import Settings, is_loopback
from criadero.serve.store import Store, open_store

ROOT = Path(__file__).resolve().parents[1]
SERVE = ROOT / "criadero" / "serve"
KEY = {"Authorization": "Bearer the-key-of-these-tests"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = open_store(tmp_path_factory.mktemp("db") / "serve.db")
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(store: Store) -> Iterator[Live]:
    settings = Settings(models=(MODEL,), require_key=True, key_hashes=(hash_key("the-key-of-these-tests"),))
    with serving(settings, store=store) as made:
        yield made


def ask(live: Live, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    return live.chat(headers=KEY | (headers or {}), **more)


def routes(live: Live) -> list[tuple[str, str]]:
    """Every method and path that the application answers."""
    app: Any = live.server.config.app
    found: list[tuple[str, str]] = []

    def walk(these: list[BaseRoute]) -> None:
        for route in these:
            if isinstance(route, APIRoute) or hasattr(route, "methods"):
                found.extend((method, route.path) for method in sorted(getattr(route, "methods", None) or ()))  # type: ignore[attr-defined]
            elif hasattr(route, "routes"):
                walk(list(route.routes))
            elif hasattr(route, "original_router"):
                walk(list(route.original_router.routes))

    walk(app.routes)
    return found


def test_s1_a_gguf_file_that_lies_about_its_size_is_not_served(tmp_path: Path) -> None:
    """Ollama, CVE-2026-7482: a tensor's offset beyond the file's end read the heap. And there is no route that takes files."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    name = b"token_embd.weight"
    tensor = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 2**60)
    file = tmp_path / "liar.gguf"
    file.write_bytes(head + tensor)
    with pytest.raises(UserError):
        Pool(Settings(models=(str(file),)))


def test_s1_no_route_takes_files_or_paths(live: Live) -> None:
    assert not [path for _, path in routes(live) if re.search(r"upload|create|pull|push|import|load", path)]


@pytest.mark.parametrize("value", [-1, -(2**31), 2**31, 2**63, 2**64, 10**40, -(10**40), 0.5, True, "1", None])
def test_s2_s3_every_number_has_bounds(live: Live, value: Any) -> None:
    """llama.cpp, CVE-2026-21869 (a negative n_discard wrote out of bounds); vLLM, CVE-2026-34756 (a huge n stopped the server)."""
    fields = (
        "n", "max_tokens", "max_completion_tokens", "top_logprobs", "top_k", "min_tokens", "seed", "temperature", "top_p", "min_p",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "stop_token_ids", "logit_bias",
    )  # fmt: skip
    for name in fields:
        given: Any = value
        if name == "stop_token_ids":
            given = [value]
        elif name == "logit_bias":
            given = {"5": value} if value is not None else value
        answer = ask(live, **{name: given, "logprobs": True} if name == "top_logprobs" else {name: given})
        assert answer.status_code in (200, 400), (name, answer.text)
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] in ("out_of_range", "invalid_type"), (name, answer.text)
    for name in ("prompt", "logprobs", "n", "max_tokens"):
        answer = live.post(
            "/v1/completions", {"prompt": "a", name: [value] if name == "prompt" else value}, headers=KEY
        )
        assert answer.status_code in (200, 400)
    assert live.worker.active == 0


def test_s3_every_field_of_a_body_has_a_bound_in_the_schema(live: Live) -> None:
    """A number without minimum and maximum is how a new parameter would bring the incident back; lists end by `Limits`."""
    schema = live.get("/openapi.json", headers=KEY).json()["components"]["schemas"]

    def unbounded(one: Any) -> bool:
        kind = one.get("type")
        if kind in ("integer", "number") and not {"enum", "const"} & one.keys():
            return not ({"minimum", "exclusiveMinimum"} & one.keys() and {"maximum", "exclusiveMaximum"} & one.keys())
        return any(unbounded(part) for part in (*one.get("anyOf", ()), *([one["items"]] if "items" in one else ())))

    assert {"ChatRequest", "ResponseRequest", "MessageRequest", "PageParams", "TraceRequest"} <= schema.keys()
    loose = [
        f"{name}.{field}" for name, body in schema.items() for field, one in body.get("properties", {}).items()
        if unbounded(one) and "refused" not in one and name != "ValidationError"
    ]  # fmt: skip
    assert not loose


CODES = ("invalid_grammar", "out_of_range", "context_length_exceeded")
HOSTILE = [
    {"type": "string", "pattern": "(a{1,1000}){1,1000}"}, {"type": "string", "pattern": "(" * 200 + ")" * 200},
    {"anyOf": [{"const": "x" * (number % 97) + str(number)} for number in range(3000)]}, {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"},
    {"type": "array", "minItems": 10**9, "items": {"type": "integer"}}, {"type": ["string", "nonsense"]},
    {"type": "string", "minLength": 10**9}, {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"type": "string", "pattern": "(?<=a)b"}, {"type": "string", "pattern": "\\"},
]  # fmt: skip


@pytest.mark.parametrize("schema", HOSTILE, ids=range(len(HOSTILE)))
def test_s4_a_hostile_schema_costs_one_error(live: Live, schema: Any) -> None:
    """vLLM: a tool's pattern or type ended the engine (CVE-2025-48944); outlines: its cache filled the disk (GHSA-mgrm-fgjv-mhv8)."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {
        "type": "function",
        "function": {"name": "x", "parameters": {"type": "object", "properties": {"a": schema}}},
    }
    for more in ({"response_format": form}, {"tools": [tool], "tool_choice": "required"}):
        answer = ask(live, **more, max_tokens=4)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] in CODES, answer.text
    assert ask(live).status_code == 200
    deep: Any = {}
    for _ in range(200):
        deep = {"properties": {"a": deep}}
    assert (
        ask(live, response_format={"type": "json_schema", "json_schema": {"schema": deep}}).json()["error"]["code"]
        == "out_of_range"
    )


def test_s5_a_template_of_a_request_is_unknown(live: Live) -> None:
    """llama-cpp-python, CVE-2024-34359; SGLang, CVE-2026-5760: Jinja from elsewhere ran code."""
    for name in ("chat_template", "chat_template_kwargs", "template"):
        answer = ask(live, **{name: "{{ ''.__class__.__mro__ }}"})
        assert answer.json()["error"]["code"] == "unknown_parameter"
    text = "{{ 7 * 7 }}{% raise %}"  # a content is text, in a template too
    answer = live.post("/tokenize", {"messages": [{"role": "user", "content": text}]}, headers=KEY).json()
    told = live.post("/detokenize", {"tokens": answer["tokens"]}, headers=KEY).json()["prompt"]
    assert text in told


def test_s5_a_hostile_template_of_a_model_is_stopped(tmp_path: Path) -> None:
    folder = copy_of_the_model(tmp_path)
    for source in (
        "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}",
        "{{ ''.__class__ }}",
    ):
        (folder / "chat_template.jinja").write_text(source)
        with serving(Settings(models=(str(folder),))) as one:
            answer = one.chat()
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "template_refused"
            assert str(tmp_path) not in answer.text
            assert one.get("/health").status_code == 200


def copy_of_the_model(tmp_path: Path) -> Path:
    from criadero.artifact import resolve

    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        (folder / name).symlink_to(resolve(MODEL) / name)
    return folder


def test_s6_no_pickle_in_the_server() -> None:
    """SGLang, CVE-2026-3059: pickles between processes. PyTorch, CVE-2025-32434: weights_only was not enough."""
    for file in SERVE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        names = {
            alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
        }
        assert not names & {"pickle", "marshal", "shelve", "dill", "multiprocessing"}, file
        assert not re.search(r"\b(eval|exec)\(|torch\.load", text), file


def test_s6_a_pickled_model_is_not_served(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04c__builtin__\nexec\n.")
    with pytest.raises(UserError):
        Pool(Settings(models=(str(folder),)))


def test_s7_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """vLLM, CVE-2026-22807: auto_map's code ran although nobody had trusted it."""
    folder = copy_of_the_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with serving(Settings(models=(str(folder),))) as one:
        one.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert not (tmp_path / "ran").exists()


def test_s8_nothing_is_fetched_for_a_client(live: Live) -> None:
    """Ollama, CVE-2026-5530; vLLM, GHSA-3f6c-7fw2-ppm4: the server fetched URLs of requests."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        parts: list[Any] = [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "input_audio", "input_audio": {"url": url}},
            {"type": "file", "file": {"url": url}},
        ]  # fmt: skip
        for part in parts:
            assert ask(live, messages=[{"role": "user", "content": [part]}]).status_code == 400
        ask(live, messages=[{"role": "user", "content": url}], response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}},
        })  # fmt: skip
        ask(live, model=url)
        with pytest.raises(TimeoutError):
            trap.accept()
    for file in SERVE.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        assert not names & {"requests", "httpx", "aiohttp", "urllib.request", "urllib3"}, file


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "cria-chat/../cria",
        "..%2f..",
        "cria-chat\x00",
        "C:\\x",
        "file:///etc/passwd",
        "a" * 256,
    ],
)
def test_s9_a_name_is_never_a_path(live: Live, name: str) -> None:
    """Ollama, CVE-2026-7020 and CVE-2024-37032; Chainlit, CVE-2026-22218: names that led out of their folder."""
    answer = ask(live, model=name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    for path in (
        f"/v1/models/{name}",
        f"/assets/{name}",
        "/assets/..%2f..%2fapp.py",
        "/assets/../../app.py",
        "/static/%2e%2e/app.py",
    ):
        made = socket.create_connection(live.address)  # as it is: clients would tidy it up
        path = path.replace("\x00", "%00").replace("\\", "%5c")
        host = f"{live.address[0]}:{live.address[1]}"
        made.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {KEY['Authorization']}\r\nConnection: close\r\n\r\n".encode()
        )
        heard = b""
        while piece := made.recv(65536):
            heard += piece
        made.close()
        assert heard.split()[1] in (b"404", b"400"), heard[:200]
        assert b"import " not in heard
        assert b"root:" not in heard


def test_s9_a_link_in_the_watched_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_config.json").write_text('{"base_model_name_or_path": "cria-chat"}')
    (tmp_path / "adapters" / "link").symlink_to(outside)
    pool = Pool(Settings(models=(MODEL,), adapters=tmp_path / "adapters"))
    with pytest.raises(ApiError):
        pool.find("link")


def test_s10_pages_elsewhere_cannot_use_the_server(live: Live) -> None:
    """Ollama, CVE-2024-28224: DNS rebinding. llama.cpp #25655: any origin was allowed."""
    host = f"{live.address[0]}:{live.address[1]}"
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil.example"):
        assert ask(live, {"Host": name}).json()["error"]["code"] == "host_not_allowed"
        assert live.get("/health", headers={"Host": name}).status_code == 403
    assert live.get("/health", headers={"Host": "localhost:1"}).status_code == 200
    for origin in ("http://evil.example", "null", f"http://{host}.evil.example", "http://localhost:9"):
        assert ask(live, {"Origin": origin}).json()["error"]["code"] == "origin_not_allowed"
    assert ask(live, {"Origin": f"http://{host}"}).status_code == 200
    assert ask(live, {"Sec-Fetch-Site": "cross-site"}).status_code == 403
    for answer in (
        ask(live), httpx.options(live.url + "/v1/chat/completions", headers={"Origin": "http://evil.example", **KEY}),
    ):  # fmt: skip
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    # what a form or a script without permission can send
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        body = json.dumps({"messages": HELLO}).encode()
        answer = httpx.post(live.url + "/v1/chat/completions", content=body, headers={**KEY, "Content-Type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json")


def test_s11_every_route_asks_for_a_key(live: Live) -> None:
    """vLLM: the key guarded some prefixes only. Open WebUI, CVE-2026-45339: x-api-key went round the rules."""
    found = routes(live)
    assert len(found) > 15
    for method, path in found:
        path = re.sub(r"\{[^}]*\}", "x", path)
        if path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            if method not in ("GET", "HEAD"):
                assert httpx.request(method, live.url + path, json={}).status_code in (401, 405)
            continue
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"x-api-key": "wrong"},
            {"Authorization": "Basic x"},
            {"Authorization": "Bearer"},
        ):
            answer = httpx.request(
                method, live.url + path, headers={"Content-Type": "application/json", **headers}, content=b"{}"
            )
            assert answer.status_code == 401, (method, path)
            assert "WWW-Authenticate" in answer.headers
    for path in (
        "/nowhere",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/admin",
        "/v1",
        "/metrics/",
        "/v1/models/../models",
        "//v1/models",
    ):
        assert live.get(path).status_code == 401
    assert ask(live).status_code == 200
    assert live.chat(headers={"x-api-key": "the-key-of-these-tests"}).status_code == 200
    assert live.get("/health").status_code == live.get("/ready").status_code == 200


def test_s11_an_open_address_needs_keys() -> None:
    assert not key_required(Settings())
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
        assert key_required(Settings(host=host))
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "0.0.0.0", "127.0.0.1.x")] == [
        True, True, True, True, True, False, False,
    ]  # fmt: skip


def test_s11_keys_are_kept_hashed(store: Store, tmp_path: Path) -> None:
    key = new_key()
    assert len(key) > 40
    made = open_store(tmp_path / "keys.db")
    made.add_key(hash_key(key), name="ana", hint="ck")
    made.close()
    assert key.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_s12_owners_come_from_keys_only(live: Live) -> None:
    """Open WebUI, CVE-2026-45349: others' chats. (Each route across two owners: tests of the store and the page's API.)"""
    answer = ask(live, user="local", metadata={"owner": "local"})
    assert {"user", "metadata"} <= set(answer.json()["criadero"]["ignored"])
    for headers in ({"X-Owner": "local"}, {"X-Forwarded-User": "local"}, {"X-Forwarded-For": "127.0.0.1"}):
        assert live.get("/v1/models", headers=headers).status_code == 401


def test_s13_browsers_are_told_what_may_run(live: Live) -> None:
    """Open WebUI, CVE-2026-44568: a script in an answer. (That answers are sanitised last: tests of the page.)"""
    for answer in (live.get("/"), live.get("/health"), ask(live), live.get("/nowhere"), ask(live, stream=True)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"].startswith("req-")
        assert "server" not in answer.headers
    assert ask(live).headers["cache-control"] == "no-store"


def test_s14_computed_prompts_are_found_by_their_owner_only(live: Live, store: Store) -> None:
    """vLLM, CVE-2025-46570: the time to the first token told what others had asked."""
    other = new_key()
    store.add_key(hash_key(other), name="other", hint="ck")
    long = [{"role": "user", "content": "a " * 200}]
    first = ask(live, messages=long).json()["criadero"]["cached_tokens"]
    again = ask(live, messages=long).json()["criadero"]["cached_tokens"]
    theirs = live.chat(messages=long, headers={"x-api-key": other}).json()["criadero"]["cached_tokens"]
    assert first == 0
    assert again > 150
    assert theirs == 0
    assert ask(live, cache_salt="x").json()["error"]["code"] == "unknown_parameter"  # no client chooses the salt


def test_s15_few_dependencies_and_each_pinned() -> None:
    """LiteLLM 1.82.7 on PyPI stole keys."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    names = [re.split(r"[<>=\[ ]", one)[0].lower().replace("-", "_") for one in project["dependencies"]]
    assert {name.replace("-", "_") for name in names} <= {name.replace("-", "_") for name in pinned}
    assert not {"litellm"} & set(pinned)
    assert len(names) <= 20


def test_s16_errors_and_logs_say_nothing_of_the_inside(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM: tracebacks and paths in responses. Logs: a line of a client's own making."""
    pool = live.service.pool
    find = pool.find

    def broken(name: str) -> Any:
        raise RuntimeError(f"secret of {ROOT}/criadero")

    pool.find = broken  # type: ignore[method-assign]
    try:
        answer = ask(live, messages=[{"role": "user", "content": "my secret question"}])
    finally:
        pool.find = find  # type: ignore[method-assign]
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert not re.search(r"secret|Traceback|criadero/|File", answer.text)
    id = answer.headers["x-request-id"]
    assert id in answer.text
    assert id in caplog.text
    assert "my secret question" not in caplog.text
    live.get("/v1/models/x%0a2026-01-01%20ERROR%20forged", headers=KEY)
    assert not [line for line in caplog.text.splitlines() if line.startswith("2026-01-01")]
    assert public("a /opt/ana/models/x.gguf\nb\x1b[2J") == "a x.gguf b?[2J"
    assert public("see http://example.org/a/b") == "see http://example.org/a/b"


def test_s16_a_body_that_is_too_large_or_slow(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from criadero.serve import app as module

    most = live.service.settings.limits.body_bytes
    answer = httpx.post(
        live.url + "/v1/chat/completions",
        content=b" " * (most + 1),
        headers={**KEY, "Content-Type": "application/json"},
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    def pieces() -> Iterator[bytes]:  # without a length
        for _ in range(most // 65536 + 2):
            yield b" " * 65536

    with contextlib_suppress():
        answer = httpx.post(
            live.url + "/v1/chat/completions", content=pieces(), headers={**KEY, "Content-Type": "application/json"}
        )
        assert answer.status_code == 413
    monkeypatch.setattr(module, "BODY_SECONDS", 0.1)
    made = socket.create_connection(live.address)
    host = f"{live.address[0]}:{live.address[1]}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: {KEY['Authorization']}\r\n"
    made.sendall(f"{head}Content-Length: 9\r\n\r\n".encode())
    made.settimeout(10)
    assert b"408" in made.recv(4096)
    made.close()


def contextlib_suppress() -> Any:
    """The server may close the connection before the client has sent it all."""
    import contextlib

    return contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError)
