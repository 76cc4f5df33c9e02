"""The model against transformers' LlamaForCausalLM, an implementation we had no part in."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from criadero.errors import UserError
from criadero.model import DocumentMask, KVCache, Llama, ModelConfig, rope_frequencies

BASE = ModelConfig(
    vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 4, "num_key_value_heads": 3},
    "theta 500000": {"rope_theta": 500000.0},
    "epsilon": {"rms_norm_eps": 1e-2},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn with all": {"head_dim": 64, "rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 0.9}},
    "yarn mscale": {"head_dim": 64, "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn untruncated": {"head_dim": 64, "rope_scaling": YARN | {"truncate": False}},
}


def make(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2, **changes: Any) -> Llama:
    """A small model with random weights, larger than an initialisation's, so that every part matters."""
    config = dataclasses.replace(BASE, **({"head_dim": 0} | changes))
    model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else scale * noise / weight.shape[1] ** 0.5)
    return model.to(dtype)


def reference(model: Llama) -> torch.nn.Module:
    """The same weights in transformers' model, with its plain ("eager") attention."""
    transformers = pytest.importorskip("transformers")
    values = model.config.to_hf()
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, attn_implementation="eager"))
    twin = twin.to(next(model.parameters()).dtype)
    result = twin.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    return twin.eval()


def tokens(rows: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def spread(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root-mean-square difference, relative to the root mean square of the logits."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers(variant: str) -> None:
    model = make(**VARIANTS[variant])
    ids = tokens()
    assert distance(model(ids), reference(model)(ids).logits) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_in_bfloat16(variant: str) -> None:
    model = make(torch.bfloat16, scale=1, **VARIANTS[variant])
    ids = tokens()
    exact = make(scale=1, **VARIANTS[variant])
    exact.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    ours, theirs, truth = model(ids).float(), reference(model)(ids).logits.float(), exact(ids)
    # over all logits: the largest single difference is a few steps of bfloat16, and chance
    assert spread(ours, theirs) < 2e-2
    assert spread(ours, truth) < max(2e-2, 1.2 * spread(theirs, truth))


@torch.no_grad()
def test_float64_is_computed_in_float64() -> None:
    exact, single = make(torch.float64), make()
    ids = tokens()
    logits = exact(ids)
    assert logits.dtype == torch.float64
    assert distance(single(ids).double(), logits) < 1e-5
    # a change far below float32's resolution is seen, so nothing on the way was rounded to float32
    exact.model.layers[0].mlp.up_proj.weight += 1e-11
    change = (exact(ids) - logits).abs().max()
    assert 1e-13 < change < 1e-7


def test_gradients_equal_transformers() -> None:
    model = make(rope_scaling=LLAMA3)
    twin = reference(model)
    ids = tokens()
    targets = tokens(seed=2)
    for logits in (model(ids), twin(ids).logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    theirs = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert theirs[name].grad is not None
        assert distance(weight.grad, theirs[name].grad) < 1e-4, name


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 1, 20, 11], [39, 1]])
@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "yarn"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(variant: str, chunks: list[int]) -> None:
    model = make(**VARIANTS[variant])
    ids = tokens()
    cache = KVCache(model.config, 2, 40, torch.float32)
    pieces = [model(piece, attend=cache) for piece in ids.split(chunks, dim=1)]
    assert cache.length == 40
    assert distance(torch.cat(pieces, 1), model(ids)) < 1e-5


@torch.no_grad()
def test_a_full_cache_is_refused() -> None:
    model = make()
    cache = KVCache(model.config, 2, 39, torch.float32)
    with pytest.raises(UserError, match="context is full"):
        model(tokens(), attend=cache)


@torch.no_grad()
def test_left_padding_changes_nothing() -> None:
    model = make()
    long, short = tokens(1, 30), tokens(1, 18, seed=3)
    padded = torch.cat((long, torch.cat((torch.full((1, 12), 7), short), 1)))  # [2, 30]
    padding = torch.tensor([0, 12])
    positions = (torch.arange(30)[None] - padding[:, None]).clamp(min=0)
    cache = KVCache(model.config, 2, 40, torch.float32, padding=padding)
    logits = [model(padded, positions=positions, attend=cache)]
    extra = tokens(2, 3, seed=4)
    for step in range(3):  # and the tokens that follow, one at a time
        at = (torch.tensor([[30], [30]]) - padding[:, None]) + step
        logits.append(model(extra[:, step : step + 1], positions=at, attend=cache))
    both = torch.cat(logits, 1)
    assert distance(both[:1], model(torch.cat((long, extra[:1]), 1))) < 1e-5
    assert distance(both[1:, 12:], model(torch.cat((short, extra[1:]), 1))) < 1e-5
    assert torch.isfinite(both).all()


