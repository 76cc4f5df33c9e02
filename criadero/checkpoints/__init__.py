"""Llama checkpoints of every make, in and out: Hugging Face safetensors, Meta's ``.pth``, GGUF, and our adapters.

The layout is converted once, here: everything past this package has Hugging Face's names and rotate-half rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from criadero.artifact import Artifact, read_passport, require, resolve
from criadero.chat import Template, load_template
from criadero.checkpoints.adapter_file import read_adapter_config
from criadero.checkpoints.gguf import (
    is_quantised_gguf,
    read_gguf,
    read_gguf_config,
    read_gguf_quantised,
    write_gguf,
)  # fmt: skip
from criadero.checkpoints.gguf_vocab import read_gguf_template, read_gguf_tokenizer
from criadero.checkpoints.meta import is_meta_folder, read_meta
from criadero.checkpoints.packed import (
    as_tensor,
    dequantised_state,
    is_quantised,
    load_quantised,
    read_quantised,
    to_torch,
    write_quantised,
)  # fmt: skip
from criadero.checkpoints.safetensors_hf import read_config, read_hf, read_json, save_hf
from criadero.checkpoints.states import build, fill
from criadero.config import ModelConfig
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor
from criadero.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # what only needs a configuration or a tokenizer does without torch
    import torch
    from torch import Tensor

    from criadero.model import Llama

__all__ = [
    "holds_quantised",
    "is_quantised",
    "is_quantised_gguf",
    "load_config",
    "load_frozen",
    "load_model",
    "load_quantised",
    "read_gguf",
    "read_gguf_config",
    "read_gguf_quantised",
    "read_gguf_template",
    "read_gguf_tokenizer",
    "read_hf",
    "read_meta",
    "read_quantised",
    "save_hf",
    "template_of",
    "tokenizer_of",
    "weights_sample",
    "write_gguf",
    "write_quantised",
]

Ref = str | Path | Artifact
ADAPTER = "adapter_config.json"
_WEIGHTS = (".safetensors", ".gguf", ".pth")
_PIECES, _PIECE = 64, 4096  # of a file of weights that are looked at, and their bytes


def load_model(
    ref: Ref, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", require_passport: bool = False
) -> Llama:
    """The model that ``ref`` means: a bundled name, an artifact, a Hugging Face or Meta folder, a ``.gguf`` file.

    An adapter is merged into its base. ``dtype`` default: as stored (float32 for what was quantised). In evaluation mode.
    With ``require_passport`` every file of it (and of an adapter's base) has to be as its passport says: UserError otherwise.
    """
    path = find_place(ref)
    if require_passport:
        require(path)
    if path.is_dir() and (path / ADAPTER).is_file():
        from criadero.lora import load_adapter, merge

        base = adapter_base(path)
        check_base(path, base)
        model = load_model(base, dtype=dtype, device=device, require_passport=require_passport)
        load_adapter(model, path)
        model.config = _with_ends(model.config, path)
        return merge(model).requires_grad_(True).eval()
    config, state = _read(path)
    return build(config, state, dtype=dtype, device=device)


def holds_quantised(ref: Ref) -> bool:
    """Whether the weights that ``ref`` means lie there in 4 or 8 bits; an adapter's do when its base's do."""
    path = find_place(ref)
    if path.is_dir() and (path / ADAPTER).is_file():
        return holds_quantised(adapter_base(path))
    return is_quantised(path) if path.is_dir() else is_quantised_gguf(path)


def load_frozen(ref: Ref, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> Llama:
    """A quantised model with the matrices of its blocks left in 4 or 8 bits (`QuantLinear`), for QLoRA; the embedding, the
    output matrix and the norms in ``dtype``. Nothing of it learns. UserError when nothing of it is quantised."""
    import torch

    from criadero.model import Llama
    from criadero.quant_linear import QuantLinear

    path = find_place(ref)
    if not holds_quantised(path) or (path.is_dir() and (path / ADAPTER).is_file()):
        raise UserError(f"{path} is not a quantised model: make one with criadero quantize")
    config, state = read_quantised(path) if path.is_dir() else read_gguf_quantised(path)[:2]
    with torch.device("meta"):
        model = Llama(config)
    plain: dict[str, Tensor] = {}
    # what becomes tensors of another dtype first, and each forgotten once it is used: its memory serves the next
    for name in sorted(state, key=lambda name: isinstance(state[name], QuantTensor)):
        weight = state.pop(name)
        module = name.removesuffix(".weight")
        if isinstance(weight, QuantTensor) and name.startswith("model.layers."):
            parent, _, child = module.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantLinear(weight, dtype, device))
        else:
            stored = to_torch(weight) if isinstance(weight, QuantTensor) else as_tensor(weight)
            plain[name] = stored.to(device=device, dtype=dtype)
    fill(model, plain)
    return model.requires_grad_(False).eval()


def load_config(ref: Ref) -> ModelConfig:
    """The configuration of what `load_model` would load; weights are read only where it cannot be known without them."""
    path = find_place(ref)
    if path.is_dir() and (path / ADAPTER).is_file():
        config = _with_ends(load_config(adapter_base(path)), path)
        ids = [i for rows in read_adapter_config(path)["trainable_token_indices"].values() for i in rows]
        return dataclasses.replace(config, vocab_size=max([config.vocab_size, *(i + 1 for i in ids)]))
    if path.is_file():
        return read_gguf_config(_gguf(path))
    if is_meta_folder(path):
        return read_meta(path)[0]
    return read_config(_model_folder(path))


def tokenizer_of(ref: Ref) -> Tokenizer:
    """The tokenizer that travels with a model: of a folder, in a ``.gguf`` file, or an adapter's base's."""
    path = find_place(ref)
    if path.is_file():
        found = read_gguf_tokenizer(_gguf(path))
        if found is None:
            raise UserError(f"{path}: this GGUF file has no tokenizer that can be read: use the model's folder")
        return found
    own = any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    if (path / ADAPTER).is_file() and not own:
        return tokenizer_of(adapter_base(path))
    return load_tokenizer(path if own or is_meta_folder(path) else _model_folder(path))


def template_of(ref: Ref) -> Template:
    """The chat template that travels with a model: of a folder, in a ``.gguf`` file, or an adapter's base's."""
    path = find_place(ref)
    if path.is_file():
        source = read_gguf_template(_gguf(path))
        if source is None:
            raise UserError(f"{path} has no chat template: it is a base model, which has not learned to chat")
        return Template(source, str(path))
    if (path / ADAPTER).is_file():
        try:
            return load_template(path)
        except UserError:
            return template_of(adapter_base(path))
    return load_template(path)


def find_place(ref: Ref) -> Path:
    """The folder or file of a model; of a folder that holds nothing but one GGUF file (as `export` makes), that file."""
    path = resolve(ref)
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json", ADAPTER)):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"{path} holds {len(files)} GGUF files: name one of them, such as {files[0]}")
        return files[0] if files else path
    return path


def _with_ends(config: ModelConfig, adapter: Path) -> ModelConfig:
    """The base's configuration with the ids that end an answer after tuning, where the adapter's folder names them."""
    file = adapter / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.is_file() else None
    if eos is None:
        return config
    return dataclasses.replace(config, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)


def weights_sample(base: Path) -> str:
    """A hash of pieces of the weights at ``base``: other weights of the same shapes have another, in milliseconds however large they
    are. Where single bytes have changed, ``criadero passport verify`` finds it, which reads all of them."""
    files = [base] if base.is_file() else sorted(file for file in base.iterdir() if file.suffix in _WEIGHTS)
    hasher = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{size}\n".encode())
        with open(file, "rb") as opened:
            for n in range(_PIECES):
                opened.seek(size * n // _PIECES)
                hasher.update(opened.read(_PIECE))
    return "sha256:" + hasher.hexdigest()


def check_base(folder: Path, base: Path) -> None:
    """A sealed adapter belongs to the one base that its passport names, by its id and a sample of its weights: another of the same
    shape would give nonsense."""
    passport = read_passport(folder)
    there = read_passport(base) if base.is_dir() else None
    wanted = [row["id"] for row in passport["inputs"] if row.get("relation") == "finetune_of"] if passport else []
    if there and wanted and there["id"] not in wanted:
        raise UserError(
            f"{folder}: this adapter was made on another base than {base} (its passport names {wanted[0][7:19]}, "
            f"this is {there['id'][7:19]}): bring that base back, or tune again"
        )
    sample = (passport.get("model") or {}).get("base_sample") if passport else None
    if sample and sample != weights_sample(base):
        raise UserError(
            f"{folder}: this adapter was made on other weights than {base.resolve()} has now: bring those back, or tune again"
        )


def adapter_base(folder: Path) -> Path:
    """Where the base of an adapter lies: as written, or relative to the adapter's own folder."""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path does not name the base model")
    near = folder / base
    try:
        found = near if near.exists() else resolve(base)
    except UserError as error:
        why = f"nothing at {near.resolve()}" if base.startswith(".") else str(error)
        raise UserError(
            f"{folder}: the base of this adapter is not here ({why}): put it back there, or say in {ADAPTER} where it is "
            "(base_model_name_or_path)"
        ) from None
    if found.resolve() == folder.resolve():
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path names the adapter itself")
    if (found / ADAPTER).is_file():
        raise UserError(f"{folder}: its base {base!r} is an adapter too: merge that one first")
    return found


def _read(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    if path.is_file():
        config, state, _ = read_gguf(_gguf(path))
        if not state:
            raise UserError(f"{path}: holds a vocabulary only, no model")
        return config, state
    if is_meta_folder(path):
        return read_meta(path)
    if is_quantised(_model_folder(path)):
        return dequantised_state(path)
    return read_hf(path)


def _gguf(path: Path) -> Path:
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{path}: not a model: give a folder with config.json and safetensors, or a .gguf file")
    return path


def _model_folder(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model folder: it has no config.json (nor Meta's params.json)")
    return path
