"""AdamW and Muon with float32 masters, and the learning-rate schedules.

The model computes in its own dtype (often bf16); the optimizer owns a float32 copy of every trained tensor, updates that,
and writes the rounded result back. Gradients are summed in float32, over micro-batches too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from criadero.kernels import native

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon (K. Jordan, 2024)


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, by Newton-Schulz iterations: ``[m, n]`` float32 -> ``[m, n]`` float32.

    Muon (https://kellerjordan.github.io/posts/muon). ``dtype`` is of the iteration, which tolerates bf16.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    for _ in range(steps):
        square = x @ x.t()
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.t() if tall else x).float()


class Optimizer:
    """AdamW (arXiv 1711.05101) for every tensor, or Muon for the matrices inside the blocks and AdamW for the rest.

    Muon's update is scaled by ``0.2 * sqrt(max(m, n))`` so that one learning rate and one weight decay serve both
    (Moonlight, arXiv 2502.16982, section 2.2). Weight decay touches matrices only.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, method: str, weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, momentum: float = 0.95,
        scales: dict[str, float] | None = None, fused: bool | None = None, kernels: bool | None = None,
    ) -> None:  # fmt: skip
        """``scales``: factors on the learning rate by name. ``fused``: AdamW by PyTorch's fused kernel, by default on a GPU;
        ``kernels``: by the compiled ones, by default on a CPU where there are some. With neither the loop in `step` computes it."""
        self.parameters = dict(parameters)
        self.weight_decay, self.betas, self.eps, self.momentum = weight_decay, betas, eps, momentum
        self.scales = scales or {}  # learning-rate factor by parameter name, 1.0 when absent
        self.muon = {
            name for name, p in self.parameters.items() if method == "muon" and p.ndim == 2 and ".layers." in f".{name}"
        }
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.first = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.second = {name: torch.zeros_like(m) for name, m in self.masters.items() if name not in self.muon}
        self.grads = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        self.steps = 0
        on_gpu = any(p.device.type == "cuda" for p in self.parameters.values())
        # AdamW in one kernel for many tensors, and a norm that waits for the GPU once
        self.fused = on_gpu if fused is None else fused
        if kernels is None:
            plain = all(
                p.device.type == "cpu" and p.is_contiguous() and p.dtype in (torch.float32, torch.bfloat16)
                for p in self.parameters.values()
            )
            kernels = plain and not self.fused and hasattr(getattr(native(), "train", None), "AdamW")
        self.kernels = kernels
        self._compiled: tuple[list[int], Any] = [], None  # where the tensors lay, and what the kernels know of them

    def collect(self) -> None:
        """Add every ``.grad`` to the float32 sums and clear it."""
        for name, p in self.parameters.items():
            if p.grad is not None:
                self.grads[name] += p.grad
                p.grad = None

    @torch.no_grad()
    def step(self, lr: float, *, divide_by: float, clip: float) -> float:
        """One update with the summed gradients divided by ``divide_by`` and clipped to norm ``clip``; returns the norm before
        clipping. A gradient that is not finite raises ``FloatingPointError`` and changes nothing."""
        sums = list(self.grads.values())
        if self.kernels and not self.muon:
            norm = self._known()[1].norm(torch.get_num_threads()) / divide_by
        elif self.fused:
            norm = float(torch.stack(torch._foreach_norm(sums)).norm()) / divide_by
        else:
            norm = math.sqrt(sum(float(g.square().sum()) for g in sums)) / divide_by
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        factor = min(1.0, clip / (norm + 1e-6)) / divide_by if clip > 0 else 1.0 / divide_by
        self.steps += 1
        beta1, beta2 = self.betas
        done: set[str] = set()
        if self.fused:
            done = self._fused_adamw(lr, factor)
        elif self.kernels:
            done = self._compiled_adamw(lr, factor)
        correct1, correct2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for name, master in self.masters.items():
            if name in done:
                continue
            grad = self.grads[name].mul_(factor)
            rate = lr * self.scales.get(name, 1.0)
            if master.ndim == 2 and self.weight_decay:
                master.mul_(1 - rate * self.weight_decay)
            first = self.first[name]
            if name in self.muon:
                first.lerp_(grad, 1 - self.momentum)
                nesterov = grad.lerp(first, self.momentum)
                update = orthogonalise(nesterov, self.parameters[name].dtype)
                master.sub_(update, alpha=rate * 0.2 * math.sqrt(max(master.shape)))
            else:
                second = self.second[name]
                first.lerp_(grad, 1 - beta1)
                second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                master.addcdiv_(first, (second / correct2).sqrt_().add_(self.eps), value=-rate / correct1)
            self.parameters[name].copy_(master)
            grad.zero_()
        return norm

    def _known(self) -> tuple[list[str], Any]:
        """The names of the tensors that AdamW has, and the kernels' object over them, made again when one of them has moved."""
        names = [name for name in self.masters if name not in self.muon]
        parts: list[dict[str, Any]] = [self.masters, self.first, self.second, self.grads, self.parameters]
        at = [part[name].data_ptr() for part in parts for name in names]
        if at != self._compiled[0]:
            module = native()
            assert module is not None
            made = module.train.AdamW(*([part[name].detach() for name in names] for part in parts))
            self._compiled = at, made
        return names, self._compiled[1]

    def _compiled_adamw(self, lr: float, factor: float) -> set[str]:
        """The step of every tensor that AdamW has, in one pass over each by the compiled kernels; their names."""
        names, known = self._known()
        rates = [lr * self.scales.get(name, 1.0) for name in names]
        decays = [self.weight_decay if self.masters[name].ndim == 2 else 0.0 for name in names]
        known.step(rates, decays, factor, *self.betas, self.eps, self.steps, torch.get_num_threads())
        return set(names)

    def _fused_adamw(self, lr: float, factor: float) -> set[str]:
        """The step of every tensor that AdamW has, by PyTorch's fused kernel; their names. Rounds otherwise than the loop in `step`."""
        groups: dict[tuple[float, float], list[str]] = {}
        for name, master in self.masters.items():
            if name not in self.muon:
                kind = lr * self.scales.get(name, 1.0), self.weight_decay if master.ndim == 2 else 0.0
                groups.setdefault(kind, []).append(name)
        for (rate, decay), names in groups.items():
            masters, grads, first, second = (
                [part[name] for name in names] for part in (self.masters, self.grads, self.first, self.second)
            )
            torch._foreach_mul_(grads, factor)
            steps = torch.full((len(names),), self.steps - 1.0, device=masters[0].device)
            adamw(
                masters, grads, first, second, [], list(steps.unbind()), fused=True, amsgrad=False,
                beta1=self.betas[0], beta2=self.betas[1], lr=rate, weight_decay=decay, eps=self.eps, maximize=False,
            )  # fmt: skip
            torch._foreach_copy_([self.parameters[name] for name in names], masters)
            torch._foreach_zero_(grads)
        return {name for names in groups.values() for name in names}

    def state(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, as named float32 tensors (the gradient sums are empty between steps)."""
        parts = {"master": self.masters, "first": self.first, "second": self.second}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Restore what `state` gave, and the model's own tensors from the masters."""
        mine = self.state()
        if mine.keys() != state.keys():
            odd = sorted(mine.keys() ^ state.keys())
            raise KeyError(f"the checkpoint is of another model: {odd[0]} and {len(odd) - 1} more do not match")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        for name, p in self.parameters.items():
            p.copy_(self.masters[name])
        self.steps = steps


def learning_rate(step: int, steps: int, *, schedule: str, warmup: float, decay: float, floor: float) -> float:
    """The factor on the peak learning rate at ``step`` (0-based) of ``steps``.

    ``wsd``: warm up over the fraction ``warmup``, hold, fall in a straight line to ``floor`` over the last fraction ``decay``
    (arXiv 2404.06395). ``cosine``: warm up, then half a cosine down to ``floor`` (Llama 2, section 2.2). ``constant``.
    """
    rise = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = (step - rise) / max(1, steps - rise)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    fall = max(1, round(decay * steps))
    left = steps - step
    return 1.0 if left > fall else floor + (1 - floor) * left / fall
