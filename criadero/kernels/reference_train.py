"""The slow twins of the compiled training kernels, in plain PyTorch, with the same signatures: what they compute, to be read and tested
against. They work in the dtype of what they are given, float64 too. Results are written into the arguments named for them.

Shape legend: T tokens, D hidden size, F feed-forward size, H query heads, K key-value heads, Dh head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from criadero.kernels.formats import QuantTensor
from criadero.kernels.reference import SPAN


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def norm(x: Tensor, weight: Tensor, eps: float, y: Tensor, r: Tensor, threads: int) -> None:
    """RMSNorm (arXiv 1910.07467): y ``[T, D]`` = x * r * weight, r ``[T]`` = 1 / sqrt(mean(x^2) + eps)."""
    wide = _wide(x)
    r.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
    y.copy_(wide * r[:, None] * weight)


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, dres: Tensor | None, dx: Tensor, dweight: Tensor, threads: int
) -> None:
    """dx ``[T, D]`` = dres + the gradient through `norm`; dweight ``[D]``."""
    hat = _wide(x) * r[:, None]
    part = _wide(dy) * hat
    dweight.copy_(part.sum(0))
    grad = (_wide(dy) * weight - hat * (part * weight).mean(-1, keepdim=True)) * r[:, None]
    dx.copy_(grad if dres is None else grad + _wide(dres))


def swiglu(gate_up: Tensor, y: Tensor, threads: int) -> None:
    """SwiGLU (arXiv 2002.05202): gate_up ``[T, 2 F]`` -> y ``[T, F]`` = silu(gate) * up."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    y.copy_(gate * torch.sigmoid(gate) * up)


def swiglu_backward(dy: Tensor, gate_up: Tensor, dgate_up: Tensor, y: Tensor, threads: int) -> None:
    """dgate_up ``[T, 2 F]`` from dy ``[T, F]``, and y once more, so that it need not be kept."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    s = torch.sigmoid(gate)
    y.copy_(gate * s * up)
    dgate_up.copy_(torch.cat((_wide(dy) * up * s * (1 + gate * (1 - s)), _wide(dy) * gate * s), dim=-1))


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, backward: bool, threads: int) -> None:
    """losses ``[T]`` in nats of logits ``[T, V]``; with ``backward`` softmax - onehot takes the logits' place."""
    wide = _wide(logits)
    log_z = torch.logsumexp(wide, dim=-1)
    losses.copy_(log_z - wide.gather(1, targets[:, None])[:, 0])
    if backward:
        grad = torch.exp(wide - log_z[:, None])
        grad[torch.arange(len(targets)), targets] -= 1
        logits.copy_(grad)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate-half: x ``[T, heads, Dh]``, cosine and sine ``[T, Dh / 2]``. With -sine it is the inverse."""
    a, b = x.chunk(2, dim=-1)
    c, s = cosine[:, None], sine[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def attend(
    qkv: Tensor, starts: Tensor, heads: int, kv_heads: int, cosine: Tensor, sine: Tensor, out: Tensor, lse: Tensor,
    d_out: Tensor | None, d_qkv: Tensor | None, threads: int,
) -> None:  # fmt: skip
    """Causal attention within each document, RoPE included. qkv ``[T, (H + 2 K) Dh]``; document d is tokens ``starts[d]`` to
    ``starts[d + 1]``. Without ``d_out``: writes out ``[T, H Dh]`` and lse ``[H, T]``, log2 of the softmax's sums. With it: reads them, and
    writes d_qkv from d_out (FlashAttention, arXiv 2205.14135, appendix B)."""
    tokens, group = len(qkv), heads // kv_heads
    x = _wide(qkv).view(tokens, heads + 2 * kv_heads, -1)
    scale = x.shape[-1] ** -0.5
    q, k = _rotated(x[:, :heads], cosine, sine), _rotated(x[:, heads:-kv_heads], cosine, sine)
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, x[:, -kv_heads:]))  # [T, H, Dh]
    gradient = torch.zeros_like(x)
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        here, n = slice(start, end), end - start
        if n == 0:
            continue
        scores = torch.einsum("ihd,jhd->hij", q[here], k[here]) * scale
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        if d_out is None or d_qkv is None:
            sums = torch.logsumexp(scores, dim=-1)  # [H, n]
            lse[:, here] = sums / math.log(2)
            out[here] = (
                torch.einsum("hij,jhd->ihd", torch.exp(scores - sums[..., None]), v[here]).flatten(1).to(out.dtype)
            )
            continue
        p = torch.exp(scores - lse[:, here, None] * math.log(2))
        g = _wide(d_out[here]).view(n, heads, -1)
        delta = (g * _wide(out[here]).view(n, heads, -1)).sum(-1).t()  # [H, n]
        ds = p * (torch.einsum("ihd,jhd->hij", g, v[here]) - delta[..., None]) * scale
        dq = _rotated(torch.einsum("hij,jhd->ihd", ds, k[here]), cosine[here], -sine[here])
        dk = torch.einsum("hij,ihd->jhd", ds, q[here]).view(n, kv_heads, group, -1).sum(2)
        dv = torch.einsum("hij,ihd->jhd", p, g).view(n, kv_heads, group, -1).sum(2)
        gradient[here] = torch.cat((dq, _rotated(dk, cosine[here], -sine[here]), dv), dim=1)
    if d_qkv is not None:
        d_qkv.copy_(gradient.flatten(1))


def product(
    a: Tensor, b: Tensor, out: Tensor, residual: Tensor | None, a_across: bool, b_across: bool, add: bool, threads: int
) -> None:
    """out ``[M, N]`` = a @ b, plus the residual or what out held; an operand that lies across is given transposed."""
    a, b = a.t() if a_across else a, b.t() if b_across else b
    if add:
        out += torch.mm(a, b)
    elif residual is not None:
        torch.addmm(residual, a, b, out=out)
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def has_product() -> bool:
    """Whether products belong here rather than to PyTorch; it is only here to be replaced."""
    return False


class Weight:
    """A frozen weight ``[N, K]`` as it lies, dense or packed."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    @classmethod
    def dense(cls, w: Tensor) -> Weight:
        return cls(w)

    @classmethod
    def quant(cls, q: Tensor, scales: Tensor, mins: Tensor | None, bits: int, group: int) -> Weight:
        """As `criadero.kernels.formats.QuantTensor` has it."""
        packed = QuantTensor(bits, group, q.numpy(), scales.numpy(), None if mins is None else mins.numpy())
        return cls(torch.from_numpy(packed.dequantise()))


