"""A pytest plugin for the suites of others (``-p watch``): for each test a line of JSON in ``$CRIADERO_WATCH``, what came of it and when.

It runs in a suite's own environment and imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

began: dict[str, float] = {}


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    began[nodeid] = time.time()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = (yield).get_result()
    text = ""
    if report.failed:
        text = f"{call.excinfo.typename}: {call.excinfo.value}"
    elif report.skipped:
        where = report.longrepr
        text = str(getattr(report, "wasxfail", "") or (where[2] if isinstance(where, tuple) else ""))
    if report.when == "call" or report.outcome != "passed":
        line = {
            "test": item.nodeid, "outcome": report.outcome, "when": report.when, "text": text[:2000],
            "began": began[item.nodeid], "ended": time.time(),
        }  # fmt: skip
        with open(os.environ["CRIADERO_WATCH"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
