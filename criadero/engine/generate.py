"""Generation with the plain model, one prompt at a time: the engine's slow twin, for tests and for a first reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from criadero.engine.request import SamplingParams
from criadero.engine.sampler import Sampler
from criadero.errors import UserError
from criadero.model import KVCache, Llama


@torch.inference_mode()
def generate(model: Llama, prompt: Sequence[int], params: SamplingParams, index: int = 0) -> Iterator[int]:
    """Yield new ids one by one; an id that ends the answer is not yielded. Stop texts and grammars it does not know.

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
    ends = {*params.stop_ids, *(() if params.ignore_eos else model.config.eos_ids)}
    sampler = Sampler(
        params, prompt, vocab=model.config.vocab_size, ends=ends if params.min_tokens else (), index=index
    )
    ids = torch.tensor([list(prompt)], device=weight.device)
    model.eval()
    for _ in range(length - len(prompt)):
        hidden = model(ids, attend=cache, return_hidden=True)
        token = sampler.choose(model.logits(hidden[0, -1]).float().cpu().numpy())
        if token in ends:
            return
        yield token
        sampler.accept(token)
        ids = torch.tensor([[token]], device=weight.device)
