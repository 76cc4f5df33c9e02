"""The guard against copying (`criadero.trust.guard`) in the server: which index is a model's, and what becomes of an answer that copies.

An answer ends where it has copied more than so many tokens of a text whose licence forbids that. It has the finish reason "guard", which
each API says in its own word, and the `criadero` block names the document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from criadero.checkpoints import tokenizer_of
from criadero.engine.request import Output
from criadero.errors import UserError
from criadero.trust.guard import Guard, Hit, same_words
from criadero.trust.search import Index
from criadero.trust.trace import index_for


@dataclasses.dataclass(frozen=True)
class Guarding:
    """A model's index, and how many tokens of it an answer may copy."""

    index: Index
    most: int

    def watch(self) -> Watch:
        """For one request."""
        return Watch(self)


def opener(indexes: Sequence[str], most: int) -> Callable[[Path], Guarding]:
    """A function that gives each model the first of ``indexes`` that is of its own data. UserError: none is, or it has other tokens."""

    def guarding(model: Path) -> Guarding:
        why: UserError | None = None
        for one in indexes:
            try:
                index = index_for(model, one)
            except UserError as error:
                why = why or error
                continue
            same_words(index, tokenizer_of(model))
            Guard(index, most)  # refuses what cannot be
            return Guarding(index, most)
        raise UserError(f"--guard: {why}")

    return guarding


class Watch:
    """Follows the samples of one request, each with a guard of its own."""

    def __init__(self, guarding: Guarding) -> None:
        self.guarding = guarding
        self.stopped: dict[int, Hit] = {}
        self._guards: dict[int, Guard] = {}
        self._ended: set[int] = set()
        self._said = 0  # tokens; the engine computes some more before it hears of the end

    def look(self, output: Output) -> Output:
        """What may be said of an engine's output: all of it, or, of a sample that was stopped before, nothing but its end."""
        at = output.index
        if at in self.stopped:
            output = dataclasses.replace(
                output, ids=[], text="", logprobs=None, stopped_by=None, end_logprob=None, error=None
            )
        elif at not in self._guards:
            self._guards[at] = Guard(self.guarding.index, self.guarding.most)
        if at not in self.stopped:
            guard = self._guards[at]
            hit = next((hit for token in output.ids if (hit := guard.push(token)) is not None), None)
            if hit is not None:
                self.stopped[at] = hit
        if output.finish_reason is not None:
            self._ended.add(at)
            if at in self.stopped:
                output = dataclasses.replace(output, finish_reason="guard", stopped_by=None)
        self._said += len(output.ids)
        if output.usage is not None and self.stopped:
            output = dataclasses.replace(output, usage=dataclasses.replace(output.usage, completion=self._said))
        return output

    def over(self, samples: int) -> bool:
        """Whether nothing more of the request will be said, though the engine still computes."""
        return len(self._ended | self.stopped.keys()) == samples and len(self._ended) < samples

    def as_dict(self) -> dict[str, Any]:
        """For the `criadero` block and the receipt."""
        return {
            "index": self.guarding.index.path.name, "tokens": self.guarding.most,
            "stopped": [
                {
                    "choice": at, "copied_tokens": hit.tokens, "document": hit.document.name, "source": hit.document.source,
                    "licence": hit.document.licence, "asks": hit.asks,
                }
                for at, hit in sorted(self.stopped.items())
            ],
        }  # fmt: skip
