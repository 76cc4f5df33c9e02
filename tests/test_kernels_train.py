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


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_document_is_the_same_to_the_bit_with_any_threads_and_beside_any_others(
    dtype: torch.dtype,
) -> None:
    h, k, dim = 6, 2, 48
    lengths = (
        5,
        67,
        0,
        49,
        48,
        1,
        70,
        16,
        17,
        60,
        66,
        50,
        64,
        65,
        70,
        70,
    )  # whole ones to one or two threads, heads to three
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tokens = int(starts[-1])
    qkv, d_out = draw(0, tokens, (h + 2 * k) * dim, dtype=dtype), draw(1, tokens, h * dim, dtype=dtype)
    angles = torch.arange(tokens)[:, None] * 0.3 ** torch.arange(dim // 2)

    def attend(a: int, b: int, starts: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:
        x, g, c, s = qkv[a:b], d_out[a:b], angles[a:b].cos(), angles[a:b].sin()
        out, lse, grad = torch.empty_like(g), torch.empty(h, b - a), torch.empty_like(x)
        ours.attend(x, starts, h, k, c, s, out, lse, None, None, threads)
        ours.attend(x, starts, h, k, c, s, out, lse, g, grad, threads)
        return out, lse, grad

    one, *others = (attend(0, tokens, starts, threads) for threads in (1, 2, 3))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        out, lse, grad = attend(a, b, torch.tensor([0, b - a]), 2)
        assert torch.equal(out, one[0][a:b])
        assert torch.equal(lse, one[1][:, a:b])
        assert torch.equal(grad, one[2][a:b])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 64, 32), (7, 5, 2), (97, 130, 64), (13, 320, 70), (200, 100, 2050), (6, 65, 1026), (50, 3, 401),
        (700, 100, 70), (450, 70, 2100),
    ],
)  # fmt: skip
def test_product(shape: tuple[int, int, int], across: tuple[bool, bool], dtype: torch.dtype) -> None:
    m, n, k = shape
    a, b = draw(0, m, k, dtype=dtype), draw(1, k, n, dtype=dtype)
    want = a.double() @ b.double()
    a, b = a.t().contiguous() if across[0] else a, b.t().contiguous() if across[1] else b
    exact, rounded, residual = torch.empty(m, n), torch.empty(m, n, dtype=dtype), draw(2, m, n, dtype=dtype)
    ours.product(a, b, exact, None, *across, False, 2)
    near(exact, want, torch.float32)
    once = exact.clone()
    ours.product(a, b, exact, None, *across, True, 1)
    assert torch.equal(exact, once * 2), "another number of threads gives the same bits"
    ours.product(a, b, rounded, residual, *across, False, 2)
    near(rounded, want + residual.double(), dtype)


def test_product_of_odd_depth_and_of_parts_of_wider_rows() -> None:
    a, b = draw(0, 33, 50, dtype=torch.bfloat16), draw(1, 33, 90, dtype=torch.bfloat16)
    out = torch.zeros(20, 100)
    ours.product(a[:, 10:30], b[:, 5:75], out[:, 20:90], None, True, False, False, 2)
    near(out[:, 20:90], a[:, 10:30].double().t() @ b[:, 5:75].double(), torch.float32)
    assert not out[:, :20].any()
    assert not out[:, 90:].any()


@pytest.mark.parametrize("across", [(False, True), (True, False)])
def test_a_product_of_more_columns_than_are_packed_at_once(across: tuple[bool, bool]) -> None:
    a, b, out = draw(0, 100, 64), draw(1, 64, 70000), torch.empty(100, 70000)  # 18 MB of b
    want = a.double() @ b.double()
    a, b = a.t().contiguous() if across[0] else a, b.t().contiguous() if across[1] else b
    ours.product(a, b, out, None, *across, False, 2)
    near(out, want, torch.float32)


