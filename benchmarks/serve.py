"""Our server beside llama.cpp's and llama-cpp-python's, on one model file, in one run, interleaved; and beside our engine without a server.

    python benchmarks/serve.py [--peer llama.cpp,llama-cpp-python] [--clients 1,4,16] [--requests 2] [--rounds 3] [--threads 2]
                               [--shape tinyllama-1.1b] [--type Q4_0] [--prompt 128] [--tokens 64] [--peers .peers] [--json]

Each client sends its next request to /v1/completions when the last is through: a prompt of its own of so many tokens, greedy, streamed,
the end token ignored. The same program reads all servers' streams. The sides answer in turn, A B A B, each round with other
prompts, so that no cache helps; a ratio is of medians, with the spread of the rounds' own ratios. Weights are random, of a real shape,
with a vocabulary (benchmarks/shapes.py). `tools/peers.sh server` builds the peers for this machine: llama-server, with as many slots as
ours and continuous batching, is the fair one; llama-cpp-python's server computes one answer at a time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAUSE = 0.5  # before each part: llama.cpp's threads still turn for a while after their work
OURS, BARE = "criadero", "our engine, no server"
Record = dict[str, Any]  # asked, ended, times of the pieces of text, tokens, prompt


@dataclass
class Side:
    """A running server, or our engine in a process of its own."""

    name: str
    process: subprocess.Popen
    port: int = 0
    rounds: dict[int, list[list[Record]]] = field(default_factory=dict)  # clients -> of each round all its records

    def round(self, prompts: list[list[str]], tokens: int) -> list[Record]:
        """So many clients at once, each with its prompts one after another."""
        time.sleep(PAUSE)
        if not self.port:
            assert self.process.stdin
            assert self.process.stdout
            self.process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens}) + "\n")
            self.process.stdin.flush()
            return flat(json.loads(self.process.stdout.readline()))
        found: list[list[Record]] = [[] for _ in prompts]

        def client(number: int) -> None:
            for text in prompts[number]:
                found[number].append(ask(self.port, text, tokens))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        records = flat(found)
        if len(records) < sum(map(len, prompts)):
            sys.exit(f"error: {self.name} has not answered all requests")
        return records

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def flat(lists: list[list[Record]]) -> list[Record]:
    return [one for each in lists for one in each]


def ask(port: int, text: str, tokens: int) -> Record:
    """One streamed answer. What comes is looked into as little as can be while it comes."""
    body = json.dumps({"prompt": text, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                       "stream_options": {"include_usage": True}}).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as made:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        record: Record = {"asked": time.perf_counter(), "times": []}
        made.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        parts = []
        while part := made.recv(65536):
            now = time.perf_counter()
            parts.append(part)
            record["times"] += [now] * part.count(b'"text":')
            if b"[DONE]" in part:
                break
    whole = b"".join(parts)
    reasons = re.findall(rb'"finish_reason": ?"(\w+)"', whole)
    counts = re.findall(rb'"prompt_tokens": ?(\d+)', whole)
    if not whole.startswith(b"HTTP/1.1 200") or reasons != [b"length"]:
        raise SystemExit(f"error: port {port} did not answer as asked: {whole[:300]!r} ... {whole[-300:]!r}")
    return record | {"ended": now, "tokens": tokens, "prompt": int(counts[-1]) if counts else 0}


# --- the sides ---


def start(name: str, model: Path, arguments: argparse.Namespace) -> Side:
    """Start one and wait until it can answer."""
    threads, slots, port = str(arguments.threads), max(arguments.clients), free_port()
    peers: Path = arguments.peers
    context = arguments.prompt + arguments.tokens + 64
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if name == BARE:
        command = [sys.executable, str(HERE / "serve_bare.py"), str(model), "--threads", threads]
        side = Side(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert side.process.stdout
        if side.process.stdout.readline() != "ready\n":
            sys.exit(f"error: {name} did not start")
        return side
    if name == OURS:
        folder = tempfile.mkdtemp()
        command = [
            str(Path(sys.executable).with_name("criadero")),
            "serve",
            str(model),
            "--port",
            str(port),
            "--no-open",
        ]
        command += ["--threads", threads, "--sequences", str(max(16, slots)), "--database", f"{folder}/db"]
        health = "/ready"
    elif name == "llama.cpp":
        command = [str(peers / "bin/llama-server"), "-m", str(model), "--port", str(port), "-t", threads, "--no-webui"]
        command += ["-np", str(slots), "-c", str(slots * context), "--cache-ram", "0"]
        health = "/health"
    else:
        command = [str(peers / "bin/python"), "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--interrupt_requests", "false"]
        health = "/v1/models"
    if not Path(command[0]).exists():
        sys.exit(f"error: no {command[0]}: run tools/peers.sh server, which builds the peers for this machine")
    side = Side(name, subprocess.Popen(command, **quiet), port)
    for _ in range(600):
        if side.process.poll() is not None:
            sys.exit(f"error: {name} ended with {side.process.returncode}: {' '.join(command)}")
        if answers(port, health):
            return side
        time.sleep(0.1)
    sys.exit(f"error: {name} is not ready after a minute")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def answers(port: int, path: str) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False


def versions(arguments: argparse.Namespace) -> dict[str, str]:
    """Of what is measured, as it says itself."""
    from criadero import __version__, kernels

    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "an installed package"
    found = {"criadero": f"{__version__} ({commit}, {kernels.level()})"}
    peers: Path = arguments.peers
    if "llama.cpp" in arguments.peer:
        said = subprocess.run([peers / "bin/llama-server", "--version"], capture_output=True, text=True)
        found["llama.cpp"] = next((line for line in (said.stderr + said.stdout).splitlines() if "version" in line), "?")
    if "llama-cpp-python" in arguments.peer:
        code = "import importlib.metadata as m; print(m.version('llama_cpp_python'))"
        said = subprocess.run([peers / "bin/python", "-c", code], capture_output=True, text=True)
        found["llama-cpp-python"] = said.stdout.strip()
    return found


def processor() -> str:
    """Its name, and which of the instructions that matter it has."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    has = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f" {flag}" in text]
    return f"{name[1] if name else platform.machine()} ({', '.join(has)})"


