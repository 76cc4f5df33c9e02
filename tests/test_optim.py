"""AdamW against torch's, Muon's orthogonalisation against a singular value decomposition, and the schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from criadero.train.optim import Optimizer, learning_rate, orthogonalise


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "model.norm.weight": (4,),
        "model.embed_tokens.weight": (9, 4),
    }
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in shapes.items()]


def give_gradients(named: list[tuple[str, nn.Parameter]], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named:
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def test_adamw_equals_torchs() -> None:
    ours, theirs = parameters(), parameters()
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = Optimizer(ours, method="adamw", weight_decay=0.1, **settings)
    groups = [
        {"params": [p for _, p in theirs if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for _, p in theirs if p.ndim == 1], "weight_decay": 0.0},
    ]
    truth = torch.optim.AdamW(groups, **settings)
    for step in range(7):
        lr = 0.01 * (step + 1)
        give_gradients(ours, step), give_gradients(theirs, step)
        optimizer.collect()
        for group in truth.param_groups:
            group["lr"] = lr
        norm = optimizer.step(lr, divide_by=1, clip=0)
        assert norm == pytest.approx(float(torch.cat([p.grad.flatten() for _, p in theirs]).norm()))
        truth.step()
        for (name, mine), (_, other) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.data, other.data, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_clipping_equals_torchs() -> None:
    for clip in (0.1, 1.0, 100.0):
        ours, theirs = parameters(), parameters()
        optimizer = Optimizer(ours, method="adamw", weight_decay=0.0)
        give_gradients(ours, 3), give_gradients(theirs, 3)
        optimizer.collect()
        norm = optimizer.step(0.0, divide_by=1, clip=clip)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_([p for _, p in theirs], clip)))
        for name, other in theirs:
            torch.testing.assert_close(optimizer.first[name], 0.1 * other.grad)  # the first moment after one step


def test_gradients_are_summed_divided_once_and_cleared() -> None:
    once, thrice = parameters(), parameters()
    one = Optimizer(once, method="adamw", weight_decay=0.0)
    many = Optimizer(thrice, method="adamw", weight_decay=0.0)
    give_gradients(once, 5)
    one.collect()
    for _ in range(3):
        give_gradients(thrice, 5)
        many.collect()
        assert all(p.grad is None for _, p in thrice)
    one.step(0.1, divide_by=4, clip=0), many.step(0.1, divide_by=12, clip=0)
    for (name, a), (_, b) in zip(once, thrice, strict=True):
        torch.testing.assert_close(a.data, b.data, rtol=1e-6, atol=1e-6)
        assert not one.grads[name].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(method: str, bad: float) -> None:
    named = parameters()
    optimizer = Optimizer(named, method=method, weight_decay=0.1)
    give_gradients(named, 1)
    optimizer.collect()
    optimizer.step(0.1, divide_by=1, clip=1)
    before = {name: t.clone() for name, t in optimizer.state().items()} | {name: p.data.clone() for name, p in named}
    give_gradients(named, 2)
    named[1][1].grad[2] = bad
    optimizer.collect()
    with pytest.raises(FloatingPointError):
        optimizer.step(0.1, divide_by=1, clip=1)
    after = optimizer.state() | {name: p.data for name, p in named}
    assert optimizer.steps == 1
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (5, 64)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    out = orthogonalise(matrix)
    values = torch.linalg.svdvals(out)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.25
    # the singular vectors stay: the polar factor of the matrix is that of the result
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    u2, _, v2 = torch.linalg.svd(out, full_matrices=False)
    torch.testing.assert_close(u @ v, u2 @ v2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_orthogonalise_equals_the_polynomial_on_singular_values(shape: tuple[int, int]) -> None:
    """Independent of matrix iterations: the quintic, applied five times to each singular value, in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalise(matrix).double(), torch.from_numpy(u * s @ v), rtol=1e-4, atol=1e-5)
    rough = orthogonalise(matrix, torch.bfloat16).double()
    assert float((rough - torch.from_numpy(u * s @ v)).norm() / np.linalg.norm(s)) < 0.05


def test_a_zero_gradient_is_orthogonalised_to_zero() -> None:
    assert not orthogonalise(torch.zeros(4, 6)).any()


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    """The update written out from Jordan's and Moonlight's texts: Nesterov momentum, orthogonalised, 0.2 sqrt(max) lr."""
    named = parameters()
    start = {name: p.detach().clone() for name, p in named}
    optimizer = Optimizer(named, method="muon", weight_decay=0.1, momentum=0.9)
    assert optimizer.muon == {"model.layers.0.mlp.up_proj.weight"}
    assert "second.model.layers.0.mlp.up_proj.weight" not in optimizer.state()
    momentum = torch.zeros(6, 4)
    weight = start["model.layers.0.mlp.up_proj.weight"]
    for step in range(3):
        give_gradients(named, step)
        gradient = named[0][1].grad.clone()
        optimizer.collect()
        optimizer.step(0.02, divide_by=1, clip=0)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalise(0.1 * gradient + 0.9 * momentum)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(6) * update
        torch.testing.assert_close(named[0][1].data, weight, rtol=1e-5, atol=1e-6)
    plain = parameters()
    twin = Optimizer(plain, method="adamw", weight_decay=0.1)
    for step in range(3):
        give_gradients(plain, step)
        twin.collect()
        twin.step(0.02, divide_by=1, clip=0)
    for mine, other in zip(named[1:], plain[1:], strict=True):
        assert torch.equal(mine[1], other[1])