@pytest.mark.parametrize("across", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_deep_product_is_the_sum_of_its_parts(across: tuple[bool, bool], dtype: torch.dtype) -> None:
    a, b, residual = draw(0, 9, 33000, dtype=dtype), draw(1, 33000, 40, dtype=dtype), draw(2, 9, 40, dtype=dtype)
    want, out, rows = a.double() @ b.double(), torch.empty(9, 40, dtype=dtype), torch.empty(9, 40)
    a, b = a.t().contiguous() if across[0] else a, b.t().contiguous() if across[1] else b
    ours.product(a, b, out, residual, *across, False, 2)
    error = float((out.double() - residual.double() - want).norm() / want.norm())
    assert error < max(5e-6, TOLERANCE[dtype])
    ours.product(a, b, rows, None, *across, False, 2)
    once = rows.clone()
    ours.product(a, b, rows, None, *across, True, 1)
    assert torch.equal(rows, once * 2)


@pytest.mark.parametrize("shape", [(400, 130, 70), (400, 130, 1100)])
def test_how_many_rows_are_computed_together_changes_no_bit(shape: tuple[int, int, int]) -> None:
    """Few rows and many are cut up in other ways; a row must not tell which."""
    m, n, k = shape
    x, w, low, up = draw(0, m, k), draw(1, n, k), draw(2, m, 3), draw(3, n, 3)
    frozen, many, few = ours.Weight.dense(w), torch.empty(m, n), torch.empty(m, n)
    for start in range(0, m, 30):
        here = slice(start, start + 30)
        ours.product(x[here], w, few[here], None, False, True, False, 2)
    ours.product(x, w, many, None, False, True, False, 2)
    assert torch.equal(many, few)
    for start in range(0, m, 30):
        here = slice(start, start + 30)
        ours.frozen(x[here], [frozen], [low[here]], [up], few[here], None, False, 2)
    ours.frozen(x, [frozen], [low], [up], many, None, False, 2)
    assert torch.equal(many, few)


def weight(form: str, seed: int, rows: int, columns: int) -> tuple[object, object, Tensor]:
    """The same frozen weight for the kernels and for the twin, and its numbers. A few are larger than the rest, as in trained models."""
    w = draw(seed, rows, columns) * 0.02
    w[:, 3] *= 5
    if form in ("float32", "bfloat16"):
        w = w.to(getattr(torch, form))
        return ours.Weight.dense(w), twin.Weight.dense(w), w
    bits, group = (int(part) for part in form.removesuffix(" mins").removeprefix("int").split("/"))
    group = group or columns
    grouped = w.view(rows, -1, group)
    if "mins" in form:
        mins = -grouped.amin(-1)
        scales = ((grouped.amax(-1) + mins) / 15).half()
        mins = mins.half()
        u = ((grouped + mins[..., None].float()) / scales[..., None].float()).round().clamp(0, 15)
    else:
        mins, most = None, 127 if bits == 8 else 7
        scales = (grouped.abs().amax(-1) / most).half()
        u = (grouped / scales[..., None].float()).round().clamp(-most, most) + (0 if bits == 8 else 8)
    u = u.view(rows, columns)
    q = u.to(torch.int8) if bits == 8 else (u.to(torch.uint8)[:, ::2] | u.to(torch.uint8)[:, 1::2] << 4).contiguous()
    reference = twin.Weight.quant(q, scales, mins, bits, group)
    return ours.Weight.quant(q, scales, mins, bits, group), reference, reference.w


FORMS = ("float32", "bfloat16", "int8/0", "int8/32", "int8/128", "int4/32", "int4/64 mins")


SHAPES = [
    (1, 64, (16,)),
    (45, 192, (128, 24, 40)),
    (130, 1088, (70,)),
    (37, 576, (200, 8)),
    (18, 70, (33,)),
    (420, 1088, (70, 8)),
]


def divides(form: str, depth: int) -> bool:
    """Whether the groups of a packed form, 0 for whole rows, divide ``depth`` columns."""
    group = int(form.split()[0].partition("/")[2] or 0)
    return group == 0 or depth % group == 0


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "shape"), [(form, shape) for form in FORMS for shape in SHAPES if divides(form, shape[1])]
)
def test_products_with_frozen_weights(
    shape: tuple[int, int, tuple[int, ...]], form: str, dtype: torch.dtype, whole: bool
) -> None:
    """Forward and backward, with thin adapters beside them, against the twin; and against float64: whole numbers within 3 %."""
    rows, depth, widths = shape
    weights = [weight(form, 10 + i, n, depth) for i, n in enumerate(widths)]
    mine, twins, exact = zip(*weights, strict=True)
    x, dy = draw(0, rows, depth, dtype=dtype), draw(1, rows, sum(widths), dtype=dtype)
    lows = [draw(2 + i, rows, 3, dtype=dtype) * 0.3 if i != 1 else None for i in range(len(widths))]
    ups = [draw(5 + i, n, 3, dtype=dtype) * 0.1 if i != 1 else None for i, n in enumerate(widths)]
    low, down, residual = (
        draw(8, rows, 5, dtype=dtype) * 0.3,
        draw(9, 5, depth, dtype=dtype) * 0.1,
        draw(7, *dy.shape, dtype=dtype),
    )
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    y2, dx2 = torch.empty_like(dy), torch.empty_like(x)
    ours.frozen(x, list(mine), lows, ups, y, residual, whole, 2)
    ours.frozen_backward(dy, list(mine), low, down, dx, whole, 2)
    ours.frozen(x, list(mine), lows, ups, y2, residual, whole, 1)
    ours.frozen_backward(dy, list(mine), low, down, dx2, whole, 1)
    assert torch.equal(y, y2)
    assert torch.equal(dx, dx2), "another number of threads gives the same bits"
    wide = [None if t is None else t.double() for t in (*lows, *ups)]
    want_y, want_dx = torch.empty_like(y).double(), torch.empty_like(dx).double()
    twin.frozen(x.double(), list(twins), wide[: len(widths)], wide[len(widths) :], want_y, residual.double(), whole, 1)
    twin.frozen_backward(dy.double(), list(twins), low.double(), down.double(), want_dx, whole, 1)
    tolerance = max(TOLERANCE[dtype], 2e-3 if whole else 0)  # a number on the border may be rounded either way
    for got, want in ((y, want_y), (dx, want_dx)):
        assert float((got.double() - want).norm() / want.norm()) < tolerance
    truth_y = torch.cat([x.double() @ w.double().t() for w in exact], 1)
    truth_dx = dy.double() @ torch.cat(exact).double()
    assert float((want_y - residual.double() - truth_y - _thin(lows, ups, truth_y)).norm() / truth_y.norm()) < (
        0.03 if whole else 1e-12
    )
    assert float((want_dx - low.double() @ down.double() - truth_dx).norm() / truth_dx.norm()) < (
        0.03 if whole else 1e-12
    )


