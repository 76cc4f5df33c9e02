"""What training takes of the memory, by part, before anything is loaded; and what has to give way for it to fit.

The figures are arithmetic over the shape: `Needs` says each part. ``fit`` tries the settings that cost nothing but time first
(fewer tokens at once), then a base in 4 or 8 bits, then shorter examples, and says what it did.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from criadero.errors import UserError
from criadero.model import ModelConfig
from criadero.train.hardware import available_memory_bytes
from criadero.train.loss import CHUNK

PROCESS = 360 * 10**6  # Python, PyTorch and its threads, before the first tensor
SLACK = 0.45  # of activations and logits: temporaries, and what the allocator keeps between tensors; measured in adapter runs
SLACK_COMPILED = 0.15  # the same where the compiled kernels train, which keep less
SHORTER = (4096, 2048, 1024, 512, 256, 128)  # tokens of an example, to which `fit` may cut; below them nobody is served


@dataclass(frozen=True)
class Needs:
    """Bytes, by part, at the moment at which most is in use."""

    weights: int
    adapter: int  # 0 where every weight learns
    optimiser: int  # float32 masters, moments and sums of gradients; gradients; the best weights so far
    activations: int
    logits: int
    process: int = PROCESS

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def words(self) -> str:
        """``0.3 GB: weights 0.02, ...``, parts below a hundredth left out."""
        listed = [(name, value) for name, value in vars(self).items() if value >= 5e6]
        return f"{gb(self.total)}: " + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in listed)


def gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def adapter_weights(config: ModelConfig, rank: int, targets: Sequence[str], dora: bool = False) -> int:
    """How many weights the adapters have."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    each = sum(rank * sum(sizes[name]) + (sizes[name][1] if dora else 0) for name in targets)
    return each * config.num_hidden_layers


def needs(
    config: ModelConfig, *, method: str, trained: int, micro_tokens: int, length: int, dtype: torch.dtype,
    weight_bytes: int | None = None, keep_best: bool = True, compiled: bool = False, checkpointing: bool = False,
    device: str = "cpu",
) -> Needs:  # fmt: skip
    """Of training ``trained`` weights with ``micro_tokens`` computed at once in rows of ``length`` tokens. ``weight_bytes``: of the
    base where it is not held in ``dtype`` (QLoRA). ``compiled``: by the compiled kernels, which keep no scores of attention, as on a
    GPU, and need no ``checkpointing``, which keeps what goes into each block, and of one block all."""
    width = dtype.itemsize
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = config.parameters() * width if weight_bytes is None else weight_bytes
    # a frozen layer keeps no input for its own gradient, but an adapter's A keeps the same one
    block = (14 * hidden + 5 * inner) * width
    scores = config.num_attention_heads * min(length, 1024) * 3 * width  # attention over short rows
    if compiled or device != "cpu":
        block, scores = (5 * hidden + 3 * inner) * width if compiled else block, 0
    per_token = layers * (block + scores)
    if checkpointing and not compiled:
        per_token = layers * hidden * width + block + scores
    activations = micro_tokens * per_token
    if method == "qlora":  # one matrix at a time is written out
        activations += hidden * inner * (width + 4)
    logits = min(micro_tokens, CHUNK) * config.vocab_size * (4 + 2 * width)
    slack = SLACK_COMPILED if compiled else SLACK
    return Needs(
        weights=weights,
        adapter=0 if method == "full" else trained * width,
        optimiser=trained * (16 + width + (width if keep_best else 0)),
        activations=round(activations * (1 + slack)),
        logits=round(logits * (1 + slack)),
    )


def free_memory(device: str | torch.device) -> int | None:
    """Bytes that can be had there, of the machine, or of the GPU with what this process has of it; None where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return available_memory_bytes()


def check_memory(needed: int, device: str = "cpu") -> None:
    """Refuse a run that cannot fit, with the numbers, before it starts."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"this run needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free; "
            "lower micro_tokens or context, or take a smaller model"
        )


