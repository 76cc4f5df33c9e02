"""Exact resume: what a run must remember to go on as if it had never stopped.

``resume/step-00001200/`` holds ``state.safetensors`` (masters and moments) and, written last, ``state.json`` (step, settings,
size of the tensors file). A folder without a whole ``state.json`` is not there. The batches are functions of the step and the
random numbers are seeded by it, so nothing else needs keeping; a step that was cut short is done again from its start.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save(folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the state after ``step`` steps; older ones beyond ``keep`` go only when the new one is whole on disk."""
    target = folder / f"step-{step:08d}"
    partial = folder / f"step-{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
        with open(partial / "state.safetensors", "rb") as file:
            os.fsync(file.fileno())
        size = (partial / "state.safetensors").stat().st_size
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, "size": size, **about}, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:  # a full disk: what was written of it only takes more of the room
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    whole = sorted(folder.glob("step-????????"))
    for old in [*whole[:-keep], *folder.glob("step-????????.partial")]:  # partial: left by a kill while saving
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The newest whole state under ``folder``: what its ``state.json`` says, and its path; None when there is none."""
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            about = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if (path / "state.safetensors").stat().st_size == about["size"]:
                return about, path
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def resumed_dtype(folder: Path, wanted: str) -> str:
    """``wanted``, but for ``auto`` the dtype of the run that ``folder`` (a ``resume/``) would go on with: two measurements
    on a busy machine may differ, and a run goes on as it began."""
    found = latest(folder)
    if wanted != "auto" or found is None:
        return wanted
    return str((found[0].get("about") or {}).get("dtype", "torch.auto")).removeprefix("torch.")


def resumed_matmul(folder: Path, wanted: str) -> str:
    """As `resumed_dtype`, for ``base_matmul``: ``auto`` goes on as the run began, also on a processor that would choose otherwise."""
    found = latest(folder)
    if wanted != "auto" or found is None:
        return wanted
    return str((found[0].get("computed_by") or {}).get("base_matmul", "auto"))


def load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state found by `latest`."""
    return load_file(path / "state.safetensors")
