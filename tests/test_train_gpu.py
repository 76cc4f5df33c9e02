"""What a GPU trains with, on a CPU: attention without masks, blocks computed twice, compiled blocks, fused AdamW. No GPU was at hand."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from criadero import lora
from criadero.chat import Example
from criadero.errors import UserError
from criadero.kernels import native
from criadero.kernels.formats import QuantTensor
from criadero.model import Attend, DocumentMask, Llama, causal
from criadero.quant_linear import QuantLinear
from criadero.run import make
from criadero.train import gpu
from criadero.train.batches import Batch, rows_to_batch
from criadero.train.loss import next_token_loss
from criadero.train.memory import Needs, fit, needs
from criadero.train.optim import Optimizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")
NOTHING = Needs(0, 0, 0, 0, 0)
compiler = pytest.mark.skipif(
    not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")),
    reason="torch.compile on a CPU needs a C++ compiler",
)


def batch(lengths: list[list[int]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows of documents of these lengths, padded to the longest row; a third of the tokens is not learned."""
    draw = torch.Generator().manual_seed(seed)
    rows = [
        [
            Example(
                torch.randint(0, 280, (n,), generator=draw).tolist(), (torch.rand(n, generator=draw) > 0.3).tolist()
            )
            for n in row
        ]
        for row in lengths
    ]
    return rows_to_batch(rows, max(sum(row) for row in lengths), 0, dtype)


def results(model: Llama, data: Batch, attend: Attend | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients, by PyTorch."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout
    loss, _, _ = next_token_loss(model, data, attend or gpu.without_mask(data.segments))
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-12)) for name in want)


