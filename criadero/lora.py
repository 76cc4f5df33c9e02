"""Low-rank adapters: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353); attach, merge, and PEFT's files.

A frozen ``W`` gains ``scale * B A`` with ``A`` ``[r, in]``, ``B`` ``[out, r]``; B starts at zero, so an attached model computes
exactly what it did before. ``scale`` is ``alpha / r``, or ``alpha / sqrt(r)`` with ``rslora``. DoRA learns the length of each
row of the sum apart from its direction: ``m * (W + scale * B A) / |W + scale * B A|``, the lengths taken as constants
(section 4.3 there). The base may be a `QuantLinear`, which stays as it is (QLoRA).

A few rows of the embedding (and of the output matrix) can learn beside the adapters: new special tokens, PEFT's
``trainable_token_indices``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from criadero.checkpoints.adapter_file import ALL_LINEAR, read_adapter_config
from criadero.errors import UserError
from criadero.model import Llama, ModelConfig
from criadero.quant_linear import QuantLinear

PREFIX = "base_model.model."  # PEFT's
ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name for the rows that learn (they are values, not differences)
FrozenLinear = nn.Linear | QuantLinear


def adapted_linear(
    x: Tensor, low: Tensor, base: nn.Module, a: Tensor, b: Tensor, scale: float, factor: Tensor | None = None
) -> Tensor:
    """What a frozen linear layer and its adapter compute: x ``[..., in] -> [..., out]``.

    ``low`` is what the adapter reads: x, or x after dropout. ``factor`` ``[out]`` is DoRA's: the learned lengths over those
    of the rows. The one place where this is computed: a faster kernel belongs here.
    """
    y = base(x) + F.linear(F.linear(low, a), b * scale)
    return y if factor is None else y * factor


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter: ``[..., in] -> [..., out]``. ``int8``: while it learns, the compiled kernels may compute
    the products with the frozen weight in whole numbers of 8 bits, forward and for the gradient of x; `forward` here never does."""

    int8 = False

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float, dora: bool = False) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        dtype, device = (base.dtype, base.device) if isinstance(base, QuantLinear) else (
            base.weight.dtype, base.weight.device)  # fmt: skip
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.squares = base_weight(base).float().square().sum(1)  # [out], of the frozen rows
            self.magnitude = nn.Parameter(self.squares.sqrt())  # float32 always: its steps are small beside it

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W + scale * B A| of each row, float32 ``[out]``, without writing the sum out:
        |w|^2 + 2 s b . (w A^T) + s^2 b (A A^T) b^T, where w A^T is the frozen layer's answer to A."""
        a, b = self.lora_A.float(), self.lora_B.float()
        crossed = self.base(self.lora_A).float().t()  # [out, r]
        squares = self.squares + 2 * self.scale * (b * crossed).sum(1) + self.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        return squares.clamp_min(1e-30).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        factor = None if self.magnitude is None else (self.magnitude / self.lengths()).to(x.dtype)
        return adapted_linear(x, low, self.base, self.lora_A, self.lora_B, self.scale, factor)

    def changes(self) -> bool:
        """Whether the layer computes anything else than its base does."""
        moved = self.magnitude is not None and not torch.equal(self.magnitude, self.squares.sqrt())
        return moved or bool(self.lora_B.any())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight of the layer and its adapter as one, float32 ``[out, in]``."""
        whole = base_weight(self.base).float() + self.lora_B.float() @ self.lora_A.float() * self.scale
        if self.magnitude is not None:
            whole *= (self.magnitude / whole.norm(dim=1).clamp_min(1e-15))[:, None]
        return whole


def base_weight(base: nn.Module) -> Tensor:
    """The weight of a frozen linear layer ``[out, in]``, written out where it is packed."""
    if isinstance(base, QuantLinear):
        return base.dequantise()
    assert isinstance(base, nn.Linear)
    return base.weight.detach()


def attach(
    model: Llama, *, rank: int, alpha: float, targets: tuple[str, ...] = ALL_LINEAR, dropout: float = 0.0,
    rslora: bool = False, dora: bool = False, seed: int = 0,
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
        layer = LoraLinear(getattr(parent, child), rank, scale, dropout, dora)
        bound = 1 / math.sqrt(layer.base.in_features)  # PEFT's kaiming_uniform with a = sqrt(5)
        drawn = (torch.rand(layer.lora_A.shape, generator=generator) * 2 - 1) * bound
        layer.lora_A.data.copy_(drawn)
        setattr(parent, child, layer)
        found += [(f"{name}.lora_A", layer.lora_A), (f"{name}.lora_B", layer.lora_B)]
        if layer.magnitude is not None:
            found.append((f"{name}.magnitude", layer.magnitude))
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
        if child in targets and isinstance(module, nn.Linear | QuantLinear):
            out.append((name, model.get_submodule(parent), child))
    return out


def adapters(model: Llama) -> dict[str, LoraLinear]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@torch.no_grad()
def merge(model: Llama) -> Llama:
    """Fold every adapter into its weight, computed in float32 and rounded once, and take it away; the same model object."""
    for name, layer in adapters(model).items():
        weight = layer.merged_weight()
        base = layer.base
        if isinstance(base, QuantLinear):  # its numbers cannot hold the sum: `criadero.merge` rounds it again
            with torch.device("meta"):
                base = nn.Linear(layer.base.in_features, layer.base.out_features, bias=False)
            base.weight = nn.Parameter(weight.to(layer.lora_A.dtype), requires_grad=False)
        else:
            base.weight.copy_(weight)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    for name, rows in trained_rows(model).items():
        parent, _, child = name.rpartition(".")
        rows.base.weight.data = rows.weight.detach()
        setattr(model.get_submodule(parent), child, rows.base)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


# --- rows of the embedding that learn ---


class TrainedRows(nn.Module):
    """An embedding table or output matrix of which only the rows ``ids`` learn. ``base.weight`` ``[V, D]`` is frozen."""

    def __init__(self, base: nn.Embedding | nn.Linear, ids: Sequence[int], rows: nn.Parameter | None = None) -> None:
        super().__init__()
        self.base, self.ids = base, tuple(ids)
        index = torch.tensor(self.ids, device=base.weight.device)
        self.index = index  # not a buffer: it is no weight
        self.place = torch.full((base.weight.shape[0],), -1, device=base.weight.device)  # [V]: which row learns
        self.place[index] = torch.arange(len(self.ids), device=base.weight.device)
        self.rows = rows if rows is not None else nn.Parameter(base.weight.detach()[index].clone())  # [n, D]

    @property
    def weight(self) -> Tensor:
        """The whole matrix, from which a gradient reaches the rows that learn: ``[V, D]``."""
        return self.base.weight.detach().index_copy(0, self.index, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return F.linear(x, self.weight)
        place = self.place[x]  # [B, T]
        return torch.where((place >= 0)[..., None], self.rows[place.clamp_min(0)], self.base(x))


def train_rows(model: Llama, ids: Sequence[int]) -> list[tuple[str, nn.Parameter]]:
    """Let the rows ``ids`` of the embedding learn, and those of the output matrix (the same ones where it is tied)."""
    table = TrainedRows(model.model.embed_tokens, ids)
    model.model.embed_tokens = table
    shared = table.rows if model.config.tie_word_embeddings else None
    head = TrainedRows(model.lm_head, ids, shared)
    model.lm_head = head  # type: ignore[assignment]
    found = [("model.embed_tokens.rows", table.rows)]
    return found if shared is not None else [*found, ("lm_head.rows", head.rows)]


def trained_rows(model: Llama) -> dict[str, TrainedRows]:
    """The matrices of which some rows learn, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedRows)}


