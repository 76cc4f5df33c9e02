"""Seconds and peak memory of each step of the demo, each in a process of its own, as a Markdown table or JSON.

``python benchmarks/demo.py [--json] [--base cria] [--repeat 1]``: the lowest time of `repeat` runs is taken. The steps are the
demo's, with its settings and its examples; the last row is ``criadero demo`` itself, in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Linux counts what the parent held when a child was started towards the child's peak: so this process imports nothing large.
ABOUT = """
import json, os, platform, torch
from criadero import demo
from criadero.machine import cpu
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
system = f"{platform.system()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
machine = f"{cpu()}, {cores} cores, {torch.get_num_threads()} threads, {system}"
print(json.dumps({"machine": machine, "settings": demo.settings(), "examples": str(demo.examples_folder()),
                  "questions": demo.QUESTIONS, "typed": demo.TRANSCRIPT}))
"""
ANSWER = """
import sys
from criadero.demo import read_questions
from criadero.engine.llm import LLM
from pathlib import Path
for ref in sys.argv[2:]:
    llm = LLM(ref)
    for question in read_questions(Path(sys.argv[1])):
        "".join(llm.chat([{"role": "user", "content": question}], max_tokens=60))
"""


@dataclass(frozen=True)
class Row:
    """One step: what it does, seconds of wall and processor, and the most memory it held."""

    step: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(step: str, command: Sequence[str], typed: str = "") -> Row:
    """Run a command with `typed` as its input, and read what it took from the system. RuntimeError when it fails."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        source.write(typed.encode())
        source.seek(0)
        began = time.monotonic()
        files = [(os.POSIX_SPAWN_DUP2, source.fileno(), 0), *((os.POSIX_SPAWN_DUP2, sink.fileno(), n) for n in (1, 2))]
        child = os.posix_spawn(command[0], list(command), dict(os.environ), file_actions=files)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - began
        if code := os.waitstatus_to_exitcode(status):
            sink.seek(0)
            raise RuntimeError(f"{' '.join(command)} exits with {code}:\n{sink.read().decode(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Row(step, round(seconds, 2), round(usage.ru_utime + usage.ru_stime, 2), usage.ru_maxrss * unit)


def steps(base: str, folder: Path, about: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """What is measured: name, command, input."""
    criadero = [sys.executable, "-m", "criadero.cli"]
    examples, typed = Path(about["examples"]), about["typed"]
    held_out = str(examples / "tienda.held-out.jsonl")
    tuned = str(folder / "tienda")
    fields = [word for name, value in about["settings"].items() for word in (f"--{name}", str(value))]
    tune = [*criadero, "tune", base, str(examples / "tienda.jsonl"), "--held_out", held_out, *fields]
    listed = [
        ("criadero --help", [*criadero, "--help"], ""),
        ("show the passport of the base", [*criadero, "show", base], ""),
        ("tune it (LoRA), held-out loss before and after", [*tune, "--out", tuned, "--overwrite"], ""),
        (
            f"{about['questions']} answers of each of the two models",
            [sys.executable, "-c", ANSWER, held_out, base, tuned],
            "",
        ),
        (f"a chat of {len(typed)} turns", [*criadero, "chat", tuned, "--temperature", "0"], "\n".join(typed)),
        ("verify the tuned artifact", [*criadero, "passport", "verify", tuned], ""),
        ("export it as GGUF (Q8_0)", [*criadero, "export", tuned, "--out", f"{tuned}.gguf", "--overwrite"], ""),
    ]
    if base == "cria":
        listed.append(("the whole of criadero demo", [*criadero, "demo"], ""))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--base", default="cria", help="the model to customise")
    parser.add_argument("--repeat", type=int, default=1, help="run each step so often and take the quickest")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    about = json.loads(subprocess.run([sys.executable, "-c", ABOUT], capture_output=True, check=True).stdout)
    rows = []
    with tempfile.TemporaryDirectory(prefix="criadero-bench-") as folder:
        for name, command, typed in steps(options.base, Path(folder), about):
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            tries = [measure(name, command, typed) for _ in range(max(1, options.repeat))]
            rows.append(min(tries, key=lambda row: row.seconds))
    if options.json:
        print(json.dumps({"machine": about["machine"], "rows": [asdict(row) for row in rows]}, indent=2))
        return
    print(f"{about['machine']}\n\n| step | seconds | peak memory |\n|---|---:|---:|")
    for row in rows:
        print(f"| {row.step} | {row.seconds:.1f} | {row.peak_bytes / 1e6:,.0f} MB |")


if __name__ == "__main__":
    main()
