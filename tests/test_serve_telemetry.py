"""OpenTelemetry: what spans an answer gives, what they never hold, and when they are sent at all."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import MODEL, Live, half_request, serving, slow_steps, wait_for

from criadero import cli
from criadero.errors import UserError
from criadero.serve.telemetry import ENDPOINTS, PROTOCOLS, Telemetry, open_telemetry, wanted

SECRET = "tangerine"
ASK = [{"role": "user", "content": f"¿Quién es {SECRET}?"}]


@pytest.fixture(scope="module")
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def live(spans: InMemorySpanExporter) -> Iterator[Live]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with serving(telemetry=Telemetry(provider)) as one:
        yield one


@pytest.fixture(autouse=True)
def _none_from_before(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    spans.clear()
    for name in (*ENDPOINTS, *PROTOCOLS, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def trace(spans: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, ReadableSpan]]:
    """The span of the only answer, once it is there, and those inside it by name."""
    wait_for(lambda: any(one.kind is SpanKind.SERVER for one in spans.get_finished_spans()))
    (whole,) = (one for one in spans.get_finished_spans() if one.kind is SpanKind.SERVER)
    inside = {one.name: one for one in spans.get_finished_spans() if one is not whole}
    assert whole.context
    assert all(one.parent and one.parent.span_id == whole.context.span_id for one in inside.values())
    return whole, inside


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_a_span_with_three_inside(live: Live, spans: InMemorySpanExporter, stream: bool) -> None:
    response = live.chat(messages=ASK, max_tokens=6, ignore_eos=True, temperature=0.5, seed=7, stream=stream)
    whole, inside = trace(spans)
    found = dict(whole.attributes or {})
    assert whole.name == f"chat {MODEL}"
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == MODEL
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.seed"]) == (0.5, 7)
    assert found["gen_ai.request.max_tokens"] == found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.usage.input_tokens"]
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert found["criadero.request_id"] == response.headers["x-request-id"]
    assert whole.status.status_code is StatusCode.UNSET
    assert list(inside) == ["queue", "prefill", "decode"]
    times = [time for one in inside.values() for time in (one.start_time, one.end_time)]
    assert times[0] == whole.start_time
    assert times[-1] == whole.end_time
    assert times[1] == times[2]
    assert times[3] == times[4]
    assert times == sorted(times, key=lambda time: time or 0)


def test_no_span_holds_a_text(live: Live, spans: InMemorySpanExporter) -> None:
    answer = live.chat(messages=ASK, user=SECRET, headers={"Authorization": "Bearer " + SECRET}).json()
    live.post("/v1/completions", {"prompt": f"Hola {SECRET}", "max_tokens": 4, "stop": [SECRET]})
    live.post("/v1/embeddings", {"input": f"Hola {SECRET}"})
    wait_for(lambda: sum(one.kind is SpanKind.SERVER for one in spans.get_finished_spans()) == 3)
    told = "".join(one.to_json() for one in spans.get_finished_spans())
    assert SECRET not in told
    assert answer["choices"][0]["message"]["content"] not in told
    names = {one.name for one in spans.get_finished_spans()}
    assert names == {f"{what} {MODEL}" for what in ("chat", "text_completion", "embeddings")} | {
        "queue",
        "prefill",
        "decode",
    }


def test_it_is_part_of_its_callers_trace(live: Live, spans: InMemorySpanExporter) -> None:
    parent = f"00-{'ab' * 16}-{'cd' * 8}-01"
    live.chat(headers={"traceparent": parent})
    whole, _ = trace(spans)
    assert whole.context
    assert whole.parent
    assert format(whole.context.trace_id, "032x") == "ab" * 16
    assert format(whole.parent.span_id, "016x") == "cd" * 8
    spans.clear()
    live.chat(headers={"traceparent": "00-nonsense"})
    assert trace(spans)[0].parent is None


def test_who_leaves_and_what_fails_is_told(live: Live, spans: InMemorySpanExporter) -> None:
    with slow_steps(live.worker, 0.02):
        made = half_request(live, "/v1/chat/completions", {"messages": ASK, "stream": True, "ignore_eos": True})
        made.recv(1)
        made.close()
        whole, inside = trace(spans)
    assert (whole.attributes or {})["error.type"] == "client_gone"
    assert whole.status.status_code is StatusCode.UNSET
    assert "queue" in inside
    spans.clear()
    runner = live.worker.llm.runner
    fast = runner.step

    def broken(batch: object) -> object:
        raise RuntimeError("no memory")

    runner.step = broken  # type: ignore[method-assign, assignment]
    try:
        assert live.chat().status_code == 500
    finally:
        runner.step = fast  # type: ignore[method-assign]
    whole, inside = trace(spans)
    assert (whole.attributes or {})["error.type"] == "generation_failed"
    assert whole.status.status_code is StatusCode.ERROR
    assert "decode" not in inside


def test_a_refused_request_has_no_span(live: Live, spans: InMemorySpanExporter) -> None:
    assert live.chat(temperature=99).status_code == 400
    live.chat()
    trace(spans)


# --- when it is sent ---


def test_the_flag_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wanted(None)
    assert wanted(True)
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:1")
    assert wanted(None)
    assert not wanted(False)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not wanted(None)


def test_without_the_extra_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SystemExit) as left:
        cli.main(["serve", "--otel", "--no-open"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'criadero[otel]', or say --no-otel" in said


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROTOCOLS[0], "grpc")
    with pytest.raises(UserError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        open_telemetry()


def test_nothing_that_sends_is_imported_without_it() -> None:
    names = (
        "'opentelemetry.sdk', 'opentelemetry.exporter'"  # FastAPI itself looks for the API, which does nothing alone
    )
    code = f"import sys, criadero.serve.app; sys.exit(any(name in sys.modules for name in ({names})))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_spans_go_to_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(ENDPOINTS[0], f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "tienda")
    try:
        with serving(telemetry=open_telemetry()) as one:
            one.chat(messages=ASK)
    finally:
        server.shutdown()
        server.server_close()
    ((path, data),) = bodies
    assert path == "/v1/traces"
    assert b"tienda" in data
    assert b"gen_ai.usage.output_tokens" in data
    assert SECRET.encode() not in data


def test_a_collector_that_is_not_there_takes_no_answer_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(telemetry=open_telemetry()) as one:
        response = httpx.post(one.url + "/v1/chat/completions", json={"messages": ASK, "max_tokens": 2}, timeout=60)
        assert json.loads(response.text)["usage"]["completion_tokens"] <= 2
