"""What tuning takes, by part, and what gives way: arithmetic that is done again here by hand, and by counting what is attached."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from criadero import lora
from criadero.config import ModelConfig
from criadero.errors import UserError
from criadero.train.memory import Fit, adapter_weights, fit, gb, needs
from criadero.train.preflight import Report
from criadero.train.preflight import fitted as say_fitted

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
        "budget": gb * 1e9, "method": "lora", "rank": 16, "targets": lora.ALL_LINEAR, "longest": 600, "row": 600,
        "micro_tokens": 4096, "dtype": torch.bfloat16, "packed": None, "may_cut": False, "base": "big", "compiled": True,
    }  # fmt: skip
    return fit(BIG, **(values | changes))


def test_what_gives_way_first() -> None:
    roomy = fitted(64)
    assert (roomy.method, roomy.length, roomy.rows, roomy.wanted, roomy.why) == ("lora", 600, 6, 6, "lora")
    tighter = fitted(6)  # fewer rows at once, which only takes longer
    assert (tighter.method, tighter.length) == ("lora", 600)
    assert tighter.rows < tighter.wanted == 6
    packed = fitted(2.5, packed=PACKED)  # then the base in 4 bits
    assert (packed.method, packed.length) == ("qlora", 600)
    assert packed.why == f"qlora, because lora needs {gb(needs_of_lora(600))}"
    shorter = fitted(1.9, packed=PACKED, may_cut=True)  # and at last shorter examples
    assert (shorter.method, shorter.length) == ("qlora", 256)
    for found, budget in ((roomy, 64), (tighter, 6), (packed, 2.5), (shorter, 1.9)):
        assert found.needs.total <= budget * 1e9


def needs_of_lora(row: int) -> int:
    trained = adapter_weights(BIG, 16, lora.ALL_LINEAR)
    return needs(
        BIG, method="lora", trained=trained, micro_tokens=row, length=row, dtype=torch.bfloat16, compiled=True
    ).total


def test_short_examples_still_stand_in_rows() -> None:
    """Rows are 256 tokens at least, so that is what has to fit, also where no example has as many."""
    found = fitted(needs_of_lora(256) / 1e9, longest=39, row=256)
    assert (found.length, found.rows, found.needs.total) == (256, 1, needs_of_lora(256))
    with pytest.raises(UserError, match=r"\(lora, a row of 256 tokens at once\)"):
        fitted((needs_of_lora(256) - 1) / 1e9, longest=39, row=256, may_cut=True)
    with pytest.raises(UserError) as refused:
        fitted(1.9, packed=PACKED, longest=100, row=4096)
    assert "shorter examples" not in str(refused.value)  # cutting examples of 100 tokens to 128 would change nothing


def said(found: Fit, **counts: Any) -> str:
    report = Report("d", "s", 0, "", counts.pop("context", 2048), **counts)
    return say_fitted(found, report, budget=4, longest=600, rows=found.rows, length=found.length)


def test_what_is_said_of_it() -> None:
    assert said(fitted(64)) == (
        "fit 4 GB: lora; 6 rows of 600 tokens at once; no chat is cut or split, the longest has 600 tokens"
    )
    line = said(fitted(1.9, packed=PACKED, may_cut=True), context=256, too_long=3, parts=5, long_rounds=1)
    assert line == (
        f"fit 4 GB: qlora, because lora needs {gb(needs_of_lora(256))}; 1 row of 256 tokens at once instead of 16, which takes "
        "longer; chats of at most 256 tokens instead of 600 (3 chats: split into 5 parts, 0 dropped, 0 tokens cut, 1 round left out)"
    )
    again = fitted(64, compiled=False, checkpointing="on")
    line = said(again, context=600, noun="piece")
    assert line.endswith("; blocks computed again; pieces of at most 600 tokens, nothing left out")
    # the given length cut them, not the budget
    assert said(fitted(64), context=600, too_long=1, truncated_tokens=7).endswith(
        "; chats of at most 600 tokens (1 chat: 0 dropped, 7 tokens cut)"
    )
    assert said(fitted(64), context=600, held_out_cut=2).endswith(
        "; chats of at most 600 tokens (2 held-out chats cut)"
    )


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