def _spans(x: Tensor, dim: int, f16: bool = False) -> Tensor:
    """x rounded to whole numbers of at most 127, with a scale (an f16 one) for every 128 elements of ``dim``."""
    parts = []
    for part in x.split(SPAN, dim):
        scale = part.abs().amax(dim, keepdim=True) / 127
        if f16:
            scale = (scale * 4096).half().to(scale.dtype) / 4096
        divided = torch.where(scale > 0, part / torch.where(scale > 0, scale, 1.0), 0.0)
        parts.append(divided.round().clamp(-127, 127) * scale)
    return torch.cat(parts, dim)


def _frozen_product(a: Tensor, b: Tensor, whole: bool) -> Tensor:
    """a ``[T, K]`` @ b ``[K, N]``; with ``whole`` both are rounded to 8 bits, along the depth."""
    wide = _wide(a)
    b = b.to(wide.dtype)
    return _spans(wide, 1) @ _spans(b, 0, f16=True) if whole else wide @ b


def frozen(
    x: Tensor, weights: Sequence[Weight], lows: Sequence[Tensor | None], ups: Sequence[Tensor | None], out: Tensor,
    residual: Tensor | None, whole: bool, threads: int,
) -> None:  # fmt: skip
    """out ``[T, sum of N]``: beside each other, x @ w' + low @ up' of each weight w ``[N, K]``, with low ``[T, R]`` and up ``[N, R]``
    (or None); and the residual."""
    parts = []
    for weight, low, up in zip(weights, lows, ups, strict=True):
        y = _frozen_product(x, weight.w.t(), whole)
        parts.append(y if low is None or up is None else y + _wide(low) @ _wide(up).t())
    y = torch.cat(parts, 1)
    out.copy_(y if residual is None else y + _wide(residual))


def frozen_backward(
    dy: Tensor,
    weights: Sequence[Weight],
    low: Tensor | None,
    down: Tensor | None,
    dx: Tensor,
    whole: bool,
    threads: int,
) -> None:
    """dx ``[T, K]`` = the sum of dy @ w over the weights (dy of all beside each other) + low @ down (or None)."""
    parts = dy.split([len(weight.w) for weight in weights], 1)
    total = torch.zeros_like(dx, dtype=_wide(dy).dtype) if low is None or down is None else _wide(low) @ _wide(down)
    for part, weight in zip(parts, weights, strict=True):
        total = total + _frozen_product(part, weight.w, whole)
    dx.copy_(total)
