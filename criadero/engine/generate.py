"""Generation with the plain model: ids in, ids out. It knows no text and no templates.

The native engine to come has this as its twin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from criadero.errors import UserError
from criadero.model import KVCache, Llama


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep everything.

    ``repetition_penalty`` divides the positive and multiplies the negative logits of ids seen already (CTRL, arXiv
    1909.05858, section 4.1). ``stop`` are ids that end the generation, beside the model's own.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100), ("top_k", 0, 2**31), ("top_p", 0, 1), ("max_tokens", 1, 2**31),
            ("repetition_penalty", 0.01, 100),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must lie between {low} and {high:,}, not {getattr(self, name)!r}")
        if self.top_p == 0.0:
            raise UserError("top_p must be above 0; use temperature 0 for the likeliest token")


def choose(logits: Tensor, params: SamplingParams, seen: Sequence[int], generator: torch.Generator) -> int:
    """The next id from logits ``[V]``."""
    logits = logits.to(torch.float32, copy=True)  # the caller's stay as they are
    if params.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted(set(seen)))
        picked = logits[ids]
        penalty = params.repetition_penalty
        logits[ids] = torch.where(picked > 0, picked / penalty, picked * penalty)
    if params.temperature == 0.0:
        return int(logits.argmax())
    logits = logits / params.temperature
    if 0 < params.top_k < len(logits):
        logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
    probabilities = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= params.top_p] = 0.0  # the first token that passes the mark stays
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(model: Llama, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """Yield new ids one by one; an end-of-sequence id ends the generation and is not yielded.

    A prompt longer than the context is refused; a generation that reaches the end of the context stops there.
    """
    context = model.config.max_position_embeddings
    if not prompt:
        raise UserError("the prompt is empty; give at least one token")
    if len(prompt) >= context:
        raise UserError(f"the prompt has {len(prompt)} tokens and the model's context is {context}; shorten it")
    weight = model.model.embed_tokens.weight
    length = min(context, len(prompt) + params.max_tokens)
    cache = KVCache(model.config, 1, length, weight.dtype, weight.device)
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()  # from the system; torch's own default is the same in every process
    else:
        generator.manual_seed(params.seed)
    ends = {*model.config.eos_ids, *params.stop}
    seen = list(prompt)
    ids = torch.tensor([seen], device=weight.device)
    model.eval()
    for _ in range(length - len(prompt)):
        hidden = model(ids, attend=cache, return_hidden=True)
        token = choose(model.logits(hidden[0, -1]).cpu(), params, seen, generator)
        if token in ends:
            return
        yield token
        seen.append(token)
        ids = torch.tensor([[token]], device=weight.device)
