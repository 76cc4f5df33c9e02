"""Answers to held-out questions before, while and after tuning: what a loss does not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from criadero.chat import Message, Template, render
from criadero.data.filters import identify
from criadero.engine.generate import generate
from criadero.engine.request import SamplingParams
from criadero.engine.sampler import BadLogits
from criadero.model import Llama
from criadero.tokenizer import Tokenizer

LONGEST = 64  # tokens of an answer
ROOM = 16  # tokens of an answer that have to fit into the context at least


@dataclass(frozen=True)
class Asked:
    """A held-out question: the prompt's ids, what was said last, the answer in the data, and the language of both."""

    ids: tuple[int, ...]
    question: str
    reference: str
    lang: str


def choose(
    chats: Sequence[Sequence[Message]], tokenizer: Tokenizer, template: Template | None, context: int, count: int
) -> list[Asked]:
    """At most ``count`` different questions, in the order of ``chats``, the languages in turn; those that leave no room for an
    answer are passed over. Each is a chat up to its first answer."""
    by_language: dict[str, list[Asked]] = {}
    seen: set[str] = set()
    for chat in chats if template else ():  # raw text has no questions
        first = next((n for n, message in enumerate(chat) if message["role"] == "assistant"), 0)
        if not first:
            continue
        asked = list(chat[:first])
        assert template
        ids = render(asked, tokenizer, template, add_generation_prompt=True).ids
        question, reference = asked[-1]["content"], chat[first]["content"]
        if len(ids) + ROOM > context or question in seen:
            continue
        seen.add(question)
        lang, _ = identify(f"{question}\n{reference}")
        by_language.setdefault(lang, []).append(Asked(tuple(ids), question, reference, lang))
    found: list[Asked] = []
    while len(found) < count and any(by_language.values()):
        found += [listed.pop(0) for listed in by_language.values() if listed]
    return found[:count]


def answers(
    model: Llama, asked: Sequence[Asked], tokenizer: Tokenizer, ends: Sequence[int], longest: int = LONGEST
) -> list[str]:
    """The model's greedy answers, of at most ``longest`` tokens. Whether it is training stays as it was. A model whose logits are not
    numbers (diverged, until the loop sees it in the next loss) says so in place of an answer."""
    params = SamplingParams(max_tokens=longest, stop_ids=tuple(ends))
    was = model.training

    def said(one: Asked) -> str:
        try:
            ids = list(generate(model, one.ids, params))
        except BadLogits as error:
            return f"(no answer: {error})"
        # an embedding table may have rows beyond the vocabulary, and an untrained model may choose one: no text belongs to it
        return tokenizer.decode([id for id in ids if id < tokenizer.vocab_size]).strip()

    try:
        return [said(one) for one in asked]
    finally:
        model.train(was)
