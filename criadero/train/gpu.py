"""Training through PyTorch, as on a GPU: attention that flash kernels take, blocks compiled, and blocks computed twice to save memory.

Nothing here asks for a GPU: all of it runs on a CPU too, where tests/test_train_gpu.py holds it against the plain forward pass. There the
compiled kernels (`criadero.train.fast`) compute instead, where they are.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from criadero.errors import UserError
from criadero.model import HALVES, Attend, Llama, causal, sdpa
from criadero.quant_linear import QuantLinear
from criadero.train import fast
from criadero.train.memory import Needs, free_memory

Switch = Literal["auto", "on", "off"]
CHECKPOINTING = "compute each block again on the way back instead of keeping what it needs; auto: where memory would not do otherwise"
COMPILE = "torch.compile of the blocks; auto: on a GPU, but for qlora. The compiled kernels of CPUs need neither"
NARROWEST = 64  # tokens of a group of documents


class Documents:
    """Causal attention within each document of packed rows, without a mask, so that SDPA may take its flash kernel.

    The documents are laid side by side in groups by length, ``[documents, 64]``, ``[documents, 128]`` and so on, padded on the right,
    where a causal attention never looks from a real token; what was found is laid back. Less than half of a group is padding, but for
    the narrowest. ``segments`` ``[B, T]`` as in `Batch`. What it gives at padding is finite and means nothing.
    """

    def __init__(self, segments: Tensor) -> None:
        device, size = segments.device, segments.numel()
        starts, lengths = spans(segments)
        widths = np.maximum(NARROWEST, 2 ** np.ceil(np.log2(lengths)).astype(np.int64))
        back = np.zeros(size, np.int64)  # where each token is found again, among the places of all groups
        self.groups: list[Tensor] = []  # tokens [documents, width]; past the end of a document its last one
        place = 0
        for width in np.unique(widths):
            first, count = (array[widths == width][:, None] for array in (starts, lengths))  # [n, 1] each
            index = np.arange(width)[None, :]
            tokens = first + np.minimum(index, count - 1)  # [n, width]
            real = index < count
            back[tokens[real]] = place + np.flatnonzero(real)
            place += tokens.size
            self.groups.append(torch.from_numpy(tokens).to(device))
        self.back = torch.from_numpy(back).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, size = q.shape
        flat = [t.transpose(1, 2).reshape(batch * length, -1, size) for t in (q, k, v)]  # [B T, H or K, Dh]
        found = []
        for tokens in self.groups:
            laid = [
                t.index_select(0, tokens.flatten()).view(*tokens.shape, -1, size).transpose(1, 2) for t in flat
            ]  # [n, H or K, width, Dh]
            found.append(sdpa(laid[0], laid[1], laid[2], causal=True).transpose(1, 2).reshape(-1, heads, size))
        out = torch.cat(found).index_select(0, self.back)  # [B T, H, Dh]
        return out.view(batch, length, heads, size).transpose(1, 2)


def spans(segments: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of ``[B, T]`` begin in the flat row of all, and how many tokens each has; padding is none."""
    numbers = segments.cpu().numpy()
    border = np.ones(numbers.shape, bool)
    border[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(border)
    lengths = np.diff(np.append(starts, numbers.size))
    real = numbers.reshape(-1)[starts] >= 0
    return starts[real], lengths[real]


def without_mask(segments: Tensor) -> Attend:
    """`causal` where each row is one document from its start, with padding behind it at most; else `Documents`."""
    starts, _ = spans(segments)
    alone = np.array_equal(starts, np.arange(len(segments)) * segments.shape[1])
    return causal if alone or not len(starts) else Documents(segments)


def prepare(model: Llama, wanted: Switch, compile: Switch, plain: Needs, saving: Needs) -> tuple[Needs, str]:
    """Set how ``model`` learns, by the recipe's two switches: what of memory that takes, ``plain`` or with checkpointing ``saving``, and
    a few words for the run's first lines, or "". UserError: compiling is asked for and nothing here can."""
    if fast.obstacle(model) is None:
        asked = [name for name, switch in (("checkpointing", wanted), ("compile", compile)) if switch == "on"]
        return plain, f"{' and '.join(asked)} not needed: the compiled kernels keep little of a block" if asked else ""
    device = model.model.embed_tokens.weight.device
    free = free_memory(device)
    model.checkpointing = wanted == "on" or (wanted == "auto" and free is not None and plain.total > free)
    said = ["blocks computed again on the way back"] if model.checkpointing else []
    if compile == "on" and device.type == "cpu" and not _compiler():
        raise UserError(
            "compile: PyTorch needs a C++ compiler for it, and there is none; install g++, or leave compile out"
        )
    packed = any(
        isinstance(module, QuantLinear) for module in model.modules()
    )  # the compiler might keep it written out
    may = device.type == "cuda" and find_spec("triton") is not None and not packed
    if compile == "on" or (compile == "auto" and may):
        # lengths differ from batch to batch: dynamic shapes, or it would compile again and again
        model.halves = (torch.compile(HALVES[0], dynamic=True), torch.compile(HALVES[1], dynamic=True))
        said.append("blocks compiled")
    return saving if model.checkpointing else plain, ", ".join(said)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++") or shutil.which("cl")
