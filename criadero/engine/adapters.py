"""LoRA adapters beside one base, each request with its own: loaded and unloaded while the engine runs."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from criadero.engine.runner import NO_ADAPTER, AdapterTensors, Runner
from criadero.errors import UserError

MOST = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_SLOT = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip


@dataclass
class _Loaded:
    index: int
    identity: str  # hash of its weights: what it computes is reused for the same weights only
    users: int = 0
    leaving: bool = False


class Adapters:
    """The adapters of one runner by name. ``base`` is where the base model lies; None: adapters are checked by shape only."""

    def __init__(self, runner: Runner, base: Path | None = None) -> None:
        self._runner, self._base = runner, base
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Those that a request may name now."""
        with self._lock:
            return sorted(name for name, one in self._loaded.items() if not one.leaving)

    def load(self, name: str, folder: str | Path) -> None:
        """Read the PEFT adapter in ``folder``. UserError: it is for another base, or not readable, or the name is taken."""
        if not _NAME.fullmatch(name):
            raise UserError(f"adapter name {name!r:.60}: use letters, digits and . _ : / - (at most 128)")
        with self._lock:
            if name in self._loaded:
                raise UserError(f"adapter {name!r} is loaded already: unload it first, or choose another name")
            if len(self._loaded) >= MOST:
                raise UserError(f"{MOST} adapters are loaded, which is the most there may be: unload one first")
            taken = {one.index for one in self._loaded.values()}
            index = next(number for number in range(MOST) if number not in taken)
        tensors, identity = read_adapter(folder, self._runner, self._base)
        self._runner.add_adapter(index, tensors)
        with self._lock:
            self._loaded[name] = _Loaded(index, identity)

    def unload(self, name: str, *, drain: bool = False) -> None:
        """Forget it now, or with ``drain`` when nobody uses it any more; else UserError while somebody does."""
        with self._lock:
            one = self._find(name)
            if one.users and not drain:
                raise UserError(
                    f"adapter {name!r} is used by {one.users} request{'s' if one.users > 1 else ''}: wait for their end, or drain it"
                )
            one.leaving = True
            self._drop_unused(name)

    def hold(self, name: str | None) -> tuple[int, str]:
        """One more request uses ``name``: its index and identity. UserError when it is not loaded."""
        if name is None:
            return NO_ADAPTER, ""
        with self._lock:
            one = self._find(name)
            one.users += 1
            return one.index, one.identity

    def release(self, name: str | None) -> None:
        """A request that used ``name`` has ended."""
        if name is not None:
            with self._lock:
                self._loaded[name].users -= 1
                self._drop_unused(name)

    def _find(self, name: str) -> _Loaded:
        one = self._loaded.get(name)
        if one is None or one.leaving:
            there = ", ".join(sorted(n for n, o in self._loaded.items() if not o.leaving)) or "none"
            raise UserError(f"there is no adapter {name!r:.60}; loaded: {there}")
        return one

    def _drop_unused(self, name: str) -> None:
        one = self._loaded[name]
        if one.leaving and one.users == 0:
            self._runner.drop_adapter(one.index)
            del self._loaded[name]


def read_adapter(folder: str | Path, runner: Runner, base: Path | None) -> tuple[AdapterTensors, str]:
    """The tensors of a PEFT LoRA adapter for `Runner.add_adapter`, scaled, and a hash of them.

    Checked as when it is merged (`criadero.lora.load_adapter`): the same refusals, names and shapes, and the base's hash.
    """
    import torch

    from criadero.artifact import resolve
    from criadero.checkpoints import ADAPTER, check_base
    from criadero.checkpoints.adapter_file import alone, beside_a_base
    from criadero.lora import adapters, load_adapter
    from criadero.model import Llama

    path = resolve(str(folder))
    if not (path / ADAPTER).is_file():
        raise UserError(f"{path}: not an adapter: it has no {ADAPTER}")
    if more := beside_a_base(path):
        raise UserError(alone(path, more))
    if base is not None:
        check_base(path, base)
    with torch.device("meta"):
        model = Llama(runner.config)
    model = model.to_empty(device="cpu")  # shapes are all that is needed: this memory is never touched
    load_adapter(model, path)
    tensors: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
    hasher = hashlib.sha256()
    for name, layer in adapters(model).items():
        parts = name.split(".")  # model.layers.3.self_attn.q_proj
        a = layer.lora_A.detach().float().numpy()
        b = (layer.lora_B.detach().float() * layer.scale).numpy()
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"{path}: {name} holds NaN or infinity")
        hasher.update(name.encode() + a.tobytes() + b.tobytes())
        tensors[int(parts[2]), _SLOT[parts[-1]]] = (np.ascontiguousarray(a), np.ascontiguousarray(b))
    return tensors, hasher.hexdigest()
