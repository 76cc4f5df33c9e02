"""Llama models in GGUF files, as llama.cpp reads and writes them.

Names and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's ``convert_hf_to_gguf.py``.
Rows of q and k are interleaved in the file (`criadero.checkpoints.layout`); Llama 3.1's frequency scaling is a tensor,
``rope_freqs.weight``, by which each frequency is divided.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.checkpoints.ggml import FORMATS, PACK, PLAIN, TORCH, WRITABLE, finite, pack
from criadero.checkpoints.ggml_quantised import KEPT, blocks, own_kind, repack
from criadero.checkpoints.gguf_file import Header, read_array, read_bytes, read_header, read_tensor, write_file
from criadero.checkpoints.gguf_vocab import read_gguf_tokenizer, tokenizer_keys
from criadero.checkpoints.layout import Rows, to_interleaved, to_rotate_half
from criadero.checkpoints.states import check_shapes, expected_shapes, state_of
from criadero.config import ModelConfig, rope_frequencies
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor
from criadero.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from criadero.model import Llama

OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
INNER_BACK = {ggml: hf for hf, ggml in INNER.items()}
OUTER_BACK = {ggml: hf for hf, ggml in OUTER.items()}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # Meta's
Weight = QuantTensor | np.ndarray  # an array: float32, float16, or uint16 that holds the bits of bfloat16
OWN = "criadero.rope_scaling."  # our keys for the numbers that llama.cpp only keeps multiplied out


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor -> GGUF's."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}"


def hf_name(name: str) -> str:
    """GGUF's name of a tensor -> Hugging Face's; a name that is not a Llama's stays as it is."""
    if name in OUTER_BACK:
        return OUTER_BACK[name]
    first, layer, inner = [*name.split(".", 2), "", ""][:3]
    if first == "blk" and layer.isdecimal() and str(int(layer)) == layer and inner in INNER_BACK:
        return f"model.layers.{layer}.{INNER_BACK[inner]}"
    return name


