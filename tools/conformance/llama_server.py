"""Our server, started with llama-server's flags by llama.cpp's tests. A flag for what there is not here is written down, and ends it.

The model is cria-chat whatever is asked for; sizes of batches, threads and the like change nothing of an answer and are taken.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

TAKEN = {  # flag -> how many values it has
    "--temp": 1, "--seed": 1, "--offline": 0, "--model": 1, "--model-url": 1, "--hf-repo": 1, "--hf-file": 1, "--batch-size": 1,
    "--ubatch-size": 1, "--threads": 1, "--n-gpu-layers": 1, "--cont-batching": 0, "--embedding": 0, "--metrics": 0, "--no-slots": 0,
    "--ctx-size": 1, "-ctk": 1, "-ctv": 1, "-fa": 1, "--n-predict": 1, "--verbose": 0, "--jinja": 0, "--no-jinja": 0,
    "--kv-unified": 0, "--cache-ram": 1, "--reranking": 0,  # all kinds of servers are tried once before the first test
}  # fmt: skip


def main() -> None:
    words, given = sys.argv[1:], ["--bare", "--log", os.environ["CRIADERO_LOG"]]
    given += [
        "--alias",
        "gpt-4.1",
        "--alias",
        "gpt-3.5-turbo",
        "--alias",
        "gpt-3.5-turbo-instruct",
    ]  # it answers to any name
    while words:
        flag, *words = words
        if flag in TAKEN:
            words = words[TAKEN[flag] :]
            continue
        if flag == "--pooling" and words[:1] == ["mean"]:
            words = words[1:]
            continue
        named = {
            "--port": "--port",
            "--host": "--host",
            "--api-key": "--key",
            "--parallel": "--sequences",
            "--alias": "--alias",
        }
        if flag not in named:
            refuse(flag)
        value, *words = words
        given += [named[flag], value]
    server = Path(__file__).with_name("server.py")
    os.execv(sys.executable, [sys.executable, str(server), *given])


def refuse(flag: str) -> None:
    """Say in the list of requests why there is no server."""
    now = time.time()
    told = {
        "status": 400,
        "code": "unsupported_parameter",
        "param": None,
        "message": f"{flag} is no flag of criadero serve",
    }
    line = {"began": now, "ended": now, "request": "the server's start", "sent": [], "status": 400, "refusals": [told]}
    with open(os.environ["CRIADERO_LOG"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
