"""The verbs of an index of training data: trace, memorised, and ``data`` index, search, contamination, repeats, removal."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from criadero.errors import UserError

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
IndexArgument = Annotated[str, typer.Argument(metavar="INDEX", help="an index (criadero data index)")]
IndexOption = Annotated[
    str | None,
    typer.Option("--index", help="the index of the model's own training tokens; default: one beside the model"),
]


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _given(text: str) -> str:
    """The text, or what stands on standard input for "-"."""
    if text != "-":
        return text
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason}); convert it first") from None


def trace(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="the model that wrote the text: a bundled one, or a folder")
    ] = None,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="the text, or - to read it from input")] = None,
    last: Annotated[bool, typer.Option("--last", help="the last answer of criadero chat, instead of TEXT")] = False,
    index: IndexOption = None,
    min_tokens: Annotated[int, typer.Option(help="the shortest run that counts", min=2)] = 8,
    as_json: AsJson = False,
) -> None:
    """Show which parts of an answer stand word for word in the model's training data, and in which documents."""
    from criadero.trust import trace as tracing
    from criadero.trust.last import last_answer

    if last:
        talked, answer = last_answer()
        if text is not None:
            raise UserError("give either a text or --last")
        model, text = model or talked, answer
    if model is None or text is None:
        raise UserError("MODEL and TEXT must be given, or --last: see --help")
    opened = tracing.index_for(model, index)
    found = tracing.trace(opened, _given(text), min_tokens=min_tokens)
    if as_json:
        _print_json({"index": str(opened.path), **found.as_dict()})
        return
    from criadero.trust.show import print_trace

    print_trace(found)


def memorised(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a bundled model or a folder")],
    index: IndexOption = None,
    each: Annotated[int, typer.Option(help="passages tried of each frequency", min=1)] = 100,
    canaries: Annotated[
        Path | None, typer.Option(help="rows with text (with {} in it), secret and alphabet: what was planted")
    ] = None,
    seed: Annotated[int, typer.Option(help="which passages are drawn")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what a model knows by heart: given 50 tokens of its training data, does it go on with the next 50?"""
    from criadero.checkpoints import load_model, tokenizer_of
    from criadero.trust import memorisation
    from criadero.trust.trace import index_for

    planted = memorisation.read_canaries(canaries) if canaries else []
    opened = index_for(model, index)
    loaded = load_model(model).eval()
    rows = memorisation.extraction(opened, memorisation.greedy(loaded), each=each, seed=seed)
    loss = memorisation.losses_of(loaded, tokenizer_of(model))
    exposures = [memorisation.exposure(one, loss, seed=seed) for one in planted]
    if as_json:
        _print_json(
            {
                "extraction": [
                    {**dataclasses.asdict(row), "rate": row.extracted / row.tried if row.tried else None, "interval": row.interval}
                    for row in rows
                ],
                "canaries": [
                    {**dataclasses.asdict(one.canary), "exposure": one.bits, "most": one.most, "rank": one.rank} for one in exposures
                ],
            }
        )  # fmt: skip
    else:
        print(memorisation.as_text(rows, exposures))


def search(
    index: IndexArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="the words, or - to read them from input")],
    limit: Annotated[int, typer.Option(help="places to print", min=0)] = 10,
    as_json: AsJson = False,
) -> None:
    """Count how often a text stands in the training data, and show where."""
    from criadero.trust.removal import search as look
    from criadero.trust.search import open_index
    from criadero.trust.show import print_places

    text = _given(text)
    total, places = look(open_index(index), text, limit=limit)
    if as_json:
        _print_json({"text": text, "count": total, "places": [dataclasses.asdict(one) for one in places]})
    else:
        print_places(text, total, places)


def contamination(
    index: IndexArgument,
    file: Annotated[str, typer.Argument(metavar="FILE", help="a benchmark: rows as JSONL, CSV, Parquet, ...")],
    fields: Annotated[str, typer.Option(help="the fields with an item's text, with commas; default: all")] = "",
    score: Annotated[str, typer.Option(help="the field with the model's score on the item")] = "",
    as_json: AsJson = False,
) -> None:
    """Say how much of a benchmark stands in the training data, and the scores on the clean part of it."""
    from criadero.trust import contamination as checking
    from criadero.trust.search import open_index

    names = [name.strip() for name in fields.split(",") if name.strip()]
    items = checking.check(open_index(index), checking.read_items(file, names, score))
    if as_json:
        _print_json({**checking.summary(items), "items": [dataclasses.asdict(one) for one in items]})
    else:
        print(checking.as_text(items))


def repeats(
    index: IndexArgument,
    length: Annotated[int, typer.Option(help="the shortest sequence that counts, in tokens", min=8)] = 50,
    out: Annotated[Path | None, typer.Option(help="a file for the ranges: [start, end] a line")] = None,
    as_json: AsJson = False,
) -> None:
    """Count the text that stands in the training data more than once (data unique takes it out)."""
    from criadero.trust import repeats as repeating
    from criadero.trust.search import open_index

    opened = open_index(index)
    found = repeating.repeats(opened, length)
    if out:
        repeating.write_ranges(found, out)
    rows = repeating.by_source(opened, found)
    if as_json:
        _print_json(
            {"length": length, "tokens": opened.size, "repeated": found.tokens, "again": found.again, "sources": rows}
        )
        return
    print(f"{'source':<24} {'documents':>10} {'tokens':>14} {'stood before':>14}")
    for row in [
        *rows,
        {"source": "all", "documents": opened.documents, "tokens": opened.size, "repeated": found.tokens},
    ]:
        share = row["repeated"] / max(1, row["tokens"])
        print(f"{row['source']:<24} {row['documents']:>10,} {row['tokens']:>14,} {row['repeated']:>14,} {share:>7.2%}")


def removal(
    index: IndexArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="the text or document, or - to read it from input")],
    out: Annotated[Path | None, typer.Option(help="a file for what was found: one JSON object a line")] = None,
    min_tokens: Annotated[
        int, typer.Option(help="a document counts when it holds a run of so many tokens", min=1)
    ] = 20,
    reason: Annotated[str, typer.Option(help="why they have to go: with --by, the file of --out is a ledger")] = "",
    by: Annotated[str, typer.Option(help="who signs the removals off")] = "",
    as_json: AsJson = False,
) -> None:
    """Find every training document that holds a text or a long part of it: what a request for removal is about.

    With --reason and --by the file of --out is a ledger: a data recipe that says removals = FILE leaves these documents out.
    """
    from criadero.trust.removal import holders, write_holders
    from criadero.trust.search import open_index

    found = holders(open_index(index), _given(text), min_tokens=min_tokens)
    if (reason or by) and not out:
        raise UserError("--reason and --by sign the file of --out: give --out too")
    if out:
        write_holders(found, out, reason=reason, by=by)
    if as_json:
        _print_json([dataclasses.asdict(one) for one in found])
        return
    for one in found:
        print(
            f"{one.share:>6.1%}  longest run {one.longest:>5}  {one.source}  {one.document}  {one.sha256[:12]}  {one.licence}"
        )
    print(f"{len(found):,} documents hold it, or a run of {min_tokens} tokens of it")


def add(app: typer.Typer, data_app: typer.Typer) -> None:
    """Register the verbs."""
    app.command()(trace)
    app.command()(memorised)
    for verb in (search, contamination, repeats, removal):
        data_app.command()(verb)
