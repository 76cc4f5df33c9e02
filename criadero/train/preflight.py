"""What will happen, before it happens: exact counts, one example with its mask, memory, time; and a refusal of runs in which
nothing would be learned."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from criadero.chat import Example, Message
from criadero.data.filters import identify
from criadero.errors import UserError
from criadero.model import Llama
from criadero.tokenizer import Tokenizer
from criadero.train.batches import Batch
from criadero.train.memory import Fit, Needs

LANGUAGES = {"en": "English", "es": "Spanish", "other": "other", "unknown": "not known"}


@dataclass
class Report:
    """Counts of what rendering did to the chats."""

    data: str
    shape: str
    bad: int
    held_out_from: str
    context: int
    chats: int = 0
    held_out: int = 0
    tokens: int = 0
    supervised: int = 0
    held_out_supervised: int = 0
    duplicates: int = 0
    contaminated: int = 0  # held-out chats that stand in the training part, word for word
    near_contaminated: int = 0  # others whose question has most of a training question's words, in their order
    near_example: str = ""
    too_long: int = 0
    longest: int = 0
    truncated_tokens: int = 0
    unsupervised: int = 0
    dropped: int = 0
    parts: int = 0  # what chats that were too long were split into
    noun: str = "chat"  # or "piece", of a plain document
    long_rounds: int = 0  # rounds left out of them, too long by themselves
    held_out_cut: int = 0  # held-out chats whose end was cut off, whatever the rule for the others
    refused_for_length: bool = False
    languages: dict[str, int] = field(default_factory=dict)  # chats by language, all parts

    def count(self, train: Sequence[Example], held_out: Sequence[Example]) -> None:
        """Fill in the totals."""
        self.chats, self.held_out = len(train), len(held_out)
        self.tokens = sum(len(e.ids) for e in train)
        self.supervised = sum(sum(e.loss_mask[1:]) for e in train)
        self.held_out_supervised = sum(sum(e.loss_mask[1:]) for e in held_out)
        self.longest = max([self.longest, *(len(e.ids) for e in train)])

    def table(self, data: Path, licence: str, sources: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The passport's ``data`` table; ``sources`` are the rows that the data's own passport gives."""
        counts = {k: v for k, v in vars(self).items() if isinstance(v, int) and not isinstance(v, bool)}
        row = {"name": data.name, "licence": licence, "documents": self.chats, "tokens": self.tokens}
        return {
            "documents": self.chats,
            "tokens": self.tokens,
            "shape": self.shape,
            "languages": self.languages,
            "counts": counts,
            "by_source": list(sources) or [row],
        }


def counted(n: float, noun: str, plural: str = "") -> str:
    """``1 chat``, ``2 chats``, ``0.5 passes``."""
    number = f"{n:,}" if isinstance(n, int) else f"{n:g}"
    return f"{number} {noun if n == 1 else plural or noun + 's'}"


def check(report: Report) -> None:
    """Refuse what cannot teach anything."""
    if report.refused_for_length:
        raise UserError(
            f"{report.data}: {counted(report.too_long, 'chat')} {'is' if report.too_long == 1 else 'are'} longer than "
            f"{report.context} tokens (the longest has "
            f"{report.longest}); choose --too_long split, drop or truncate, or a base with a longer context"
        )
    if report.chats == 0 and report.unsupervised:
        cut = f" after cutting them to {report.context} tokens" if report.truncated_tokens else ""
        raise UserError(
            f"{report.data}: no chat has an assistant's token to learn{cut} ({report.unsupervised} of "
            f"{counted(report.unsupervised + report.dropped, 'chat')}), so nothing would be "
            "learned; check the roles, the template and max_length"
        )
    if report.chats == 0 and report.dropped:
        all_of = "the only one is" if report.dropped == 1 else f"all {report.dropped:,} are"
        raise UserError(
            f"{report.data}: no chat is left to learn from: {all_of} longer than {report.context} tokens "
            f"and {'was' if report.dropped == 1 else 'were'} dropped; raise max_length, or choose --too_long truncate"
        )
    if report.chats == 0:
        all_of = "the only chat was" if report.held_out == 1 else f"all {report.held_out:,} chats were"
        raise UserError(
            f"{report.data}: {all_of} kept apart to measure on, none is left to learn from; give more "
            "chats, or held_out_share 0"
        )


