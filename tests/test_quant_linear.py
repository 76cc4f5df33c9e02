"""The frozen packed layer against a plain one that holds the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from criadero.kernels.formats import QuantTensor
from criadero.quant_linear import QuantLinear


def packed(bits: int, group: int, minimums: bool = False, rows: int = 10, columns: int = 64) -> QuantTensor:
    draw = np.random.default_rng(bits + group)
    if bits == 4:
        q = draw.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    else:
        q = draw.integers(-127, 128, (rows, columns)).astype(np.int8)
    scales = draw.normal(size=(rows, columns // group)).astype(np.float16)
    mins = draw.normal(size=scales.shape).astype(np.float16) if minimums else None
    return QuantTensor(bits, group, q, scales, mins)


@pytest.mark.parametrize("minimums", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (8, 32), (8, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(bits: int, group: int, minimums: bool, dtype: torch.dtype) -> None:
    if minimums and bits == 8:
        pytest.skip("8-bit tensors have no minimums")
    weight = packed(bits, group, minimums)
    layer = QuantLinear(weight, dtype)
    plain = torch.from_numpy(weight.dequantise()).to(dtype)
    assert torch.equal(layer.dequantise(), plain)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_(True)
    y, z = layer(x), twin @ plain.t()
    assert torch.equal(y, z)
    with torch.no_grad():
        assert torch.equal(layer(x), z)
    weigh = torch.randn_like(z)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_numbers_that_may_be_kept_are_not_copied() -> None:
    """Loading an 8-bit base held it twice otherwise. What is mapped read-only has to be copied."""
    numbers, scales = np.zeros((4, 32), np.int8), np.ones((4, 1), np.float32)
    assert np.shares_memory(QuantLinear(QuantTensor(8, 32, numbers, scales), torch.float32).q.numpy(), numbers)
    numbers.flags.writeable = False
    assert not np.shares_memory(QuantLinear(QuantTensor(8, 32, numbers, scales), torch.float32).q.numpy(), numbers)


def test_it_keeps_the_packed_numbers_and_no_more() -> None:
    weight = packed(4, 32, rows=256, columns=512)
    layer = QuantLinear(weight, torch.bfloat16)
    assert layer.nbytes == weight.nbytes < 256 * 512 * 2 / 3
    assert not list(layer.parameters())
    assert not list(layer.buffers())
    layer.to(torch.float32)  # a change of dtype leaves the numbers alone
    assert np.array_equal(layer.q, weight.q)
    assert np.array_equal(layer.scales, weight.scales)
    y = layer(torch.randn(3, 512, dtype=torch.bfloat16, requires_grad=True))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(y.detach()[:, :1].expand(3, 512).contiguous().requires_grad_(True))
    assert not saved  # neither the input nor a matrix waits for the way back
