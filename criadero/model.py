"""The Llama architecture: Llama 1, 2, 3, 3.1 and 3.2 in one file.

Sources: Llama (arXiv 2302.13971, section 2.2), Llama 2 (arXiv 2307.09288, section 2.2), Llama 3 (arXiv 2407.21783,
section 3.2), RoPE (arXiv 2104.09864), grouped-query attention (arXiv 2305.13245), YaRN (arXiv 2309.00071).

Names of configuration fields and tensors are Hugging Face's, so that no conversion is ever needed between the two.

Shape legend: B batch, T new tokens, S tokens attended to, D hidden size, H query heads, K key-value heads,
Dh head size, F feed-forward size, V vocabulary.

The block, twice a layer a residual stream of ``[B, T, D]``::

    x ──┬─ input_layernorm ─ q k v ─ RoPE ─ attend ─ o_proj ─ (+) ──┬─ post_attention_layernorm ─ gate·up ─ down ─ (+) ─
        └────────────────────────────────────────────────────┘     └───────────────────────────────────────────────┘
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criadero.errors import UserError

# attend(layer, q, k, v): q [B, H, T, Dh], k and v [B, K, T, Dh] -> [B, H, T, Dh]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Llama, with Hugging Face's field names and Llama 2 7B's values as defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim == 0 and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and (
                isinstance(value, bool)
                or not isinstance(value, int if field.type == "int" else int | float)
                or value <= 0
            ):
                raise UserError(f"model configuration: {field.name} must be a positive {field.type}, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model configuration: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None and (isinstance(one, bool) or not isinstance(one, int)):
                    raise UserError(f"model configuration: {name} must be a token's number, not {one!r}")
        if self.head_dim % 2:
            raise UserError(f"model configuration: head_dim ({self.head_dim}) must be even for RoPE")
        rope_frequencies(self)  # a scaling that cannot be computed is refused here, not at the first token

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token id that ends a generation."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        d, heads, kv, dh = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        layer = d * dh * (2 * heads + 2 * kv) + 3 * d * self.intermediate_size + 2 * d
        return layer * self.num_hidden_layers + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face ``config.json`` in either spelling of RoPE; refuse what this file does not compute."""
        if values.get("model_type", "llama") != "llama":
            raise UserError(f"{where}: model_type is {values['model_type']!r}; only 'llama' models can be read")
        for key, allowed in {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "sliding_window": (None,),
            "partial_rotary_factor": (1.0, None),
            "quantization_config": (None,),
        }.items():
            if key in values and values[key] not in allowed:
                raise UserError(f"{where}: {key} = {values[key]!r} is not supported; only {allowed[0]!r} or none is")
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {key: value for key, value in values.items() if key in known and value is not None}
        fields.setdefault("num_key_value_heads", values.get("num_attention_heads", cls.num_attention_heads))
        rope = values.get("rope_parameters") or values.get("rope_scaling")  # transformers 5 and 4
        fields.pop("rope_scaling", None)
        if rope is not None:
            if not isinstance(rope, Mapping):
                raise UserError(f"{where}: rope_scaling must be a table, not {rope!r}")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if "rope_theta" in rope:
                fields["rope_theta"] = rope["rope_theta"]
            if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
                fields["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("type", "rope_theta")}
                fields["rope_scaling"]["rope_type"] = kind
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that transformers 4.3x to 5.x all read alike.

        The newer ``rope_parameters`` is left out on purpose: older readers skip it in silence and use theta 10000.
        """
        values = dataclasses.asdict(self)
        scaling = None
        if self.rope_scaling is not None:
            scaling = dict(self.rope_scaling) | {"type": self.rope_scaling["rope_type"]}
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return values | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "pretraining_tp": 1,
            "use_cache": True,
            "rope_scaling": scaling,
            "eos_token_id": eos,
        }


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies ``[Dh / 2]`` in float32 and the factor on cosine and sine, after scaling.

    ``linear``: positions divided by ``factor``. ``llama3``: low frequencies divided, high kept, a ramp between.
    ``yarn``: the same idea on rotations per context, with an attention factor (arXiv 2309.00071, section 3).
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (config.rope_theta ** (half / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise UserError(f"model configuration: rope_scaling {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    for key, value in scaling.items():
        number = isinstance(value, int | float) and 0 < value < math.inf
        if key not in ("type", "rope_type", "truncate") and value is not None and not number:
            raise UserError(f"model configuration: rope_scaling {key} must be a positive number, not {value!r}")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("model configuration: rope_scaling partial_rotary_factor is not supported")
    try:
        if kind == "linear":
            return frequencies / float(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3_frequencies(frequencies, scaling), 1.0
        if kind == "yarn":
            return _yarn_frequencies(frequencies, scaling, config)
    except KeyError as missing:
        raise UserError(f"model configuration: rope_scaling {kind!r} needs {missing}") from None
    return frequencies, 1.0


def _llama3_frequencies(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise UserError("model configuration: rope_scaling high_freq_factor must be above low_freq_factor")
    wavelength = 2 * math.pi / frequencies
    ramp = (original / wavelength - low) / (high - low)
    smooth = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, smooth, scaled)


def _yarn_frequencies(frequencies: Tensor, scaling: Mapping[str, Any], config: ModelConfig) -> tuple[Tensor, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        weight, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = magnitude(factor)
        if weight and all_dims:
            attention = magnitude(factor, weight) / magnitude(factor, all_dims)

    def dimension(rotations: float) -> float:
        """The (fractional) pair of dimensions that turns ``rotations`` times within the original context."""
        return config.head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # avoids 0 / 0
    ramp = ((torch.arange(len(frequencies), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, H, T, Dh]
        k = self.k_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        v = self.v_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, K, T, Dh]
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # [B, H, T, Dh]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # [B, T, D]


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the output layer; called ``model`` in Hugging Face's tensor names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
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
            frequencies, factor = rope_frequencies(self.config)
            self._rope = frequencies.to(positions.device), factor
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
        for block in self.model.layers:
            x = block(x, cos, sin, attend or causal)
        x = self.model.norm(x)
        return x if return_hidden else self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer: hidden ``[..., D]`` -> logits ``[..., V]``."""
        return self.lm_head(hidden)