def measure_speed(model: Llama, batch: Batch, loss: Callable[..., Any]) -> float:
    """Tokens a second of one forward and backward pass, the second of two; gradients are thrown away."""
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        value, _, _ = loss(model, batch)
        if value.requires_grad:
            value.backward()
        float(value.detach())  # a GPU is done by then
        took = time.perf_counter() - start
        for parameter in model.parameters():
            parameter.grad = None
    return batch.tokens / took


def pieces(tokenizer: Tokenizer, example: Example, limit: int = 120) -> list[tuple[str, bool]]:
    """The decoded example, cut where what is learned begins or ends; and whether each piece is."""
    out: list[tuple[str, bool]] = []
    shown, begin = example.ids[:limit], 0
    for i in range(1, len(shown) + 1):
        if i == len(shown) or example.loss_mask[i] != example.loss_mask[begin]:
            out.append((tokenizer.decode(shown[begin:i], skip_special=False), bool(example.loss_mask[begin])))
            begin = i
    if len(example.ids) > limit:
        out.append((f" ... ({len(example.ids) - limit} more tokens)", False))
    return out


def masked_example(tokenizer: Tokenizer, example: Example, limit: int = 120) -> Text:
    """The decoded example: what is learned in bold green, the rest dim; without colours, learned text stands in «»."""
    text = Text()
    for piece, learned in pieces(tokenizer, example, limit):
        text.append(f"«{piece}»" if learned else piece, style="bold green" if learned else "dim")
    return text


def shortened(report: Report) -> str:
    """What became of the chats that were too long; "" where none was."""
    said = []
    if report.too_long:
        split = f"split into {counted(report.parts, 'part')}, " if report.parts else ""
        rounds = f", {counted(report.long_rounds, 'round')} left out" if report.long_rounds else ""
        said.append(
            f"{counted(report.too_long, 'chat')}: {split}{report.dropped:,} dropped, "
            f"{counted(report.truncated_tokens, 'token')} cut{rounds}"
        )
    if report.held_out_cut:
        said.append(f"{counted(report.held_out_cut, 'held-out chat')} cut")
    return "; ".join(said)


def fitted(found: Fit, report: Report, *, budget: float, longest: int, rows: int, length: int) -> str:
    """What was taken to stay within ``budget`` GB: the method, ``rows`` of ``length`` tokens at once, and what became of examples of
    which the longest had ``longest`` tokens."""
    said = [found.why, f"{counted(rows, 'row')} of {length:,} tokens at once"]
    if found.rows < found.wanted:
        said[-1] += f" instead of {found.wanted:,}, which takes longer"
    if found.checkpointing:
        said.append("blocks computed again")
    most = f"{report.noun}s of at most {report.context:,} tokens"
    if report.context < longest:
        most += f" instead of {longest:,}"
    if report.noun == "piece":
        said.append(f"{most}, nothing left out")
    elif cut := shortened(report):
        said.append(f"{most} ({cut})")
    else:
        said.append(f"no {report.noun} is cut or split, the longest has {longest:,} tokens")
    return f"fit {budget:g} GB: {'; '.join(said)}"


def languages_of(chats: Sequence[Sequence[Message]]) -> dict[str, int]:
    """How many chats are in which language, most first: "en", "es", "other", "unknown" (too short to say)."""
    found = Counter(identify("\n".join(message["content"] for message in chat))[0] for chat in chats)
    return dict(found.most_common())


