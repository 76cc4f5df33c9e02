"""docs/reference/api.md from the server's own tables: every parameter of every endpoint, and what becomes of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
# suite -> the file of ours that runs it
PROOFS = {
    "the openai package as a client": ("test_serve_chat.py", "import openai"),
    "the anthropic package as a client": ("test_serve_anthropic.py", "import anthropic"),
    "schemathesis, on our own OpenAPI document": ("test_serve_spec.py", "schemathesis.cli"),
}


def bodies() -> list[tuple[str, type, str]]:
    """(endpoint, body, tests that exercise it)."""
    from criadero.serve import anthropic, embeddings, openai_chat, openai_completions, responses, tokenize, traces

    return [
        ("POST /v1/chat/completions", openai_chat.ChatRequest, "test_serve_chat.py"),
        ("POST /v1/completions", openai_completions.CompletionRequest, "test_serve_completions.py"),
        ("POST /v1/embeddings", embeddings.EmbeddingRequest, "test_serve_completions.py"),
        ("POST /tokenize", tokenize.TokenizeRequest, "test_serve_completions.py"),
        ("POST /detokenize", tokenize.DetokenizeRequest, "test_serve_completions.py"),
        ("POST /v1/responses", responses.ResponseRequest, "test_serve_responses.py"),
        ("POST /v1/messages", anthropic.MessageRequest, "test_serve_anthropic.py"),
        ("POST /v1/trace", traces.TraceRequest, "test_serve_trace.py"),
    ]


def page(note: str, table: Callable[[tuple[str, ...], Sequence[tuple[str, ...]]], list[str]]) -> str:
    """The page; ``table`` writes one in Markdown."""
    from conformance_reference import proofs

    from criadero.serve import params
    from criadero.serve.settings import Limits

    lines = [
        "# The API of `criadero serve`", note, "",
        "Every parameter is *honoured*; or *refused* with a 400 that names it (unless its value asks for nothing); or *reported*: taken, "
        "without effect, and named in `criadero.ignored` and in the header `X-Criadero-Ignored`. A name that is not here is a 400.", "",
        "*Proved by* names the [suites of others](conformance.md) in which a test that passed sent the parameter and was content with the "
        "answer, or, for what is refused, in which the 400 that names it came back.", "",
    ]  # fmt: skip
    for endpoint, body, tests in bodies():
        known = proofs(endpoint)
        rows = [(f"`{name}`", status, about, shown(known.get(name, []))) for name, status, about in params.rows(body)]
        lines += [f"## {endpoint}", "", *table(("parameter", "", "what it does, or why not", "proved by"), rows)]
        if (TESTS / tests).is_file():
            lines += [f"Tested in [`tests/{tests}`](../../tests/{tests}).", ""]
    lines += [
        "## Query parameters", "",
        "Of these addresses; others take none. A name that is not here is a 400, and so is one that stands twice, unless it is a list.", "",
    ]  # fmt: skip
    lines += table(("address", "parameter", "what it does"), queries())
    lines += ["## Limits", "", "What is above one is a 4xx that names it.", ""]
    defaults = [
        (f"`{one.name}`", f"{one.default:,}" if one.default is not None else "none")
        for one in dataclasses.fields(Limits)
    ]
    lines += table(("limit", "default"), defaults)
    lines += ["## The `criadero` block", "", "In every answer, and in the last piece of a stream:", ""]
    lines += table(("field", "what it says"), _block())
    lines += [
        "## The guard", "",
        "With `criadero serve --guard INDEX` an answer ends at the token with which it has copied more than `--guard-tokens` tokens of "
        "training text whose licence forbids that. The finish reason is `content_filter` for chats and completions, `incomplete` with the "
        "reason `content_filter` for responses, `refusal` for messages, and `guard` in receipts, metrics and spans. The header "
        "`X-Criadero-Guard` says `on`, or `stopped` when the answer is whole; a stream tells it in its last piece, in "
        "the `criadero` block.", "",
    ]  # fmt: skip
    lines += ["## Errors", "", '`{"error": {"message", "type", "param", "code"}}`; the codes do not change.', ""]
    lines += table(("code", "status"), _codes())
    proofs = [
        (suite, f"[`tests/{file}`](../../tests/{file})")
        for suite, (file, mark) in PROOFS.items()
        if (TESTS / file).is_file() and mark in (TESTS / file).read_text(encoding="utf-8")
    ]
    lines += ["## Proved by", "", *table(("outside suite", "run by"), proofs)]
    return "\n".join(lines).rstrip() + "\n"


def queries() -> list[tuple[str, ...]]:
    """(address, parameter, what it does) of every query parameter, and of those that every address takes."""
    from criadero.serve import health, page_api, query, responses

    found = [
        (f"`{' '.join(sorted(route.methods))} {route.path}`", f"`{name}`", info.description or "")
        for router in (health.router, responses.router, page_api.router)
        for route in router.routes
        for name, info in query.parameters(route)[0].items()
    ]
    return [*found, *(("every address", f"`{name}`", f"without effect: {why}") for name, why in query.IGNORED.items())]


def shown(suites: list[str]) -> str:
    """The suites that proved a parameter: the first three."""
    return ", ".join(suites[:3]) + (f" and {len(suites) - 3} more" if len(suites) > 3 else "")


def _block() -> list[tuple[str, ...]]:
    return [
        ("`context.limit`, `context.used`", "the model's context, and how much of it prompt and answer take"),
        ("`context.filled`", "the answer ended because the context was full"),
        (
            "`context.dropped_messages`, `context.dropped`",
            "how many messages the model did not see, and which (from 0)",
        ),
        ("`context.policy`", "why: `error` (none is ever left out) or `oldest`"),
        ("`cached_tokens`", "of the prompt, computed for an earlier request of the same key"),
        ("`queue_ms`", "how long it waited for a slot"),
        ("`ignored`", "parameters without effect"),
        ("`seed`", "the one that was used: it gives the same answer again"),
        (
            "`guard`",
            "null without `--guard`; else the index, how many of its tokens may be copied, and in `stopped` each choice that ended there, "
            "with the document and its licence",
        ),
        (
            "`receipt`",
            "an id for `criadero replay`, whether it was kept, and SHA-256 hashes of weights, template and adapter",
        ),
    ]


def _codes() -> list[tuple[str, ...]]:
    """Every code that the server's sources name, with the statuses it comes with."""
    import criadero.serve

    found: dict[str, set[str]] = {}
    folder = Path(criadero.serve.__file__).parent
    for file in sorted(folder.glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for match in re.finditer(r'ApiError\(\s*(\d{3}),\s*"([a-z_]+)"', text):
            found.setdefault(match[2], set()).add(match[1])
    for code in ("unknown_parameter", "missing_parameter", "invalid_json", "invalid_type"):
        found.setdefault(code, set()).add("400")
    return [(f"`{code}`", ", ".join(sorted(statuses))) for code, statuses in sorted(found.items())]
