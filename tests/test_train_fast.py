"""Training with the compiled kernels against the model's own forward, its slow twin: losses, gradients, isolation, whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from criadero import lora
from criadero.kernels import native, reference_train
from criadero.kernels.formats import QuantTensor
from criadero.model import Llama
from criadero.quant_linear import QuantLinear
from criadero.train import fast
from criadero.train.batches import IGNORE, Batch
from criadero.train.loss import attention_for, next_token_loss
from criadero.train.optim import Optimizer

compiled = pytest.mark.skipif(native() is None, reason="the compiled kernels are not installed, or turned off")
SEGMENTS = [[0] * 20 + [1] * 33 + [2] + [-1] * 10, [0] * 64]  # documents of 20, 33, 1 and 64 tokens, and padding
SHAPES = [
    {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 52},
    {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": False},
    {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
]


def model(dtype: torch.dtype, **shape: object) -> Llama:
    made = Llama(tiny.config(**shape))
    made.initialise(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in made.parameters():  # norms that are not 1, logits that are not small
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return made.to(dtype)


def batch(vocab: int, dtype: torch.dtype, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    segments = torch.tensor(SEGMENTS)
    ids, targets = (torch.randint(0, vocab, segments.shape, generator=generator) for _ in range(2))
    targets[torch.rand(segments.shape, generator=generator) < 0.3] = IGNORE
    targets[segments < 0] = IGNORE
    positions = torch.zeros_like(segments)
    for i in range(1, segments.shape[1]):
        positions[:, i] = torch.where(segments[:, i] == segments[:, i - 1], positions[:, i - 1] + 1, 0)
    return Batch(ids, targets, segments, positions, dtype)


def packed(weight: Tensor, bits: int) -> QuantTensor:
    """Rounded to 4 or 8 bits with a scale for 16 columns."""
    groups = weight.view(len(weight), -1, 16)
    scales = (groups.abs().amax(-1) / (127 if bits == 8 else 7)).half()
    numbers = (groups / scales[..., None].float()).round().clamp(-127, 127).view(weight.shape).numpy()
    q = numbers.astype(np.int8)
    if bits == 4:
        u = (numbers + 8).astype(np.uint8)
        q = u[:, ::2] | u[:, 1::2] << 4
    return QuantTensor(bits, 16, q, scales.numpy(), None)


def gradients(net: Llama, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in net.named_parameters() if p.grad is not None}


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_backward_pass_by_hand_is_autograds(shape: dict) -> None:
    """In float64, with the twins of the kernels: what is left is the twin's loss and RoPE tables in float32."""
    net = model(torch.float64, **shape)
    data = batch(net.config.vocab_size, torch.float64)
    slow, count, _ = next_token_loss(net, data, attention_for(data))
    want = gradients(net, slow)
    loss, n = fast.loss_sum(net, data, reference_train)
    assert n == count
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=1e-6)
    assert furthest(gradients(net, loss), want) < 1e-6


@compiled
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_path_is_as_near_to_float64_as_the_slow_one(shape: dict, dtype: torch.dtype) -> None:
    net = model(dtype, **shape)
    exact = Llama(net.config).double()
    exact.load_state_dict({name: t.double() for name, t in net.state_dict().items()})
    data, wide = batch(net.config.vocab_size, dtype), batch(net.config.vocab_size, torch.float64)
    truth = next_token_loss(exact, wide, attention_for(wide))[0]
    want = gradients(exact, truth)
    slow = gradients(net, next_token_loss(net, data, attention_for(data))[0])
    assert fast.obstacle(net) is None
    loss = next_token_loss(net, data)[0]
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-6 if dtype == torch.float32 else 2e-3)
    assert furthest(gradients(net, loss), want) < 1.5 * furthest(slow, want) + 1e-6


@compiled
def test_no_gradient_crosses_a_document() -> None:
    net = model(torch.float32)
    data = batch(net.config.vocab_size, torch.float32)
    changed = data.ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % net.config.vocab_size  # in the first document
    alone = data.targets.clone()
    alone[0, :20] = IGNORE  # only the others are learned
    losses = [
        fast.loss_sum(net, Batch(ids, alone, data.segments, data.positions, data.dtype))[0]
        for ids in (data.ids, changed)
    ]
    assert torch.equal(losses[0], losses[1])