# --- measuring ---


class Words:
    """Prompts of exactly so many tokens, no two alike."""

    def __init__(self, model: Path, tokens: int) -> None:
        from criadero.checkpoints import tokenizer_of

        self.tokenizer, self.tokens, self.random = tokenizer_of(model), tokens, random.Random(0)

    def prompt(self) -> str:
        while True:
            word = [
                "".join(self.random.choices("aeiounlrstdcm", k=self.random.randrange(2, 8))) for _ in range(self.tokens)
            ]
            text = ""
            for one in word:
                longer = f"{text} {one}".strip()
                length = len(self.tokenizer.encode(longer, bos=True))
                if length > self.tokens:
                    break
                text = longer
                if length == self.tokens:
                    return text


def speed(records: list[Record]) -> float:
    """Generated tokens a second of all clients together."""
    return sum(one["tokens"] for one in records) / (
        max(one["ended"] for one in records) - min(one["asked"] for one in records)
    )


def firsts(records: list[Record]) -> list[float]:
    """Seconds from asking to the first piece of text."""
    return [one["times"][0] - one["asked"] for one in records]


def gaps(records: list[Record]) -> list[float]:
    """Seconds between pieces of text."""
    return [b - a for one in records for a, b in zip(one["times"], one["times"][1:], strict=False)]


