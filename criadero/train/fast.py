"""Training on a CPU with the compiled kernels: the network of `criadero.model`, forward and backward by hand, block by block.

It reads the same parameters, gives them the same gradients up to rounding, and leaves the model's own ``forward`` as the slow twin
(tests/test_train_fast.py). What it gains: padding is not computed; attention stays within each document instead of masking the rest of
the row; rotary embedding, norms, SwiGLU and cross-entropy are one pass each; a block keeps no more than its backward pass needs.

Shape legend: T real tokens of all rows, D hidden size, H query heads, K key-value heads, Dh head size, F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from criadero.kernels import level, native, reference_train
from criadero.lora import LoraLinear, TrainedRows, base_weight
from criadero.model import Block, Llama, RMSNorm
from criadero.quant_linear import QuantLinear
from criadero.train.batches import IGNORE, Batch

CHUNK = 2048  # rows of logits alive at once, at most


def chunk_rows(vocab: int) -> int:
    """Rows of logits alive at once: so many that they, and what a product makes of them, stay near 100 MB."""
    return max(256, min(CHUNK, 2**25 // vocab))


def compiled() -> bool:
    """Whether the compiled kernels are there: not missing, turned off, or built before there were these."""
    return hasattr(getattr(native(), "train", None), "frozen")


def obstacle(model: Llama) -> str | None:
    """Why this model is trained through its own ``forward``, or None when the compiled kernels take it."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu":
        return f"on {weight.device.type}"
    if not compiled():
        return "without compiled kernels"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"in {str(weight.dtype).removeprefix('torch.')}"
    if model.config.head_dim % 2:
        return "with heads of odd size"
    for module in model.modules():
        if isinstance(module, LoraLinear | QuantLinear | TrainedRows) or not list(module.parameters(recurse=False)):
            continue
        if type(module) not in (nn.Linear, nn.Embedding, RMSNorm):
            return f"with {type(module).__name__}"
        if getattr(module, "bias", None) is not None:
            return "with biases"
        if any(p.dtype != weight.dtype for p in module.parameters()):
            return "with mixed dtypes"
    return None


def describe(model: Llama) -> str:
    """Which code computes a step, in a few words for the run's first lines."""
    reason = obstacle(model)
    if reason is not None:
        return f"PyTorch's own kernels ({reason})"
    how = ""
    if has_adapters(model):
        how = f", the base multiplied {'in int8' if multiplies_in_int8(model) else 'exactly'}"
    return f"compiled training kernels ({level()}){how}"


def int8_is_fast() -> bool:
    """Whether this processor multiplies whole numbers of 8 bits several times as fast as floats, at the level in use."""
    module = native()
    if module is None:
        return False
    by_level = {"avx512": {"avx512_vnni"}, "avx2": {"avx_vnni"}, "neon": {"neon_dot"}}
    return bool(by_level.get(level(), set()) & set(module.features()))