def near_questions(train: Sequence[Sequence[Message]], held_out: Sequence[Sequence[Message]]) -> tuple[int, str]:
    """How many held-out chats ask almost what a training chat asks, without being one; and the first such question.

    Two first questions are near when four fifths of the trigrams of letters of both are common (Jaccard): "Are you open on
    Sundays?" and "are you open sundays". That is what other words for the same are measured by, so it is told, not refused.
    """
    asked = [trigrams(_question(chat)) for chat in train]
    places: dict[str, list[int]] = {}
    for n, grams in enumerate(asked):
        for gram in grams:
            places.setdefault(gram, []).append(n)
    exact = {repr(chat) for chat in train}
    count, example = 0, ""
    for chat in held_out:
        grams = trigrams(_question(chat))
        if repr(chat) in exact or not grams:
            continue
        shared = Counter(n for gram in grams for n in places.get(gram, ()))
        if any(common >= 0.8 * (len(grams) + len(asked[n]) - common) for n, common in shared.most_common(20)):
            count += 1
            example = example or _question(chat)
    return count, example


def trigrams(text: str) -> set[str]:
    """The trigrams of the letters and digits of a text, words apart; folded to lower case."""
    words = " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
    return {words[i : i + 3] for i in range(len(words) - 2)}


def _question(chat: Sequence[Message]) -> str:
    return next((message["content"] for message in chat if message["role"] == "user"), "")


def show(
    report: Report, tokenizer: Tokenizer, example: Example, *, base: str, method: str, trained: int, total: int, steps: int,
    tokens: int, epochs: float, batch_tokens: int, memory: Needs, speed: float, why: str, code: str, lr: float,
    rule: str, measuring: float = 0.0,
) -> None:  # fmt: skip
    """Print the pre-flight to standard error. ``why``: the dtype and its reason; ``code``: which code computes;
    ``measuring``: what is measured beside the training, as tokens that are trained on."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(name: str, value: str) -> None:
        console.print(Text(f"  {name:<11}", style="bold"), Text(value), sep="")

    console.print(Text("pre-flight", style="bold"))
    line("data", f"{report.data}: {report.shape}")
    skipped = f", {counted(report.bad, 'bad line')} skipped" if report.bad else ""
    line(
        f"{report.noun}s", f"{report.chats:,} to learn, {report.held_out:,} held out ({report.held_out_from}){skipped}"
    )
    share = report.supervised / report.tokens
    line(
        "tokens",
        f"{report.tokens:,} a pass, {report.supervised:,} supervised ({share:.0%}); longest {report.noun} {report.longest} "
        f"of {report.context}",
    )
    if report.unsupervised:
        line("left out", f"{counted(report.unsupervised, 'chat')} in which no assistant's token is left to learn")
    if said := shortened(report):
        line("too long", said)
    if report.duplicates or report.contaminated:
        line(
            "warning",
            f"{counted(report.duplicates, 'duplicate chat')}; {counted(report.contaminated, 'held-out chat')} "
            f"{'is' if report.contaminated == 1 else 'are'} also in the training part",
        )
    if report.near_contaminated:
        line(
            "note",
            f"{counted(report.near_contaminated, 'held-out question')} almost as in the training part, such as "
            f"{' '.join(report.near_example.split())[:60]!r}",
        )
    if report.languages:
        line("languages", ", ".join(f"{LANGUAGES.get(lang, lang)} {n:,}" for lang, n in report.languages.items()))
    if report.held_out_supervised == 0:
        line("warning", f"no held-out {report.noun}s: the effect cannot be measured")
    line("example", "what is learned stands in «»:")
    console.print(Text("    ").append_text(masked_example(tokenizer, example)))
    line("method", f"{method} on {base}: {trained:,} of {total:,} weights learn")
    line(
        "course",
        f"{counted(epochs, 'pass', 'passes')} in {counted(steps, 'step')} of about {batch_tokens:,} tokens, lr {lr:.2g}",
    )
    line("ending", rule)
    line("computing", f"{why}, with {code}; {counted(torch.get_num_threads(), 'thread')}")
    line("memory", f"about {memory.words()}")
    beside = f", and {measuring / speed:,.0f} s of measuring" if measuring / speed >= 1 else ""
    line("time", f"about {tokens / speed:,.0f} s at {speed:,.0f} tokens/s{beside}")
    sys.stderr.flush()
