"""What will happen, before it happens: exact counts, one example with its mask, memory, time; and a refusal of runs in which
nothing would be learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from criadero.chat import Example
from criadero.errors import UserError
from criadero.model import Llama
from criadero.tokenizer import Tokenizer
from criadero.train.batches import Batch


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
    contaminated: int = 0
    too_long: int = 0
    longest: int = 0
    truncated_tokens: int = 0
    unsupervised: int = 0
    dropped: int = 0
    refused_for_length: bool = False

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
            f"{report.longest}); choose --too_long drop or --too_long truncate, or a base with a longer context"
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
        took = time.perf_counter() - start
        for parameter in model.parameters():
            parameter.grad = None
    return batch.tokens / took


def masked_example(tokenizer: Tokenizer, example: Example, limit: int = 120) -> Text:
    """The decoded example: what is learned in bold green, the rest dim; without colours, learned text stands in «»."""
    text = Text()
    run: list[int] = []
    shown = example.ids[:limit]
    for i, token in enumerate(shown):
        run.append(token)
        learned = bool(example.loss_mask[i])
        if i + 1 == len(shown) or bool(example.loss_mask[i + 1]) != learned:
            piece = tokenizer.decode(run, skip_special=False)
            text.append(f"«{piece}»" if learned else piece, style="bold green" if learned else "dim")
            run = []
    if len(example.ids) > limit:
        text.append(f" ... ({len(example.ids) - limit} more tokens)", style="dim")
    return text


def show(
    report: Report, tokenizer: Tokenizer, example: Example, *, base: str, method: str, trained: int, total: int, steps: int,
    tokens: int, epochs: float, batch_tokens: int, memory: int, speed: float, why: str, lr: float,
) -> None:  # fmt: skip
    """Print the pre-flight to standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def line(name: str, value: str) -> None:
        console.print(Text(f"  {name:<11}", style="bold"), Text(value), sep="")

    console.print(Text("pre-flight", style="bold"))
    line("data", f"{report.data}: {report.shape}")
    skipped = f", {counted(report.bad, 'bad line')} skipped" if report.bad else ""
    line("chats", f"{report.chats:,} to learn, {report.held_out:,} held out ({report.held_out_from}){skipped}")
    share = report.supervised / report.tokens
    line(
        "tokens",
        f"{report.tokens:,} a pass, {report.supervised:,} supervised ({share:.0%}); longest chat {report.longest} of {report.context}",
    )
    if report.unsupervised:
        line("left out", f"{counted(report.unsupervised, 'chat')} in which no assistant's token is left to learn")
    if report.too_long:
        line(
            "too long",
            f"{counted(report.too_long, 'chat')}: {report.dropped:,} dropped, {counted(report.truncated_tokens, 'token')} cut",
        )
    if report.duplicates or report.contaminated:
        line(
            "warning",
            f"{counted(report.duplicates, 'duplicate chat')}; {counted(report.contaminated, 'held-out chat')} "
            f"{'is' if report.contaminated == 1 else 'are'} also in the training part",
        )
    if report.held_out_supervised == 0:
        line("warning", "no held-out chats: the effect cannot be measured")
    line("example", "what is learned stands in «»:")
    console.print(Text("    ").append_text(masked_example(tokenizer, example)))
    line("method", f"{method} on {base}: {trained:,} of {total:,} weights learn")
    line(
        "course",
        f"{counted(epochs, 'pass', 'passes')} in {counted(steps, 'step')} of about {batch_tokens:,} tokens, lr {lr:.2g}",
    )
    line("computing", f"{why}; {counted(torch.get_num_threads(), 'thread')}; about {memory / 2**30:.1f} GiB of memory")
    line("time", f"about {tokens / speed:,.0f} s at {speed:,.0f} tokens/s")
    sys.stderr.flush()
