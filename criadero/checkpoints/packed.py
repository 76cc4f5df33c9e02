"""Quantised model folders in the ``compressed-tensors`` layout ("pack-quantized"), which transformers and vLLM open.

Layout: https://github.com/vllm-project/compressed-tensors. A linear layer ``X`` is three tensors: ``X.weight_packed`` int32
``[N, K * bits / 32]`` (number j of a row in bits ``j * bits`` upwards, stored as number + 2 ** (bits - 1)), ``X.weight_scale``
``[N, K / group]``, ``X.weight_shape`` int64 ``[N, K]``. Little-endian, the bytes of a 4-bit row are those of a `QuantTensor`:
it is mapped, not copied. Which modules have how many bits stands in ``quantization_config`` of ``config.json``.

Neither transformers nor vLLM open a packed embedding table. So a table of 8-bit numbers is stored, by default, as the plain
bfloat16 tensor it dequantises to: with scales that are powers of two, bfloat16 holds ``number * scale`` exactly. Everyone
opens it, and here it becomes the same int8 numbers again. ``config.json`` names such tables under ``criadero``.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.checkpoints.safetensors_hf import (
    legacy_config,
    read_config,
    read_json,
    read_safetensors_header,
    weight_files,
    write_generation,
    write_json,
)  # fmt: skip
from criadero.checkpoints.states import check_shapes, check_tie, expected_shapes
from criadero.config import ModelConfig
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, floats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Weight = QuantTensor | np.ndarray  # an array: float32, float16, or uint16 that holds the bits of bfloat16
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
ARRAYS = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64}
OUTER = ("model.embed_tokens.weight", "lm_head.weight")


def is_quantised(folder: Path) -> bool:
    """Whether ``config.json`` says that the weights are quantised, in whatever layout."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("quantization_config") is not None


def schemes_of(folder: Path) -> list[dict[str, Any]]:
    """The config groups of a quantised folder: ``bits``, ``group`` (0: one scale a row), ``targets``."""
    file = folder / "config.json"
    return _schemes(read_json(file).get("quantization_config"), file)


# --- reading ---


def load_quantised(folder: str | Path) -> dict[str, Weight]:
    """The weights of a quantised folder by Hugging Face's names, memory-mapped; see `read_quantised`."""
    return read_quantised(folder)[1]


def read_quantised(folder: str | Path) -> tuple[ModelConfig, dict[str, Weight]]:
    """Configuration and weights of a quantised folder, every name, dtype, shape and size checked against each other.

    Matrices that were quantised are `QuantTensor`s; other tensors are arrays: float32, float16, or uint16 holding the bits
    of bfloat16. 4-bit numbers and plain tensors are mapped from the file, 8-bit ones copied once. A tied head is left out.
    UserError: another layout than pack-quantized, damage, or a configuration that does not fit the files.
    """
    folder = Path(folder)
    config, values = read_config(folder), read_json(folder / "config.json")
    schemes = _schemes(values.get("quantization_config"), folder / "config.json")
    arrays: dict[str, np.ndarray] = {}
    for path in weight_files(folder):
        for name, array in map_file(path).items():
            if name in arrays:
                raise UserError(f"{path}: tensor {name} is also in another file of this model")
            arrays[name] = array
    state: dict[str, Weight] = {}
    for name in [name for name in arrays if name.endswith("." + PACKED)]:
        module = name.removesuffix("." + PACKED)
        state[module + ".weight"] = _unpack(module, arrays, schemes, folder)
    for name, array in arrays.items():
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        if array.dtype not in (np.float32, np.float16, np.uint16):
            raise UserError(f"{folder}: tensor {name} is not a weight that can be read: it has type {array.dtype}")
        if name in state:
            raise UserError(f"{folder}: {name} is there both packed and plain")
        state[name] = array
    check_shapes(config, {name: tuple(weight.shape) for name, weight in state.items()}, str(folder))
    for name, group in _tables(values, folder / "config.json").items():
        state[name] = _table(state.get(name), group, f"{folder}: {name}")
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        pair = {"lm_head.weight": floats(head), "model.embed_tokens.weight": floats(state["model.embed_tokens.weight"])}
        check_tie(config, pair, str(folder))
    return config, {name: state[name] for name, _ in expected_shapes(config)}