def adapted(dropout: float = 0.0, dora: bool = False, packed: bool = False, **changes: Any) -> Llama:
    model = tiny.model(**changes)
    for name, layer in list(model.model.layers.named_modules()) if packed else ():
        if isinstance(layer, torch.nn.Linear):
            parent, _, child = name.rpartition(".")
            numbers = (layer.weight.detach() * 20).round().clamp(-127, 127).to(torch.int8).numpy()
            scales = np.full((len(numbers), numbers.shape[1] // 16), 0.05, np.float16)
            weight = QuantLinear(QuantTensor(8, 16, numbers, scales, None), torch.float32)
            setattr(model.model.layers.get_submodule(parent), child, weight)
    lora.attach(model, rank=4, alpha=8.0, dropout=dropout, dora=dora)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.train()


# --- attention ---


def test_one_document_a_row_needs_no_mask() -> None:
    model, data = tiny.model(), batch([[90], [17], [64]])
    attend = gpu.without_mask(data.segments)
    assert attend is causal
    want, gradients = results(model, data, DocumentMask(data.segments))
    got, ours = results(model, data, attend)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert furthest(ours, gradients) < 1e-5


@pytest.mark.parametrize("lengths", [[[20, 33, 1], [64]], [[3, 70, 65], [128, 2], [5]], [[200, 1, 1, 63]]])
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_documents_without_a_mask(lengths: list[list[int]], keys: int) -> None:
    model, data = tiny.model(num_key_value_heads=keys), batch(lengths)
    attend = gpu.without_mask(data.segments)
    assert isinstance(attend, gpu.Documents)
    want, gradients = results(model, data, DocumentMask(data.segments))
    got, ours = results(model, data, attend)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert furthest(ours, gradients) < 1e-5


def test_rows_that_begin_in_the_middle_of_a_document() -> None:
    """As pretraining cuts them: several documents, no padding; and a row of padding alone."""
    segments = torch.tensor([[0] * 10 + [1] * 54, [3] * 64, [-1] * 64])
    data = batch([[64], [64], [64]])
    targets = torch.where(segments < 0, -100, data.targets)
    data = dataclasses.replace(data, segments=segments, targets=targets)
    model = tiny.model()
    want, gradients = results(model, data, DocumentMask(segments))
    got, ours = results(model, data)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    assert furthest(ours, gradients) < 1e-5


def test_no_call_of_sdpa_has_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention refuses masks; and less than half of what is laid out is padding, beyond the narrowest group."""
    asked: list[dict[str, Any]] = []
    shapes: list[torch.Size] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        asked.append(more)
        shapes.append(q.shape)
        return real(q, k, v, **more)

    monkeypatch.setattr("criadero.model.F.scaled_dot_product_attention", watch)
    for lengths in ([[130], [90]], [[129, 70, 65], [100, 66]]):
        data = batch(lengths)
        shapes.clear()
        next_token_loss(tiny.model(), data, gpu.without_mask(data.segments))
        assert sum(shape[0] * shape[2] for shape in shapes) < 2 * 2 * data.tokens  # two layers
    assert all(one["attn_mask"] is None and one["is_causal"] for one in asked)


def test_gpus_get_attention_without_masks() -> None:
    from criadero.train.loss import attention_for

    data = batch([[20, 33], [64]])
    on_device = dataclasses.replace(data, ids=data.ids.to("meta"))
    assert isinstance(attention_for(on_device), gpu.Documents)


def test_bfloat16_stays_close() -> None:
    data, model = batch([[20, 33, 1], [64]], dtype=torch.bfloat16), tiny.model(dtype=torch.bfloat16)
    want, _ = results(tiny.model(), dataclasses.replace(data, dtype=torch.float32))
    got, _ = results(model, data)
    assert float(got) == pytest.approx(float(want), rel=2e-2)


# --- checkpointing ---


@pytest.mark.parametrize("kind", ["full", "adapters with dropout"])
def test_checkpointing_changes_no_bit(kind: str) -> None:
    model = tiny.model().train() if kind == "full" else adapted(dropout=0.2)
    data = batch([[20, 33, 1], [64]])
    want, gradients = results(model, data)
    model.checkpointing = True
    got, ours = results(model, data)
    assert torch.equal(got, want)
    assert ours.keys() == gradients.keys()
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)


def test_checkpointing_keeps_less() -> None:
    """Bytes that autograd keeps for the way back, counted."""
    model, data = tiny.model(num_hidden_layers=4), batch([[100], [100]])

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            next_token_loss(model, data, causal)
        return sum(sizes.values())

    plain = kept()
    model.checkpointing = True
    assert kept() < plain / 2


def test_memory_knows_checkpointing() -> None:
    values: dict[str, Any] = {
        "method": "full",
        "trained": 0,
        "micro_tokens": 4096,
        "length": 256,
        "dtype": torch.float32,
    }
    config = tiny.config(num_hidden_layers=16)
    plain, saving = (needs(config, checkpointing=on, **values).activations for on in (False, True))
    assert saving < plain / 5
    compiled = [needs(config, checkpointing=on, compiled=True, **values) for on in (False, True)]
    assert compiled[0] == compiled[1]
    assert needs(config, device="cuda", **values).activations < plain  # no scores of attention


@pytest.mark.parametrize(("switch", "again"), [("auto", True), ("on", True), ("off", None)])
def test_fit_takes_checkpointing_before_it_gives_up(switch: str, again: bool | None) -> None:
    values: dict[str, Any] = {
        "method": "full", "rank": 4, "targets": lora.ALL_LINEAR, "longest": 2048, "row": 2048, "micro_tokens": 4096,
        "dtype": torch.float32, "packed": None, "may_cut": False, "base": "it",
    }  # fmt: skip
    config = tiny.config(num_hidden_layers=64)
    roomy = fit(config, budget=1e12, compiled=False, checkpointing="auto", **values)
    assert not roomy.checkpointing
    assert roomy.rows * roomy.length == 4096
    least = fit(config, budget=1e12, compiled=False, checkpointing="on", **values | {"micro_tokens": 2048}).needs.total
    if again is None:
        with pytest.raises(UserError, match="at least"):
            fit(config, budget=least + 1, compiled=False, checkpointing=switch, **values)
        return
    found = fit(config, budget=least + 1, compiled=False, checkpointing=switch, **values)
    assert found.checkpointing
    assert found.rows * found.length == 2048


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    if native() is not None:
        memory, said = gpu.prepare(model, "on", "on", NOTHING, dataclasses.replace(NOTHING, logits=1))
        assert memory is NOTHING
        assert said.startswith("checkpointing and compile not needed")
        assert not model.checkpointing
        assert gpu.prepare(model, "auto", "auto", NOTHING, NOTHING)[1] == ""
    monkeypatch.setattr("criadero.train.gpu.fast.obstacle", lambda model: "without compiled kernels")
    much = dataclasses.replace(NOTHING, activations=10**18)
    assert gpu.prepare(model, "auto", "auto", NOTHING, NOTHING)[1] == ""
    assert not model.checkpointing
    assert gpu.prepare(model, "off", "auto", much, NOTHING) == (much, "")
    assert gpu.prepare(model, "auto", "auto", much, NOTHING) == (NOTHING, "blocks computed again on the way back")
    assert model.checkpointing
    assert model.halves is gpu.HALVES
    monkeypatch.setattr("criadero.train.gpu._compiler", lambda: None)
    with pytest.raises(UserError, match=r"install g\+\+"):
        gpu.prepare(model, "off", "on", NOTHING, NOTHING)


def test_tuning_with_checkpointing_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("criadero.train.fast.compiled", lambda: False)
    tiny.base(tmp_path / "base")
    tiny.write_chats(tmp_path / "chats.jsonl")
    made = []
    for switch in ("off", "on"):
        values = {
            "base": str(tmp_path / "base"), "data": str(tmp_path / "chats.jsonl"), "dtype": "float32", "epochs": 1.0,
            "batch_tokens": 256, "lora_dropout": 0.1, "gradient_checkpointing": switch, "samples": 0,
        }  # fmt: skip
        make("sft", values, tmp_path / switch)
        made.append(load_file(tmp_path / switch / "adapter_model.safetensors"))
    assert "blocks computed again" in capsys.readouterr().err
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --- compiling ---


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"packed": True}], ids=["lora", "dora", "qlora"])
def test_compiled_blocks(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to tolerance, for adapters, with checkpointing too; and however lengths vary, nothing is compiled again."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr("criadero.train.gpu.fast.obstacle", lambda model: "without compiled kernels")
    model = adapted(num_hidden_layers=10, **kind)
    shapes = [[[20, 33, 1], [64]], [[90], [40]], [[5, 6], [7], [100, 3]], [[64, 64]], [[33]]]
    shapes += [[[n, 2 * n], [n]] for n in range(9, 13)]
    batches = [batch(lengths, seed) for seed, lengths in enumerate(shapes)]
    want = [results(model, one) for one in batches]
    _, said = gpu.prepare(model, "off", "on", NOTHING, NOTHING)
    assert said == "blocks compiled"
    torch._dynamo.reset()
    counters.clear()
    compiled = []
    for again in (False, True):
        model.checkpointing = again
        for one, (loss, gradients) in zip(batches, want, strict=True):
            got, ours = results(model, one)
            assert float(got) == pytest.approx(float(loss), rel=1e-5)
            assert furthest(ours, gradients) < 1e-4
            compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] <= 8, compiled  # two halves; one row, and several
    assert compiled[-1] == compiled[4], compiled
    with torch.no_grad():  # held-out losses and answers are never compiled
        next_token_loss(model.eval(), batches[0])
    assert counters["stats"]["unique_graphs"] == compiled[-1]
    assert not counters["graph_break"]


# --- the optimiser ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_is_ours(dtype: torch.dtype) -> None:
    models = [tiny.model(dtype=dtype), tiny.model(dtype=dtype)]
    ours, fused = (
        Optimizer(
            m.named_parameters(),
            method="adamw",
            weight_decay=0.1,
            scales={"lm_head.weight": 4.0},
            fused=on,
            kernels=False,
        )
        for m, on in zip(models, (False, True), strict=True)
    )
    for step in range(5):
        for model, optimizer in zip(models, (ours, fused), strict=True):
            draw = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
            optimizer.collect()
        norms = [optimizer.step(1e-2, divide_by=7, clip=1.0) for optimizer in (ours, fused)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    state, theirs = ours.state(), fused.state()
    assert state.keys() == theirs.keys()
    assert all(torch.allclose(state[name], theirs[name], rtol=1e-4, atol=1e-6) for name in state)
    assert all(not grad.any() for grad in fused.grads.values())
    assert all(torch.equal(p, fused.masters[name].to(dtype)) for name, p in models[1].named_parameters())


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_fused_state_goes_on_to_the_bit(method: str) -> None:
    """Three steps, and three from a resume point after the second."""
    model, other = tiny.model(), tiny.model()
    first, second = (
        Optimizer(m.named_parameters(), method=method, weight_decay=0.1, fused=True) for m in (model, other)
    )

    def step(m: Llama, optimizer: Optimizer, number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for p in m.parameters():
            p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)
        optimizer.collect()
        optimizer.step(1e-2, divide_by=7, clip=1.0)

    step(model, first, 0)
    step(model, first, 1)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()}, first.steps)
    step(model, first, 2)
    step(other, second, 2)
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in first.state().items())
