"""Run a model layer by layer over a fixed set of tokens, in float32, with one layer in memory at a time.

What calibration, measuring and the search for sensitive layers share. A model that fits the memory only in bfloat16 or as
int4 is measured as exactly as a small one: a layer's weights become float32 when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from criadero.kernels.formats import QuantTensor
from criadero.model import Attend, Block, Llama, ModelConfig, rotate
from criadero.train.batches import IGNORE, Batch
from criadero.train.loss import attention_for, cross_entropy_sum

State = Mapping[str, Tensor | QuantTensor]
TABLE, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def wide(weight: Tensor | QuantTensor) -> Tensor:
    """A weight in float32."""
    return torch.from_numpy(weight.dequantise()) if isinstance(weight, QuantTensor) else weight.detach().float()


def layer_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


@dataclass
class Rows:
    """A batch on its way through the layers: x ``[B, T, D]`` float32, its rotary tables, its mask, its targets."""

    batch: Batch
    x: Tensor
    cos: Tensor
    sin: Tensor
    attend: Attend


def embed(batches: Sequence[Batch], state: State, config: ModelConfig) -> list[Rows]:
    """The rows before the first layer."""
    table = state[TABLE]
    with torch.device("meta"):
        rope = Llama(config)  # for its rotary tables only
    rows = []
    for batch in batches:
        if isinstance(table, QuantTensor):
            flat = batch.ids.reshape(-1).numpy()
            x = torch.from_numpy(table.rows(flat).dequantise()).reshape(*batch.ids.shape, -1)  # [B, T, D]
        else:
            x = F.embedding(batch.ids, table.detach()).float()
        cos, sin = rope.rotary(batch.positions, torch.float32)
        rows.append(Rows(batch, x, cos, sin, attention_for(batch)))
    return rows


def empty_block(config: ModelConfig) -> Block:
    """A layer in float32 to load weights into, again and again."""
    with torch.device("meta"):
        block = Block(config, 0)
    return block.to_empty(device="cpu").requires_grad_(False)


def load_layer(block: Block, state: State, layer: int, only: Sequence[str] | None = None) -> None:
    """Put the weights of a layer (or those named) into the block."""
    parameters = dict(block.named_parameters())
    for name in only or layer_shapes_of(block):
        parameters[name].copy_(wide(state[layer_name(layer, name)]))


def layer_shapes_of(block: Block) -> list[str]:
    return [name for name, _ in block.named_parameters()]


def attention_input(block: Block, rows: Rows, x: Tensor) -> Tensor:
    """What o_proj gets: the attended values ``[B, T, H * Dh]`` of the normed hidden states x ``[B, T, D]``."""
    attention = block.self_attn
    batch, length, _ = x.shape
    q = attention.q_proj(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)  # [B, H, T, Dh]
    k = attention.k_proj(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)  # [B, K, T, Dh]
    v = attention.v_proj(x).view(batch, length, -1, attention.head_dim).transpose(1, 2)
    out = rows.attend(0, rotate(q, rows.cos, rows.sin), rotate(k, rows.cos, rows.sin), v)  # [B, H, T, Dh]
    return out.transpose(1, 2).reshape(batch, length, -1)


def down_input(block: Block, x: Tensor) -> Tensor:
    """What down_proj gets: ``[B, T, F]`` of the normed hidden states x ``[B, T, D]``."""
    return F.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)


def forward(block: Block, rows: Rows, x: Tensor) -> Tensor:
    """One layer: x ``[B, T, D]`` -> ``[B, T, D]``."""
    return block(x, rows.cos, rows.sin, rows.attend)


def normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """The last norm: x ``[B, T, D]``."""
    return norm * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def losses(rows: Sequence[Rows], xs: Sequence[Tensor], norm: Tensor, head: Tensor, eps: float) -> list[float]:
    """The summed loss of each batch in nats, from the hidden states after the last layer."""
    return [
        float(cross_entropy_sum(normed(x, norm, eps), head, row.batch.targets)) for row, x in zip(rows, xs, strict=True)
    ]


def count(batches: Sequence[Batch]) -> int:
    """The tokens that are predicted."""
    return sum(int((batch.targets != IGNORE).sum()) for batch in batches)


def head_of(state: State) -> Tensor:
    return wide(state[HEAD] if HEAD in state else state[TABLE])


@torch.no_grad()
def last_states(
    state: State, config: ModelConfig, batches: Sequence[Batch], tick: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """What the output matrix gets: ``[B, T, D]`` of each batch. ``tick`` is called after each layer."""
    rows = embed(batches, state, config)
    block = empty_block(config)
    for layer in range(config.num_hidden_layers):
        load_layer(block, state, layer)
        for row in rows:
            row.x = forward(block, row, row.x)
        tick()
    return [normed(row.x, wide(state[NORM]), config.rms_norm_eps) for row in rows]


@torch.no_grad()
def measure(
    state: State, config: ModelConfig, batches: Sequence[Batch], tick: Callable[[], None] = lambda: None
) -> list[float]:
    """The summed loss of each batch in nats."""
    head = head_of(state)
    hidden = last_states(state, config, batches, tick)
    return [float(cross_entropy_sum(x, head, batch.targets)) for x, batch in zip(hidden, batches, strict=True)]
