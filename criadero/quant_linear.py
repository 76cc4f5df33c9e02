"""A frozen linear layer whose weight stays in 4 or 8 bits: the base of QLoRA (arXiv 2305.14314, section 3).

The weight is written out in the computing dtype when a product needs it, once forward and once backward, and thrown away
after it, so that memory holds the packed numbers and one matrix. No gradient is formed for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from criadero.kernels.formats import QuantTensor

CHUNK = 1 << 20  # weights written out at once: the temporaries stay in the cache


class QuantLinear(nn.Module):
    """``[..., K] -> [..., N]`` by a `QuantTensor`. No buffers: a change of the module's dtype must leave its numbers alone."""

    def __init__(self, weight: QuantTensor, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits, self.group, self.dtype, self.device = weight.bits, weight.group, dtype, torch.device(device)
        self.q, self.scales = _tensor(weight.q, device), _tensor(weight.scales, device)
        self.mins = None if weight.mins is None else _tensor(weight.mins, device)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows of the weight, ``[stop - start, K]``: each number the nearest that ``dtype`` holds to its float32 value."""
        n = stop - start
        wide = torch.empty(n, self.in_features, dtype=torch.float32, device=self.device)
        if self.bits == 4:
            pairs = wide.view(n, -1, 2)  # column 2j in the low nibble, 2j + 1 in the high one
            pairs[..., 0] = self.q[start:stop] & 15
            pairs[..., 1] = self.q[start:stop] >> 4
        else:
            wide.copy_(self.q[start:stop])
        grouped = wide.view(n, -1, self.group)  # [n, K / group, group], one scale beside each group
        if self.bits == 4 and self.mins is None:
            grouped -= 8
        grouped *= self.scales[start:stop, :, None].float()
        if self.mins is not None:
            grouped -= self.mins[start:stop, :, None].float()
        return wide.to(self.dtype) if out is None else out.copy_(wide)

    def dequantise(self) -> Tensor:
        """The weight ``[N, K]`` in ``dtype``."""
        out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.device)
        step = max(1, CHUNK // self.in_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            self.rows(start, stop, out[start:stop])
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.q.nbytes + self.scales.nbytes + (0 if self.mins is None else self.mins.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x @ self.dequantise().t()
        return _FrozenProduct.apply(x, self)


def _tensor(array: np.ndarray, device: str | torch.device) -> Tensor:
    """The array itself, or a copy of one that is mapped read-only, which cannot be given to PyTorch."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array)).to(device)


class _FrozenProduct(torch.autograd.Function):
    """x ``[..., K]`` times the weight, transposed. Nothing is kept for the way back but the layer itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantise().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (grads[0] @ ctx.layer.dequantise() if ctx.needs_input_grad[0] else None), None
