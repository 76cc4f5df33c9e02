"""The Llama architecture: Llama 1, 2, 3, 3.1 and 3.2 in one file.

Sources: Llama (arXiv 2302.13971, section 2.2), Llama 2 (arXiv 2307.09288, section 2.2), Llama 3 (arXiv 2407.21783,
section 3.2), grouped-query attention (arXiv 2305.13245). The shape is `criadero.config.ModelConfig`; names of tensors are
Hugging Face's, so that no conversion is ever needed between the two.

Shape legend: B batch, T new tokens, S tokens attended to, D hidden size, H query heads, K key-value heads,
Dh head size, F feed-forward size, V vocabulary.

The block, twice a layer a residual stream of ``[B, T, D]``::

    x ──┬─ input_layernorm ─ q k v ─ RoPE ─ attend ─ o_proj ─ (+) ──┬─ post_attention_layernorm ─ gate·up ─ down ─ (+) ─
        └────────────────────────────────────────────────────┘     └───────────────────────────────────────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from criadero.config import ModelConfig, rope_frequencies
from criadero.errors import UserError

# attend(layer, q, k, v): q [B, H, T, Dh], k and v [B, K, T, Dh] -> [B, H, T, Dh]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# the two halves of a block, before and after attention: `before_attention` and `after_attention`, or the same compiled
Halves = tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]

__all__ = ["Attend", "DocumentMask", "KVCache", "Llama", "ModelConfig", "causal", "rope_frequencies"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half layout: x ``[B, H, T, Dh]``, cos and sin ``[B, 1, T, Dh]``."""
    first, second = x.chunk(2, dim=-1)  # [B, H, T, Dh / 2] each
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# --- attention: who may look at whom ---


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention with grouped key-value heads: query head h reads key-value head h // (H / K)."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees itself and what came before it in its row."""
    return sdpa(q, k, v, causal=True)


class DocumentMask:
    """Causal attention that never crosses a document border; for packed rows and for padding.

    ``segments`` ``[B, T]`` numbers the document of each token; -1 is padding, which sees only itself (so that softmax
    stays finite) and which nobody sees.
    """

    def __init__(self, segments: Tensor) -> None:
        same = segments[:, :, None] == segments[:, None, :]  # [B, T, T]
        real = (segments >= 0)[:, None, :]
        length = segments.shape[1]
        lower = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=segments.device)
        self.mask = (same & real & lower | itself)[:, None]  # [B, 1, T, T]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, self.mask)


class KVCache:
    """Keys and values of earlier tokens, contiguous: ``[layers, B, K, length, Dh]``.

    ``padding`` ``[B]`` counts the left-padding tokens of each row, which nobody sees.
    """

    def __init__(
        self, config: ModelConfig, batch: int, length: int, dtype: torch.dtype,
        device: str | torch.device = "cpu", padding: Tensor | None = None,
    ) -> None:  # fmt: skip
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.padding = padding
        self.length = 0  # tokens stored so far

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, new = self.length, q.shape[2]
        end = start + new
        if end > self.keys.shape[3]:
            raise UserError(f"the context is full: {end} tokens do not fit a cache of {self.keys.shape[3]}")
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        if layer == self.keys.shape[0] - 1:
            self.length = end
        k, v = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        if self.padding is None and (new == 1 or start == 0):
            return sdpa(q, k, v, causal=new > 1)
        rows = torch.arange(start, end, device=q.device)[:, None]  # [T, 1]
        columns = torch.arange(end, device=q.device)[None, :]  # [1, S]
        mask = columns <= rows  # [T, S]
        if self.padding is not None:  # a padding row sees itself only, to stay finite
            mask = (mask[None] & (columns[None] >= self.padding[:, None, None])) | (columns == rows)[None]
            mask = mask[:, None]  # [B, 1, T, S]
        return sdpa(q, k, v, mask)


# --- the network ---


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[B, H, T, Dh]``, keys and values ``[B, K, T, Dh]`` of x ``[B, T, D]``, queries and keys turned by RoPE."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, H, T, Dh]
        k = self.k_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        v = self.v_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def join(self, out: Tensor) -> Tensor:
        """What the heads found, ``[B, H, T, Dh] -> [B, T, D]``."""
        return self.o_proj(out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, halves: Halves | None = None) -> Tensor:
        before, after = halves or HALVES
        q, k, v = before(self, x, cos, sin)
        return after(self, x, attend(self.self_attn.layer, q, k, v))


def before_attention(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[B, T, D]`` -> q ``[B, H, T, Dh]``, k and v ``[B, K, T, Dh]``."""
    return block.self_attn.project(block.input_layernorm(x), cos, sin)


def after_attention(block: Block, x: Tensor, out: Tensor) -> Tensor:
    """x ``[B, T, D]`` and what attention found ``[B, H, T, Dh]`` -> ``[B, T, D]``."""
    x = x + block.self_attn.join(out)
    return x + block.mlp(block.post_attention_layernorm(x))


HALVES: Halves = (before_attention, after_attention)


class Trunk(nn.Module):
    """Everything below the output layer; called ``model`` in Hugging Face's tensor names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        table = torch.empty(config.vocab_size, config.hidden_size)
        if not table.is_meta:  # on the meta device this one call imports torch's compiler: seconds, for nothing
            nn.init.normal_(table)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama language model: token ids ``[B, T]`` to next-token logits ``[B, T, V]``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # how it learns (criadero.train.gpu): what computes a block, and whether that is done again on the way back
        self.halves, self.checkpointing = HALVES, False
        self._rope: tuple[Tensor, float] | None = None  # not a buffer: a change of dtype must leave it in float32

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal(0, initializer_range); projections into the residual stream divided by sqrt(2 layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions ``[B, T]`` or ``[T]``: ``[B or 1, 1, T, Dh]`` each, computed in float32."""
        if self._rope is None or self._rope[0].device != positions.device:
            array, factor = rope_frequencies(self.config)
            self._rope = torch.from_numpy(array).to(positions.device), factor
        frequencies, factor = self._rope
        angles = positions[..., None].float() * frequencies  # [.., T, Dh / 2]
        angles = torch.cat((angles, angles), dim=-1)  # [.., T, Dh]
        angles = angles[None, None] if angles.ndim == 2 else angles[:, None]  # [B or 1, 1, T, Dh]
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def forward(
        self, ids: Tensor, *, positions: Tensor | None = None, attend: Attend | None = None, return_hidden: bool = False
    ) -> Tensor:
        """Logits ``[B, T, V]`` in the weights' dtype, or with ``return_hidden`` the normed hidden states ``[B, T, D]``.

        ``positions`` ``[B, T]`` default to 0, 1, 2, ... after what a `KVCache` holds; ``attend`` defaults to `causal`.
        """
        if positions is None:
            start = attend.length if isinstance(attend, KVCache) else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cos, sin = self.rotary(positions, x.dtype)
        learning = torch.is_grad_enabled()
        if learning and self.halves is not HALVES:
            x.requires_grad_()  # under adapters the first block's does not: it would have to be compiled for itself
        for block in self.model.layers:
            if learning and self.checkpointing:
                x = checkpoint(block, x, cos, sin, attend or causal, self.halves, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend or causal, self.halves if learning else HALVES)
        x = self.model.norm(x)
        return x if return_hidden else self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden ``[..., D]`` -> logits ``[..., V]``."""
        return self.lm_head(hidden)
