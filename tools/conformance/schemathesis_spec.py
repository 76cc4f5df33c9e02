"""schemathesis against the running server: on our own OpenAPI document, or with a folder on OpenAI's (its openapi.yaml), for our paths.

Each operation is a test; it fails with the first lines of what schemathesis found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

# Of ours: rules between parameters and ids that have to be of something are a 4xx; and what a write without its content type gets
OURS = ["--exclude-checks", "positive_data_acceptance,ensure_resource_availability,unsupported_method"]
# Of OpenAI's: it says 200 alone of every operation, takes what we refuse by a 400, and describes answers of models that we have not
THEIRS = ["--checks", "not_a_server_error,content_type_conformance", "--include-path-regex"]
LEFT_OUT = (
    "checks left out: that every request that fits the schemas is taken (rules between parameters are a 400 that names one), that an id "
    "is found again wherever it could be sent, and 405 before 415 (a write without its content type is refused before its address is "
    "looked up)"
)
CHECKED = "checked: no server error, and content types as described"
PATHS = r"^/(chat/completions|completions|embeddings|models(/\{model\})?|responses(/\{response_id\}.*|/input_tokens)?)$"
SEED = ["--generation-deterministic", "--warnings", "off", "--no-color"]


def main() -> None:
    url = os.environ["CRIADERO_URL"]
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    words = [f"{url}/openapi.json", "--max-examples", "5", "--max-time", "60", *OURS]
    if given is not None:
        words = [
            str(given / "openapi.yaml"),
            "--url",
            f"{url}/v1",
            "--max-examples",
            "5",
            "--max-time",
            "120",
            *THEIRS,
            PATHS,
        ]
    began = time.time()
    command = [sys.executable, "-m", "schemathesis.cli", "run", *words, *SEED, "--continue-on-failure"]
    done = subprocess.run(command, cwd=os.environ["CRIADERO_WORK"], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    counted = re.search(r"Tested: (\d+)", done.stdout)
    operations = int(counted[1]) if counted else 0
    failed = re.findall(r"^_{3,} (.+?) _{3,}\n1\. Test Case ID: \w+\n\n((?:.+\n|\n)+?)Reproduce", done.stdout, re.M)
    cases = re.search(r"(\d+) generated", done.stdout)
    told = f"{cases[1] if cases else 0} requests, {operations} operations; {LEFT_OUT if given is None else CHECKED}"
    lines = [(name, "failed", " ".join(text.split())) for name, text in failed]
    lines += [(f"operation {number + 1}", "passed", "") for number in range(operations - len(failed))]
    if not operations:
        lines = [("schemathesis", "failed", done.stdout[-500:] + done.stderr[-500:])]
    with open(os.environ["CRIADERO_WATCH"], "a", encoding="utf-8") as file:
        for name, outcome, text in lines:
            line = {
                "test": name,
                "outcome": outcome,
                "when": "call",
                "text": text,
                "began": began,
                "ended": time.time(),
            }
            file.write(json.dumps(line | {"note": told}) + "\n")


if __name__ == "__main__":
    main()
