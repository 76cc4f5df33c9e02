"""The compiled kernels, and which of their code paths this processor takes.

``level()`` is one of ``avx512``, ``avx2``, ``neon`` and ``portable``, or ``reference`` where the module is missing: everything then runs in
plain PyTorch, many times slower, with the same results up to rounding. ``CRIADERO_KERNELS`` forces one of them; ``CRIADERO_NATIVE`` names a
folder (or file) to take the compiled module from instead of the installed one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor

NAME = "criadero.kernels._native"


def _load() -> Any | None:
    folder = os.environ.get("CRIADERO_NATIVE")
    if not folder:
        try:
            return importlib.import_module(NAME)
        except ModuleNotFoundError as error:
            if error.name != NAME:
                raise
            return None
    files = [Path(folder)] if Path(folder).is_file() else sorted(Path(folder).glob("_native*.so"))
    if not files:
        raise UserError(f"CRIADERO_NATIVE: no _native*.so in {folder}: build one there, or unset it")
    spec = importlib.util.spec_from_file_location(NAME, files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def native() -> Any | None:
    """The compiled module at the level of CRIADERO_KERNELS (or the best), or None: the reference path.

    UserError when CRIADERO_KERNELS names a level that cannot be had. Says once, on stderr, that the module is missing.
    """
    wanted = os.environ.get("CRIADERO_KERNELS", "")
    if wanted == "reference":
        return None
    module = _load()
    if module is None:
        if wanted:
            raise UserError(
                f"CRIADERO_KERNELS: {wanted} needs the compiled kernels, which this installation lacks: install a C++ "
                "compiler and criadero again, or set it to reference"
            )
        print(
            "note: criadero was installed without its compiled kernels, so generating is many times slower than it "
            "could be: install a C++ compiler (g++ or clang++) and criadero again",
            file=sys.stderr,
        )
        return None
    if wanted:
        if wanted not in module.levels():
            raise UserError(
                f"CRIADERO_KERNELS: {wanted} is not one of {', '.join(module.levels())} and reference, which this "
                "processor can run"
            )
        module.set_level(wanted)
    return module


def level() -> str:
    """The code path in use: ``avx512``, ``avx2``, ``neon``, ``portable`` or ``reference``."""
    module = native()
    return "reference" if module is None else str(module.level())


@functools.cache
def physical_cores() -> int:
    """The processor cores (not hyperthreads) that this process may use: the number of threads to compute with."""
    module = native()
    return (os.cpu_count() or 1) if module is None else int(module.physical_cores())


def pack(weights: QuantTensor | np.ndarray, threads: int | None = None) -> Any:
    """Weights `[N, K]`, repacked for the compiled kernels: a ``_native.Linear``. Needs the compiled module.

    A QuantTensor, float32, or bf16 as its bits in uint16. ValueError when the sizes do not fit together: groups must be
    a multiple of 32 that divides K, or, of 8-bit weights, 16 or K. Scales of groups are kept as float16 under one power
    of two for the whole tensor: float16 exactly, float32 to 2^-11 of each.
    """
    module = native()
    if module is None:
        raise UserError("packing needs the compiled kernels, which are missing or turned off by CRIADERO_KERNELS")
    threads = threads or physical_cores()
    if isinstance(weights, QuantTensor):
        arrays = [None if a is None else np.ascontiguousarray(a) for a in (weights.q, weights.scales, weights.mins)]
        return module.Linear.pack_quant(*arrays, weights.bits, weights.group, threads)
    kind = "bf16" if weights.dtype == np.uint16 else "f32"
    return module.Linear.pack_dense(np.ascontiguousarray(weights), kind, threads)
