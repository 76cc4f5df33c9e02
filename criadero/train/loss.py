"""Cross-entropy over the rows that count, in chunks, with the gradient formed in the forward pass.

A full ``[tokens, V]`` matrix of float32 logits and its gradient never exist (the idea of Cut Cross-Entropy, arXiv 2411.09009,
and of Liger, arXiv 2410.10989, in plain PyTorch): each chunk's logits are turned into the gradient in place and folded into
the gradients of the hidden states and of the output layer at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from criadero.model import Attend, Llama
from criadero.train import fast
from criadero.train.batches import IGNORE, Batch
from criadero.train.fast import CHUNK


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden ``[N, D]``, weight ``[V, D]``, targets ``[N]`` -> the sum of the losses, float32 scalar."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows = hidden[start : start + CHUNK]  # [n, D]
            aim = targets[start : start + CHUNK]  # [n]
            logits = torch.mm(rows, weight.t()).float()  # [n, V]
            log_z = torch.logsumexp(logits, dim=-1)  # [n]
            loss += (log_z - logits.gather(1, aim[:, None])[:, 0]).sum()
            if d_hidden is None and d_weight is None:
                continue
            grad = logits.sub_(log_z[:, None]).exp_()  # softmax
            grad[torch.arange(len(aim), device=aim.device), aim] -= 1.0
            grad = grad.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(grad, weight, out=d_hidden[start : start + CHUNK])
            if d_weight is not None:
                d_weight += torch.mm(grad.t(), rows)
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight) if t is not None))
        ctx.has = (d_hidden is not None, d_weight is not None)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = list(ctx.saved_tensors)
        d_hidden = saved.pop(0) * grads[0].to(saved[0].dtype if saved else grads[0].dtype) if ctx.has[0] else None
        d_weight = (saved.pop(0) * grads[0]).to(ctx.weight_dtype) if ctx.has[1] else None
        return d_hidden, d_weight, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of next-token losses in nats; rows whose target is -100 take no part. hidden ``[..., D]``, targets ``[...]``."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = (targets != IGNORE).nonzero()[:, 0]
    if len(keep) < len(targets):
        hidden, targets = hidden[keep], targets[keep]
    if not torch.is_grad_enabled():  # a Function cannot tell, and would form gradients that nobody asked for
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, targets)


def next_token_loss(model: Llama, batch: Batch, attend: Attend | None = None) -> tuple[Tensor, int, dict[str, float]]:
    """The objective of pretraining and of supervised tuning: (loss summed over supervised tokens, their count, metrics).

    Computed by the compiled kernels where they take the model (`criadero.train.fast`), else, or with ``attend``, by its ``forward``.
    """
    if attend is None and fast.obstacle(model) is None:
        loss, count = fast.loss_sum(model, batch)
        return loss, count, {}
    hidden = model(batch.ids, positions=batch.positions, attend=attend or attention_for(batch), return_hidden=True)
    count = int((batch.targets != IGNORE).sum())
    return cross_entropy_sum(hidden, model.lm_head.weight, batch.targets), count, {}


def learned_rows(model: Llama, batch: Batch) -> Tensor:
    """What the output layer reads at the M supervised tokens, row after row of the batch: hidden states ``[M, D]``, by the compiled
    kernels where they take the model. For objectives other than `next_token_loss`, which fuses the output layer with its own."""
    if fast.obstacle(model) is None:
        return fast.learned_rows(model, batch)[0]
    hidden = model(batch.ids, positions=batch.positions, attend=attention_for(batch), return_hidden=True)
    return hidden[batch.targets != IGNORE]


class BlockAttention:
    """Attention by two matrix products over a mask ``[B, 1, T, T]``: on CPUs, for rows of up to about a thousand tokens, twice
    as fast as the flash kernel, forward and backward (docs/log.md). Softmax runs in float32 inside the kernel."""

    def __init__(self, segments: Tensor, dtype: torch.dtype) -> None:
        length = segments.shape[1]
        hidden = segments[:, :, None] != segments[:, None, :]  # [B, T, T]: another document
        hidden |= torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
        hidden |= (segments < 0)[:, None, :]
        hidden &= ~torch.eye(length, dtype=torch.bool, device=segments.device)  # padding sees itself, to stay finite
        self.mask = torch.zeros(hidden.shape, dtype=dtype, device=segments.device).masked_fill_(hidden, -torch.inf)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, size = q.shape[1], q.shape[3]
        if k.shape[1] != heads:
            k = k.repeat_interleave(heads // k.shape[1], dim=1)  # [B, H, T, Dh]
            v = v.repeat_interleave(heads // v.shape[1], dim=1)
        scores = torch.matmul(q * size**-0.5, k.transpose(-1, -2))  # [B, H, T, T]
        return torch.matmul(F.softmax(scores + self.mask[:, None], dim=-1), v)  # [B, H, T, Dh]


def attention_for(batch: Batch) -> Attend:
    """The fastest attention that keeps the documents of a packed batch apart."""
    from criadero.model import DocumentMask, causal
    from criadero.train.gpu import without_mask

    if batch.ids.device.type == "cpu" and batch.ids.shape[1] <= 1024:
        return BlockAttention(batch.segments, batch.dtype)
    if batch.ids.device.type != "cpu":
        return without_mask(batch.segments)
    if bool((batch.segments == batch.segments[:, :1]).all()):
        return causal
    return DocumentMask(batch.segments)
