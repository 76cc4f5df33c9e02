"""What runs a step: ``StepBatch`` in, logits out. The engine above it knows requests, the runner below it knows weights.

A `Runner` holds the weights and a paged cache of keys and values, and nothing else: which request owns which page is the
engine's business (`criadero.engine.cache`). There are two: `criadero.engine.native` (the compiled kernels) and
`criadero.engine.torch_runner`, its slow twin in plain PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from criadero.artifact import Artifact, require
from criadero.config import ModelConfig
from criadero.errors import UserError

PAGE = 32  # tokens in a page of the cache: what is shared, and what is rounded up to
NO_ADAPTER = -1

# (layer, slot) -> A f32 [r, K] and B f32 [N, r], B already times the adapter's scale; slots as in `SLOTS`
AdapterTensors = Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray]]
SLOTS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(slots=True)
class StepBatch:
    """The rows of one step. All arrays are C-contiguous int32; T rows, R requests, P pages a table, L rows wanted.

    Request r owns rows ``starts[r]`` to ``starts[r + 1]``, at least one, at consecutive positions that end at
    ``lengths[r] - 1``. Position p of request r lies in page ``tables[r, p // page]`` at offset ``p % page``; entries of a table
    past the request's own pages are 0 and are not read. Keys and values of the rows are written before they are attended to;
    what a page holds past ``lengths[r]`` (after a rejected draft) is garbage and is never read.
    """

    ids: np.ndarray  # [T] token ids
    positions: np.ndarray  # [T]
    starts: np.ndarray  # [R + 1]
    lengths: np.ndarray  # [R] tokens of context, the new ones included
    tables: np.ndarray  # [R, P] page numbers
    adapters: np.ndarray | None  # [R] adapter index or NO_ADAPTER; None: nobody has one
    logit_rows: np.ndarray  # [L] indices into T, increasing
    want_logits: bool = True
    want_hidden: bool = False


class Runner(Protocol):
    """Weights and a paged cache. One thread at a time calls it.

    A row's numbers do not depend on what else is in the batch, on how its prompt was cut into chunks, or on which pages it
    lies in: bit for bit in the native runner, to rounding in the twin.
    """

    config: ModelConfig
    page: int  # tokens a page
    pages: int  # pages in the cache
    name: str  # for people: "native avx512 int4", "torch cpu float32"

    def step(self, batch: StepBatch) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Logits float32 ``[L, V]`` (None without ``want_logits``) and final normed hidden states float32 ``[L, D]`` (None
        without ``want_hidden``) of ``logit_rows``. Both are the caller's to change, until the next step overwrites them.

        A shape, id, page or adapter that is out of bounds is a ValueError, raised before anything is written.
        """
        ...

    def add_adapter(self, index: int, tensors: AdapterTensors) -> None:
        """Make adapter ``index`` (0, 1, ...) ready for use; layers and slots that are missing are left as the base has them."""
        ...

    def drop_adapter(self, index: int) -> None:
        """Forget adapter ``index``; no request uses it any more."""
        ...


def make_runner(
    ref: str | Path | Artifact, *, runner: Literal["auto", "native", "torch"] = "auto", threads: int | None = None,
    pages: int | None = None, kv_memory: int | None = None, page: int = PAGE, sequences: int = 16, weights: str = "auto",
    kv: str = "auto", device: str = "cpu", compile: bool = False, require_passport: bool = False,
) -> Runner:  # fmt: skip
    """Load ``ref`` into the best runner there is: the native one where its compiled module is installed, else PyTorch.

    ``pages`` of ``page`` tokens, or ``kv_memory`` bytes, size the cache; the default is room for ``sequences`` whole contexts,
    at most a quarter of the free memory. ``weights`` and ``kv`` name number formats (``auto``: as stored, or what suits the
    runner); ``threads`` default to the physical cores. A model that cannot fit is refused before anything is loaded, and so is,
    with ``require_passport``, one of which a file (or of an adapter's base) is not as its passport says.
    """
    from criadero.engine.fit import cache_pages, check_fits

    if runner not in ("auto", "native", "torch"):
        raise UserError(f"there is no runner {runner!r}: use auto, native or torch")
    if threads is not None and not 1 <= threads <= 1024:
        raise UserError(f"threads must lie between 1 and 1024, not {threads}")
    if not 1 <= sequences <= 4096:
        raise UserError(f"sequences must lie between 1 and 4,096, not {sequences}")
    if runner == "auto":
        runner = "native" if device == "cpu" and native_available() else "torch"
    if runner == "native" and device != "cpu":
        raise UserError(f"the native runner computes on the CPU only, not on {device}: use runner torch")
    if runner == "native" and not native_available():
        raise UserError(
            "the native runner is not installed (criadero.kernels has no compiled module): use runner torch"
        )
    threads = threads or physical_cores()
    from criadero.checkpoints import ADAPTER, adapter_base, load_config

    if require_passport:
        folder = require(ref)
        if (folder / ADAPTER).is_file():
            require(adapter_base(folder))
    shape = load_config(ref)
    form = "bfloat16" if kv == "auto" and device.startswith("cuda") else kv
    pages = cache_pages(shape, page=page, pages=pages, memory=kv_memory, sequences=sequences, kv=form, device=device)
    check_fits(ref, shape, page=page, pages=pages, weights=weights, kv=form, runner=runner, device=device)
    options: dict[str, Any] = {"page": page, "pages": pages, "threads": threads, "weights": weights, "kv": kv}
    if runner == "native":
        native = importlib.import_module("criadero.engine.native")
        made: Runner = native.NativeRunner(ref, **options)
        return made
    from criadero.engine.torch_runner import TorchRunner

    return TorchRunner.load(ref, device=device, compile=compile, **options)


def native_available() -> bool:
    """Whether the compiled kernels and the runner over them are there, and are not switched off by CRIADERO_KERNELS."""
    if os.environ.get("CRIADERO_KERNELS") == "reference":
        return False
    for name in ("criadero.engine.native", "criadero.kernels._native"):
        try:
            if importlib.util.find_spec(name) is None:
                return False
        except ImportError:
            return False
    return True


def physical_cores() -> int:
    """Cores without their hyper-threads, and no more than this process may use; 1 where the system does not say."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        return max(1, os.cpu_count() or 1)
    seen = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                seen.add(file.read().strip())
        except OSError:
            seen.add(str(cpu))
    return max(1, len(seen))
