"""The engine beside its peers on one model file, in one run, interleaved: load, prefill, decode at several batch sizes.

    python benchmarks/engine.py [--peer llama.cpp,transformers] [--shape tinyllama-1.1b] [--type Q4_0,Q4_K_M] [--model FILE.gguf]
                                [--peer-python .peers/bin/python] [--rounds 5] [--loads 3]
                                [--batches 1,4,8,16] [--threads 2] [--json]

Each side runs in a process of its own with the model loaded (benchmarks/engine_worker.py), the same token ids, and takes the largest
logit of each sequence as the next token; the sides answer in turn, A B A B, and the ratio is of medians, with the spread of the rounds'
own ratios. Loading is measured in fresh processes, in turn too, each to its first token, with its peak memory. Models are files of
random weights of a real shape (benchmarks/shapes.py), made once in ``--models``: for one type both sides read the same file. Memory
bandwidth and arithmetic peak are probed in the same run, so that "share of the limit" is of this machine now.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Before each command: for a tenth of a second after its work, llama.cpp's threads still turn, waiting for more, on the cores that the other
# side is to use
PAUSE = 0.5


@dataclass
class Side:
    """A running worker."""

    name: str
    type: str
    process: subprocess.Popen
    peak_bytes: int = 0

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, **command: Any) -> float:
        time.sleep(PAUSE)
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name} ended while doing {command}")
        answer = json.loads(line)
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer["seconds"]


def start(name: str, type: str, model: Path, python: str, threads: int) -> Side:
    command = [python, str(HERE / "engine_worker.py"), name, str(model), "--threads", str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
    return Side(name, type, process)


def tasks(quick: bool, batches: list[int]) -> list[tuple[str, dict[str, Any], int]]:
    """(name, command, tokens that the seconds stand for)"""
    steps = 16 if quick else 32
    rows: list[tuple[str, dict[str, Any], int]] = [("prefill 512", {"do": "prefill", "tokens": 512}, 512)]
    for batch in batches:
        rows.append(
            (f"decode, batch {batch}", {"do": "decode", "batch": batch, "prompt": 128, "steps": steps}, batch * steps)
        )
    return rows


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} - {max(values):,.1f})"


def limits(threads: int) -> dict[str, float]:
    """Read bandwidth in GB/s and int8 peak in GOP/s of this machine, by our own probes."""
    from criadero import kernels

    native = kernels.native()
    if native is None:
        sys.exit("error: the kernels were not compiled: install a C++ compiler and run make again")
    return {
        "read_gb_s": native.bandwidth(400 << 20, threads, 0.5) / 1e9,
        "int8_gop_s": native.peak("int8", threads, 0.3) / 1e9,
    }


def say(what: str) -> None:
    """Progress, for who watches."""
    print(time.strftime("%H:%M:%S ") + what, file=sys.stderr, flush=True)


def measure_loads(wanted: list[tuple], loads: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds to the first token, one value a process, and the most memory of them."""
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for number in range(loads):
        for one in wanted if number % 2 == 0 else wanted[::-1]:
            side = start(*one)
            name = f"{side.name} {side.type}"
            seconds.setdefault(name, []).append(side.ask(do="load"))
            peaks[name] = max(peaks.get(name, 0), side.peak_bytes)
            side.end()
            say(f"load {name}: {seconds[name][-1]:.2f} s, {side.peak_bytes / 1e6:,.0f} MB")
    return seconds, peaks