def reorder(name: str, config: ModelConfig, order: Callable[[Rows, int], Rows], weight: Rows) -> Rows:
    if name.endswith("q_proj.weight"):
        return order(weight, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return order(weight, config.num_key_value_heads)
    return weight


def _reorder_rows(
    name: str, config: ModelConfig, order: Callable[[np.ndarray, int], np.ndarray], weight: QuantTensor
) -> QuantTensor:
    """The same of a packed matrix: whole rows change places."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    numbers = np.arange(weight.shape[0])[:, None]  # [N, 1]
    return weight.rows(reorder(name, config, order, numbers)[:, 0])


# --- reading ---


def read_gguf(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor], Tokenizer | None]:
    """Configuration, weights and tokenizer of a Llama GGUF file.

    Weights are as stored when F32, F16 or BF16, unpacked to float32 otherwise. A file with a vocabulary only gives an
    empty state.
    """
    import torch

    header = read_header(path)
    config = read_gguf_config(header)
    tokenizer = read_gguf_tokenizer(header)
    if not header.tensors:
        return config, {}, tokenizer
    names = {hf_name(name): name for name in header.tensors if name != "rope_freqs.weight"}
    check_shapes(config, {name: header.tensors[stored].shape for name, stored in names.items()}, str(path))
    state = {}
    for name, stored in names.items():
        weight = read_tensor(header, stored)
        if not torch.isfinite(weight).all():
            raise UserError(f"{path}: tensor {stored!r} holds values that are not finite; get the file again")
        state[name] = reorder(name, config, to_rotate_half, weight)
    return config, state, tokenizer


def read_gguf_quantised(path: str | Path) -> tuple[ModelConfig, dict[str, Weight], Tokenizer | None]:
    """The same without dequantising, for an engine that computes with packed weights.

    Matrices in Q4_0, Q8_0, Q4_K and Q6_K are `QuantTensor`s, number for number; BF16 is uint16 that holds its bits, F16 and F32
    are as stored, other formats float32. UserError: damage, not a Llama, or no model in the file.
    """
    header = read_header(path)
    config = read_gguf_config(header)
    if not header.tensors:
        raise UserError(f"{path}: holds a vocabulary only, no model")
    names = {hf_name(name): name for name in header.tensors if name != "rope_freqs.weight"}
    check_shapes(config, {name: header.tensors[stored].shape for name, stored in names.items()}, str(path))
    order = [name for name, _ in expected_shapes(config)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # numpy lets go of the interpreter
        weights = pool.map(lambda name: _quantised_weight(header, name, names[name], config), order)
        state = dict(zip(order, weights, strict=True))
    return config, state, read_gguf_tokenizer(header)


def _quantised_weight(header: Header, name: str, stored: str, config: ModelConfig) -> Weight:
    info = header.tensors[stored]
    weight: Weight
    if info.kind in KEPT and len(info.shape) == 2:
        packed = repack(read_bytes(header, stored), info.kind, *info.shape)
        sound = finite(packed.scales) and (packed.mins is None or finite(packed.mins))
        weight = _reorder_rows(name, config, to_rotate_half, packed)
    else:
        plain = read_array(header, stored)
        sound = finite(plain)
        weight = np.ascontiguousarray(reorder(name, config, to_rotate_half, plain))
    if not sound:
        raise UserError(f"{header.path}: tensor {stored!r} holds values that are not finite; get the file again")
    return weight


def is_quantised_gguf(source: Header | str | Path) -> bool:
    """Whether a GGUF file holds weights in another format than F32, F16 and BF16."""
    header = source if isinstance(source, Header) else read_header(source)
    return any(info.kind not in PLAIN for info in header.tensors.values())


def read_gguf_config(source: Header | str | Path) -> ModelConfig:
    """The configuration in a GGUF file's keys; whatever this package does not compute is refused by name."""
    header = source if isinstance(source, Header) else read_header(source)
    keys, path = header.metadata, header.path
    architecture = keys.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: general.architecture is {architecture!r}; only 'llama' models can be read")

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = keys.get(f"llama.{key}", default)
        if value is None:
            raise UserError(f"{path}: key 'llama.{key}' is missing: the file is not a complete Llama")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{path}: key 'llama.{key}' must be of type {kind.__name__}, not {str(value)[:40]!r}")
        return value

    for key in ("expert_count", "attention.sliding_window", "attention.clamp_kqv", "rope.scaling.alpha"):
        if keys.get(f"llama.{key}"):
            raise UserError(f"{path}: key 'llama.{key}' = {keys[f'llama.{key}']!r} is not supported")
    size, heads = get("embedding_length", int), get("attention.head_count", int)
    embedding, tokens = header.tensors.get("token_embd.weight"), keys.get("tokenizer.ggml.tokens")
    vocab_size = keys.get("llama.vocab_size") or (embedding.shape[0] if embedding else len(tokens or ()))
    rotary = get("rope.dimension_count", int, size // max(heads, 1))
    head_dim = get("attention.key_length", int, rotary)
    if rotary != head_dim or get("attention.value_length", int, head_dim) != head_dim:
        raise UserError(f"{path}: heads of unequal or partly rotated size are not supported ({rotary} of {head_dim})")
    eos = keys.get("criadero.eos_token_ids") or keys.get("tokenizer.ggml.eos_token_id")
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=size,
        intermediate_size=get("feed_forward_length", int),
        num_hidden_layers=get("block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        max_position_embeddings=get("context_length", int),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon", float),
        rope_theta=float(get("rope.freq_base", float, 10000.0)),
        tie_word_embeddings=bool(header.tensors) and "output.weight" not in header.tensors,
        bos_token_id=keys.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=keys.get("tokenizer.ggml.padding_token_id"),
    )
    return replace(config, rope_scaling=_read_scaling(header, config, get))


def _read_scaling(header: Header, config: ModelConfig, get: Callable[..., Any]) -> dict[str, Any] | None:
    if "rope_freqs.weight" in header.tensors:
        return _read_llama3(header, config)
    kind = get("rope.scaling.type", str, "none")
    factor = float(get("rope.scaling.factor", float, get("rope.scale_linear", float, 1.0)))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(f"{header.path}: key 'llama.rope.scaling.type' = {kind!r} is not supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length", int)
    if get("rope.scaling.yarn_attn_factor", float, 1.0) != 1.0:
        raise UserError(f"{header.path}: key 'llama.rope.scaling.yarn_attn_factor' is not supported")
    for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if f"llama.rope.scaling.{key}" in header.metadata:
            scaling[name] = get(f"rope.scaling.{key}", float)
    if "llama.rope.scaling.attn_factor" in header.metadata:
        # llama.cpp multiplies this number by the paper's factor, Hugging Face's attention_factor replaces it
        scaling["attention_factor"] = get("rope.scaling.attn_factor", float) * _magnitude(factor)
    return scaling


def _magnitude(factor: float) -> float:
    """YaRN's default attention factor (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_llama3(header: Header, config: ModelConfig) -> dict[str, Any]:
    """The scaling whose divisors are in ``rope_freqs.weight``, or an error where no such scaling gives them."""
    divisors = read_tensor(header, "rope_freqs.weight").float().numpy()
    if divisors.shape != (config.head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise UserError(f"{header.path}: tensor 'rope_freqs.weight' does not hold {config.head_dim // 2} factors")
    scaling: dict[str, Any] = {"rope_type": "llama3"}
    for name, value in {"factor": float(divisors.max()), **LLAMA3}.items():
        scaling[name] = header.metadata.get(OWN + name, value)
        if isinstance(scaling[name], bool) or not isinstance(scaling[name], int | float) or scaling[name] <= 0:
            raise UserError(f"{header.path}: key '{OWN + name}' must be a positive number")
    if not np.allclose(_divisors(replace(config, rope_scaling=scaling)), divisors, rtol=1e-5):
        raise UserError(f"{header.path}: the factors in 'rope_freqs.weight' are not Llama 3's: not supported")
    return scaling


def _divisors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp divides each frequency by: ``[Dh / 2]``."""
    return rope_frequencies(replace(config, rope_scaling=None))[0] / rope_frequencies(config)[0]


# --- writing ---


def write_gguf(
    model: Llama | tuple[ModelConfig, Mapping[str, Tensor | QuantTensor]],
    tokenizer: Tokenizer | None,
    path: str | Path,
    *,
    type: str = "Q8_0",
    template: str | None = None,
    name: str | None = None,
) -> None:
    """Write ``model`` as llama.cpp stores it: matrices in format ``type``, norms in float32.

    ``type`` is one of F32, F16, BF16, Q8_0, Q4_0. With Q4_0 the embedding and the output matrix are kept at Q8_0: they
    suffer most and, in a small model, matter most. ``template`` is the chat template's source.

    Instead of a model, its configuration and state may be given: a `QuantTensor` in it is written number for number, where
    ``type`` is Q4_0 or Q8_0 and holds it, and dequantised otherwise.
    """
    if type not in WRITABLE:
        raise UserError(f"GGUF type {type!r} cannot be written: choose one of {', '.join(WRITABLE)}")
    import torch

    config, given = model if isinstance(model, tuple) else (model.config, model.state_dict())
    exact = {}  # name -> the format that holds it as it is
    for key, weight in given.items():
        if isinstance(weight, QuantTensor) and type in PACK and (own := own_kind(weight)):
            exact[key] = "Q8_0" if type == "Q8_0" else own
    state: dict[str, Tensor | QuantTensor] = {}
    for key, one in given.items():
        if isinstance(one, QuantTensor) and key not in exact:
            state[key] = torch.from_numpy(one.dequantise())
        else:
            state[key] = one
    check_shapes(config, {key: tuple(one.shape) for key, one in state.items()}, "the model to write")
    if not exact:
        state = dict(state_of({key: one for key, one in state.items() if not isinstance(one, QuantTensor)}, config))
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}: they do not belong "
            "together"
        )
    kinds = {}
    for key, tensor in state.items():
        outer = key in ("model.embed_tokens.weight", "lm_head.weight")
        if key in exact:
            kinds[key] = exact[key]
        elif len(tensor.shape) == 1:
            kinds[key] = "F32"
        elif exact:  # what was kept beside packed matrices was kept for a reason
            dtype = torch.float32 if isinstance(tensor, QuantTensor) else tensor.dtype
            kinds[key] = next((kind for kind, one in TORCH.items() if getattr(torch, one) == dtype), "F32")
        else:
            kinds[key] = "Q8_0" if outer and type in PACK else type
        block = FORMATS[kinds[key]].block
        if tensor.shape[-1] % block:
            raise UserError(
                f"{key} has rows of {tensor.shape[-1]}, and {type} needs a multiple of {block}: choose type F16"
            )
    metadata = _config_keys(config) | {"general.name": name or "model", "general.file_type": FILE_TYPES[type]}
    if type in PACK:
        metadata["general.quantization_version"] = 2
    if tokenizer is not None:  # where the model and the tokenizer name different ends of a text, the model is right
        metadata = tokenizer_keys(tokenizer, config.vocab_size) | metadata
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    table = [(gguf_name(key), tuple(tensor.shape), kinds[key]) for key, tensor in state.items()]
    sources = {gguf_name(key): key for key in state}
    divisors = None
    if config.rope_scaling is not None and config.rope_scaling["rope_type"] == "llama3":
        divisors = _divisors(config)
        table.insert(0, ("rope_freqs.weight", tuple(divisors.shape), "F32"))

    def data(stored: str) -> np.ndarray:
        if stored == "rope_freqs.weight":
            assert divisors is not None
            return pack(torch.from_numpy(divisors), "F32", stored)
        key = sources[stored]
        weight = state[key]
        if isinstance(weight, QuantTensor):
            return blocks(_reorder_rows(key, config, to_interleaved, weight), kinds[key])
        return pack(reorder(key, config, to_interleaved, weight), kinds[key], key)

    write_file(path, metadata, table, data)