def check_disk(needed: int, out: Path) -> None:
    """Refuse a run whose result cannot be written where it is to lie, before it starts."""
    there = next(folder for folder in out.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{out}: what is made takes at least {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free on that disk; free some space, "
            "or choose another place with --out"
        )


def stored_bytes(base: Path) -> int:
    """Size of the weights on disk, which is what a quantised base takes in memory too."""
    files = [base] if base.is_file() else [*base.glob("*.safetensors"), *base.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Fit:
    """What fits: the settings to take, what they need, and why."""

    method: str
    length: int  # tokens in a row, which no example exceeds
    rows: int  # computed at once
    wanted: int  # rows that would be, without a limit
    needs: Needs
    why: str  # the method
    checkpointing: bool = False


def fit(
    config: ModelConfig, *, budget: float, method: str, rank: int, targets: Sequence[str], longest: int, row: int,
    micro_tokens: int, dtype: torch.dtype, packed: int | None, may_cut: bool, base: str, compiled: bool,
    checkpointing: str = "off", device: str = "cpu",
) -> Fit:  # fmt: skip
    """The best settings within ``budget`` bytes. ``longest``: tokens of the longest example, ``row`` of the rows it is packed into;
    ``micro_tokens``: how many would be computed at once without a limit; ``packed``: bytes of the base where it lies there in 4 or 8
    bits, else None; ``may_cut``: whether longer examples may be split, dropped or cut. ``checkpointing``, on, off or auto, matters
    where PyTorch computes; auto takes it where the fewest tokens at once do not fit without.

    UserError with the numbers when nothing fits, or only what may not be done without asking.
    """

    ways = [False] if compiled or checkpointing == "off" else [True] if checkpointing == "on" else [False, True]

    def tried(method: str, length: int, rows: int = 1, again: bool = ways[-1]) -> Needs:
        trained = config.parameters() if method == "full" else adapter_weights(config, rank, targets, method == "dora")
        weight_bytes = packed if method == "qlora" else None
        return needs(
            config, method=method, trained=trained, micro_tokens=rows * length, length=length, dtype=dtype,
            weight_bytes=weight_bytes, compiled=compiled, checkpointing=again, device=device,
        )  # fmt: skip

    methods = [method]
    if packed is not None and method in ("lora", "dora"):
        methods.append("qlora")
    lengths = [row] + ([n for n in SHORTER if n < longest] if may_cut else [])
    for length in lengths:
        wanted = max(1, micro_tokens // length)
        for one in methods:
            for again, rows in itertools.product(ways, _halved(wanted)):
                found = tried(one, length, rows, again)
                if found.total <= budget:
                    why = one if one == method else f"{one}, because {method} needs {gb(tried(method, length).total)}"
                    return Fit(one, length, rows, wanted, found, why, again)
    smallest = tried(methods[-1], lengths[-1])
    advice = []
    if method == "full" and (less := tried("lora", row)).total <= budget:
        advice.append(f"adapters would need {gb(less.total)}: --method lora")
    if packed is None and method != "full":
        quarter = dataclasses.replace(tried("lora", row), weights=round(config.parameters() * 0.6)).total
        if quarter <= budget:
            advice.append(
                f"a base in 4 bits would need about {gb(quarter)}: criadero quantize {base} --to int4, and tune that"
            )
    if not may_cut and longest > SHORTER[-1]:
        shorter = tried(methods[-1], SHORTER[-1]).total
        if shorter <= budget:
            advice.append(
                f"shorter examples would fit (from {gb(shorter)}): allow it with --too_long split, drop or truncate"
            )
    advice.append("give it more, or take a smaller model")
    raise UserError(
        f"fit {budget / 1e9:g}: tuning {base} takes at least {smallest.words()} ({methods[-1]}, a row of {lengths[-1]} tokens at "
        f"once); {'; '.join(advice)}"
    )  # fmt: skip


def _halved(rows: int) -> list[int]:
    """``rows``, its halves, and at last one."""
    return [rows >> n for n in range(rows.bit_length())]
