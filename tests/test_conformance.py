"""What tools/conformance/run.py makes of a suite's tests and of the requests that the server saw meanwhile, and the page of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAT = "POST /v1/chat/completions"


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tools/conformance", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for name in ("run", "suites"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def ran(name: str, outcome: str, at: float, text: str = "") -> dict[str, Any]:
    return {"test": name, "outcome": outcome, "when": "call", "text": text, "began": at, "ended": at + 1}


def asked(at: float, status: int, *sent: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    refusals = (
        [{"status": status, "code": code, "param": param, "message": f"{param} is not supported"}] if code else []
    )
    return {
        "began": at, "ended": at + 2, "request": CHAT, "sent": list(sent), "status": status, "refusals": refusals,
    }  # fmt: skip


def test_what_a_suite_came_to() -> None:
    import run
    from suites import Suite

    suite = Suite("s", "a suite", ("p==1",), (), package="p", own="their", not_applicable=(("mock", "a mock server"),))
    tests = [
        ran("right", "passed", 10), ran("refused", "failed", 20, "400"), ran("wrong", "failed", 30, "it is not"), ran("mock", "failed", 40),
        ran("theirs", "failed", 50, "400"), ran("left", "skipped", 60, "no key"), ran("torn down", "passed", 70),
        {**ran("torn down", "failed", 70, "teardown"), "when": "teardown"},
    ]  # fmt: skip
    requests = [
        asked(10.5, 200, "model", "seed"), asked(20.5, 400, "model", "audio", code="unsupported_parameter", param="audio"),
        asked(30.5, 200, "model", "top_p"), asked(50.5, 400, "model", "own", code="unknown_parameter", param="own"),
        asked(80, 500, "model"), asked(81, 503, "model", code="cancelled"),
    ]  # fmt: skip
    told = run.judged(suite, tests, requests, "1")
    assert told["passed"] == 1
    assert [one["test"] for one in told["failed"]] == ["torn down", "wrong"]
    assert {one["reason"]: one["tests"] for one in told["not_applicable"]} == {
        "refused by design: audio is not supported": 1, "a mock server": 1, "sends their's own parameter own": 1, "no key": 1,
    }  # fmt: skip
    # honoured: in a test that passed; refused: wherever the 400 came back
    assert told["proved"] == {CHAT: ["audio", "model", "seed"]}
    assert told["server_errors"] == 1
    assert "1 passed, 2 failed, 4 not applicable" in run.said(suite, told)


def test_the_page_has_every_suite() -> None:
    import conformance_reference
    from suites import SUITES

    kept = conformance_reference.results()
    assert kept.keys() <= {suite.name for suite in SUITES}
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    page = (ROOT / "docs" / "reference" / "conformance.md").read_text(encoding="utf-8")
    for name, one in kept.items():
        assert f"## {name}\n" in page
        assert one["server_errors"] == 0
