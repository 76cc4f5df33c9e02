"""The compiled training kernels against their twins in PyTorch (float64), at every level of this processor, over shapes with odd tails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from criadero import kernels
from criadero.kernels import reference_train as twin

native = kernels.native()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels are not installed, or turned off")
LEVELS = native.levels() if native is not None else []
ours = getattr(native, "train", None)
# relative to the norm of the right answer: results are rounded to the dtype once, the attention's operands too
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = (torch.float32, torch.bfloat16)


def levels_with_products() -> list[str]:
    """The levels that have bf16 products."""
    before, found = native.level() if LEVELS else "", []
    for level in LEVELS:
        native.set_level(level)
        found += [level] if ours.has_product() else []
    if LEVELS:
        native.set_level(before)
    return found


PRODUCTS = pytest.mark.parametrize("at_level", levels_with_products(), indirect=True)


@pytest.fixture(params=LEVELS, autouse=True)
def at_level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.level()
    native.set_level(request.param)
    yield
    native.set_level(before)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(got: Tensor, want: Tensor, dtype: torch.dtype, least: float = 1e-9) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=least))
    assert error < TOLERANCE[dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 48), (17, 65), (40, 320)])
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    x, dy, dres = (draw(i, rows, width, dtype=dtype) for i in range(3))
    weight = draw(3, width) + 2
    y, r, dx, dw = torch.empty_like(x), torch.empty(rows), torch.empty_like(x), torch.empty(width)
    ours.norm(x, weight, 1e-5, y, r, 2)
    ours.norm_backward(dy, x, weight, r, dres, dx, dw, 2)
    wide = x.double().requires_grad_()
    w = weight.double().requires_grad_()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * w
    grad_x, grad_w = torch.autograd.grad(want, (wide, w), dy.double())
    near(y, want.detach(), dtype)
    if width > 1:  # of one number the gradient is nothing but rounding
        near(dx, grad_x + dres.double(), dtype)
    near(dw, grad_w, torch.float32 if dtype == torch.float32 else dtype)
    ours.norm_backward(dy, x, weight, r, None, dx, dw, 1)
    if width > 1:
        near(dx, grad_x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 48), (9, 83)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    both, dy = draw(0, rows, 2 * width, dtype=dtype) * 3, draw(1, rows, width, dtype=dtype)
    y, again, grad = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(both)
    ours.swiglu(both, y, 2)
    ours.swiglu_backward(dy, both, grad, again, 2)
    wide = both.double().requires_grad_()
    want = torch.nn.functional.silu(wide[:, :width]) * wide[:, width:]
    near(y, want.detach(), dtype)
    assert torch.equal(y, again)
    near(grad, torch.autograd.grad(want, wide, dy.double())[0], dtype)


def test_swiglu_far_out_is_finite() -> None:
    both = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    y = torch.empty(1, 4)
    ours.swiglu(both, y, 1)
    assert y.tolist()[0] == pytest.approx([0.0, 0.0, 200.0, 1e4], abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 17), (5, 101), (4, 4096)])
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = shape
    logits = draw(0, rows, width, dtype=dtype) * 5
    targets = torch.arange(rows) * 7 % width
    want = torch.nn.functional.cross_entropy(wide := logits.double().requires_grad_(), targets, reduction="none")
    grad = torch.autograd.grad(want.sum(), wide)[0]
    losses = torch.empty(rows)
    ours.cross_entropy(logits, targets, losses, False, 2)
    assert torch.allclose(losses.double(), want.detach(), atol=1e-5, rtol=2e-6)
    ours.cross_entropy(logits, targets, losses, True, 2)
    assert torch.allclose(losses.double(), want.detach(), atol=1e-5, rtol=2e-6)
    near(logits, grad, dtype, least=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(5, 1, 64), (6, 3, 48), (4, 4, 16), (2, 1, 10), (3, 1, 80), (2, 2, 2)])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 64, 65, 0, 30), (200, 7)])
def test_attention(heads: tuple[int, int, int], lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    h, k, dim = heads
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(starts[-1])
    qkv, d_out = draw(0, tokens, (h + 2 * k) * dim, dtype=dtype) * 2, draw(1, tokens, h * dim, dtype=dtype)
    angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(dim // 2)
    cosine, sine = angles.cos(), angles.sin()
    out, lse, grad = torch.empty_like(d_out), torch.empty(h, tokens), torch.full_like(qkv, 7.0)
    ours.attend(qkv, starts, h, k, cosine, sine, out, lse, None, None, 2)
    ours.attend(qkv, starts, h, k, cosine, sine, out, lse, d_out, grad, 2)
    wide = qkv.double()
    want, want_lse, want_grad = torch.empty_like(out).double(), torch.empty_like(lse).double(), torch.empty_like(wide)
    c, s = cosine.double(), sine.double()
    twin.attend(wide, starts, h, k, c, s, want, want_lse, None, None, 1)
    twin.attend(wide, starts, h, k, c, s, want, want_lse, d_out.double(), want_grad, 1)
    near(out, want, dtype)
    assert torch.allclose(lse.double(), want_lse, atol=1e-4 if dtype == torch.float32 else 0.2)
    # P and dS are rounded on their way, and partly cancel
    error = float((grad.double() - want_grad).norm() / want_grad.norm().clamp(min=1e-3))
    assert error < 5 * TOLERANCE[dtype], error


def test_the_twin_of_attention_has_the_gradient_of_autograd() -> None:
    h, k, dim, starts = 6, 3, 8, torch.tensor([0, 5, 6, 17])
    qkv = draw(0, 17, (h + 2 * k) * dim).double().requires_grad_()
    d_out = draw(1, 17, h * dim).double()
    angles = torch.arange(17)[:, None] * 0.3 ** torch.arange(dim // 2).double()
    c, s = angles.cos(), angles.sin()
    x = qkv.view(17, h + 2 * k, dim)
    q, key = twin._rotated(x[:, :h], c, s), twin._rotated(x[:, h:-k], c, s)
    whole = []
    for a, b in ((0, 5), (5, 6), (6, 17)):
        parts = [t[a:b].transpose(0, 1)[None] for t in (q, key, x[:, -k:])]
        done = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        whole.append(done[0].transpose(0, 1).flatten(1))
    want = torch.cat(whole)
    out, lse, grad = torch.empty_like(want), torch.empty(h, 17).double(), torch.empty_like(x.flatten(1))
    twin.attend(qkv.detach(), starts, h, k, c, s, out, lse, None, None, 1)
    twin.attend(qkv.detach(), starts, h, k, c, s, out, lse, d_out, grad, 1)
    assert torch.allclose(out, want.detach(), atol=1e-12)
    assert torch.allclose(grad, torch.autograd.grad(want, qkv, d_out)[0], atol=1e-12)


@PRODUCTS
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    "shape", [(8, 64, 32), (7, 5, 2), (97, 130, 64), (13, 320, 70), (200, 100, 2050), (6, 65, 1026)]
)
def test_product(shape: tuple[int, int, int], across: tuple[bool, bool]) -> None:
    m, n, k = shape
    a, b = draw(0, m, k, dtype=torch.bfloat16), draw(1, k, n, dtype=torch.bfloat16)
    want = a.double() @ b.double()
    a, b = a.t().contiguous() if across[0] else a, b.t().contiguous() if across[1] else b
    exact, rounded, residual = (
        torch.empty(m, n),
        torch.empty(m, n, dtype=torch.bfloat16),
        draw(2, m, n, dtype=torch.bfloat16),
    )
    ours.product(a, b, exact, None, *across, False, 2)
    near(exact, want, torch.float32)
    once = exact.clone()
    ours.product(a, b, exact, None, *across, True, 1)
    assert torch.equal(exact, once * 2), "another number of threads gives the same bits"
    ours.product(a, b, rounded, residual, *across, False, 2)
    near(rounded, want + residual.double(), torch.bfloat16)


@PRODUCTS
def test_product_of_odd_depth_and_of_parts_of_wider_rows() -> None:
    a, b = draw(0, 33, 50, dtype=torch.bfloat16), draw(1, 33, 90, dtype=torch.bfloat16)
    out = torch.zeros(20, 100)
    ours.product(a[:, 10:30], b[:, 5:75], out[:, 20:90], None, True, False, False, 2)
    near(out[:, 20:90], a[:, 10:30].double().t() @ b[:, 5:75].double(), torch.float32)
    assert not out[:, :20].any()
    assert not out[:, 90:].any()


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="weight: "):
        ours.norm(x, torch.zeros(5), 1e-5, x, torch.zeros(4), 1)
    with pytest.raises(ValueError, match="same type"):
        ours.swiglu(x, torch.zeros(4, 2), 1)
    with pytest.raises(ValueError, match="target 6 is none of 6"):
        ours.cross_entropy(x, torch.tensor([0, 1, 2, 6]), torch.zeros(4), False, 1)
    starts = torch.tensor([0, 5])
    with pytest.raises(ValueError, match="number of tokens"):
        ours.attend(
            x, starts, 1, 1, x[:, :1].clone(), x[:, :1].clone(), x[:, :2].clone(), torch.zeros(1, 4), None, None, 1
        )
    if ours.has_product():
        with pytest.raises(ValueError, match="do not fit"):
            ours.product(x.bfloat16(), x.bfloat16(), torch.zeros(4, 6), None, False, False, False, 1)
