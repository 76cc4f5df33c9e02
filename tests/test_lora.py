"""Adapters against PEFT, an implementation we had no part in, and against their own definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero import lora
from criadero.checkpoints import load_model, save_hf
from criadero.errors import UserError
from criadero.model import Llama

IDS = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def fill(model: Llama, seed: int = 1) -> Llama:
    """Random numbers for B, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.adapters(model).values():
        layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=generator))
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + 0.3 * torch.randn(layer.magnitude.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model.eval()(IDS)
    return getattr(out, "logits", out).float()


def test_an_attached_adapter_changes_nothing_at_first_and_only_it_learns() -> None:
    model = tiny.model()
    before = logits(model)
    named = lora.attach(model, rank=4, alpha=8)
    assert torch.equal(logits(model), before)
    assert len(named) == 2 * 7 * 2
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {name for name, _ in named}
    layer = model.model.layers[0].mlp.down_proj
    assert layer.lora_A.shape == (4, 48)
    assert layer.lora_B.shape == (32, 4)
    assert float(layer.lora_A.detach().abs().max()) <= 1 / math.sqrt(48)
    assert not layer.lora_B.any()
    again = tiny.model()
    lora.attach(again, rank=4, alpha=8)
    assert torch.equal(again.model.layers[0].mlp.down_proj.lora_A, layer.lora_A)  # the seed decides
    other = tiny.model()
    lora.attach(other, rank=4, alpha=8, seed=1)
    assert not torch.equal(other.model.layers[0].mlp.down_proj.lora_A, layer.lora_A)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(rslora: bool, scale: float) -> None:
    model = tiny.model()
    plain = model.model.layers[1].mlp.up_proj.weight.clone()
    lora.attach(model, rank=4, alpha=12, rslora=rslora)
    layer = fill(model).model.layers[1].mlp.up_proj
    wanted = plain + scale * layer.lora_B.data @ layer.lora_A.data
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x).detach(), x @ wanted.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("targets", [lora.ALL_LINEAR, ("q_proj", "v_proj")])
def test_merged_equals_unmerged(dtype: torch.dtype, tolerance: float, targets: tuple[str, ...]) -> None:
    model = tiny.model(dtype=dtype, scale=1.0)
    names = list(model.state_dict())
    lora.attach(model, rank=4, alpha=8, targets=targets)
    apart = logits(fill(model))
    merged = lora.merge(model)
    assert merged is model
    assert list(merged.state_dict()) == names
    assert not lora.adapters(merged)
    relative = float((logits(merged) - apart).norm() / apart.norm())
    assert relative < tolerance
    assert float((apart - logits(tiny.model(dtype=dtype, scale=1.0))).norm() / apart.norm()) > 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_dora_starts_as_the_base_and_merges(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.model(dtype=dtype, scale=1.0)
    before = logits(model)
    named = lora.attach(model, rank=4, alpha=8, dora=True)
    assert torch.equal(logits(model), before)
    assert sum(name.endswith(".magnitude") for name, _ in named) == 2 * 7
    apart = logits(fill(model))
    assert float((apart - before).norm() / before.norm()) > 0.05
    relative = float((logits(lora.merge(model)) - apart).norm() / apart.norm())
    assert relative < tolerance


def test_doras_gradients_equal_pefts() -> None:
    """The lengths of the rows are constants for the gradient, as section 4.3 of the paper has it."""
    peft = pytest.importorskip("peft")
    layer = torch.nn.Linear(12, 9, bias=False)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(torch.nn.Sequential(layer), settings)
    part = theirs.base_model.model[0]
    ours = lora.LoraLinear(layer, 3, 2.0, 0.0, dora=True)
    assert ours.magnitude is not None
    with torch.no_grad():
        ours.lora_A.copy_(part.lora_A["default"].weight)
        ours.lora_B.copy_(part.lora_B["default"].weight)
        ours.magnitude.copy_(part.lora_magnitude_vector["default"].weight.mul_(1.3))
    x = torch.randn(5, 12)
    weigh = torch.randn(5, 9)
    (theirs(x) * weigh).sum().backward()
    (ours(x) * weigh).sum().backward()
    for mine, other in (
        (ours.lora_A, part.lora_A["default"].weight),
        (ours.lora_B, part.lora_B["default"].weight),
        (ours.magnitude, part.lora_magnitude_vector["default"].weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    model = tiny.model()
    lora.attach(model, rank=4, alpha=8, dropout=0.5)
    fill(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"targets": ("q_proj", "lm_head")}, {"targets": ()}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"lora_rank must be at least 1|lora_targets: "):
        lora.attach(tiny.model(), **({"rank": 2, "alpha": 4} | settings))


# --- files ---

VARIANTS: list[dict[str, Any]] = [{}, {"rslora": True}, {"targets": ("q_proj", "down_proj")}, {"dora": True}]


def adapter(
    folder: Path, rslora: bool = False, targets: tuple[str, ...] = lora.ALL_LINEAR, dora: bool = False
) -> torch.Tensor:
    """A base in folder/base and an adapter in folder/adapter; the logits of the two together."""
    base = tiny.base(folder / "base")
    model = load_model(base)
    lora.attach(model, rank=4, alpha=8, targets=targets, rslora=rslora, dora=dora)
    fill(model)
    (folder / "adapter").mkdir()
    lora.save_adapter(model, folder / "adapter", base="../base", alpha=8, rslora=rslora, dropout=0.0)
    return logits(model)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_peft_opens_ours(tmp_path: Path, variant: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ours = adapter(tmp_path, **variant)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = logits(twin)
    twin = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    torch.testing.assert_close(logits(twin), ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_ours_opens_pefts(tmp_path: Path, variant: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = tiny.base(tmp_path / "base")
    twin = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = list(variant.get("targets", lora.ALL_LINEAR))
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, use_rslora=variant.get("rslora", False), task_type="CAUSAL_LM",
        init_lora_weights=False, use_dora=variant.get("dora", False),
    )  # fmt: skip
    torch.manual_seed(0)
    twin = peft.get_peft_model(twin, settings)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "magnitude" in name:
                weight.mul_(1.2)
    twin.save_pretrained(tmp_path / "theirs")
    attached = lora.load_adapter(load_model(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(attached), logits(twin), rtol=1e-4, atol=1e-5)


def test_load_model_merges_an_adapter_on_its_base_wherever_the_two_lie(tmp_path: Path) -> None:
    ours = adapter(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "adapter"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    model = load_model(tmp_path / "elsewhere" / "adapter")
    assert not lora.adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), ours, rtol=1e-4, atol=1e-5)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(UserError, match="another base model"):
        lora.load_adapter(tiny.model(hidden_size=64), tmp_path / "adapter")
    with pytest.raises(UserError, match="is missing; this adapter is for another base model"):
        lora.load_adapter(tiny.model(num_hidden_layers=3), tmp_path / "adapter")
    with pytest.raises(UserError, match="fit no layer of this base model"):
        lora.load_adapter(tiny.model(num_hidden_layers=1), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"q_proj.magnitude is missing; this adapter is for another base model"),
        ({"trainable_token_indices": {"norm": [1]}}, "trainable_token_indices must list"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices must list"),
        ({"trainable_token_indices": [1]}, "embed_tokens.rows is missing"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "only LoRA adapters"),
        ({"bias": "all"}, "without bias"),
        ({"target_modules": "all.*regex"}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["lm_head"]}, "target_modules"),
        ({"r": "many"}, "not a readable adapter"),
        ({"r": 0}, "ranks from 1"),
    ],
)
def test_adapters_of_other_kinds_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        lora.load_adapter(tiny.model(), tmp_path / "adapter")
    assert str(file.parent) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}"])
def test_damaged_adapters_are_refused(tmp_path: Path, content: bytes) -> None:
    adapter(tmp_path)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not readable"):
        lora.load_adapter(tiny.model(), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match="not a readable adapter"):
        lora.load_adapter(tiny.model(), tmp_path / "adapter")


def test_a_merged_model_opens_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = adapter(tmp_path)
    model = load_model(tmp_path / "adapter")
    save_hf(model, model.config, tmp_path / "merged")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(twin), ours, rtol=1e-4, atol=1e-5)
