"""``criadero demo``: the whole story in three minutes. A base model, a shop's chats, a tuned model, a conversation."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from criadero.artifact import Artifact, open_artifact
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.summary import code_line
from criadero.terminal import chat
from criadero.train.hardware import peak_memory_bytes

BASE = "cria"
QUESTIONS = 5
TRANSCRIPT = ("Hola, ¿abren los domingos?", "¿Puedo pagar con tarjeta?", "Muchas gracias, adiós.")
LEAST_FALL = 0.2  # nats a token: below it the demo has failed


def examples_folder() -> Path:
    """Where ``tienda.jsonl`` lies: in the package when installed, in ``examples/`` in a clone."""
    here = Path(__file__).resolve().parent
    for folder in (here / "examples", here.parent / "examples"):
        if (folder / "tienda.jsonl").is_file():
            return folder
    raise UserError("the demo's examples/tienda.jsonl is missing; install criadero again")


def demo(out: Path | None = None) -> int:
    """Run it; the exit code: 0, or 1 when tuning did not lower the held-out loss clearly."""
    from criadero.train.sft import SftRecipe, sft

    console = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()

    def heading(text: str) -> None:
        spent = time.monotonic() - began
        console.print()
        console.print(Text(text, style="bold cyan"), Text(f"  [{spent:.0f} s]", style="dim"))

    folder = examples_folder()
    base = open_artifact(BASE)
    heading(f"1. The base model: {base.name}")
    console.print(passport_lines(base))

    heading("2. Make it yours: LoRA on the chats of a small shop")
    place = out or Path(tempfile.mkdtemp(prefix="criadero-demo-")) / "tienda"
    recipe = SftRecipe(
        base=BASE, data=str(folder / "tienda.jsonl"), held_out=str(folder / "tienda.held-out.jsonl"), **settings()
    )
    tuned = sft(recipe, place, overwrite=True)

    heading("3. Before and after, on questions it has not seen")
    questions = read_questions(folder / "tienda.held-out.jsonl")
    compare(console, base, tuned, questions)
    losses = {m["slice"]: float(m["value"]) for m in tuned.metrics if m["metric"] == "loss"}
    fall = losses["before"] - losses["after"]
    console.print(
        f"held-out loss: {losses['before']:.3f} before, {losses['after']:.3f} after ({-fall:+.3f} nats a token)"
    )
    if not fall > LEAST_FALL:
        console.print(
            Text(f"The loss did not fall by {LEAST_FALL}: the demo has failed. Please report this.", style="bold red")
        )
        return 1
    console.print(f"your model: {tuned.path}  (criadero show {tuned.path}; criadero chat {tuned.path})")

    heading("4. Talk to it")
    spent, memory = time.monotonic() - began, peak_memory_bytes() / 2**30
    if sys.stdin.isatty() and console.is_terminal:
        chat(tuned.path)
    else:
        chat(tuned.path, lines=TRANSCRIPT, temperature=0.0)
    console.print(Text(f"The first three steps took {spent:.0f} s; peak memory {memory:.1f} GiB.", style="dim"))
    return 0


def settings() -> dict[str, Any]:
    """What the demo changes from the defaults of `criadero tune`: nothing about the training."""
    return {"licence": "Apache-2.0"}


def passport_lines(artifact: Artifact) -> Table:
    """The passport in a few lines: made of what, under which licences, how many tokens, by which code."""
    passport = artifact.passport
    table = Table(box=None, show_header=False, pad_edge=False)
    model, step = passport.get("model", {}), passport.get("step", {})
    rows = passport.get("data", {}).get("by_source", [])
    licences = sorted({str(row.get("licence")) for row in rows})
    table.add_row("  id", artifact.id[:19] + "...")
    table.add_row("  model", f"Llama, {model.get('params', 0):,} parameters, context {model.get('context')}")
    table.add_row("  made of", f"{len(rows)} sources: {', '.join(str(row.get('name')) for row in rows)}")
    table.add_row("  licences", "; ".join(licences))
    table.add_row(
        "  trained on", f"{int(step.get('tokens', 0)):,} tokens in {float(step.get('seconds', 0)) / 60:.0f} minutes"
    )
    table.add_row("  by", code_line(step))
    for metric in artifact.metrics:
        if metric.get("metric") == "bits_per_byte":
            table.add_row("  held out", f"{metric['slice']}: {float(metric['value']):.3f} bits per byte")
    return table


def read_questions(path: Path) -> list[str]:
    """The first question of each of the first chats in the file."""
    with open(path, encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in file if line.strip()]
    return [next(m["content"] for m in chat if m["role"] == "user") for chat in chats[:QUESTIONS]]


def compare(console: Console, base: Artifact, tuned: Artifact, questions: Sequence[str]) -> None:
    """Both models' greedy answers side by side."""
    table = Table(show_lines=True, expand=True)
    for title in ("question", f"{base.name} (before)", "yours (after)"):
        table.add_column(title, ratio=1)
    models = [LLM(base), LLM(tuned)]
    for question in questions:
        answers = ["".join(m.chat([{"role": "user", "content": question}], max_tokens=60)).strip() for m in models]
        table.add_row(question, *(Text(a) for a in answers))
    console.print(table)
