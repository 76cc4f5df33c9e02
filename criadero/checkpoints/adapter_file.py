"""PEFT's ``adapter_config.json``: read and checked, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from criadero.errors import UserError

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``, checked: ``r``, ``lora_alpha``, ``target_modules`` (a tuple), ``use_rslora``, ``use_dora`` and
    ``trainable_token_indices`` (a dict); whatever this file does not compute is refused."""
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), config["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable adapter ({error})") from None
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "lora_bias"):
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
    rows = config.get("trainable_token_indices") or {}
    rows = {"embed_tokens": rows} if isinstance(rows, list) else rows
    fits = (
        isinstance(rows, dict) and set(rows) <= {"embed_tokens", "lm_head"} and len(set(map(str, rows.values()))) <= 1
    )
    if not fits or not all(type(i) is int and 0 <= i < 2**31 for ids in rows.values() for i in ids):
        raise UserError(
            f"{path}: trainable_token_indices must list the same token ids for embed_tokens and lm_head: "
            f"{str(rows)[:80]} cannot be read"
        )
    return config | {
        "r": rank, "lora_alpha": alpha, "target_modules": tuple(targets), "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")), "trainable_token_indices": rows,
    }  # fmt: skip


def beside_a_base(folder: Path) -> str | None:
    """None when the adapter in ``folder`` is only added to what its base computes; else what it does besides, which the
    engine cannot do one request at a time: it has to be folded in."""
    config = read_adapter_config(folder)
    if config["use_dora"]:
        return "scales the base's answer (DoRA)"
    return "brings new tokens" if config["trainable_token_indices"] else None


def alone(folder: Path, more: str) -> str:
    """What to say where an adapter does ``more`` (`beside_a_base`) than can be done beside a base."""
    return (
        f"{folder}: this adapter {more}, which cannot be done beside the base one request at a time: fold it in with "
        f"criadero merge {folder} and serve the result"
    )