def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are computed as they are; elsewhere as float32, which rounds less."""
    module = native()
    return module is not None and level() == "avx512" and "avx512_bf16" in module.features()


def has_adapters(model: Llama) -> bool:
    """Whether adapters learn beside frozen weights."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def multiply_in_int8(model: Llama) -> None:
    """Let the compiled kernels compute the products of training with the frozen weights under adapters, and with a frozen output layer,
    in whole numbers of 8 bits."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.int8 = True


def multiplies_in_int8(model: Llama) -> bool:
    """Whether `multiply_in_int8` was asked for."""
    return any(isinstance(module, LoraLinear) and module.int8 for module in model.modules())


@dataclass(frozen=True)
class Rows:
    """A batch without its padding: ids and targets ``[T]``, documents as ``starts`` ``[documents + 1]``, cosine and sine
    ``[T, Dh / 2]`` of the positions."""

    ids: Tensor
    targets: Tensor
    starts: Tensor
    cosine: Tensor
    sine: Tensor


def rows_of(model: Llama, batch: Batch) -> Rows:
    """Lay the real tokens of all rows one after another; a document begins where the row or the segment changes."""
    real = batch.segments.flatten() >= 0
    length = batch.ids.shape[1]
    border = torch.ones_like(batch.segments, dtype=torch.bool)
    border[:, 1:] = batch.segments[:, 1:] != batch.segments[:, :-1]
    first = border.flatten()[real].nonzero()[:, 0]
    starts = torch.cat((first, torch.tensor([int(real.sum())])))
    cosine, sine = model.rotary(torch.arange(length), torch.float32)  # [1, 1, length, Dh]
    half = cosine.shape[-1] // 2
    at = batch.positions.flatten()[real]
    if len(at) and int(at.max()) >= length:
        cosine, sine = model.rotary(torch.arange(int(at.max()) + 1), torch.float32)
    c, s = (t[0, 0, :, :half][at].contiguous() for t in (cosine, sine))  # [T, Dh / 2]
    return Rows(batch.ids.flatten()[real], batch.targets.flatten()[real], starts, c, s)


@dataclass(frozen=True)
class Setting:
    """What a block needs besides tensors with gradients. ``kernels`` is the compiled module or its twin."""

    kernels: Any
    rows: Rows
    heads: int
    kv_heads: int
    eps: float
    threads: int
    learning: bool = True  # False: only looked at, and then no product is computed in whole numbers
    whole_head: bool = False  # the output layer is frozen, and its products may be computed in whole numbers

    def product(
        self, a: Tensor, b: Tensor, out: Tensor | None = None, *, residual: Tensor | None = None, a_across: bool = False,
        b_across: bool = False, add: bool = False,
    ) -> Tensor:  # fmt: skip
        """``a @ b``, of operands as they lie (``a_across``: a is given transposed), plus ``residual``; f32 sums."""
        if out is None:
            out = a.new_empty(a.shape[1] if a_across else a.shape[0], b.shape[0] if b_across else b.shape[1])
        which = self.kernels if self.kernels.has_product() else reference_train
        which.product(a, b, out, residual, a_across, b_across, add, self.threads)
        return out

    def norm(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, r = torch.empty_like(x), x.new_empty(len(x), dtype=_wide(x.dtype))
        self.kernels.norm(x, weight, self.eps, y, r, self.threads)
        return y, r

    def norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, r: Tensor, dres: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        self.kernels.norm_backward(dy, x, weight, r, dres, dx, dweight, self.threads)
        return dx, dweight

    def attend(self, qkv: Tensor, out: Tensor, lse: Tensor, d_out: Tensor | None, d_qkv: Tensor | None) -> None:
        rows = self.rows
        self.kernels.attend(
            qkv, rows.starts, self.heads, self.kv_heads, rows.cosine, rows.sine, out, lse, d_out, d_qkv, self.threads
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Block(torch.autograd.Function):
    """One block: ``[T, D]`` -> ``[T, D]``. The attention half, then the feed-forward half, each with its residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, at: Setting, norm1: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, norm2: Tensor, gate: Tensor,
        up: Tensor, down: Tensor,
    ) -> Tensor:  # fmt: skip
        wide = _wide(x.dtype)
        norm1, norm2 = norm1.to(wide), norm2.to(wide)
        into, wider = torch.cat((q, k, v)), torch.cat((gate, up))  # [(H + 2 K) Dh, D], [2 F, D]
        normed1, r1 = at.norm(x, norm1)
        qkv = at.product(normed1, into, b_across=True)
        attended, lse = x.new_empty(len(x), q.shape[0]), x.new_empty(at.heads, len(x), dtype=wide)
        at.attend(qkv, attended, lse, None, None)
        middle = at.product(attended, o, b_across=True, residual=x)
        normed2, r2 = at.norm(middle, norm2)
        gate_up = at.product(normed2, wider, b_across=True)
        act = x.new_empty(len(x), gate.shape[0])
        at.kernels.swiglu(gate_up, act, at.threads)
        ctx.at, ctx.widths = at, (q.shape[0], k.shape[0], v.shape[0])
        ctx.save_for_backward(
            x, norm1, normed1, r1, qkv, attended, lse, middle, norm2, normed2, r2, gate_up, into, o, wider, down
        )
        return at.product(act, down, b_across=True, residual=middle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, norm1, normed1, r1, qkv, attended, lse, middle, norm2, normed2, r2, gate_up, into, o, wider, down) = (
            ctx.saved_tensors
        )
        at: Setting = ctx.at
        grad = grads[0].contiguous()

        def weight_grad(dy: Tensor, of: Tensor, *inputs: int) -> Tensor | None:
            return at.product(dy, of, a_across=True) if any(ctx.needs_input_grad[i] for i in inputs) else None

        d_act = at.product(grad, down)
        d_gate_up, act = torch.empty_like(gate_up), torch.empty_like(d_act)
        at.kernels.swiglu_backward(d_act, gate_up, d_gate_up, act, at.threads)
        d_down = weight_grad(grad, act, 10)
        d_wider = weight_grad(d_gate_up, normed2, 8, 9)
        d_middle, d_norm2 = at.norm_backward(at.product(d_gate_up, wider), middle, norm2, r2, grad)
        d_o = weight_grad(d_middle, attended, 6)
        d_qkv = torch.empty_like(qkv)
        at.attend(qkv, attended, lse, at.product(d_middle, o), d_qkv)
        d_into = weight_grad(d_qkv, normed1, 3, 4, 5)
        dx, d_norm1 = at.norm_backward(at.product(d_qkv, into), x, norm1, r1, d_middle)
        d_q, d_k, d_v = (None,) * 3 if d_into is None else d_into.split(ctx.widths)
        d_gate, d_up = (None, None) if d_wider is None else d_wider.chunk(2)
        return dx, None, d_norm1.to(x.dtype), d_q, d_k, d_v, d_o, d_norm2.to(x.dtype), d_gate, d_up, d_down


