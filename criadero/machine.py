"""Where and with what a step ran: code, environment, hardware, and the energy it took (measured, or estimated and said so)."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from criadero import __version__, places

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "zstandard", "pyarrow")
_RAPL = Path("/sys/class/powercap")
# Watts of one busy core with its share of memory and power supply. Servers take about 4 to 10, laptops 3 to 12: an
# estimate made of it can be wrong by half in either direction, which is why the passport names the method.
WATTS_PER_CORE = 7.0


def command() -> str:
    """The command, when it was ours; only the program's name otherwise (a notebook's arguments say nothing)."""
    program = Path(sys.argv[0] if sys.argv else "").name
    if program in ("criadero", "__main__.py", "cli.py"):
        return places.command(["criadero", *sys.argv[1:]])
    return program or "python"


@functools.cache
def code() -> dict[str, Any]:
    """The version of this package, and its commit when it runs from a checkout."""
    root = Path(__file__).resolve().parents[1]
    commit, dirty = None, None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
            commit = git(["git", "rev-parse", "HEAD"]).stdout.strip() or None
            dirty = bool(git(["git", "status", "--porcelain", "--", "criadero"]).stdout.strip())
    return {"package": f"criadero=={__version__}", "git": commit, "dirty": dirty}


@functools.cache
def environment() -> dict[str, Any]:
    """Versions of Python, the system and the packages that compute."""
    import importlib.metadata  # brings in the modules for e-mail, which opening a model need not wait for

    packages = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    system = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    return {"python": platform.python_version(), "os": system, "cpu": cpu(), "packages": packages}


def cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Processor, logical cores this process may use, memory in bytes, and the GPUs that were in use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    found: dict[str, Any] = {"cpu": cpu(), "cores": cores}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cuda := _cuda():
        found["gpus"] = [cuda.get_device_name(n) for n in range(cuda.device_count())]
    return found


def _cuda() -> Any:
    """``torch.cuda`` when this process has used it; nothing is imported for that."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


# -- energy -----------------------------------------------------------------------------------------------------------


class EnergyMeter:
    """The energy from now until :meth:`stop`, of this session only: a run that was cut off and resumed counts its last part.

    Where the processor's counters (RAPL) can be read, what they say: the whole machine, while this ran. Elsewhere an estimate:
    CPU seconds of this process and its children times :data:`WATTS_PER_CORE`, and a used GPU's power limit times the time.
    """

    def __init__(self, folder: Path = _RAPL, every: float = 60.0) -> None:
        self.began, self.cpu_began = time.monotonic(), _cpu_seconds()
        self.domains = {path: _read_int(path / "max_energy_range_uj") or 0 for path in _packages(folder)}
        self.last = {path: _read_int(path / "energy_uj") for path in self.domains}
        self.microjoules = 0
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        if self.domains:  # a counter runs over in minutes on a busy server, so it is read now and then
            self.thread = threading.Thread(target=self._watch, args=(every,), daemon=True)
            self.thread.start()

    def _watch(self, every: float) -> None:
        while not self.ended.wait(every):
            self._add()

    def _add(self) -> None:
        for path, limit in self.domains.items():
            now, before = _read_int(path / "energy_uj"), self.last[path]
            if now is not None and before is not None:
                self.microjoules += now - before if now >= before else now - before + limit
            self.last[path] = now

    def stop(self) -> dict[str, Any]:
        """``kwh``, ``method`` (``rapl`` or ``estimate``), ``how`` in words, ``seconds``, ``cpu_seconds``."""
        self.ended.set()
        if self.thread:
            self.thread.join()
        seconds, busy = time.monotonic() - self.began, _cpu_seconds() - self.cpu_began
        if self.domains:
            self._add()
            joules, method = self.microjoules / 1e6, "rapl"
            how = "RAPL counters of the processor packages: the whole machine while this ran, without GPU and power supply"
        else:
            joules, method = busy * WATTS_PER_CORE, "estimate"
            how = f"CPU seconds x {WATTS_PER_CORE:g} W for a busy core (not measured; may be off by half)"
        watts = _gpu_watts() if _cuda() else 0.0
        if watts:
            joules, method = joules + watts * seconds, "estimate" if method == "estimate" else "rapl and estimate"
            how += f"; GPU: power limit of {watts:.0f} W x seconds, an upper bound"
        return {
            "kwh": _short(joules / 3.6e6),
            "method": method,
            "how": how,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(busy, 1),
        }


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _packages(folder: Path) -> list[Path]:
    """The powercap folders of whole processor packages, when their counters may be read."""
    try:
        found = sorted(path for path in folder.glob("*-rapl:*") if path.name.count(":") == 1)
    except OSError:
        return []
    return [path for path in found if _read_int(path / "energy_uj") is not None]


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _gpu_watts() -> float:
    """The sum of the GPUs' power limits, as nvidia-smi says them; 0 when it does not."""
    try:
        query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return sum(float(line) for line in said.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0
