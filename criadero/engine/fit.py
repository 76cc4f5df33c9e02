"""Whether a model fits this machine, and how fast it can be: arithmetic before anything is loaded. Needs neither torch nor numpy
until the probe.

Decoding one token reads every weight once and the keys and values of the context: its speed is bandwidth over bytes.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from criadero.artifact import resolve
from criadero.errors import UserError

# bytes a weight, scales of groups of 32 in float16 counted
WEIGHT_BYTES = {
    "float64": 8.0, "float32": 4.0, "f32": 4.0, "bfloat16": 2.0, "bf16": 2.0, "float16": 2.0, "f16": 2.0, "int8": 1.0625,
    "int4": 0.5625,
}  # fmt: skip
OVERHEAD = 300 * 2**20  # the interpreter, libraries, activations and logits
SHARE = 0.25  # of the free memory, for the cache, when nothing is said


if TYPE_CHECKING:
    from criadero.config import ModelConfig as Shape  # or what has its fields: config.py imports numpy


def parameters(shape: Shape) -> int:
    """Number of parameters, a tied embedding once."""
    d, dh = shape.hidden_size, shape.head_dim
    layer = (
        d * dh * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
        + 3 * d * shape.intermediate_size
        + 2 * d
    )
    return layer * shape.num_hidden_layers + d + shape.vocab_size * d * (1 if shape.tie_word_embeddings else 2)


def weight_bytes(shape: Shape, weights: str) -> int:
    """Bytes of all weights in a number format of `WEIGHT_BYTES`."""
    return round(parameters(shape) * WEIGHT_BYTES.get(weights, 4.0))


def token_bytes(shape: Shape, kv: str = "float32") -> int:
    """Bytes of the keys and values of one token."""
    return round(2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * WEIGHT_BYTES.get(kv, 4.0))


def read_bytes(shape: Shape, weights: str, context: int, kv: str = "float32") -> int:
    """Bytes read to decode one token after ``context`` others: all weights but the embedding's other rows, and the cache."""
    rows = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size
    return round((parameters(shape) - rows) * WEIGHT_BYTES.get(weights, 4.0)) + context * token_bytes(shape, kv)


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that can be had: of the machine or of this process's control group, whichever is less; None if nobody says."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else None
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except OSError:
        pass
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
            if text.isdigit() and int(text) < 2**60:
                found.append(max(0, int(text) - int(Path(usage).read_text(encoding="ascii"))))
        except (OSError, ValueError):
            continue
    if not found:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    return min(found)