def dequantised_state(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of a quantised folder in float32, for the PyTorch model."""
    config, state = read_quantised(folder)
    return config, {name: to_torch(weight) for name, weight in state.items()}


def to_torch(weight: Weight) -> Tensor:
    """Any weight as float32 ``[N, K]`` or ``[N]``."""
    import torch

    return torch.from_numpy(np.array(floats(weight)))  # copied, since a mapped one cannot be written to


def as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor of its own dtype; uint16 is bfloat16. Copied, since a mapped one cannot be written to."""
    import torch

    copy = torch.from_numpy(np.array(array))
    return copy.view(torch.bfloat16) if array.dtype == np.uint16 else copy


def map_file(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file as a read-only array over the mapped file."""
    header = read_safetensors_header(path)  # checks that all of it lies inside the file
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    whole = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
    arrays = {}
    for name, (kind, shape) in header.items():
        if kind not in ARRAYS:
            raise UserError(f"{path}: tensor {name} has type {kind}; only {', '.join(ARRAYS)} are read")
        begin, end = (8 + length + at for at in entries[name]["data_offsets"])
        arrays[name] = whole[begin:end].view(ARRAYS[kind]).reshape(shape)
    return arrays


def _unpack(module: str, arrays: dict[str, np.ndarray], schemes: list[dict[str, Any]], folder: Path) -> QuantTensor:
    """Take the three tensors of a module out of ``arrays``."""

    def bad(reason: str) -> UserError:
        return UserError(f"{folder}: {module} is damaged: {reason}; get the model again")

    scheme = next((one for one in schemes if _matches(module, one["targets"])), None)
    if scheme is None:
        raise bad("it is packed, but no config group in quantization_config names it")
    packed = arrays.pop(f"{module}.{PACKED}")
    scales, shape = arrays.pop(f"{module}.{SCALE}", None), arrays.pop(f"{module}.{SHAPE}", None)
    if scales is None or shape is None:
        raise bad(f"{SCALE if scales is None else SHAPE} is missing")
    for extra in ("weight_zero_point", "weight_g_idx"):
        if f"{module}.{extra}" in arrays:
            raise UserError(
                f"{folder}: {module} has a {extra}, which is not supported: quantise symmetrically, groups in order"
            )
    if shape.dtype != np.int64 or shape.shape != (2,) or packed.dtype != np.int32 or packed.ndim != 2:
        raise bad(f"{PACKED} must be a matrix of int32, {SHAPE} two int64")
    rows, columns, bits = int(shape[0]), int(shape[1]), scheme["bits"]
    if rows < 1 or columns < 1 or packed.shape != (rows, columns * bits // 32) or columns * bits % 32:
        raise bad(f"{PACKED} has shape {list(packed.shape)}, which is not {rows} x {columns} numbers of {bits} bits")
    group = scheme["group"] or columns
    if columns % group or scales.shape != (rows, columns // group):
        raise bad(f"{SCALE} has shape {list(scales.shape)}, which is not {rows} rows in groups of {group} of {columns}")
    if scales.dtype == np.uint16:
        scales = (scales.astype(np.uint32) << 16).view(np.float32)
    if scales.dtype not in (np.float16, np.float32) or not np.isfinite(scales).all():
        raise bad(f"{SCALE} holds values that are not finite numbers")
    numbers = packed.view(np.uint8)  # [N, K * bits / 8]; an int32 is little-endian here as in the file
    return QuantTensor(bits, group, numbers if bits == 4 else (numbers ^ 0x80).view(np.int8), scales)


def _schemes(config: Any, where: Path) -> list[dict[str, Any]]:
    """The config groups as dicts of bits, group (0: one scale a row) and targets."""
    if not isinstance(config, dict):
        raise UserError(f"{where}: quantization_config is missing: this is not a quantised model")
    method, layout = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or layout != "pack-quantized":
        what = f"{method!r}" if method != "compressed-tensors" else f"{method!r} in format {layout!r}"
        raise UserError(f"{where}: quantised by {what}; only compressed-tensors in format 'pack-quantized' is read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(f"{where}: quantization_config has no config_groups")
    schemes = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if (
            not isinstance(weights, dict)
            or not isinstance(targets, list)
            or not all(isinstance(t, str) for t in targets)
        ):
            raise UserError(f"{where}: config group {name!r} lacks targets or weights")
        size = weights.get("group_size") if weights.get("strategy") == "group" else 0
        known = weights.get("type") == "int" and weights.get("symmetric", True) and weights.get("num_bits") in (4, 8)
        known = known and weights.get("strategy") in ("group", "channel") and not group.get("input_activations")
        if (
            not known
            or not isinstance(size, int)
            or size < 0
            or weights.get("actorder") not in (None, "weight", "static")
        ):
            raise UserError(
                f"{where}: config group {name!r} is not supported: only symmetric int weights of 4 or 8 bits, with a "
                "scale a group or row, are read"
            )
        schemes.append({"bits": weights["num_bits"], "group": size, "targets": targets})
    return schemes


def _matches(module: str, targets: list[str]) -> bool:
    """Whether a module is among the targets: names, ``re:`` and a pattern, or the names of classes."""
    kind = "Embedding" if module == "model.embed_tokens" else "Linear"
    try:
        return any(re.match(t[3:], module) if t.startswith("re:") else t in (module, kind) for t in targets)
    except re.error:
        return False


def _tables(values: dict[str, Any], where: Path) -> dict[str, int]:
    """Names of plain tables that hold 8-bit numbers, and their group."""
    own = values.get("criadero")
    tables = own.get("int8_tables") if isinstance(own, dict) else None
    if tables is None:
        return {}
    if not isinstance(tables, dict) or not all(k in OUTER and isinstance(v, int) and v > 0 for k, v in tables.items()):
        raise UserError(f"{where}: criadero.int8_tables must map {' or '.join(OUTER)} to a group size")
    return tables


def _table(array: Weight | None, group: int, what: str) -> QuantTensor:
    if array is None or isinstance(array, QuantTensor) or array.shape[1] % group:
        raise UserError(f"{what} is not a plain table in groups of {group}, as config.json says")
    found = int8_of_table(array, group)
    if found is None:
        raise UserError(f"{what} does not hold 8-bit numbers with scales of powers of two, as config.json says")
    return found


def int8_of_table(table: np.ndarray, group: int) -> QuantTensor | None:
    """The int8 numbers of a table ``[N, K]`` that was made by `power_of_two`; None when it was not."""
    rounded = power_of_two(table, group)
    return rounded if np.array_equal(rounded.dequantise(), floats(table)) else None


def power_of_two(table: np.ndarray, group: int) -> QuantTensor:
    """A table ``[N, K]`` (float32, float16, or bits of bfloat16) as int8 numbers in groups, scales being the smallest
    powers of two that fit."""
    rows, columns = table.shape
    q = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group), np.float16)
    step = max(1, (1 << 22) // columns)
    for start in range(0, rows, step):
        w = floats(table[start : start + step]).reshape(-1, columns // group, group)  # [n, groups, group]
        largest = np.abs(w).max(-1)
        if not largest.max() < 2**22:  # so that the scales are float16
            raise UserError("the embedding table holds values that are too large or not finite: the model is damaged")
        # 127.5 and more would round to 128, one too many
        exponent = np.frexp(largest * np.float32(128 / 127.5))[1] - 7
        scale = np.ldexp(np.float32(1), exponent.clip(min=-24))
        q[start : start + step] = np.rint(w / scale[..., None]).clip(-127, 127).astype(np.int8).reshape(-1, columns)
        scales[start : start + step] = scale.astype(np.float16)
    return QuantTensor(8, group, q, scales)


# --- writing ---


def write_quantised(
    state: Mapping[str, QuantTensor | Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    pack_tables: bool = False,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write ``config.json``, ``generation_config.json`` and the packed weights of a model.

    Plain matrices are stored as ``dtype``, norms in their own. An int8 embedding table is stored plain (see the head of this file) unless
    ``pack_tables``, which only Criadero opens. The folder is the caller's.
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    check_shapes(config, shapes, "the model to write")
    values = legacy_config(config, dtype)
    files: list[dict[str, Tensor]] = [{}]
    packed: dict[str, QuantTensor] = {}
    size = total = 0
    for name, _ in expected_shapes(config):
        weight = state[name]
        if isinstance(weight, QuantTensor) and name == OUTER[0] and not pack_tables:
            values["criadero"] = {"int8_tables": {name: weight.group}}
            weight = exact(weight, dtype)
        if isinstance(weight, QuantTensor):
            packed[name.removesuffix(".weight")] = weight
            tensors = _pack(name.removesuffix(".weight"), weight)
        else:
            narrow = dtype if weight.ndim == 2 else torch.float32 if weight.dtype == torch.float64 else weight.dtype
            tensors = {name: weight.detach().to(device="cpu", dtype=narrow).contiguous()}
        taken = sum(tensor.nbytes for tensor in tensors.values())
        if files[-1] and size + taken > max_shard_bytes:
            files.append({})
            size = 0
        files[-1] |= tensors
        size, total = size + taken, total + taken
    plain = [n.removesuffix(".weight") for n, s in shapes.items() if len(s) == 2 and n != OUTER[0]]
    if config.tie_word_embeddings:
        plain.append("lm_head")
    values["quantization_config"] = quantization_config(packed, [name for name in plain if name not in packed])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(files, 1):
            one = len(files) == 1
            file = "model.safetensors" if one else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        write_json(folder / "config.json", values)
        write_generation(config, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def exact(table: QuantTensor, dtype: torch.dtype) -> Tensor:
    """A table as plain numbers of ``dtype``, which must hold them exactly."""
    import torch

    wide = torch.from_numpy(table.dequantise())
    narrow = wide.to(dtype)
    if not torch.equal(narrow.float(), wide):
        raise ValueError(f"{dtype} does not hold this table exactly")
    return narrow


def _pack(module: str, weight: QuantTensor) -> dict[str, Tensor]:
    import torch

    if weight.mins is not None:
        raise ValueError(f"{module}: minimums have no place in the symmetric layout")
    numbers = weight.q if weight.bits == 4 else weight.q.view(np.uint8) ^ 0x80
    if numbers.shape[1] % 4:
        raise ValueError(f"{module}: rows of {weight.shape[1]} numbers of {weight.bits} bits do not fill whole int32")
    return {
        f"{module}.{PACKED}": torch.from_numpy(np.ascontiguousarray(numbers).view(np.int32)),
        f"{module}.{SCALE}": torch.from_numpy(np.ascontiguousarray(weight.scales)),
        f"{module}.{SHAPE}": torch.tensor(weight.shape, dtype=torch.int64),
    }


def quantization_config(packed: Mapping[str, QuantTensor], ignore: list[str]) -> dict[str, Any]:
    """The table of ``config.json`` that says which modules have how many bits; every module is named once."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for module, weight in packed.items():
        kinds.setdefault((weight.bits, 0 if weight.group == weight.shape[1] else weight.group), []).append(module)
    # one pattern for a slot that is of one kind in all layers, names otherwise
    slots = {module: module.rsplit(".", 1)[-1] for module in [*packed, *ignore]}
    groups = {}
    for number, ((bits, group), modules) in enumerate(kinds.items()):
        mine = set(modules)
        whole = {slots[m] for m in modules if all(o in mine for o, slot in slots.items() if slot == slots[m])}
        targets = [rf"re:.*\.{slot}$" for slot in sorted(whole) if slot.endswith("_proj")]
        targets += [module for module in modules if slots[module] not in whole or not slots[module].endswith("_proj")]
        weights = {
            "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "group" if group else "channel", "group_size": group or None,
        }  # fmt: skip
        groups[f"group_{number}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
            "format": "pack-quantized",
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": sorted(ignore), "kv_cache_scheme": None,
    }  # fmt: skip
