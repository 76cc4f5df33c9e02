"""The engine without a server, for benchmarks/serve.py: the same requests from as many clients, as JSON lines in and out.

python benchmarks/serve_bare.py MODEL --threads 2
{"prompts": [["one client's first", "its second"], ["the other's first", ...]], "tokens": 64}  ->  a list of records a client
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from criadero.engine.llm import LLM
from criadero.engine.request import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    llm = LLM(arguments.model, threads=arguments.threads, sequences=16)
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(run(llm, command["prompts"], command["tokens"])), flush=True)


def run(llm: LLM, prompts: list[list[str]], tokens: int) -> list[list[dict[str, Any]]]:
    """Each client's next request goes in when its last has ended."""
    engine, params = llm.engine, SamplingParams(max_tokens=tokens, ignore_eos=True)
    found: list[list[dict[str, Any]]] = [[] for _ in prompts]
    begun: dict[int, tuple[int, dict[str, Any]]] = {}

    def ask(client: int) -> None:
        text = prompts[client][len(found[client])]
        record = {"asked": time.perf_counter(), "times": [], "tokens": 0}
        found[client].append(record)
        begun[engine.add(llm.request(text, params))] = client, record

    for client in range(len(prompts)):
        ask(client)
    while begun:
        for output in engine.step():
            client, record = begun[output.id]
            now = time.perf_counter()
            if output.text:
                record["times"].append(now)
            record["tokens"] += len(output.ids)
            if output.done:
                assert output.usage
                record |= {"ended": now, "prompt": output.usage.prompt}
                del begun[output.id]
                if len(found[client]) < len(prompts[client]):
                    ask(client)
    return found


if __name__ == "__main__":
    main()