class _Adapted(torch.autograd.Function):
    """Frozen linear layers that read the same rows, and their adapters (LoRA): ``[T, in]`` -> ``[T, sum of out]``, plus ``residual``.

    ``before`` says what stands in front of them: "norm", RMSNorm by the frozen ``norm``; "swiglu"; or nothing. It is computed again on
    the way back rather than kept. ``adapters`` are A and B of the layers that have one. No gradient is formed for a frozen weight.

    x is handed on as a second result: whoever adds to it later sends its gradient through here, where one pass joins it to that of
    the norm. A sum by autograd would wake PyTorch's threads, which then spin for a while on the cores that ours need.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, at: Setting, before: str, norm: Tensor | None, frozen: Frozen,
        *adapters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        read, r = _read(at, before, x, norm)
        down, up = adapters[::2], list(adapters[1::2])
        layers = frozen.layers
        stacked = (
            torch.cat(down) if down else read.new_empty(0, read.shape[1])
        )  # [R, in]: the ranks one after another, scaled
        _scale(stacked, layers)
        low = at.product(read, stacked, b_across=True) if down else read.new_empty(len(x), 0)  # [T, R]
        y = read.new_empty(len(x), sum(layer.width for layer in layers))
        ups = iter(up)
        frozen.kernels.frozen(
            read, [layer.weight for layer in layers], [part if part.shape[1] else None for part in _by_rank(low, layers)],
            [next(ups) if layer.rank else None for layer in layers], y, residual, frozen.whole, at.threads,
        )  # fmt: skip
        ctx.at, ctx.before, ctx.frozen, ctx.residual = at, before, frozen, residual is not None
        ctx.save_for_backward(x, norm, r, low, stacked, *up)
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, r, low, stacked, *up = ctx.saved_tensors
        at: Setting = ctx.at
        frozen: Frozen = ctx.frozen
        grad = grads[0].contiguous()
        d_handed: Tensor | None = grads[1]
        d_low, d_read = torch.empty_like(low), grad.new_empty(len(x), stacked.shape[1])
        d_up: list[Tensor] = []
        parts = grad.split([layer.width for layer in frozen.layers], 1)
        for layer, part, here, d_here in zip(
            frozen.layers, parts, _by_rank(low, frozen.layers), _by_rank(d_low, frozen.layers), strict=True
        ):
            if layer.rank:
                at.product(part, up[len(d_up)], d_here)
                d_up.append(at.product(here, part, a_across=True).t())  # low has the scale in it
        frozen.kernels.frozen_backward(
            grad, [layer.weight for layer in frozen.layers], d_low if d_up else None, stacked if d_up else None,
            d_read, frozen.whole, at.threads,
        )  # fmt: skip
        dx, read = d_read, x
        if ctx.before == "norm":
            dx, _ = at.norm_backward(d_read, x, norm, r, None if d_handed is None else d_handed.contiguous())
            read, _ = at.norm(x, norm)
            d_handed = None
        elif ctx.before == "swiglu":
            dx, read = torch.empty_like(x), torch.empty_like(d_read)
            at.kernels.swiglu_backward(d_read, x, dx, read, at.threads)
        if d_handed is not None:
            dx = dx + d_handed
        d_stacked = at.product(d_low, read, a_across=True) if d_up else stacked
        _scale(d_stacked, frozen.layers)
        d_down = d_stacked.split([layer.rank for layer in frozen.layers if layer.rank]) if d_up else ()
        pairs = [t for pair in zip(d_down, d_up, strict=True) for t in pair]
        return dx, grad if ctx.residual else None, None, None, None, None, *pairs


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer beside an adapter of this rank (0: none). ``weight`` ``[width, in]`` is a ``Weight`` of the kernels."""

    weight: Any
    width: int
    scale: float
    rank: int