@torch.no_grad()
def add_rows(model: Llama, vocab_size: int, known: int, ids: Sequence[int]) -> None:
    """Make room for ``vocab_size`` tokens; the rows ``ids`` become the mean of the first ``known`` rows that are not among
    them (Hewitt 2021: a new token is then never more likely than the average one)."""
    config = model.config
    old = [i for i in range(known) if i not in set(ids)]

    def grown(weight: Tensor) -> nn.Parameter:
        mean = weight[old].float().mean(0).to(weight.dtype)  # [D]
        more = mean.repeat(max(0, vocab_size - weight.shape[0]), 1)
        table = torch.cat([weight, more])
        table[list(ids)] = mean
        return nn.Parameter(table, requires_grad=weight.requires_grad)

    model.model.embed_tokens = nn.Embedding.from_pretrained(grown(model.model.embed_tokens.weight), freeze=False)
    head = model.model.embed_tokens.weight if config.tie_word_embeddings else grown(model.lm_head.weight)
    model.lm_head.weight = head
    rows = model.lm_head.weight.shape[0]
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = rows
    model.config = dataclasses.replace(config, vocab_size=rows)


# --- files ---


def save_adapter(model: Llama, folder: Path, *, base: str, alpha: float, rslora: bool, dropout: float) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's format."""
    layers = adapters(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().contiguous()
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude.detach().contiguous()
    rows = trained_rows(model)
    if model.config.tie_word_embeddings:
        rows.pop("lm_head", None)  # PEFT ties it again by itself
    for name, one in rows.items():
        tensors[f"{PREFIX}{name}.{ROWS}"] = one.rows.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": first.lora_A.shape[0], "lora_alpha": alpha, "lora_dropout": dropout,
        "use_rslora": rslora, "use_dora": first.magnitude is not None, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "modules_to_save": None,
        "trainable_token_indices": {n.rpartition(".")[2]: list(one.ids) for n, one in rows.items()} or None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Llama, folder: Path) -> Llama:
    """Attach the PEFT adapter in ``folder`` to ``model``; whatever this file does not compute is refused."""
    config = read_adapter_config(folder)
    attach(
        model, rank=config["r"], alpha=config["lora_alpha"], targets=config["target_modules"],
        rslora=config["use_rslora"], dora=config["use_dora"],
    )  # fmt: skip
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: not readable ({error})") from None

    def fill(name: str, key: str, target: Tensor) -> None:
        tensor = tensors.pop(f"{PREFIX}{key}", None)
        if tensor is None or tensor.shape != target.shape:
            got = "missing" if tensor is None else f"of shape {list(tensor.shape)}, not {list(target.shape)}"
            raise UserError(f"{folder}: {name} is {got}; this adapter is for another base model")
        target.copy_(tensor)

    for name, layer in adapters(model).items():
        for part in ("lora_A", "lora_B"):
            fill(f"{name}.{part}", f"{name}.{part}.weight", getattr(layer, part).data)
        if layer.magnitude is not None:
            fill(f"{name}.magnitude", f"{name}.lora_magnitude_vector", layer.magnitude.data)
    _load_rows(model, config["trainable_token_indices"], fill)
    if tensors:
        raise UserError(f"{folder}: {next(iter(tensors))} and {len(tensors) - 1} more fit no layer of this base model")
    return model


def _load_rows(model: Llama, wanted: dict[str, list[int]], fill: Callable[[str, str, Tensor], None]) -> None:
    """The rows that learned, in a table that grows where they are new."""
    if not wanted:
        return
    ids = wanted.get("embed_tokens") or wanted["lm_head"]
    size = model.config.vocab_size
    if max(ids) >= size:
        add_rows(model, max(ids) + 1, size, [i for i in ids if i >= size])
        model.requires_grad_(False)
    train_rows(model, ids)
    for name, rows in trained_rows(model).items():
        if name.rpartition(".")[2] in wanted:
            fill(f"{name}.rows", f"{name}.{ROWS}", rows.rows.data)
        elif not (model.config.tie_word_embeddings and name == "lm_head"):
            raise UserError(
                f"trainable_token_indices names no rows of {name}, which this base has apart from the other table"
            )
