"""The OpenAPI document is what the server does: schemathesis (an outside suite) makes requests from it, right ones and wrong ones, and
compares what comes back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import MODEL, serving

from criadero.serve.settings import Settings
from criadero.serve.store import open_store

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
# What the document cannot tell: rules between parameters, ids that have to be of something (both are a 4xx that says so), and that a write
# without its content type is a 415 before anybody looks where it goes.
LEFT_OUT = "positive_data_acceptance,ensure_resource_availability,unsupported_method"


def test_answers_are_as_the_document_says(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "chats.sqlite"))
    with serving(Settings(models=(MODEL,)), store=store) as live:
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            live.url + "/openapi.json",
            "--generation-deterministic",
        ]
        command += [
            "--phases",
            "coverage,fuzzing",
            "--max-examples",
            "2",
            "--exclude-checks",
            LEFT_OUT,
            "--warnings",
            "off",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    store.close()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    counted = re.search(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", done.stdout)
    assert counted
    assert int(counted[1]) == int(counted[2]) == int(counted[3]) > 30