@torch.no_grad()
def test_right_padding_changes_nothing() -> None:
    model = make()
    long, short = tokens(1, 30), tokens(1, 18, seed=3)
    padded = torch.cat((long, torch.cat((short, torch.full((1, 12), 7)), 1)))
    segments = torch.zeros(2, 30, dtype=torch.long)
    segments[1, 18:] = -1
    logits = model(padded, attend=DocumentMask(segments))
    assert distance(logits[:1], model(long)) < 1e-5
    assert distance(logits[1:, :18], model(short)) < 1e-5
    assert torch.isfinite(logits).all()


def packed() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three documents in one row, and three paddings."""
    documents = [tokens(1, length, seed=length) for length in (11, 5, 16)]
    ids = torch.cat([*documents, torch.zeros(1, 3, dtype=torch.long)], 1)
    segments = torch.tensor([[0] * 11 + [1] * 5 + [2] * 16 + [-1] * 3])
    positions = torch.cat([torch.arange(length) for length in (11, 5, 16, 3)])[None]
    return documents, ids, segments, positions


def test_packing_changes_neither_logits_nor_gradients() -> None:
    model, alone = make(), make()
    documents, ids, segments, positions = packed()
    logits = model(ids, positions=positions, attend=DocumentMask(segments))
    separate = [alone(document) for document in documents]
    start = 0
    for document in separate:
        end = start + document.shape[1]
        assert distance(logits[:, start:end], document) < 1e-5
        start = end
    weights = torch.randn(logits[:, :start].shape, generator=torch.Generator().manual_seed(5))
    (logits[:, :start] * weights).sum().backward()
    (torch.cat(separate, 1) * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert distance(ours.grad, theirs.grad) < 1e-5, name


def test_packing_without_the_mask_is_noticed() -> None:
    """The comparison above can fail: without isolation the second document differs."""
    model = make()
    documents, ids, _, positions = packed()
    with torch.no_grad():
        assert distance(model(ids, positions=positions)[:, 11:16], model(documents[1])) > 1e-2


@torch.no_grad()
def test_hidden_states_and_logits() -> None:
    model = make(tie_word_embeddings=True)
    ids = tokens()
    assert torch.equal(model.logits(model(ids, return_hidden=True)), model(ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_are_counted() -> None:
    for changes in VARIANTS.values():
        model = make(**changes)
        assert model.config.parameters() == sum(weight.numel() for weight in model.parameters())


def test_initialisation_repeats_and_depends_on_the_seed() -> None:
    one, two, three = make(), make(seed=1), make()
    one.initialise(3)
    two.initialise(3)
    three.initialise(4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, three.lm_head.weight)
    assert abs(float(one.lm_head.weight.detach().std()) - BASE.initializer_range) < 2e-3


@torch.no_grad()
def test_a_change_of_dtype_leaves_rotary_frequencies_alone() -> None:
    """bfloat16 frequencies would move far positions by whole turns."""
    model = make()
    model(tokens())
    model = model.to(torch.bfloat16)
    model(tokens())
    assert model._rope is not None
    assert np.array_equal(model._rope[0].numpy(), rope_frequencies(model.config)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_configuration_survives_both_spellings(variant: str) -> None:
    config = make(**VARIANTS[variant]).config
    assert ModelConfig.from_hf(config.to_hf()) == config
    transformers = pytest.importorskip("transformers")
    newer = transformers.LlamaConfig(**config.to_hf()).to_dict()
    assert "rope_parameters" in newer
    assert np.array_equal(rope_frequencies(ModelConfig.from_hf(newer))[0], rope_frequencies(config)[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 512),
        ("quantization_config", {"quant_method": "gptq"}),
        ("hidden_size", 0),
        ("hidden_size", "48"),
        ("hidden_size", True),
        ("rms_norm_eps", "small"),
        ("num_key_value_heads", 4),
        ("head_dim", 7),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": "two"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": -1.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": [4]}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", 0.5),
        ("eos_token_id", "two"),
        ("bos_token_id", 1.5),
        ("pad_token_id", True),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: Any) -> None:
    values = BASE.to_hf() | {key: value}
    with pytest.raises(UserError, match=key.replace("rope_parameters", "rope_parameters|partial_rotary_factor")):
        ModelConfig.from_hf(values)
