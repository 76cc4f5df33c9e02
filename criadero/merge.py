"""Combine models: fold an adapter into its base, and average several models of one shape. ``criadero merge``.

========= ==============================================================================================================
linear    weighted mean of the weights ("model soups", Wortsman et al. 2022, arXiv 2203.05482)
slerp     two models, along the arc between their directions, tensor by tensor (Shoemake 1985)
ties      task vectors (model minus base) trimmed to their largest part, one sign elected for each weight, and the mean of
          those that agree with it (Yadav et al. 2023, arXiv 2306.01708, algorithm 1)
dare      task vectors of which a random part is dropped and the rest scaled up, then added (Yu et al. 2023, arXiv 2311.03099)
dare_ties the same, then the signs elected as in ties
========= ==============================================================================================================

Everything is computed in float32 and rounded once, to the first model's number format.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from criadero import lora
from criadero.artifact import Artifact, Draft, create, open_artifact, resolve
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor
from criadero.model import ModelConfig


def _help(text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class MergeRecipe:
    """Which models, and how they are combined."""

    models: tuple[str, ...] = _help(
        "models of one shape, adapters among them; a single adapter is folded into its base"
    )
    method: Literal["linear", "slerp", "ties", "dare", "dare_ties"] = _help("how several are combined", "linear")
    base: str = _help("what the models were tuned from; ties and dare need it", "")
    weights: tuple[float, ...] = _help("one for each model; default: equal, adding up to 1 (ties and dare: 1 each)", ())
    t: float = _help("slerp: 0 is the first model, 1 the second", 0.5)
    density: float = _help(
        "ties: the part of each task vector that is kept; dare: the chance of each weight to be kept", 0.5
    )
    requantise: bool = _help(
        "an adapter on a base of 4 or 8 bits: round the sum to the base's own bits and groups again", False
    )
    model_name: str = _help("name in the passport; default: the folder's", "")
    model_licence: str = _help("licence you give the weights", "")
    seed: int = _help("dare's draws", 0)


def merge(recipe: MergeRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Combine ``recipe.models`` and seal the result, with the first one's tokenizer and template, at ``out``.

    UserError: models of other shapes or vocabularies, a method without what it needs.
    """
    from criadero.checkpoints import load_model, save_hf, tokenizer_of

    _check(recipe)
    if recipe.requantise:
        return _requantise(recipe, Path(out), overwrite)
    names = [*recipe.models, *([recipe.base] if recipe.base else [])]
    paths = [resolve(name) for name in names]
    with create(
        out, kind="chat", name=recipe.model_name or None, recipe=recipe,
        seeds={"seed": recipe.seed}, licence=recipe.model_licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        for name in recipe.models:
            draft.add_input("merged_from", name)
        if recipe.base:
            draft.add_input("merged_from", recipe.base)
        tokenizer = tokenizer_of(paths[0])
        models = [load_model(path) for path in paths]
        for name, path, model in zip(names[1:], paths[1:], models[1:], strict=True):
            if tokenizer_of(path).encode("Ñandú 123, hello") != tokenizer.encode("Ñandú 123, hello"):
                raise UserError(f"{name} and {names[0]} have different tokenizers: their weights mean different words")
            same_shape(names[0], models[0].state_dict(), name, model.state_dict())
        states = [model.state_dict() for model in models]
        base = states.pop() if recipe.base else None
        merged = combine(states, recipe, base) if len(states) > 1 or base is not None else dict(states[0])
        models[0].load_state_dict({key: value.to(states[0][key].dtype) for key, value in merged.items()})
        save_hf(models[0], models[0].config, draft.path)
        _finish(draft, paths[0], models[0].config)
    return open_artifact(out)


def _finish(draft: Draft, first: Path, config: ModelConfig) -> None:
    """The first model's tokenizer and template, the ids that end an answer, and the passport's table."""
    from criadero.checkpoints import template_of, tokenizer_of

    try:
        source = template_of(first).source
    except UserError:
        source = None
    tokenizer_of(first).save(draft.path, chat_template=source)
    if (extra := first / "generation_config.json").is_file() and not (draft.path / extra.name).exists():
        shutil.copyfile(extra, draft.path / extra.name)
    draft.model |= {
        "params": config.parameters(),
        "context": config.max_position_embeddings,
        "vocab": config.vocab_size,
    }


def _requantise(recipe: MergeRecipe, out: Path, overwrite: bool) -> Artifact:
    """Fold an adapter into its quantised base, layer by layer; matrices without an adapter keep their numbers.

    Rounding to the nearest loses a part of what was learned: how large its error is beside the adapter's change is said, and
    stands in the passport.
    """
    from criadero.checkpoints import ADAPTER, adapter_base, holds_quantised, load_config, load_frozen, write_quantised
    from criadero.checkpoints import check_base as check_its_base
    from criadero.checkpoints.packed import as_tensor, power_of_two, read_quantised
    from criadero.checkpoints.safetensors_hf import read_json
    from criadero.quantization.rounding import round_matrix
    from criadero.train.progress import say

    adapter = resolve(recipe.models[0])
    if not (adapter / ADAPTER).is_file():
        raise UserError(f"requantise folds an adapter into its base, and {recipe.models[0]} is no adapter")
    base = adapter_base(adapter)
    if not base.is_dir() or not holds_quantised(base):
        raise UserError(f"requantise: the base of {recipe.models[0]} is not a quantised folder: leave requantise out")
    check_its_base(adapter, base)
    with create(
        out, kind="quantised", name=recipe.model_name or None, recipe=recipe,
        licence=recipe.model_licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        draft.add_input("merged_from", recipe.models[0])
        state: dict[str, QuantTensor | Tensor] = {
            name: weight if isinstance(weight, QuantTensor) else as_tensor(weight)
            for name, weight in read_quantised(base)[1].items()
        }
        model = lora.load_adapter(load_frozen(base, dtype=torch.float32), adapter)
        change = error = 0.0
        count = 0
        for name, layer in lora.adapters(model).items():
            if not layer.changes():
                continue
            old, new = lora.base_weight(layer.base), layer.merged_weight()
            key, frozen = f"{name}.weight", layer.base
            if isinstance(frozen, lora.QuantLinear):
                packed = round_matrix(new, frozen.bits, frozen.group, what=key)
                state[key], written = packed, torch.from_numpy(packed.dequantise())
            else:  # a layer that was kept out of the quantising
                narrow = state[key]
                assert isinstance(narrow, Tensor)
                state[key] = new.to(narrow.dtype)
                written = new.to(narrow.dtype).float()
            change += float((new - old).square().sum())
            error += float((written - new).square().sum())
            count += 1
        for name, rows in lora.trained_rows(model).items():
            key, table = f"{name}.weight", state.get(f"{name}.weight")
            if table is None:  # the tied head
                continue
            whole = rows.weight.detach()
            if isinstance(table, QuantTensor):
                kept = name == "model.embed_tokens" and "criadero" in read_json(base / "config.json")
                state[key] = (
                    power_of_two(whole.numpy(), table.group) if kept else round_matrix(whole, table.bits, table.group)
                )
            else:
                state[key] = whole.to(table.dtype)
        values = read_json(base / "config.json")
        plain = torch.float16 if values.get("torch_dtype") == "float16" else torch.bfloat16
        share = (error / change) ** 0.5 if change else 0.0
        say(
            f"{count} matrices of {len(lora.adapters(model))} changed; rounding them again errs by {share:.0%} of what the "
            "adapter changed"
        )
        draft.metrics.append(
            {"suite": "merge", "metric": "rounding_error_over_change", "slice": "all", "value": share, "n": count}
        )
        config = load_config(adapter)
        packed_table = isinstance(state["model.embed_tokens.weight"], QuantTensor) and "criadero" not in values
        write_quantised(state, config, draft.path, dtype=plain, pack_tables=packed_table)
        _finish(draft, adapter, config)
    return open_artifact(out)


def _check(recipe: MergeRecipe) -> None:
    n = len(recipe.models)
    if not n:
        raise UserError("models: none given: name an adapter, or two models and more")
    if recipe.requantise and (n > 1 or recipe.base):
        raise UserError("requantise folds one adapter into its own base: give that adapter alone")
    if recipe.weights and len(recipe.weights) != n:
        raise UserError(f"weights: {len(recipe.weights)} for {n} models: give one for each")
    if recipe.method == "slerp" and n != 2:
        raise UserError(f"slerp combines two models, not {n}")
    if recipe.method in ("ties", "dare", "dare_ties") and not recipe.base:
        raise UserError(f"{recipe.method} needs the base that the models were tuned from: give --base")
    if recipe.base and recipe.method in ("linear", "slerp"):
        raise UserError(f"base is for ties and dare; {recipe.method} does not use it")
    if not 0 < recipe.density <= 1 or not 0 <= recipe.t <= 1:
        raise UserError("density must be above 0 and at most 1, and t from 0 to 1")
    if any(weight <= 0 for weight in recipe.weights):
        raise UserError("weights must be positive: leave a model out instead")


def same_shape(first: str, a: Mapping[str, Tensor], second: str, b: Mapping[str, Tensor]) -> None:
    """UserError naming the first tensor in which two models differ."""
    for key in [*a, *(key for key in b if key not in a)]:
        if key not in a or key not in b or a[key].shape != b[key].shape:
            shapes = [list(s[key].shape) if key in s else "missing" for s in (a, b)]
            raise UserError(f"{second} has not the shape of {first}: {key} is {shapes[1]}, not {shapes[0]}")


@torch.no_grad()
def combine(
    states: Sequence[Mapping[str, Tensor]], recipe: MergeRecipe, base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The merged tensors, in float32. `states` have equal names and shapes."""
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = list(recipe.weights) or (
        [1 / len(states)] * len(states) if recipe.method == "linear" else [1.0] * len(states)
    )
    out = {}
    for key in states[0]:
        tensors = [state[key].float() for state in states]
        if recipe.method == "linear":
            out[key] = linear(tensors, weights)
        elif recipe.method == "slerp":
            out[key] = slerp(tensors[0], tensors[1], recipe.t)
        else:
            assert base is not None
            start = base[key].float()
            deltas = [tensor - start for tensor in tensors]
            if recipe.method == "ties":
                deltas = [trim(delta, recipe.density) for delta in deltas]
            else:
                deltas = [drop(delta, recipe.density, generator) for delta in deltas]
            if recipe.method == "dare":
                out[key] = start + sum((w * d for w, d in zip(weights, deltas, strict=True)), torch.zeros_like(start))
            else:
                out[key] = start + elect(deltas, weights)
    return out


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean with weights, which need not add up to 1."""
    total = sum((w * t for w, t in zip(weights, tensors, strict=True)), torch.zeros_like(tensors[0]))
    return total / sum(weights)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Between two tensors taken as vectors: the directions go along the arc; where they nearly agree, along the chord."""
    x, y = a.double().flatten(), b.double().flatten()
    lengths = x.norm() * y.norm()
    cosine = float((x @ y) / lengths) if lengths > 0 else 1.0
    if abs(cosine) > 0.9995:
        return ((1 - t) * a.double() + t * b.double()).float()
    angle = torch.acos(torch.tensor(cosine, dtype=torch.float64))
    mixed = (torch.sin((1 - t) * angle) * a.double() + torch.sin(t * angle) * b.double()) / torch.sin(angle)
    return mixed.float()


def trim(delta: Tensor, density: float) -> Tensor:
    """The `density` part of the entries that is largest in magnitude; the others 0."""
    keep = max(1, int(density * delta.numel()))  # rounded down, as the authors and mergekit do
    kept = torch.zeros_like(delta).flatten()
    places = delta.flatten().abs().topk(keep).indices
    kept[places] = delta.flatten()[places]
    return kept.view_as(delta)


def drop(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with chance `density` and then divided by it, so that the mean stays."""
    mask = torch.rand(delta.shape, generator=generator) < density
    return delta * mask / density


def elect(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """For each entry the sign with the larger total, and the weighted mean of those entries that have it."""
    stacked = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])  # [models, ...]
    sign = stacked.sum(0).sign()
    agree = (stacked.sign() == sign) & (stacked != 0)
    share = torch.stack([torch.full_like(deltas[0], w) for w in weights])
    return torch.where(agree, stacked, 0.0).sum(0) / torch.where(agree, share, 0.0).sum(0).clamp_min(1e-12)
