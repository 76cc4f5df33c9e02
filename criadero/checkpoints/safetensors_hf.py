"""Hugging Face model folders: ``config.json`` and ``*.safetensors``, one file or shards with an index.

Format: https://github.com/huggingface/safetensors#format. The header is checked here, against the size of the file,
before the file is mapped. No pickle (``pytorch_model.bin``) is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.checkpoints.states import check_shapes, check_tie, state_of, stored_dtype
from criadero.config import ModelConfig
from criadero.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from criadero.model import Llama

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
WEIGHTS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # names of torch's dtypes


def read_json(path: Path, limit: int = HEADER_LIMIT) -> dict[str, Any]:
    """A JSON object from a file, or one line about why not."""
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit} bytes: not a file of this kind")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder, in the spelling of transformers 4 or 5."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    values.pop("quantization_config", None)  # how the weights are stored, not what they are; `packed` looks at it
    return ModelConfig.from_hf(values, where=str(path))


def read_safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor, once each is known to lie inside the file without gap or overlap."""

    def bad(reason: str) -> UserError:
        return UserError(f"{path}: damaged safetensors file: {reason}; get the file again")

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise bad(f"it has {size} bytes")
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, HEADER_LIMIT):
                raise bad(f"its header claims {length} bytes of a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise bad("its header is not JSON") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        except (KeyError, TypeError, ValueError):
            raise bad(f"the entry of {name!r} lacks dtype, shape or data_offsets") from None
        if not whole or not isinstance(dtype, str) or dtype not in SIZES:
            raise bad(f"the entry of {name!r} is malformed: {str(entry)[:100]}")
        if math.prod(shape) * SIZES[dtype] != end - begin:
            raise bad(f"{name!r} of shape {shape} and type {dtype} does not take {end - begin} bytes")
        tensors[name] = dtype, tuple(shape)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise bad(f"{name!r} starts at {begin}, not where the tensor before it ends ({at})")
        at = end
    if at != size - 8 - length:
        raise bad(f"its tensors take {at} bytes, but it holds {size - 8 - length}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise UserError(f"{index}: weight_map must map tensor names to file names")
        names = sorted(set(mapping.values()))
        for name in names:
            if Path(name).name != name or name in (".", ".."):
                raise UserError(f"{index}: names a file outside its folder: {name!r}")
            if not (folder / name).is_file():
                raise UserError(f"{folder}: shard {name} is missing: download the model again")
        return [folder / name for name in names]
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    hint = f"; {found[0]} is a pickle, which is not read: convert it to safetensors first" if found else ""
    raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")


def read_files(paths: list[Path], *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of some safetensors files, floating-point ones only."""
    from safetensors import safe_open

    headers = {path: read_safetensors_header(path) for path in paths}
    owner: dict[str, Path] = {}
    for path, header in headers.items():
        for name, (dtype, _) in header.items():
            if name in owner:
                raise UserError(f"{path}: tensor {name} is also in {owner[name].name}")
            if dtype not in WEIGHTS:
                raise UserError(f"{path}: tensor {name} has type {dtype}; only {', '.join(WEIGHTS)} weights are read")
            owner[name] = path
    state = {}
    for path in paths:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in headers[path]:
                state[name] = file.get_tensor(name)
    return state


def read_hf(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of a Hugging Face folder, checked against each other before any weight is read."""
    folder = Path(folder)
    config = read_config(folder)
    paths = weight_files(folder)
    shapes = {name: shape for path in paths for name, (_, shape) in read_safetensors_header(path).items()}
    # Llama 1 and 2 files of 2023 store the rotary frequencies, which follow from the configuration
    derived = {name for name in shapes if name.endswith(".rotary_emb.inv_freq")}
    check_shapes(config, {name: shape for name, shape in shapes.items() if name not in derived}, str(folder))
    state = {name: tensor for name, tensor in read_files(paths, device=device).items() if name not in derived}
    check_tie(config, state, str(folder))
    return config, state


# --- writing ---


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHTS.values():
        raise UserError(f"weights cannot be stored as {dtype}: choose {', '.join(sorted(WEIGHTS.values()))}")
    return name


def legacy_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` that transformers 4.3x to 5.x read alike.

    YaRN needs care: transformers 4.51 takes the factor to be max_position_embeddings /
    original_max_position_embeddings and ignores ``factor`` where both are given, 5.x believes ``factor``. So the two are
    made to agree: the original length is left out where it equals the maximum (both then read it so), and otherwise
    max_position_embeddings, which enters no computation of ours, becomes factor times the original.
    """
    values = config.to_hf() | {"torch_dtype": _dtype_name(dtype)}
    scaling = values["rope_scaling"]
    if scaling and scaling["rope_type"] == "yarn" and scaling.get("original_max_position_embeddings"):
        original = scaling["original_max_position_embeddings"]
        if original == values["max_position_embeddings"]:
            del scaling["original_max_position_embeddings"]
        elif scaling["factor"] * original != values["max_position_embeddings"]:
            values["max_position_embeddings"] = math.ceil(scaling["factor"] * original)
    return {key: value for key, value in values.items() if value is not None or key == "rope_scaling"}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_generation(config: ModelConfig, folder: Path) -> None:
    """``generation_config.json``: the ids that begin, end and fill."""
    eos = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def save_hf(
    model_or_state: Llama | Mapping[str, Tensor],
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write ``config.json``, ``generation_config.json`` and the weights so that transformers 4.3x to 5.x read them.

    ``dtype`` default: the weights' own. More than ``max_shard_bytes`` become shards with an index. The folder is the
    caller's (a `Draft`'s, usually), which makes the whole appear at once.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    state = state_of(model_or_state, config)
    dtype = dtype or stored_dtype(state)
    _dtype_name(dtype)  # refused before anything is written
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        taken = tensor.numel() * dtype.itemsize
        if shards[-1] and size + taken > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += taken
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stale = [*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors.index.json"]
        for path in [*stale, folder / "model.safetensors"]:
            path.unlink(missing_ok=True)  # a left-over shard or index would be read instead
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            one = len(shards) == 1
            name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {key: tensor.to(device="cpu", dtype=dtype).contiguous() for key, tensor in shard.items()}
            save_file(tensors, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        if len(shards) > 1:
            total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
        write_json(folder / "config.json", legacy_config(config, dtype))
        write_generation(config, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