def measure(sides: list[Side], rounds: int, quick: bool, batches: list[int]) -> dict[str, dict[str, list[float]]]:
    """``[task][side]`` -> tokens a second, one value a round; sides in turn."""
    speeds: dict[str, dict[str, list[float]]] = {}
    for name, command, tokens in tasks(quick, batches):
        for side in sides:  # one unmeasured warm-up each
            side.ask(**command)
        for number in range(rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                seconds = side.ask(**command)
                speeds.setdefault(name, {}).setdefault(f"{side.name} {side.type}", []).append(tokens / seconds)
        say(f"{name}: " + ", ".join(f"{side} {statistics.median(v):,.1f}" for side, v in speeds[name].items()))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", default="llama.cpp")
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--type", default="Q4_0,Q4_K_M")
    parser.add_argument("--model", type=Path, help="one GGUF file instead of random weights")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache/criadero-benchmarks")
    parser.add_argument("--peer-python", default=str(HERE.parent / ".peers/bin/python"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loads", type=int, default=3)
    parser.add_argument("--batches", default="1,4,8,16", help="sequences decoded at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer steps a round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    peers = [p for p in arguments.peer.split(",") if p]
    if "llama.cpp" in peers and not shutil.which(arguments.peer_python):
        sys.exit(f"error: no {arguments.peer_python}: run tools/peers.sh, which builds llama.cpp for this machine")

    from shapes import SHAPES, write

    types = [arguments.model.stem] if arguments.model else arguments.type.split(",")
    arguments.models.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple] = []
    sizes: dict[str, int] = {}
    for type in types:
        file = arguments.model or write(arguments.shape, type, arguments.models / f"{arguments.shape}-{type}.gguf")
        sizes[type] = file.stat().st_size
        wanted.append(("criadero", type, file, sys.executable, arguments.threads))
        if "llama.cpp" in peers:
            wanted.append(("llama.cpp", type, file, arguments.peer_python, arguments.threads))
    if "transformers" in peers:
        folder = random_folder(arguments.shape, arguments.models)
        wanted.append(("transformers", "BF16", folder, sys.executable, arguments.threads))
    loads, first_peaks = measure_loads(wanted, arguments.loads)
    sides = [start(*one) for one in wanted]
    for side in sides:
        side.ask(do="load")
    time.sleep(PAUSE)
    before = limits(arguments.threads)
    speeds = measure(sides, arguments.rounds, arguments.quick, [int(n) for n in arguments.batches.split(",")])
    time.sleep(PAUSE)
    after = limits(arguments.threads)
    peaks = {f"{side.name} {side.type}": side.peak_bytes for side in sides}
    for side in sides:
        side.end()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {arguments.threads} threads", "time": time.strftime("%Y-%m-%d %H:%M"),
        "shape": arguments.shape, "file_bytes": sizes, "limits": [before, after], "load_seconds": loads,
        "load_peak_bytes": first_peaks, "peak_bytes": peaks,
        "tokens_per_second": speeds,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return
    report(result, SHAPES.get(arguments.shape))


def random_folder(shape: str, models: Path) -> Path:
    """A Hugging Face folder of the shape with random bf16 weights, for transformers."""
    from shapes import SHAPES

    folder = models / f"{shape}-hf"
    if not folder.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        s = SHAPES[shape]
        config = LlamaConfig(
            vocab_size=s["vocab"], hidden_size=s["hidden"], intermediate_size=s["ffn"], num_hidden_layers=s["layers"],
            num_attention_heads=s["heads"], num_key_value_heads=s["kv"], max_position_embeddings=s["context"],
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)  # transformers' own annotations make .to() a method of something else
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def report(result: dict[str, Any], shape: dict[str, int] | None) -> None:
    """The tables, in Markdown."""
    speeds: dict[str, dict[str, list[float]]] = result["tokens_per_second"]
    names = list(next(iter(speeds.values())))
    print(f"{result['shape']}, {result['machine']}, {result['time']}")
    for when, probe in zip(("before", "after"), result["limits"], strict=True):
        print(f"limits {when}: " + ", ".join(f"{k} {v:,.1f}" for k, v in probe.items()))
    print(
        "\n| tokens/s, median (least - most) | "
        + " | ".join(names)
        + " | ours to best peer |\n|---|"
        + "---|" * (len(names) + 1)
    )
    for task, found in speeds.items():
        middle = {name: statistics.median(values) for name, values in found.items()}
        mine = max((n for n in names if n.startswith("criadero")), key=lambda n: middle[n])
        others = [n for n in names if not n.startswith("criadero")]
        ratio = ""
        if others:
            best = max(others, key=lambda n: middle[n])
            each = [a / b for a, b in zip(found[mine], found[best], strict=True)]
            ratio = f"{middle[mine] / middle[best]:.2f}x ({min(each):.2f} - {max(each):.2f})"
        print(f"| {task} | " + " | ".join(spread(found[n]) for n in names) + f" | {ratio} |")
    print(
        "\n| | load + first token, s, median (least - most) | peak memory by then, MB | after all of it, MB | file, MB |"
    )
    print("|---|---|---|---|---|")
    for name in names:
        seconds, size = result["load_seconds"][name], result["file_bytes"].get(name.split()[-1], 0)
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f}) "
            f"| {result['load_peak_bytes'][name] / 1e6:,.0f} | {result['peak_bytes'][name] / 1e6:,.0f} | {size / 1e6:,.0f} |"
        )
    if shape:
        shares(result, shape)


def shares(result: dict[str, Any], shape: dict[str, int]) -> None:
    """What part of the machine's limits our prefill and our single decode reach."""
    linears = shape["layers"] * shape["hidden"] * (
        2 * shape["hidden"] + 2 * shape["hidden"] // shape["heads"] * shape["kv"] + 3 * shape["ffn"]
    )  # fmt: skip
    head = shape["hidden"] * shape["vocab"]
    bandwidth = statistics.mean(probe["read_gb_s"] for probe in result["limits"])
    peak = statistics.mean(probe["int8_gop_s"] for probe in result["limits"])
    for name, values in result["tokens_per_second"]["prefill 512"].items():
        if name.startswith("criadero"):
            operations = 2 * (linears + head / 512) * statistics.median(values) / 1e9
            print(f"\n{name}: prefill {operations:,.0f} GOP/s in linears, {operations / peak:.0%} of {peak:,.0f}")
    for name, values in result["tokens_per_second"]["decode, batch 1"].items():
        if name.startswith("criadero"):
            size = (
                result["file_bytes"][name.split()[-1]] * (linears + head) / (linears + 2 * head)
            )  # but for the embedding
            read = size * statistics.median(values) / 1e9
            print(f"{name}: decode reads {read:,.1f} GB/s of weights, {read / bandwidth:.0%} of {bandwidth:,.1f}")


if __name__ == "__main__":
    main()