def _config_keys(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    for key, value in (("bos", config.bos_token_id), ("padding", config.pad_token_id)):
        if value is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = value
    if config.eos_ids:
        keys["tokenizer.ggml.eos_token_id"] = config.eos_ids[0]
        if isinstance(config.eos_token_id, tuple):
            keys["criadero.eos_token_ids"] = list(config.eos_ids)
    return keys | _scaling_keys(config)


def _scaling_keys(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] == "default":
        return {}
    kind, factor = scaling["rope_type"], float(scaling["factor"])
    if kind == "llama3":
        # not under llama.*: a scaling factor there makes llama.cpp scale linearly on top of the tensor
        return {OWN + name: scaling[name] for name in ("factor", *LLAMA3)}
    keys: dict[str, Any] = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": factor}
    if kind == "yarn":
        if not scaling.get("truncate", True):
            raise UserError("YaRN with truncate = false cannot be said in a GGUF file: nothing was written")
        original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
        keys["llama.rope.scaling.original_context_length"] = original
        for name in ("beta_fast", "beta_slow"):
            if scaling.get(name):
                keys[f"llama.rope.scaling.yarn_{name}"] = float(scaling[name])
        attention = rope_frequencies(config)[1]
        if not math.isclose(attention, _magnitude(factor), rel_tol=1e-6):
            keys["llama.rope.scaling.attn_factor"] = attention / _magnitude(factor)
    return keys