def at(values: list[float], share: float) -> float:
    """The value below which ``share`` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(sides: list[Side], words: Words, arguments: argparse.Namespace) -> None:
    for side in sides:
        side.round([[words.prompt()]], 8)
    for clients in arguments.clients:
        for number in range(arguments.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                prompts = [[words.prompt() for _ in range(arguments.requests)] for _ in range(clients)]
                records = side.round(prompts, arguments.tokens)
                counted = {one["prompt"] for one in records} - {0}
                if counted - {arguments.prompt}:
                    sys.exit(f"error: {side.name} counts {counted} tokens in prompts of {arguments.prompt}")
                side.rounds.setdefault(clients, []).append(records)
                first, between = [
                    f"{1e3 * at(each, 0.5):.1f} / {1e3 * at(each, 0.99):.1f} ms"
                    for each in (firsts(records), gaps(records))
                ]
                say(
                    f"{clients} clients, round {number + 1}, {side.name}: {speed(records):.1f} tokens/s, {first}, {between}"
                )


def say(what: str) -> None:
    """Progress, for who watches."""
    print(time.strftime("%H:%M:%S ") + what, file=sys.stderr, flush=True)


def summary(side: Side, clients: int, whole: int) -> dict[str, Any]:
    """The numbers of one side at so many clients, in its first ``whole`` rounds; times in milliseconds."""
    rounds = side.rounds[clients][:whole]
    every = flat(rounds)
    first, between = firsts(every), gaps(every)
    return {
        "side": side.name, "clients": clients, "requests": len(every), "tokens_per_second": [speed(one) for one in rounds],
        "first_p50": 1e3 * at(first, 0.5), "first_p99": 1e3 * at(first, 0.99), "between_p50": 1e3 * at(between, 0.5),
        "between_p99": 1e3 * at(between, 0.99), "first_p99_of_rounds": [1e3 * at(firsts(one), 0.99) for one in rounds],
    }  # fmt: skip


def ratio(mine: list[float], theirs: list[float], digits: int = 2) -> str:
    each = [a / b for a, b in zip(mine, theirs, strict=True)]
    return f"{statistics.median(mine) / statistics.median(theirs):.{digits}f}x ({min(each):.{digits}f} - {max(each):.{digits}f})"


def report(result: dict[str, Any]) -> None:
    """The tables, in Markdown."""
    print(f"{result['shape']} {result['type']}, prompt {result['prompt']}, answer {result['tokens']} tokens")
    print(f"{result['machine']}, {result['time']}")
    print("; ".join(f"{name}: {said}" for name, said in result["versions"].items()))
    print(
        "\n| clients | side | tokens/s, median (least - most) | ours to it | first token p50 / p99, ms | between tokens p50 / p99, ms |"
    )
    print("|---|---|---|---|---|---|")
    for clients in dict.fromkeys(row["clients"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["clients"] == clients]
        ours = next(row for row in rows if row["side"] == OURS)
        for row in rows:
            speeds = row["tokens_per_second"]
            said = "" if row is ours else ratio(ours["tokens_per_second"], speeds, 3 if row["side"] == BARE else 2)
            print(
                f"| {clients} | {row['side']} | {statistics.median(speeds):.1f} ({min(speeds):.1f} - {max(speeds):.1f}) | {said} "
                f"| {row['first_p50']:,.0f} / {row['first_p99']:,.0f} | {row['between_p50']:.1f} / {row['between_p99']:.1f} |"
            )
    if "llama-cpp-python" in result["versions"]:
        print("\nllama-cpp-python's server computes one answer at a time: the others wait.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--peer", default="llama.cpp,llama-cpp-python", type=lambda text: [one for one in text.split(",") if one]
    )
    parser.add_argument("--clients", default=[1, 4, 16], type=lambda text: [int(one) for one in text.split(",")])
    parser.add_argument("--requests", type=int, default=2, help="of each client in a round, one after another")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/criadero-benchmarks")
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-bare", action="store_true", help="leave out our engine without a server")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.peer) - {"llama.cpp", "llama-cpp-python"}:
        parser.error(f"--peer: {', '.join(unknown)}: the peers are llama.cpp and llama-cpp-python")

    from shapes import write

    arguments.models.mkdir(parents=True, exist_ok=True)
    file = arguments.models / f"{arguments.shape}-{arguments.type}-words.gguf"
    model = write(arguments.shape, arguments.type, file, words=True)
    sides: list[Side] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in (*([] if arguments.no_bare else [BARE]), OURS, *arguments.peer):
            sides.append(start(name, model, arguments))
        measure(sides, Words(model, arguments.prompt), arguments)
    except KeyboardInterrupt:
        say("ended early: what follows is of the rounds that are whole")
    finally:
        for side in sides:
            side.end()
    result = {
        "time": time.strftime("%Y-%m-%d %H:%M"), "machine": f"{processor()}, {arguments.threads} threads", "versions": versions(arguments),
        "shape": arguments.shape, "type": arguments.type, "prompt": arguments.prompt, "tokens": arguments.tokens,
        "rows": [
            summary(side, clients, whole) for clients in arguments.clients
            if (whole := min(len(side.rounds.get(clients, ())) for side in sides)) for side in sides
        ],
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
    else:
        report(result)


if __name__ == "__main__":
    main()
