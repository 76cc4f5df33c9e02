"""Traces and searches in the terminal: copied spans underlined, and what is known of the documents they stand in."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

from criadero.trust.asks import asks
from criadero.trust.removal import Context
from criadero.trust.trace import CAUTION, Found, Trace

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
SHOWN = 3  # documents a span


def print_trace(trace: Trace, out: TextIO | None = None) -> None:
    """The text with its spans underlined (between « and » where a terminal cannot), then the spans and their documents."""
    console = Console(file=out, highlight=False, soft_wrap=True)
    console.print(_marked(trace, underline=console.is_terminal))
    console.print()
    if trace.longest is None:
        console.print(
            f"no run of {trace.min_tokens} tokens and more of these {trace.tokens} stands in the training data"
        )
        console.print(_caution())
        return
    shares = ", ".join(f"{share:.0%} in runs of {length} and more" for length, share in trace.covered.items())
    console.print(f"{trace.tokens} tokens: {shares}")
    longest = trace.longest
    console.print(f"longest copied run: {longest.tokens} tokens, seen {_times(longest.count)}")
    for licence in dict.fromkeys(one.document.licence for one in longest.found):
        console.print(Text(f"  {licence or 'no licence given'}: {asks(licence)}"))
    for number, span in enumerate(trace.spans, 1):
        title = Text(f"\n[{number}] ", style=_colour(number))
        title.append(_short(span.text), style="bold")
        title.append(f"  {span.tokens} tokens, seen {_times(span.count)}", style="dim")
        console.print(title)
        for found in span.found[:SHOWN]:
            console.print(_document(found))
        if span.count > len(span.found[:SHOWN]):
            console.print(Text(f"    and {span.count - len(span.found[:SHOWN]):,} more", style="dim"))
    if trace.more:
        console.print(Text(f"\n{trace.more} more spans, of commoner words, are not shown", style="dim"))
    console.print(_caution())


def _caution() -> Text:
    return Text("\n" + " · ".join(CAUTION), style="italic")


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _short(text: str, most: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3].rstrip() + "..."


def _marked(trace: Trace, *, underline: bool) -> Text:
    out = Text()
    at = 0
    for number, span in enumerate(trace.spans, 1):
        start = max(at, span.from_char)  # spans may overlap: the later one shows only what is new
        if start >= span.to_char:
            continue
        out.append(trace.text[at:start])
        part = trace.text[start : span.to_char]
        if underline:
            out.append(part, style=f"underline {_colour(number)}")
        else:
            lead = part[: len(part) - len(part.lstrip())]
            out.append(f"{lead}«{part[len(lead) :]}»[{number}]")
        at = span.to_char
    out.append(trace.text[at:])
    return out


def _document(found: Found) -> Text:
    one = found.document
    about = " · ".join(filter(None, (one.source, one.name, one.date, one.licence or "no licence given", one.url)))
    line = Text(f"    {about}\n", style="dim")
    return line.append_text(_passage(found))


def _passage(found: Found | Context) -> Text:
    """The words before, the span in bold, the words after, on one line."""
    line = Text("    ..." + _tail(found.before))
    line.append((" " if found.text[:1].isspace() else "") + _short(found.text), style="bold")
    return line.append(_head(found.after) + "...")


def _tail(text: str, most: int = 50) -> str:
    return " ".join(text.split())[-most:] + (" " if text[-1:].isspace() else "")


def _head(text: str, most: int = 50) -> str:
    return (" " if text[:1].isspace() else "") + " ".join(text.split())[:most]


def print_places(text: str, total: int, places: list[Context], out: TextIO | None = None) -> None:
    """How often a text stands in an index, and some of the places."""
    console = Console(file=out, highlight=False, soft_wrap=True)
    console.print(Text(f"{_short(text)!r} stands {_times(total) if total else 'nowhere'} in the training data"))
    for one in places:
        about = " · ".join(filter(None, (one.source, one.document, one.licence or "no licence given")))
        console.print(Text(f"  {about}", style="dim"))
        console.print(_passage(one))
