"""State dicts and the configurations they must fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.config import ModelConfig
from criadero.errors import UserError

if TYPE_CHECKING:  # this package reads for the native engine too, which does without torch
    import torch
    from torch import Tensor

    from criadero.model import Llama


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors, without the ``model.layers.N.`` in front."""
    d, f = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model and its shape, one at a time: a lying layer count must not fill the memory."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    shapes = layer_shapes(config)
    for layer in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Name the first tensor that is missing, of another shape than the configuration says, or not a Llama's."""
    seen = set()
    for name, shape in expected_shapes(config):
        if name not in shapes:
            raise UserError(f"{where}: tensor {name} is missing: the model is incomplete, or its configuration lies")
        if tuple(shapes[name]) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(shapes[name])}, but the configuration says {list(shape)}"
            )
        seen.add(name)
    if config.tie_word_embeddings:
        seen.add("lm_head.weight")  # some files store the tied matrix twice; the reader compares the two
    extra = sorted(name for name in shapes if name not in seen)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise UserError(f"{where}: tensor {extra[0]}{more} is not part of a Llama of this configuration")


def check_tie(config: ModelConfig, state: Mapping[str, Tensor] | Mapping[str, np.ndarray], where: str) -> None:
    """A tied model that stores its output matrix too must store the same numbers."""
    head = state.get("lm_head.weight")
    if not config.tie_word_embeddings or head is None:
        return
    same: Any = head == state["model.embed_tokens.weight"]
    if not same.all():
        raise UserError(
            f"{where}: tie_word_embeddings is true, but lm_head.weight differs from the embeddings: "
            "set it to false in config.json if the model was trained untied"
        )


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype most of the weights have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def build(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Llama:
    """A model that holds ``state`` (checked before with `check_shapes`) in one dtype: by default most weights' own."""
    import torch

    from criadero.model import Llama

    dtype = dtype or stored_dtype(state)
    with torch.device("meta"):
        model = Llama(config)
    fill(model, {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()})
    return model.requires_grad_(True).eval()


def fill(model: Llama, state: dict[str, Tensor]) -> None:
    """Give a model of no memory its tensors, as they are; a tied output matrix is the embedding itself."""
    tied = model.config.tie_word_embeddings
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if tied:  # assigning made two parameters of it
        model.lm_head.weight = model.model.embed_tokens.weight


def state_of(model_or_state: Llama | Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors to store: detached, in the canonical order, without the second name of a tied matrix."""
    state = model_or_state if isinstance(model_or_state, Mapping) else model_or_state.state_dict()
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()}, "the model to write")
    check_tie(config, state, "the model to write")
    return {name: state[name].detach() for name, _ in expected_shapes(config)}