@dataclass(frozen=True)
class Frozen:
    """Frozen layers that read the same rows; whose ``frozen`` and ``frozen_backward`` compute them, and whether in whole numbers."""

    layers: Sequence[Layer]
    kernels: Any
    whole: bool

    @classmethod
    def of(cls, layers: Sequence[nn.Module], at: Setting) -> Frozen:
        whole = at.learning and all(isinstance(layer, LoraLinear) and layer.int8 for layer in layers)
        # where products are left to PyTorch, whole numbers are not: it has none
        kernels = at.kernels if whole or at.kernels.has_product() else reference_train
        found = []
        for layer in layers:
            base = layer.base if isinstance(layer, LoraLinear) else layer
            scale, rank = (layer.scale, len(layer.lora_A)) if isinstance(layer, LoraLinear) else (1.0, 0)
            assert isinstance(base, nn.Linear | QuantLinear)
            found.append(Layer(_weight_of(base, kernels), base.out_features, scale, rank))
        return cls(found, kernels, whole)


def _weight_of(base: nn.Module, kernels: Any) -> Any:
    """The weight of a frozen layer as it lies, packed or not, as a ``Weight`` of these kernels."""
    if isinstance(base, QuantLinear):
        return kernels.Weight.quant(base.q, base.scales, base.mins, base.bits, base.group)
    return kernels.Weight.dense(base_weight(base))