def shape_of(path: Path) -> Shape | None:
    """The shape of the model in a folder, its adapter's base, or a GGUF file; None when there is none to be read there."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            return None
        from criadero.checkpoints import load_config

        return load_config(path)
    values = _json(_body(path) / "config.json")
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        fields = ("vocab_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        shape: Any = SimpleNamespace(**{name: int(values[name]) for name in fields})
        shape.num_attention_heads, shape.hidden_size = heads, hidden
        shape.num_key_value_heads = int(values.get("num_key_value_heads") or heads)
        shape.head_dim = int(values.get("head_dim") or hidden // heads)
        shape.tie_word_embeddings = bool(values.get("tie_word_embeddings", False))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return shape


def stored_bytes(path: Path) -> int:
    """Bytes of the weights of a model as they lie on the disk: of a folder, of an adapter and its base, or of a file."""
    if path.is_file():
        return path.stat().st_size
    folders = {path, _body(path)}
    files = [file for folder in folders for kind in ("*.safetensors", "*.gguf", "*.pth") for file in folder.glob(kind)]
    return sum(file.stat().st_size for file in files)


def _body(path: Path) -> Path:
    """The folder that holds the model: an adapter's base, where it is here."""
    base = _json(path / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        return path
    near = path / base
    try:
        return near if near.exists() else resolve(base)
    except UserError:
        return path


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def needs(ref: str | Path, *, context: int | None = None, speed: bool = False) -> dict[str, Any] | None:
    """What computing with ``ref`` takes on this machine, as it is stored: bytes of weights, of a token's keys and values (as
    float16), of both at ``context`` (default: the whole) and what is free; with ``speed``, a second's measurement of bandwidth and the
    tokens a second that it allows. None when there is no model to be read there. UserError: a context the model has not."""
    path = resolve(ref)
    shape = shape_of(path)
    if shape is None:
        return None
    whole = shape.max_position_embeddings
    context = whole if context is None else context
    if not 1 <= context <= whole:
        raise UserError(f"--context {context}: the model's context is 1 to {whole:,} tokens")
    weights, token = stored_bytes(path), token_bytes(shape, "float16")
    found: dict[str, Any] = {
        "weights_bytes": weights, "token_bytes": token, "context": context, "total_bytes": weights + context * token + OVERHEAD,
        "overhead_bytes": OVERHEAD, "free_bytes": free_memory(),
    }  # fmt: skip
    if speed:
        rate = bandwidth()
        # the embedding's rows are looked up, not read through, where the output layer has its own
        looked_up = 0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size / parameters(shape)
        read = round(weights * (1 - looked_up)) + context * token
        found |= {"bandwidth": round(rate), "read_bytes": read, "tokens_per_second": rate / read}
    return found


def stored_format(runner: str, weights: str, device: str) -> str:
    """The number format that ``weights`` "auto" comes to, for an estimate."""
    if weights != "auto":
        return weights
    return "bfloat16" if runner == "native" or device.startswith("cuda") else "float32"


def cache_pages(
    shape: Shape, *, page: int, pages: int | None, memory: int | None, sequences: int, kv: str, device: str
) -> int:
    """How many pages the cache gets: as said, or what ``memory`` bytes hold, or ``sequences`` whole contexts within `SHARE`."""
    if not 1 <= page <= 4096:
        raise UserError(f"a page holds 1 to 4,096 tokens, not {page}")
    if pages is not None:
        if not 1 <= pages <= 2**24:
            raise UserError(f"pages must lie between 1 and {2**24:,}, not {pages}")
        return pages
    size = page * token_bytes(shape, kv)
    whole = -(-shape.max_position_embeddings // page)
    if memory is not None:
        if memory < size:
            raise UserError(
                f"{said(memory)} for the cache is less than one page of {page} tokens, which takes {said(size)}"
            )
        return min(memory // size, 2**24)
    wanted = whole * max(1, sequences)
    free = free_memory(device)
    if free is None:
        return wanted
    return max(1, min(wanted, max(whole, round(free * SHARE) // size)))


def check_fits(
    ref: object, shape: Shape, *, page: int, pages: int, weights: str, kv: str, runner: str, device: str
) -> None:
    """UserError with the numbers when weights and cache cannot fit the free memory."""
    free = free_memory(device)
    if free is None:
        return
    path = Path(str(ref))
    if weights == "auto" and runner == "native" and path.exists():
        form, body = "stored", stored_bytes(path)
    else:
        form = stored_format(runner, weights, device)
        body = weight_bytes(shape, form)
    cache = pages * page * token_bytes(shape, kv)
    if body + cache + OVERHEAD > free:
        least = page * -(-shape.max_position_embeddings // page) * token_bytes(shape, kv)
        advice = (
            f"give the cache less memory (kv_memory; one context of {shape.max_position_embeddings:,} tokens takes {said(least)})"
            if body + OVERHEAD + least <= free and least < cache
            else "use a smaller or a quantised model, or a machine with more memory"
        )
        raise UserError(
            f"{ref} does not fit: its {parameters(shape):,} parameters take {said(body)} as {form}, a cache of {pages * page:,} "
            f"tokens {said(cache)}, and {said(OVERHEAD)} is needed beside them, but {said(free)} is free: {advice}"
        )


def bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second that this machine reads from memory: the native kernels' probe, else sums in numpy on as many threads as
    there are cores (an underestimate where numpy's sum is slower than the memory)."""
    from criadero.engine.runner import native_available, physical_cores

    threads = physical_cores()
    if native_available():
        probe = getattr(importlib.import_module("criadero.kernels._native"), "bandwidth", None)
        if probe is not None:  # a build from before the probe has none
            return float(probe(2**29, threads, seconds))
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    block = np.ones(2**24, np.float32)  # 64 MiB a thread: past the caches
    blocks = [block, *(block.copy() for _ in range(threads - 1))]
    best, until = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            list(pool.map(_read, blocks))  # numpy lets go of the interpreter's lock in long loops
            end = time.perf_counter()
            best = max(best, sum(one.nbytes for one in blocks) / (end - start))
            if end >= until:
                return best


def _read(block: Any) -> float:
    return float(block.max())  # one pass, vectorised, nothing written


def said(size: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
