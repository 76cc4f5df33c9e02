"""GPTQ: round a layer's columns one after another, each time moving the error onto the columns that are still free.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. The
error is measured at the layer's output on calibration text: H = X^T X of the layer's inputs weighs it. Layers are done in order,
each one on the inputs that the already quantised ones below give it, so that it also mends their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor
from criadero.model import Block, ModelConfig
from criadero.quantization.layers import (
    Rows,
    attention_input,
    down_input,
    embed,
    empty_block,
    layer_name,
    load_layer,
    wide,
)  # fmt: skip
from criadero.quantization.rounding import as_quant_tensor, best_scales, nearest
from criadero.train.batches import Batch

BLOCK = 128  # columns whose errors are gathered before they move on (section 3.3)
DAMP = 0.01  # of the mean of H's diagonal, added to it, so that it can be inverted (section 3.3)
QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
OUT = ("self_attn.o_proj.weight",)
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
DOWN = ("mlp.down_proj.weight",)
Scheme = tuple[int, int]  # bits, group


class Hessian:
    """X^T X / n of the inputs of a layer, gathered batch by batch: ``[K, K]`` float32."""

    def __init__(self, columns: int) -> None:
        self.sum, self.count = torch.zeros(columns, columns), 0

    def add(self, x: Tensor, real: Tensor) -> None:
        """x ``[B, T, K]``; real ``[B, T]`` says which tokens are no padding."""
        x = x[real]  # [n, K]
        self.sum.addmm_(x.t(), x)
        self.count += len(x)

    def mean(self) -> Tensor:
        return self.sum / max(1, self.count)


def inverse_factor(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """The upper Cholesky factor U of H^-1 (section 3.3, step 3), float32 ``[K, K]``: row i tells what column i's error costs
    the columns after it. Computed in float64; where that fails, with more damping."""
    h = hessian.double()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that was never there
    mean = float(diagonal.mean())
    for more in (1, 10, 100):
        damped = h + torch.eye(len(h), dtype=torch.float64) * (damp * more * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0:
                return upper.float()
    raise UserError("the activations of a layer are not finite on the calibration text: the model is damaged")


def gptq_matrix(w: Tensor, upper: Tensor, bits: int, group: int, what: str = "a matrix") -> QuantTensor:
    """Quantise w ``[N, K]`` with U of `inverse_factor` in groups of ``group`` columns.

    The scale of a group is chosen when its first column's turn comes, from the weights as they then are, each column's
    squared error weighed by 1 / U_ii^2, which is what it adds to the layer's.
    """
    w = w.float().clone()
    rows, columns = w.shape
    numbers = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group)
    importance = upper.diagonal().square().reciprocal()  # [K]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(rows, end - start)
        for i in range(start, end):
            if i % group == 0:
                ahead = slice(i, i + group)
                scales[:, i // group] = best_scales(
                    _settled(w, errors, upper, start, i, ahead), bits, importance[ahead]
                )
            scale = scales[:, i // group]
            column = w[:, i]
            q = nearest(column[:, None], scale, bits)[:, 0]
            numbers[:, i] = q.to(torch.int8)
            error = (column - q * scale) / upper[i, i]  # [N]
            errors[:, i - start] = error
            if i + 1 < end:
                w[:, i + 1 : end].addr_(error, upper[i, i + 1 : end], alpha=-1)
        if end < columns:
            w[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    return as_quant_tensor(numbers, scales, bits, group, what)


def _settled(w: Tensor, errors: Tensor, upper: Tensor, start: int, i: int, ahead: slice) -> Tensor:
    """The columns ``ahead`` with this block's errors so far moved onto them, also where they reach beyond the block."""
    end = min(start + BLOCK, w.shape[1])
    if ahead.stop <= end:
        return w[:, ahead]
    beyond = w[:, end : ahead.stop] - errors[:, : i - start] @ upper[start:i, end : ahead.stop]
    return torch.cat((w[:, ahead.start : end], beyond), dim=1)


@torch.no_grad()
def gptq(
    state: dict[str, Tensor | QuantTensor],
    config: ModelConfig,
    batches: Sequence[Batch],
    schemes: Mapping[str, Scheme],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Quantise the layers of ``state`` in place: each matrix in ``schemes`` to its bits and group, the others stay.

    In each layer q, k and v come first, then o on what these give, then gate and up, then down.
    """
    rows = embed(batches, state, config)
    block = empty_block(config)
    for layer in range(config.num_hidden_layers):
        load_layer(block, state, layer)
        _layer(state, block, rows, layer, schemes)
        tick()


def _layer(
    state: dict[str, Tensor | QuantTensor], block: Block, rows: list[Rows], layer: int,
    schemes: Mapping[str, Scheme],
) -> None:  # fmt: skip
    norm1, norm2 = block.input_layernorm, block.post_attention_layernorm

    def settle(names: Sequence[str], inputs: Callable[[Rows], Tensor]) -> None:
        mine = [name for name in names if layer_name(layer, name) in schemes]
        if not mine:
            return
        hessian = Hessian(state[layer_name(layer, mine[0])].shape[1])
        for row in rows:
            hessian.add(inputs(row), row.batch.segments >= 0)
        upper = inverse_factor(hessian.mean())
        for name in mine:
            full = layer_name(layer, name)
            bits, group = schemes[full]
            state[full] = gptq_matrix(wide(state[full]), upper, bits, group, full)
        load_layer(block, state, layer, mine)

    settle(QKV, lambda row: norm1(row.x))
    attended = [attention_input(block, row, norm1(row.x)) for row in rows]  # [B, T, H * Dh] each
    by_row = {id(row): one for row, one in zip(rows, attended, strict=True)}
    settle(OUT, lambda row: by_row[id(row)])
    for row, one in zip(rows, attended, strict=True):
        row.x = row.x + block.self_attn.o_proj(one)
    settle(GATE_UP, lambda row: norm2(row.x))
    settle(DOWN, lambda row: down_input(block, norm2(row.x)))
    for row in rows:
        row.x = row.x + block.mlp(norm2(row.x))