def _by_rank(low: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """The columns of ``low`` ``[T, R]`` that belong to each layer."""
    return low.split([layer.rank for layer in layers], 1)


def _scale(stacked: Tensor, layers: Sequence[Layer]) -> None:
    """Multiply each layer's rows of ``stacked`` ``[R, in]`` by its scale, in pieces so small that PyTorch leaves its other threads
    asleep (see `_Adapted`)."""
    rows = stacked.split([layer.rank for layer in layers])
    for layer, own in zip(layers, rows, strict=True):
        if layer.rank and layer.scale != 1.0:
            for part in own.split(max(1, 32000 // own.shape[1])):
                part.mul_(layer.scale)


def _read(at: Setting, before: str, x: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What the linear layers read, and the norm's factors."""
    if before == "norm":
        assert norm is not None
        return at.norm(x, norm)
    if before == "swiglu":
        y = x.new_empty(len(x), x.shape[1] // 2)
        at.kernels.swiglu(x, y, at.threads)
        return y, None
    return x, None


def _through(
    x: Tensor, residual: Tensor | None, at: Setting, before: str, norm: nn.Module | None, layers: Sequence[nn.Module]
) -> tuple[Tensor, Tensor]:
    """Linear layers of any kind that read the same rows, side by side, and x; what `_Adapted` does not take calls the modules."""
    taken, adapters = True, []
    for layer in layers:
        if isinstance(layer, LoraLinear):
            taken = taken and layer.magnitude is None and not (layer.dropout and layer.training)
            adapters += [layer.lora_A, layer.lora_B]
        elif not isinstance(layer, QuantLinear):
            taken = taken and isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    scale = None if norm is None else norm.weight
    assert scale is None or isinstance(scale, Tensor)
    if taken and not (scale is not None and scale.requires_grad):
        wide = None if scale is None else scale.detach().to(_wide(x.dtype))
        return _Adapted.apply(x, residual, at, before, wide, Frozen.of(layers, at), *adapters)
    read = x
    if before == "norm":
        read = _Norm.apply(x, at, scale)
    elif before == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        read = F.silu(gate) * up
    y = torch.cat([layer(read) for layer in layers], dim=-1)
    return (y if residual is None else residual + y), x


class _Attend(torch.autograd.Function):
    """Attention within documents, RoPE included: qkv ``[T, (H + 2 K) Dh]`` -> ``[T, H Dh]``."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, at: Setting) -> Tensor:
        width = qkv.shape[1] // (at.heads + 2 * at.kv_heads) * at.heads
        out, lse = qkv.new_empty(len(qkv), width), qkv.new_empty(at.heads, len(qkv), dtype=_wide(qkv.dtype))
        at.attend(qkv, out, lse, None, None)
        ctx.at = at
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        d_qkv = torch.empty_like(qkv)
        ctx.at.attend(qkv, out, lse, grads[0].contiguous(), d_qkv)
        return d_qkv, None


def _block(x: Tensor, at: Setting, block: Block) -> Tensor:
    """One block of whatever layers: as one function when all its weights are plain, else half by half."""
    attention, mlp = block.self_attn, block.mlp
    into = [attention.q_proj, attention.k_proj, attention.v_proj]
    layers = [*into, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if all(type(layer) is nn.Linear for layer in layers):
        q, k, v, o, gate, up, down = (layer.weight for layer in layers)
        norm1, norm2 = block.input_layernorm.weight, block.post_attention_layernorm.weight
        return _Block.apply(x, at, norm1, q, k, v, o, norm2, gate, up, down)
    qkv, x = _through(x, None, at, "norm", block.input_layernorm, into)
    x, _ = _through(_Attend.apply(qkv, at), x, at, "", None, [attention.o_proj])
    gate_up, x = _through(x, None, at, "norm", block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    return _through(gate_up, x, at, "swiglu", None, [mlp.down_proj])[0]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Setting, weight: Tensor) -> Tensor:
        weight = weight.to(_wide(x.dtype))
        y, r = at.norm(x, weight)
        ctx.at = at
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        dx, d_weight = ctx.at.norm_backward(grads[0].contiguous(), x, weight, r, None)
        return dx, None, d_weight.to(x.dtype)


class _Loss(torch.autograd.Function):
    """hidden ``[N, D]``, weight ``[V, D]``, targets ``[N]`` -> the sum of the losses. Both gradients are formed at once, chunk by chunk,
    so that a whole ``[N, V]`` never exists (as in `criadero.train.loss`)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, at: Setting, weight: Tensor, targets: Tensor, backward: bool) -> Tensor:
        wide = _wide(hidden.dtype)
        losses = hidden.new_empty(len(hidden), dtype=wide)
        d_hidden = torch.empty_like(hidden) if backward else None
        d_weight = torch.zeros_like(weight, dtype=wide) if backward and ctx.needs_input_grad[2] else None
        parts = max(1, -(-len(hidden) // chunk_rows(len(weight))))
        rows = max(
            1, -(-len(hidden) // parts)
        )  # as equal as can be: a few rows alone would pack the whole weight for themselves
        buffer = hidden.new_empty(rows, len(weight))
        whole = at.whole_head and backward and d_weight is None
        frozen = [at.kernels.Weight.dense(weight)] if whole else []
        for start in range(0, len(hidden), rows):
            here = slice(start, min(start + rows, len(hidden)))
            logits = buffer[: here.stop - start]
            if whole:
                at.kernels.frozen(hidden[here], frozen, [None], [None], logits, None, True, at.threads)
            else:
                at.product(hidden[here], weight, logits, b_across=True)
            at.kernels.cross_entropy(logits, targets[here], losses[here], backward, at.threads)
            if d_hidden is not None and whole:
                at.kernels.frozen_backward(logits, frozen, None, None, d_hidden[here], True, at.threads)
            elif d_hidden is not None:
                at.product(logits, weight, d_hidden[here])
            if d_weight is not None:
                at.product(logits, hidden[here], d_weight, a_across=True, add=True)
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight) if t is not None))
        ctx.dtype = weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *rest = ctx.saved_tensors
        factor = float(grads[0])
        if factor != 1.0:
            d_hidden = d_hidden * factor
        d_weight = (rest[0] * factor).to(ctx.dtype) if rest else None
        return d_hidden, None, d_weight, None, None


def learned_rows(model: Llama, batch: Batch, kernels: Any | None = None) -> tuple[Tensor, Tensor, Setting]:
    """What the output layer reads at the M supervised tokens, row after row of the batch: hidden ``[M, D]``, and targets ``[M]``; the
    setting it was computed in. ``kernels`` defaults to the compiled ones; `criadero.kernels.reference_train` are their twins. Call it
    where `obstacle` finds none."""
    rows, config = rows_of(model, batch), model.config
    if kernels is None:
        module = native()
        assert module is not None
        kernels = module.train
    at = Setting(
        kernels,
        rows,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.rms_norm_eps,
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        multiplies_in_int8(model),
    )
    x = model.model.embed_tokens(rows.ids)  # [T, D]
    for block in model.model.layers:
        assert isinstance(block, Block)
        x = _block(x, at, block)
    learned = (rows.targets != IGNORE).nonzero()[:, 0]
    targets = rows.targets
    if len(learned) < len(targets):
        x, targets = x[learned], targets[learned]  # [M, D], [M]
    return _Norm.apply(x, at, model.model.norm.weight), targets, at


def loss_sum(model: Llama, batch: Batch, kernels: Any | None = None) -> tuple[Tensor, int]:
    """The next-token losses of a batch, summed over supervised tokens (nats), and their count; see `learned_rows`."""
    hidden, targets, at = learned_rows(model, batch, kernels)
    return _Loss.apply(hidden, at, model.lm_head.weight, targets, torch.is_grad_enabled()), len(targets)
