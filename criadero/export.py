"""Write a model in another layout: a Hugging Face folder, or GGUF for llama.cpp and Ollama."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, create, disk_errors, open_artifact, read_passport, resolve
from criadero.errors import UserError

GGUF_TYPES = ("q8_0", "q4_0", "f16", "bf16", "f32")
HF_TYPES = ("f16", "bf16", "f32")


def export(
    ref: str | Path | Artifact, *, to: str, out: str | Path, type: str | None = None, overwrite: bool = False
) -> Artifact | Path:
    """Seal the model at `out` as ``to="hf"`` or ``to="gguf"`` with weights of `type` (default: as stored, or q8_0).

    A quantised model's numbers go into GGUF as they are, without another rounding, where its groups are multiples of 32.

    An `out` that ends with ``.gguf`` is written as that single file, which carries no passport. UserError: an unknown
    `to` or `type`, a model without tokenizer (GGUF needs one), or an `out` that exists.
    """
    types = {"gguf": GGUF_TYPES, "hf": HF_TYPES}.get(to)
    if types is None:
        raise UserError(f"--to {to}: cannot be written: choose gguf or hf")
    if type is not None and type.lower() not in types:
        raise UserError(f"--type {type}: not a type of {to}: choose one of {', '.join(types)}")
    source, out = resolve(ref), Path(out)
    exact = _as_quantised(source) if to == "gguf" else None
    kind = (type or exact or ("q8_0" if to == "gguf" else "as stored")).lower()
    single = out.name.endswith(".gguf")
    if single and to != "gguf":
        raise UserError(f"{out} is a name for --to gguf: give a folder")
    if single and out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"{out} exists: choose another place with --out, or replace it with --overwrite")
    if single:
        _write_single(source, out, kind)
        return out
    passport = read_passport(source) if source.is_dir() else None
    made = passport["kind"] if passport and passport["kind"] != "adapter" else "model"
    licence = (passport or {}).get("licence", {}).get("declared")
    rounds = kind in ("q8_0", "q4_0") and not (exact == "q4_0" or exact == kind)
    relation = "quantised_from" if rounds else "converted_from"
    config = {"to": to, "type": kind}
    with create(out, kind=made, config=config, licence=licence, overwrite=overwrite) as draft:
        draft.add_input(relation, ref)
        draft.model = (passport or {}).get("model") or {}
        if to == "gguf":
            _write_gguf(source, draft.path / f"{out.name}-{kind}.gguf", kind, out.name)
        else:
            _write_hf(source, draft.path, kind)
    return open_artifact(out)


def _write_single(source: Path, out: Path, kind: str) -> None:
    """One ``.gguf`` file, under another name until it is whole."""
    partial = out.with_name(f".{out.name}.partial")
    with disk_errors(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        except OSError as error:
            raise UserError(f"{out}: cannot be made ({error.strerror}): choose another place with --out") from error
        try:
            _write_gguf(source, partial, kind, out.name.removesuffix(".gguf"))
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)


def _write_gguf(source: Path, file: Path, kind: str, name: str) -> None:
    from criadero.checkpoints import load_model, read_quantised, tokenizer_of, write_gguf
    from criadero.checkpoints.packed import as_tensor
    from criadero.kernels.formats import QuantTensor

    model: Any = None
    if _as_quantised(source) in ("q4_0", kind):  # its numbers are written as they are
        config, state = read_quantised(source)
        model = config, {name: w if isinstance(w, QuantTensor) else as_tensor(w) for name, w in state.items()}
    model = model or load_model(source)
    write_gguf(model, tokenizer_of(source), file, type=kind.upper(), template=_template(source), name=name)


def _as_quantised(source: Path) -> str | None:
    """The GGUF type that holds a quantised folder's numbers as they are: q4_0, or q8_0 where none has 4 bits."""
    if not (source / "config.json").is_file():
        return None
    from criadero.checkpoints.packed import is_quantised, schemes_of

    if not is_quantised(source):
        return None
    return "q4_0" if any(scheme["bits"] == 4 for scheme in schemes_of(source)) else "q8_0"


def _write_hf(source: Path, folder: Path, kind: str) -> None:
    import torch

    from criadero.checkpoints import load_model, save_hf, tokenizer_of

    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}.get(kind)
    model = load_model(source)
    save_hf(model, model.config, folder, dtype=dtype)
    tokenizer_of(source).save(folder, chat_template=_template(source))


def _template(source: Path) -> str | None:
    """The chat template's source; None for a base model, which has none."""
    from criadero.checkpoints import template_of

    try:
        return template_of(source).source
    except UserError:
        return None