@compiled
def test_frozen_weights_get_no_gradient_and_evaluation_none_at_all() -> None:
    net = model(torch.float32)
    data = batch(net.config.vocab_size, torch.float32)
    whole = gradients(net, fast.loss_sum(net, data)[0])
    for name, p in net.named_parameters():
        p.requires_grad_("up_proj" in name)
    part = gradients(net, fast.loss_sum(net, data)[0])
    assert part.keys() == {name for name in whole if "up_proj" in name}
    assert all(torch.equal(part[name], whole[name]) for name in part)
    with torch.no_grad():
        loss, _ = fast.loss_sum(net, data)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(float(fast.loss_sum(net, data)[0].detach()), rel=1e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_curve_is_that_of_the_slow_twin(dtype: torch.dtype) -> None:
    curves = []
    for slow in (False, True, False):
        net = model(dtype)
        optimizer = Optimizer(net.named_parameters(), method="adamw", weight_decay=0.1)
        curve = []
        for step in range(30):
            data = batch(net.config.vocab_size, dtype, seed=step % 3)
            loss, count, _ = next_token_loss(net, data, attention_for(data) if slow else None)
            loss.backward()
            optimizer.collect()
            optimizer.step(3e-3, divide_by=count, clip=1.0)
            curve.append(float(loss.detach()) / count)
        curves.append(curve)
    assert curves[0] == curves[2], "bit for bit the same when repeated"
    assert curves[0][-1] < curves[0][0] - 0.5
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert max(abs(a - b) for a, b in zip(curves[0], curves[1], strict=True)) < tolerance


@compiled
def test_what_the_kernels_do_not_take_goes_the_slow_way_and_says_why() -> None:
    net = model(torch.float64)
    assert fast.describe(net) == "PyTorch's own kernels (in float64)"
    data = batch(net.config.vocab_size, torch.float64)
    assert next_token_loss(net, data)[1] == int((data.targets != IGNORE).sum())
    net = model(torch.float32)
    assert fast.describe(net).startswith("compiled training kernels (")
    net.model.layers[0].mlp.down_proj = torch.nn.Linear(48, 32, bias=True)
    assert fast.obstacle(net) == "with biases"


KINDS = ["lora", "odd rank", "q and v only", "new tokens"]
IN_FLOAT32 = ["dora", "int4 base", "int8 base"]  # parts of them compute in float32, also in a model of float64


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((torch.float64, kind) for kind in KINDS),
        *((dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in KINDS + IN_FLOAT32),
    ],
)
def test_adapters_of_every_kind_get_the_gradients_of_the_slow_twin(dtype: torch.dtype, kind: str) -> None:
    if dtype != torch.float64 and native() is None:
        pytest.skip("the compiled kernels are not installed, or turned off")

    def adapted(dtype: torch.dtype) -> Llama:
        net = model(dtype, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
        if kind.endswith("base"):
            bits = int(kind[3])
            for block in net.model.layers:
                for parent in (block.self_attn, block.mlp):
                    for name, layer in list(parent.named_children()):
                        setattr(parent, name, QuantLinear(packed(layer.weight.detach().float(), bits), dtype))
        targets = ("q_proj", "v_proj") if kind == "q and v only" else lora.ALL_LINEAR
        rank = 3 if kind == "odd rank" else 4
        parameters = lora.attach(net, rank=rank, alpha=8.0, targets=targets, dora=kind == "dora")
        if kind == "new tokens":
            parameters += lora.train_rows(net, [1, 5])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in parameters:
                if name.endswith("lora_B"):
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        return net

    net = adapted(dtype)
    data = batch(net.config.vocab_size, dtype)
    slow = next_token_loss(net, data, attention_for(data))[0]
    want = gradients(net, slow)
    kernels = reference_train if dtype == torch.float64 else None
    assert kernels or fast.obstacle(net) is None
    loss = fast.loss_sum(net, data, kernels)[0]
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), rel=min(tolerance, 2e-3))
    assert furthest(gradients(net, loss), want) < tolerance


@compiled
def test_dropout_before_the_adapters_is_kept_and_off_in_evaluation() -> None:
    net = model(torch.float32)
    lora.attach(net, rank=2, alpha=4.0, dropout=0.5)
    data = batch(net.config.vocab_size, torch.float32)
    with torch.no_grad():
        for layer in lora.adapters(net).values():
            layer.lora_B.fill_(0.1)
        losses = [float(fast.loss_sum(net.train(mode), data)[0]) for mode in (True, True, False, False)]
    assert losses[0] != losses[1]
    assert losses[2] == losses[3] == pytest.approx(float(next_token_loss(net, data, attention_for(data))[0]), rel=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_whole_numbers_give_nearly_the_same_gradients_and_are_off_in_evaluation(bits: int, dtype: torch.dtype) -> None:
    net = model(dtype, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320)
    for block in net.model.layers if bits else ():
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                setattr(parent, name, QuantLinear(packed(layer.weight.detach().float(), bits), dtype))
    parameters = lora.attach(net, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    data = batch(net.config.vocab_size, dtype)
    exact = fast.loss_sum(net, data)[0]
    want = gradients(net, exact)
    fast.multiply_in_int8(net)
    assert fast.describe(net).endswith("the base multiplied in int8")
    whole = fast.loss_sum(net, data)[0]
    got = gradients(net, whole)
    assert float(whole.detach()) != float(exact.detach())
    assert float(whole.detach()) == pytest.approx(float(exact.detach()), rel=5e-3)
    a, b = (torch.cat([t.flatten() for t in one.values()]) for one in (got, want))
    assert float(torch.cosine_similarity(a, b, 0)) > 0.99
    with torch.no_grad():
        assert float(fast.loss_sum(net, data)[0]) == pytest.approx(float(exact.detach()), rel=1e-6)
