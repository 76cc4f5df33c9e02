"""docs/reference/conformance.md from tools/conformance/results.json: what the suites of others say of the server, and what each proves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "tools" / "conformance" / "results.json"
NOTE = "<!-- Written by docs/generate.py from tools/conformance/results.json: run tools/conformance/run.py, then `make docs`. -->"
Table = Callable[[tuple[str, ...], Sequence[tuple[str, ...]]], list[str]]


def results() -> dict[str, dict[str, Any]]:
    """By the suite's name."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found


def proofs(endpoint: str) -> dict[str, list[str]]:
    """parameter -> the suites that proved it at ``endpoint`` ("POST /v1/chat/completions")."""
    found: dict[str, list[str]] = {}
    for suite, result in results().items():
        for name in result["proved"].get(endpoint, ()):
            found.setdefault(name, []).append(suite)
    return found


def page(table: Table) -> str:
    """The page; ``table`` writes one in Markdown."""
    lines = [
        "# Suites of others against `criadero serve`", NOTE, "",
        "`python tools/conformance/run.py --suite all` runs them: each in an environment of its own, with pinned versions, against a "
        "server with the bundled cria-chat. *Not applicable* is what asks for something that this server refuses by design, what was "
        "written for a mock server, or what only a larger model can answer; the reasons are below. Which suite proved which parameter: "
        "[the API](api.md). Two suites want something beside: `--source schemathesis-openai=FOLDER` a checkout of openai/openai-openapi, "
        "and `--source lm-eval=FOLDER` a folder with openbook_qa.jsonl (a question's query, choices and gold in a line).", "",
    ]  # fmt: skip
    rows = []
    for suite, one in results().items():
        without = sum(part["tests"] for part in one["not_applicable"])
        counts = (f"{one['passed']:,}", f"{len(one['failed']):,}", f"{without:,}", f"{one['server_errors']:,}")
        rows.append(
            (
                f"[{suite}](#{suite.replace('.', '')})",
                f"{one['package']} {one['version']}".strip(),
                one["date"],
                *counts,
            )
        )
    head = ("suite", "version", "run on", "passed", "failed", "not applicable", "server errors")
    lines += table(head, rows)
    for suite, one in results().items():
        lines += [f"## {suite}", "", f"{one['title'][:1].upper()}{one['title'][1:]}.", ""]
        lines += [f"- {note}" for note in one["notes"]] + [""] * bool(one["notes"])
        if one["failed"]:
            lines += table(("failed", "reason"), [(f"`{part['test']}`", part["reason"]) for part in one["failed"]])
        if one["not_applicable"]:
            rows = [(str(part["tests"]), part["reason"]) for part in one["not_applicable"]]
            lines += table(("not applicable", "reason"), rows)
    return "\n".join(lines).rstrip() + "\n"
