"""The engine beside its peers on one model file, in one run, interleaved: load, prefill, decode at several batch sizes.

    python benchmarks/engine.py [--peer llama.cpp,openvino,transformers] [--shape tinyllama-1.1b] [--type Q4_0,Q4_K_M] [--model FILE.gguf]
                                [--peer-python .peers/bin/python] [--rounds 5] [--loads 3]
                                [--batches 1,4,8,16] [--threads 2] [--json]

Each side runs in a process of its own with the model loaded (benchmarks/engine_worker.py), the same token ids, and takes the largest
logit of each sequence as the next token; the sides answer in turn, A B A B, and the ratio is of medians, with the spread of the rounds'
own ratios. Loading is measured in fresh processes, in turn too, each to its first token, with its peak memory. Models are files of
random weights of a real shape (benchmarks/shapes.py), made once in ``--models``: ours and llama.cpp read the same file. Memory
bandwidth and arithmetic peak are probed in the same run, so that "share of the limit" is of this machine now.

OpenVINO reads what its own converter makes of the Q4_0 file, twice (benchmarks/openvino_model.py): g32, the same numbers, and g128, its
users' default, coarser, whose like is a folder of ours, ``--type int4-g128``; transformers reads the BF16 file's numbers from a Hugging
Face folder, in bf16 and in float32. Each side keeps its default type of cached keys and values: float16 for ours (float32 beside float32
weights) and llama.cpp, bytes for OpenVINO, the weights' type for transformers. "bits a weight" is of the whole file,
embedding and head too.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Before each command: for a tenth of a second after its work, llama.cpp's threads still turn, waiting for more, on the cores that the other
# side is to use
PAUSE = 0.5
LONG = 120.0  # seconds of a row's rounds after which no further round begins


@dataclass
class Side:
    """A running worker."""

    name: str
    type: str
    process: subprocess.Popen
    peak_bytes: int = 0
    settings: dict[str, str] = field(default_factory=dict)

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
        self.settings = answer.get("settings", self.settings)
        return answer.get("seconds", 0.0)


def start(name: str, type: str, model: Path, python: str, threads: int) -> Side:
    command = [python, str(HERE / "engine_worker.py"), name, str(model), "--threads", str(threads), "--type", type]
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
        began = time.monotonic()
        for number in range(rounds):
            if number and time.monotonic() - began > LONG:
                say(f"{name}: {number} of {rounds} rounds: they take long")
                break
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
    if unknown := set(peers) - {"llama.cpp", "openvino", "transformers"}:
        sys.exit(f"error: --peer {', '.join(sorted(unknown))}: known are llama.cpp, openvino and transformers")
    if {"llama.cpp", "openvino"} & set(peers) and not shutil.which(arguments.peer_python):
        sys.exit(
            f"error: no {arguments.peer_python}: run tools/peers.sh engine (or openvino), which installs the peers"
        )

    if arguments.model and set(peers) - {"llama.cpp"}:
        sys.exit("error: --model: only llama.cpp reads that file too; leave the other peers out")

    from shapes import SHAPES

    types = [arguments.model.stem] if arguments.model else arguments.type.split(",")
    arguments.models.mkdir(parents=True, exist_ok=True)
    wanted, sizes = contestants(peers, types, arguments)
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
        "shape": arguments.shape, "weight_bytes": sizes, "limits": [before, after], "load_seconds": loads,
        "settings": {f"{side.name} {side.type}": side.settings for side in sides if side.settings},
        "load_peak_bytes": first_peaks, "peak_bytes": peaks,
        "tokens_per_second": speeds,
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
        return
    report(result, SHAPES.get(arguments.shape))


def contestants(
    peers: list[str], types: list[str], arguments: argparse.Namespace
) -> tuple[list[tuple], dict[str, int]]:
    """What `start` takes, for each side, and the bytes of each side's weights."""
    from shapes import write

    wanted: list[tuple] = []
    sizes: dict[str, int] = {}
    shape, models, threads = arguments.shape, arguments.models, arguments.threads

    def add(name: str, type: str, path: Path, python: str, size: int) -> None:
        wanted.append((name, type, path, python, threads))
        sizes[f"{name} {type}"] = size

    for type in types:
        if type.startswith("int4-g") and not arguments.model:  # no GGUF holds such groups: ours alone
            folder = packed_folder(shape, int(type.removeprefix("int4-g")), models)
            add("criadero", type, folder, sys.executable, (folder / "model.safetensors").stat().st_size)
            continue
        file = arguments.model or write(shape, type, models / f"{shape}-{type}.gguf")
        add("criadero", type, file, sys.executable, file.stat().st_size)
        if "llama.cpp" in peers:
            add("llama.cpp", type, file, arguments.peer_python, file.stat().st_size)
    if "openvino" in peers:
        for group in (32, 128):
            folder = models / f"{shape}-openvino-g{group}"
            if not folder.exists():
                converter = [arguments.peer_python, str(HERE / "openvino_model.py"), shape, str(group), str(folder)]
                subprocess.run(converter, check=True, stdout=subprocess.DEVNULL)
            add("openvino", f"int4-g{group}", folder, arguments.peer_python, (folder / "model.bin").stat().st_size)
    if "transformers" in peers:
        folder = hf_folder(shape, models)
        size = (folder / "model.safetensors").stat().st_size
        add("transformers", "BF16", folder, sys.executable, size)
        add("transformers", "F32", folder, sys.executable, 2 * size)
    return wanted, sizes


