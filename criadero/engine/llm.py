"""``LLM``: a model, its tokenizer and its template together, for notebooks and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from criadero.artifact import Artifact, resolve
from criadero.chat import Message, Template, render
from criadero.checkpoints import load_model, template_of, tokenizer_of
from criadero.engine.generate import SamplingParams, generate
from criadero.errors import UserError
from criadero.tokenizer import StreamDecoder, Tokenizer
from criadero.train.hardware import choose_dtype


class LLM:
    """Talk to a model: ``for piece in LLM("cria").chat([{"role": "user", "content": "Hola"}]): print(piece, end="")``."""

    def __init__(self, ref: str | Path | Artifact, *, dtype: str = "float32") -> None:
        """Load a bundled model, a folder or a GGUF file. Decoding one token at a time is bound by overhead in small models,
        where float32 is as quick as bf16; ``dtype`` may also be ``bfloat16`` or ``auto``."""
        self.path = resolve(ref)
        self.model = load_model(self.path, dtype=torch.float32 if dtype == "float32" else None)
        if dtype != "float32":
            self.model = self.model.to(choose_dtype(dtype, self.model.config, "cpu")[0])
        self.tokenizer: Tokenizer = tokenizer_of(self.path)
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise UserError(
                f"{self.path}: its tokenizer has {self.tokenizer.vocab_size} tokens but the model {self.model.config.vocab_size} "
                "embeddings: the two do not belong together"
            )
        self._template: Template | None = None

    @property
    def template(self) -> Template:
        """The chat template that travels with the weights; UserError when there is none."""
        if self._template is None:
            self._template = template_of(self.path)
        return self._template

    def generate(self, text: str, **sampling: object) -> Iterator[str]:
        """Go on from ``text``; pieces of text as they come. Keywords are those of `SamplingParams`."""
        ids = self.tokenizer.encode(text, bos=self.tokenizer.bos_id is not None)
        yield from self._stream(ids, sampling, continues=True)

    def chat(self, messages: Sequence[Message], **sampling: object) -> Iterator[str]:
        """Answer the last message; pieces of text as they come. A chat that fills the context is refused."""
        prompt = render(list(messages), self.tokenizer, self.template, add_generation_prompt=True)
        yield from self._stream(prompt.ids, sampling, continues=False)

    def _stream(self, ids: list[int], sampling: dict, *, continues: bool) -> Iterator[str]:
        unknown = sampling.keys() - SamplingParams.__dataclass_fields__.keys()
        if unknown:
            raise UserError(
                f"unknown sampling parameter {sorted(unknown)[0]!r}; there are {', '.join(SamplingParams.__dataclass_fields__)}"
            )
        decoder = StreamDecoder(self.tokenizer, continues=continues)
        params = SamplingParams(**sampling)
        ends = tuple({*params.stop, *self.tokenizer.end_ids})
        for token in generate(self.model, ids, SamplingParams(**{**sampling, "stop": ends})):
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.flush():
            yield piece
