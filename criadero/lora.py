"""Low-rank adapters (LoRA, arXiv 2106.09685): attach, merge, and PEFT's files.

A frozen ``W`` gains ``scale * B A`` with ``A`` ``[r, in]``, ``B`` ``[out, r]``; B starts at zero, so an attached model computes
exactly what it did before. ``scale`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``rslora`` (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from criadero.errors import UserError
from criadero.model import Llama, ModelConfig

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: ``[..., in] -> [..., out]``."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        weight = base.weight
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + F.linear(F.linear(low, self.lora_A), self.lora_B * self.scale)


def attach(
    model: Llama, *, rank: int, alpha: float, targets: tuple[str, ...] = ALL_LINEAR, dropout: float = 0.0,
    rslora: bool = False, seed: int = 0,
) -> list[tuple[str, nn.Parameter]]:  # fmt: skip
    """Freeze ``model`` and put an adapter beside every linear layer whose last name is in ``targets``; the new parameters."""
    if rank < 1:
        raise UserError(f"lora_rank must be at least 1, not {rank}")
    check_targets(targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    found: list[tuple[str, nn.Parameter]] = []
    for name, parent, child in _linears(model, targets):
        layer = LoraLinear(getattr(parent, child), rank, scale, dropout)
        bound = 1 / math.sqrt(layer.base.in_features)  # PEFT's kaiming_uniform with a = sqrt(5)
        drawn = (torch.rand(layer.lora_A.shape, generator=generator) * 2 - 1) * bound
        layer.lora_A.data.copy_(drawn)
        setattr(parent, child, layer)
        found += [(f"{name}.lora_A", layer.lora_A), (f"{name}.lora_B", layer.lora_B)]
    return found


def check_targets(targets: tuple[str, ...]) -> None:
    """UserError when there are none, or one that is no linear layer of a block."""
    wrong = sorted(set(targets) - set(ALL_LINEAR))
    if wrong or not targets:
        raise UserError(f"lora_targets: {', '.join(wrong) or 'none given'}; choose from {', '.join(ALL_LINEAR)}")


def check_rank(rank: int, targets: tuple[str, ...], config: ModelConfig) -> None:
    """UserError when ``rank`` is above the smallest dimension of a layer in ``targets``: no matrix there has a higher one."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    out = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}  # o_proj's is its input
    smallest = min(min(config.hidden_size, out.get(target, config.intermediate_size)) for target in targets)
    if rank > smallest:
        raise UserError(
            f"lora_rank is {rank}, but the smallest layer that gets an adapter is {smallest} wide; give at most {smallest}"
        )


def _linears(model: Llama, targets: tuple[str, ...]) -> list[tuple[str, nn.Module, str]]:
    out = []
    for name, module in model.named_modules():
        parent, _, child = name.rpartition(".")
        if child in targets and isinstance(module, nn.Linear):
            out.append((name, model.get_submodule(parent), child))
    return out


def adapters(model: Llama) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge(model: Llama) -> Llama:
    """Fold every adapter into its weight, computed in float32 and rounded once, and take it away; the same model object."""
    for name, layer in adapters(model).items():
        weight = layer.base.weight
        delta = layer.lora_B.float() @ layer.lora_A.float() * layer.scale  # [out, in]
        weight.copy_((weight.float() + delta).to(weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def save_adapter(model: Llama, folder: Path, *, base: str, alpha: float, rslora: bool, dropout: float) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's format."""
    layers = adapters(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": next(iter(layers.values())).lora_A.shape[0], "lora_alpha": alpha, "lora_dropout": dropout,
        "use_rslora": rslora, "use_dora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}), "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Llama, folder: Path) -> Llama:
    """Attach the PEFT adapter in ``folder`` to ``model``; whatever this file does not compute is refused."""
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable adapter ({error})") from None
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias"):
        if config.get(key):
            raise UserError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise UserError(f"{path}: only LoRA adapters without bias can be read")
    if isinstance(targets, str):
        targets = ALL_LINEAR if targets == "all-linear" else (targets,)
    if not isinstance(targets, list | tuple) or rank < 1 or not set(targets) <= set(ALL_LINEAR):
        raise UserError(
            f"{path}: r = {rank}, target_modules = {targets!r}: only ranks from 1 and {', '.join(ALL_LINEAR)} can be read"
        )
    attach(model, rank=rank, alpha=alpha, targets=tuple(targets), rslora=bool(config.get("use_rslora")))
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: not readable ({error})") from None
    for name, layer in adapters(model).items():
        for part in ("lora_A", "lora_B"):
            tensor = tensors.pop(f"{PREFIX}{name}.{part}.weight", None)
            target = getattr(layer, part)
            if tensor is None or tensor.shape != target.shape:
                got = "missing" if tensor is None else f"of shape {list(tensor.shape)}, not {list(target.shape)}"
                raise UserError(f"{folder}: {name}.{part} is {got}; this adapter is for another base model")
            target.data.copy_(tensor)
    if tensors:
        raise UserError(f"{folder}: {next(iter(tensors))} and {len(tensors) - 1} more fit no layer of this base model")
    return model