def _thin(lows: list[Tensor | None], ups: list[Tensor | None], like: Tensor) -> Tensor:
    parts, at = [], 0
    for low, up in zip(lows, ups, strict=True):
        n = 24 if up is None and like.shape[1] == 192 else 8 if up is None else len(up)
        parts.append(like.new_zeros(len(like), n) if low is None or up is None else low.double() @ up.double().t())
        at += n
    return torch.cat(parts, 1)


def test_what_is_not_a_number_is_not_hidden_by_whole_numbers() -> None:
    mine, _, _ = weight("float32", 0, 32, 64)
    x, y = draw(0, 5, 64), torch.empty(5, 32)
    x[2, 7] = torch.nan
    ours.frozen(x, [mine], [None], [None], y, None, True, 1)
    assert torch.isnan(y[2]).all()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


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
    with pytest.raises(ValueError, match="do not fit"):
        ours.product(x.bfloat16(), x.bfloat16(), torch.zeros(4, 6), None, False, False, False, 1)
    w = ours.Weight.dense(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="6 columns are needed"):
        ours.frozen(x, [w, w], [None, None], [None, None], torch.zeros(4, 7), None, False, 1)
    with pytest.raises(ValueError, match="a low needs an up"):
        ours.frozen(x, [w], [x], [None], torch.zeros(4, 3), None, False, 1)
    with pytest.raises(ValueError, match="do not fit"):
        ours.frozen(x[:, :5].contiguous(), [w], [None], [None], torch.zeros(4, 3), None, False, 1)
    with pytest.raises(ValueError, match="fewer columns"):
        ours.frozen_backward(x[:, :5], [w, w], None, None, x.clone(), False, 1)
    with pytest.raises(ValueError, match="do not divide"):
        ours.Weight.quant(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1), None, 8, 48)
    with pytest.raises(ValueError, match="scales: "):
        ours.Weight.quant(torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 1), None, 8, 32)
