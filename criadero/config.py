"""The shape of a Llama: ``ModelConfig`` with Hugging Face's field names, and RoPE's frequencies under every scaling.

Sources: RoPE (arXiv 2104.09864), Llama 3.1's scaling (llama-models, ``model.py``), YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from criadero.errors import UserError

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


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies ``[Dh / 2]`` in float32 and the factor on cosine and sine, after scaling.

    ``linear``: positions divided by ``factor``. ``llama3``: low frequencies divided, high kept, a ramp between.
    ``yarn``: the same idea on rotations per context, with an attention factor (arXiv 2309.00071, section 3).
    """
    share = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    # the power in float64, rounded: what PyTorch's float32 power gives, to the bit but for a few of the largest bases
    frequencies = np.float32(1) / (float(config.rope_theta) ** share.astype(np.float64)).astype(np.float32)
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
            return frequencies / np.float32(scaling["factor"]), 1.0
        if kind == "llama3":
            return _llama3_frequencies(frequencies, scaling), 1.0
        if kind == "yarn":
            return _yarn_frequencies(frequencies, scaling, config)
    except KeyError as missing:
        raise UserError(f"model configuration: rope_scaling {kind!r} needs {missing}") from None
    return frequencies, 1.0


def stretched(config: ModelConfig, context: int) -> ModelConfig:
    """The same with ``context`` positions laid evenly into those that it knows (position interpolation, arXiv 2306.15595): what it takes
    a little training to get used to. UserError where its positions are scaled already in a way that does not add up with this."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise UserError(
            f"context {context}: the base's positions are scaled already ({kind}), up to {config.max_position_embeddings}"
        )
    factor = float(scaling.get("factor", 1.0)) * context / config.max_position_embeddings
    return dataclasses.replace(
        config, max_position_embeddings=context, rope_scaling={"rope_type": "linear", "factor": factor}
    )


def _llama3_frequencies(frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if high <= low:
        raise UserError("model configuration: rope_scaling high_freq_factor must be above low_freq_factor")
    wavelength = 2 * math.pi / frequencies
    ramp = (original / wavelength - low) / (high - low)
    smooth = (1 - ramp) * frequencies / factor + ramp * frequencies
    scaled = np.where(wavelength > original / low, frequencies / factor, frequencies)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(between, smooth, scaled).astype(np.float32)


def _yarn_frequencies(
    frequencies: np.ndarray, scaling: Mapping[str, Any], config: ModelConfig
) -> tuple[np.ndarray, float]:
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
    ramp = ((np.arange(len(frequencies), dtype=np.float32) - low) / (high - low)).clip(0, 1)
    scaled = frequencies / factor * ramp + frequencies * (1 - ramp)
    return scaled.astype(np.float32), float(attention)
