"""The chunked cross-entropy and the block attention against PyTorch's own, in value and in gradients."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F

from criadero.chat import Example
from criadero.model import DocumentMask, causal
from criadero.train import loss as loss_module
from criadero.train.batches import IGNORE, Batch, rows_to_batch
from criadero.train.loss import BlockAttention, attention_for, cross_entropy_sum, next_token_loss


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def inputs(rows: int, masked: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 7, 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    targets = torch.randint(0, 11, (rows, 7), generator=generator)
    if masked == "some":
        targets[torch.rand(rows, 7, generator=generator) < 0.5] = IGNORE
    elif masked == "all":
        targets[:] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("chunk", [1, 5, 7, 13, 14, 15, 2048])  # borders before, on and after the 14 rows
def test_value_and_gradients_equal_pytorchs(monkeypatch: pytest.MonkeyPatch, masked: str, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    ours, theirs = [tuple(t.clone() for t in inputs(2, masked)) for _ in range(2)]
    theirs = tuple(t.double() if t.is_floating_point() else t for t in theirs)  # the truth, in float64
    for tensors in (ours, theirs):
        tensors[0].requires_grad_(), tensors[1].requires_grad_()
    value, truth = cross_entropy_sum(*ours), reference(*theirs)
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), truth.detach() if masked != "all" else torch.zeros((), dtype=torch.float64)
    )
    (value * -2.5).backward()  # whatever comes from above scales the gradients
    (truth * -2.5).backward()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        expected = other.grad if masked != "all" else torch.zeros_like(other)
        torch.testing.assert_close(mine.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_or_frozen_states_get_no_gradient() -> None:
    hidden, weight, targets = inputs(2, "some")
    cross_entropy_sum(hidden.requires_grad_(), weight, targets).backward()
    assert weight.grad is None
    alone = hidden.grad.clone()
    both = hidden.detach().clone().requires_grad_()
    cross_entropy_sum(both, weight.requires_grad_(), targets).backward()
    torch.testing.assert_close(both.grad, alone)
    frozen = weight.grad.clone()
    weight.grad = None
    cross_entropy_sum(hidden.detach(), weight, targets).backward()
    torch.testing.assert_close(weight.grad, frozen)


def test_measuring_forms_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(2, "some")
    weight.requires_grad_()
    with torch.no_grad():
        value = cross_entropy_sum(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(hidden, weight.detach(), targets))
    made = []
    original = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **k: made.append(1) or original(*a, **k))
    with torch.no_grad():
        cross_entropy_sum(hidden, weight, targets)
    assert not made


def test_bfloat16_stays_close_to_float32() -> None:
    hidden, weight, targets = inputs(8, "some")
    exact = reference(hidden, weight, targets)
    rough = cross_entropy_sum(hidden.bfloat16(), weight.bfloat16(), targets)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_models_gradients_equal_those_of_plain_cross_entropy(tied: bool) -> None:
    batch = packed()
    ours, theirs = (tiny.model(tie_word_embeddings=tied) for _ in range(2))
    value, count, _ = next_token_loss(ours, batch)
    value.backward()
    logits = theirs(batch.ids, positions=batch.positions, attend=DocumentMask(batch.segments))
    truth = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    truth.backward()
    assert count == int((batch.targets != IGNORE).sum())
    torch.testing.assert_close(value, truth)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# --- attention ---


def documents(seed: int = 1) -> list[list[Example]]:
    """Two rows: three documents and some padding; one document and much padding."""
    generator = torch.Generator().manual_seed(seed)
    size = tiny.tokenizer().vocab_size

    def example(length: int) -> Example:
        return Example(torch.randint(0, size, (length,), generator=generator).tolist(), [True] * length)

    return [[example(5), example(9), example(2)], [example(7)]]


def packed(dtype: torch.dtype = torch.float32) -> Batch:
    return rows_to_batch(documents(), 20, pad=0, dtype=dtype)


@pytest.mark.parametrize("kv", [1, 2, 4])  # multi-query, grouped, one for each query head
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_rows_equal_each_document_alone(kv: int, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.model(dtype=dtype, num_key_value_heads=kv, scale=1.0)
    batch = packed(dtype)

    def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
        assert float((got - wanted).float().norm() / wanted.float().norm()) < tolerance

    with torch.no_grad():
        block = model(batch.ids, positions=batch.positions, attend=BlockAttention(batch.segments, dtype))
        mask = model(batch.ids, positions=batch.positions, attend=DocumentMask(batch.segments))
        real = batch.segments >= 0
        close(block[real], mask[real])
        assert torch.isfinite(block).all()  # padding too
        for r, row in enumerate(documents()):
            at = 0
            for example in row:
                alone = model(torch.tensor([example.ids]), attend=causal)[0]
                close(block[r, at : at + len(example.ids)], alone)
                at += len(example.ids)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_gradients_of_packed_rows_equal_the_sum_over_documents(dtype: torch.dtype, tolerance: float) -> None:
    together, alone = (tiny.model(dtype=dtype, scale=1.0) for _ in range(2))
    value, count, _ = next_token_loss(together, packed(dtype))
    value.backward()
    total, counts = 0.0, 0
    for row in documents():
        for example in row:
            single = rows_to_batch([[example]], len(example.ids), pad=0, dtype=dtype)
            part, n, _ = next_token_loss(alone, single, attend=causal)
            part.backward()
            total, counts = total + float(part.detach()), counts + n
    assert counts == count == (5 - 1) + (9 - 1) + (2 - 1) + (7 - 1)  # the last token of a document predicts nothing
    assert float(value) == pytest.approx(total, rel=tolerance)
    for (name, mine), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        relative = float((mine.grad - other.grad).float().norm() / other.grad.float().norm())
        assert relative < tolerance, name


def test_the_attention_chosen_keeps_documents_apart() -> None:
    long = rows_to_batch([[Example([1] * 700, [True] * 700)] * 2], 1400, pad=0, dtype=torch.float32)
    assert isinstance(attention_for(packed()), BlockAttention)
    assert isinstance(attention_for(long), DocumentMask)
    one = rows_to_batch([[Example([1] * 1100, [True] * 1100)]], 1100, pad=0, dtype=torch.float32)
    assert attention_for(one) is causal