def test_masters_keep_what_bfloat16_loses() -> None:
    parameter = nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", parameter)], method="adamw", weight_decay=0.0)
    for _ in range(8):
        parameter.grad = torch.ones_like(parameter)
        optimizer.collect()
        optimizer.step(1e-3, divide_by=1, clip=0)
    assert float(optimizer.masters["w"][0, 0]) == pytest.approx(1 - 8e-3, rel=1e-4)
    assert torch.equal(parameter, optimizer.masters["w"].bfloat16())  # each step alone would have been rounded away


def test_state_goes_round_and_a_strange_one_is_refused() -> None:
    named = parameters()
    optimizer = Optimizer(named, method="muon", weight_decay=0.1)
    give_gradients(named, 0)
    optimizer.collect()
    optimizer.step(0.1, divide_by=1, clip=1)
    saved = {name: t.clone() for name, t in optimizer.state().items()}
    fresh_named = parameters(seed=9)
    fresh = Optimizer(fresh_named, method="muon", weight_decay=0.1)
    fresh.load_state(saved, optimizer.steps)
    for one, other in ((optimizer, named), (fresh, fresh_named)):
        give_gradients(other, 1)
        one.collect()
        one.step(0.1, divide_by=1, clip=1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, fresh_named, strict=True))
    with pytest.raises(KeyError, match="another model"):
        fresh.load_state(saved | {"master.more": torch.zeros(1)}, 1)


def test_scales_change_one_parameters_learning_rate() -> None:
    fast, slow = parameters(), parameters()
    name = "model.embed_tokens.weight"
    one = Optimizer(fast, method="adamw", weight_decay=0.0)
    other = Optimizer(slow, method="adamw", weight_decay=0.0, scales={name: 0.5})
    start = dict(parameters())
    for optimizer, named in ((one, fast), (other, slow)):
        give_gradients(named, 0)
        optimizer.collect()
        optimizer.step(0.1, divide_by=1, clip=0)
    moved = [dict(named)[name] - start[name] for named in (fast, slow)]
    torch.testing.assert_close(moved[1], moved[0] * 0.5)
    assert torch.equal(dict(fast)["model.norm.weight"], dict(slow)["model.norm.weight"])


# --- schedules ---


def course(schedule: str, steps: int, warmup: float = 0.1, decay: float = 0.2, floor: float = 0.0) -> list[float]:
    return [learning_rate(s, steps, schedule=schedule, warmup=warmup, decay=decay, floor=floor) for s in range(steps)]


def test_wsd_warms_up_holds_and_falls() -> None:
    rates = course("wsd", 100)
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[79:82] == pytest.approx([1.0, 1.0, 0.95])  # twenty steps of falling: from 20/20 to 1/20
    assert rates[99] == pytest.approx(1 / 20)
    assert course("wsd", 100, floor=0.5)[99] == pytest.approx(0.5 + 0.5 / 20)


def test_cosine_and_constant() -> None:
    rates = course("cosine", 100, floor=0.1)
    assert rates[9:11] == pytest.approx([1.0, 1.0])
    assert rates[55] == pytest.approx(0.55)  # half way between the end of the warm-up and the end
    assert rates == rates[:10] + sorted(rates[10:], reverse=True)
    assert 0.1 < rates[99] < 0.11
    assert course("constant", 50) == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 46)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_always_learn_something(schedule: str, steps: int) -> None:
    for warmup in (0.0, 0.02, 0.5, 1.0):
        rates = course(schedule, steps, warmup=warmup)
        assert all(0 < rate <= 1 for rate in rates), (warmup, rates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_the_compiled_kernels_step_as_the_loop_does(method: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.a": (300, 70), "model.layers.0.b": (1, 1), "norm": (33,), "head": (129, 131)}
    start = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    sides = []
    for kernels in (False, True):
        named = [(name, nn.Parameter(value.clone())) for name, value in start.items()]
        scales = {"head": 4.0}
        sides.append((named, Optimizer(named, method=method, weight_decay=0.1, scales=scales, kernels=kernels)))
    for step in range(5):
        norms = []
        for named, optimizer in sides:
            give_gradients(named, step)
            if step == 3:  # a tensor that has moved is found again
                named[3][1].data = named[3][1].data.clone()
            optimizer.collect()
            norms.append(optimizer.step(1e-2, divide_by=7, clip=1.0))
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    (named, loop), (others, compiled) = sides
    state, theirs = loop.state(), compiled.state()
    assert state.keys() == theirs.keys()
    for name in state:
        torch.testing.assert_close(state[name], theirs[name], rtol=1e-5, atol=1e-7)
    assert all(not grad.any() for grad in compiled.grads.values())
    assert all(torch.equal(p, compiled.masters[name].to(dtype)) for name, p in others)
    if dtype == torch.float32:
        for (_, one), (_, other) in zip(named, others, strict=True):
            torch.testing.assert_close(one.data, other.data, rtol=1e-5, atol=1e-7)


def test_the_number_of_threads_changes_no_bit_of_a_step() -> None:
    sides = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        named = [(name, nn.Parameter(torch.ones(200, 300))) for name in "ab"]
        optimizer = Optimizer(named, method="adamw", weight_decay=0.1)
        give_gradients(named, 0)
        optimizer.collect()
        sides.append((optimizer.step(1e-2, divide_by=3, clip=1.0), optimizer.state()))
    torch.set_num_threads(before)
    assert sides[0][0] == sides[1][0]
    assert all(torch.equal(sides[0][1][name], sides[1][1][name]) for name in sides[0][1])