def converted(shape: str, type: str, folder: Path, save: Callable[[Any, Path], None]) -> Path:
    """``folder``, made once: what ``save`` writes there of the model in the shape's file of this type."""
    from shapes import write

    from criadero.checkpoints import load_model

    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        file = write(shape, type, partial / "model.gguf", words=True)  # our reader wants a vocabulary
        save(load_model(file), partial)
        file.unlink()
        partial.rename(folder)
    return folder


def packed_folder(shape: str, group: int, models: Path) -> Path:
    """A folder of ours with the numbers of the shape's Q4_0 file rounded again, to the nearest, in groups of ``group``, as
    benchmarks/openvino_model.py does; embedding and head in 8 bits."""

    def save(model: Any, folder: Path) -> None:
        import torch

        from criadero.checkpoints import write_quantised
        from criadero.quantization.rounding import as_quant_tensor, nearest, round_matrix

        state: dict[str, Any] = dict(model.state_dict())
        for name, weight in model.state_dict().items():
            if name.startswith("model.layers.") and weight.ndim == 2:
                size = math.gcd(weight.shape[1], group)
                blocks = weight.view(len(weight), -1, size)  # [N, K / group, group]
                scales = (blocks.abs().amax(-1) / 7).half().float()
                numbers = nearest(blocks, scales, 4).to(torch.int8).view(weight.shape)
                state[name] = as_quant_tensor(numbers, scales, 4, size)
            elif weight.ndim == 2:
                state[name] = round_matrix(weight, 8, 32)
        write_quantised(state, model.config, folder, dtype=torch.bfloat16, pack_tables=True)

    return converted(shape, "Q4_0", models / f"{shape}-int4-g{group}", save)


def hf_folder(shape: str, models: Path) -> Path:
    """A Hugging Face folder with the numbers of the shape's BF16 file, for transformers."""

    def save(model: Any, folder: Path) -> None:
        import torch

        from criadero.checkpoints import save_hf

        save_hf(model, model.config, folder, dtype=torch.bfloat16)

    return converted(shape, "BF16", models / f"{shape}-bf16", save)


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
        "\n| | load + first token, s, median (least - most) | peak memory by then, MB | after all of it, MB | weights, MB | bits a weight |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        seconds, size = result["load_seconds"][name], result["weight_bytes"][name]
        print(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f}) "
            f"| {result['load_peak_bytes'][name] / 1e6:,.0f} | {result['peak_bytes'][name] / 1e6:,.0f} | {size / 1e6:,.0f} "
            f"| {f'{size * 8 / parameters(shape):.2f}' if shape else ''} |"
        )
    for name, settings in result["settings"].items():
        print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    if shape:
        shares(result, shape)


def layers_and_head(shape: dict[str, int]) -> tuple[int, int]:
    """Numbers in the layers' matrices, and in the head's (the embedding has as many)."""
    linears = shape["layers"] * shape["hidden"] * (
        2 * shape["hidden"] + 2 * shape["hidden"] // shape["heads"] * shape["kv"] + 3 * shape["ffn"]
    )  # fmt: skip
    return linears, shape["hidden"] * shape["vocab"]


def parameters(shape: dict[str, int]) -> int:
    linears, head = layers_and_head(shape)
    return linears + 2 * head


def shares(result: dict[str, Any], shape: dict[str, int]) -> None:
    """What part of the machine's limits our prefill and our single decode reach."""
    linears, head = layers_and_head(shape)
    bandwidth = statistics.mean(probe["read_gb_s"] for probe in result["limits"])
    peak = statistics.mean(probe["int8_gop_s"] for probe in result["limits"])
    for name, values in result["tokens_per_second"]["prefill 512"].items():
        if name.startswith("criadero"):
            operations = 2 * (linears + head / 512) * statistics.median(values) / 1e9
            print(f"\n{name}: prefill {operations:,.0f} GOP/s in linears, {operations / peak:.0%} of {peak:,.0f}")
    for name, values in result["tokens_per_second"]["decode, batch 1"].items():
        if name.startswith("criadero"):
            size = result["weight_bytes"][name] * (linears + head) / (linears + 2 * head)  # but for the embedding
            read = size * statistics.median(values) / 1e9
            print(f"{name}: decode reads {read:,.1f} GB/s of weights, {read / bandwidth:.0%} of {bandwidth:,.1f}")


if __name__ == "__main__":
    main()
