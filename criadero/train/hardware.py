"""What this machine does well, measured when a run starts: memory allocator, dtype, memory in use."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
import time

import torch

from criadero.kernels import native, reference_train
from criadero.model import ModelConfig


def keep_memory() -> None:
    """Tell glibc to keep freed memory instead of handing each large tensor's pages back to the kernel and faulting them in
    again: 1.3 to 1.5 times the speed of training on a CPU (docs/log.md). Elsewhere than on Linux with glibc it does nothing."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt(3)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # as an unsigned number: never; 2 GiB, the largest int, is too little
    mallopt(top_pad, 256 * 2**20)


def matmul_seconds(dtype: torch.dtype, config: ModelConfig, rows: int) -> float:
    """Seconds of one feed-forward product and its two gradients with ``rows`` tokens, the best of several, by whoever will compute
    them in training: the compiled kernels where they have products of their own, else PyTorch."""
    x = torch.randn(rows, config.hidden_size).to(dtype)
    w = torch.randn(config.intermediate_size, config.hidden_size).to(dtype)
    y, dx, dw = x.new_empty(rows, len(w)), torch.empty_like(x), torch.empty_like(w)
    ours = getattr(native(), "train", None)
    product = ours.product if ours is not None and ours.has_product() else reference_train.product
    threads, best = torch.get_num_threads(), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product(x, w, y, None, False, True, False, threads)
        product(y, w, dx, None, False, False, False, threads)
        product(y, x, dw, None, True, False, False, threads)
        best = min(best, time.perf_counter() - start)
    return best


def choose_dtype(wanted: str, config: ModelConfig, device: str, rows: int = 1024) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and one line that says why.

    ``auto`` measures: bf16 is up to 2.5 times as fast as float32 on CPUs that multiply it natively. Where the compiled kernels
    compute, it is as fast on others; PyTorch's is several times slower there, on some 500 times (pytorch issue 146508).
    """
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted], f"{wanted}, as asked"
    if device.startswith("cuda"):
        return (torch.bfloat16, "bfloat16, the GPU has it") if torch.cuda.is_bf16_supported() else (
            torch.float32, "float32, the GPU lacks bfloat16")  # fmt: skip
    wide, narrow = (matmul_seconds(t, config, rows) for t in (torch.float32, torch.bfloat16))
    ratio = wide / narrow
    if ratio > 1.1:
        return torch.bfloat16, f"bfloat16, measured {ratio:.1f}x as fast as float32 here"
    return torch.float32, f"float32, bfloat16 measured {ratio:.2f}x its speed here"


def peak_memory_bytes() -> int:
    """The most memory this process has used so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
