"""What tuning takes, by part, and what gives way: arithmetic that is done again here by hand, and by counting what is attached."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from criadero import lora
from criadero.config import ModelConfig
from criadero.errors import UserError
from criadero.train.memory import Fit, adapter_weights, fit, needs

BIG = ModelConfig(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
PACKED = 640 * 10**6  # of such a model in 4 bits


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [lora.ALL_LINEAR, ("q_proj", "down_proj")])
def test_adapter_weights_are_those_that_are_attached(dora: bool, targets: tuple[str, ...]) -> None:
    model = tiny.model()
    attached = lora.attach(model, rank=4, alpha=8.0, targets=targets, dora=dora)
    assert adapter_weights(model.config, 4, targets, dora) == sum(p.numel() for _, p in attached)


def test_parts() -> None:
    trained = adapter_weights(BIG, 16, lora.ALL_LINEAR)
    found = needs(BIG, method="lora", trained=trained, micro_tokens=1024, length=256, dtype=torch.bfloat16)
    assert found.weights == 2 * BIG.parameters()
    assert found.adapter == 2 * trained
    assert found.optimiser == trained * (4 + 4 + 4 + 4 + 2 + 2)  # master, two moments, sums; gradient; the best
    assert found.total == sum(
        (found.weights, found.adapter, found.optimiser, found.activations, found.logits, found.process)
    )
    assert found.words().startswith(f"{found.total / 1e9:.1f} GB: weights 2.20, adapter 0.03, optimiser 0.25, ")
    full = needs(BIG, method="full", trained=BIG.parameters(), micro_tokens=1024, length=256, dtype=torch.bfloat16)
    assert full.total > 20e9
    twice = needs(BIG, method="lora", trained=trained, micro_tokens=2048, length=256, dtype=torch.bfloat16)
    assert twice.activations == pytest.approx(2 * found.activations, rel=1e-6)
    packed = needs(
        BIG, method="qlora", trained=trained, micro_tokens=1024, length=256, dtype=torch.bfloat16, weight_bytes=PACKED
    )
    assert packed.weights == PACKED
    compiled = needs(
        BIG, method="lora", trained=trained, micro_tokens=1024, length=256, dtype=torch.bfloat16, compiled=True
    )
    assert compiled.activations < found.activations


def fitted(gb: float, **changes: Any) -> Fit:
    values: dict[str, Any] = {
        "budget": gb * 1e9, "method": "lora", "rank": 16, "targets": lora.ALL_LINEAR, "longest": 600, "context": 2048,
        "micro_tokens": 4096, "dtype": torch.bfloat16, "packed": None, "may_cut": False, "base": "big", "compiled": True,
    }  # fmt: skip
    return fit(BIG, **(values | changes))


def test_what_gives_way_first() -> None:
    roomy = fitted(64)
    assert (roomy.method, roomy.max_length, roomy.micro_tokens) == ("lora", 600, 4096)
    assert roomy.why == "lora; examples of at most 600 tokens; 4,096 tokens at once"
    tighter = fitted(6)  # fewer tokens at once, which only takes longer
    assert (tighter.method, tighter.max_length) == ("lora", 600)
    assert tighter.micro_tokens < 4096
    assert "instead of 4,096, which takes longer" in tighter.why
    packed = fitted(2.5, packed=PACKED)  # then the base in 4 bits
    assert (packed.method, packed.max_length) == ("qlora", 600)
    assert "qlora, because lora would need more than 2.5 GB" in packed.why
    shorter = fitted(1.9, packed=PACKED, may_cut=True)  # and at last shorter examples
    assert (shorter.method, shorter.max_length) == ("qlora", 256)
    assert "instead of 600" in shorter.why
    for found, gb in ((roomy, 64), (tighter, 6), (packed, 2.5), (shorter, 1.9)):
        assert found.needs.total <= gb * 1e9


def test_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"fit 1: tuning big takes at least \d.\d GB: weights 2.20, .*take a smaller model"
    ):
        fitted(1)
    with pytest.raises(UserError, match=r"in 4 bits would need about .* criadero quantize big --to int4"):
        fitted(2.5)
    with pytest.raises(UserError, match=r"shorter examples would fit .* allow it with --too_long split"):
        fitted(1.7, packed=PACKED)
    with pytest.raises(UserError, match=r"adapters would need .* --method lora"):
        fitted(8, method="full", longest=100)
