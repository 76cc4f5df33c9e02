"""What `criadero show` prints: an artifact's passport in a few lines, or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, open_artifact, read_passport, resolve, short_id
from criadero.errors import UserError


def as_dict(ref: str | Path | Artifact) -> dict[str, Any]:
    """``path``, ``kind``, ``id``, ``name``, ``inputs``, ``files``, ``metrics`` and the rest of the passport.

    A folder or file without passport has kind ``imported``, id None, and the files that lie there.
    """
    path = resolve(ref)
    passport = read_passport(path) if path.is_dir() else None
    if passport is None:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        rows = [{"path": f.relative_to(path if path.is_dir() else path.parent).as_posix(), "size": f.stat().st_size}
                for f in files]  # fmt: skip
        passport = {"kind": "imported", "id": None, "name": path.name, "inputs": [], "files": rows, "metrics": []}
    first = ("kind", "id", "name", "inputs", "files", "metrics")
    return {"path": str(path), **{key: passport[key] for key in first}, **passport}


def describe(ref: str | Path | Artifact, *, context: int | None = None, speed: bool = False) -> str:
    """What it is, what it was made of, by which code, how good it measured, and what computing with it takes: plain text.

    The memory is that at ``context`` tokens (default: the model's whole context); ``speed`` measures for a second how many
    tokens a second this machine's memory allows.
    """
    try:
        return _describe(ref, context, speed)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a passport that was written to deceive
        raise UserError(
            f"{resolve(ref)}: its passport says something that cannot be shown ({type(error).__name__}: {error}): see "
            "criadero passport verify --deep"
        ) from error


def _describe(ref: str | Path | Artifact, context: int | None, speed: bool) -> str:
    facts = as_dict(ref)
    size = _size(sum(row.get("size") or 0 for row in facts["files"]))
    if facts["id"] is None:
        text = f"{facts['name']} · imported · no passport: nothing says what it was made of"
        path = f"path      {facts['path']} ({_count(len(facts['files']), 'file')}, {size})"
        return "\n".join([text, path, *_needs(facts["path"], context, speed)])
    artifact = open_artifact(ref)
    lines = [f"{artifact.name} · {artifact.kind} · {short_id(artifact.id)} · sealed {str(facts.get('created'))[:10]}"]

    def add(label: str, text: str) -> None:
        if text:
            lines.append(f"{label:<9} {text}")

    add("path", f"{facts['path']} ({_count(len(artifact.files), 'file')}, {size})")
    model, data, step = (facts.get(key) or {} for key in ("model", "data", "step"))
    about = [f"{_number(model['params'])} parameters" if "params" in model else ""]
    about += [
        f"{label} {_number(model[key])}"
        for key, label in (("context", "context"), ("vocab", "vocabulary"))
        if key in model
    ]
    add("model", ", ".join(part for part in about if part))
    add(
        "data",
        ", ".join(
            f"{_number(data[key])} {key}" for key in ("documents", "chats", "tokens") if _is_count(data.get(key))
        ),
    )
    add("trained", f"on {_number(step['tokens'])} tokens" if _is_count(step.get("tokens")) else "")
    add("code", code_line(step))
    lines += _needs(facts["path"], context, speed)
    add("licence", str((facts.get("licence") or {}).get("declared") or "not declared"))
    add("owed", _owed(ref))
    rows = artifact.sources()
    if rows:
        lines += ["made of", *_table(_source_rows(rows), right=(2, 3, 4))]
    if artifact.kind in ("base", "chat", "adapter", "model", "quantised"):
        from criadero.trust.export import facts_of
        from criadero.trust.openness import lines as grade

        for line in grade(facts_of(artifact)):
            add("openness", line)
    if artifact.metrics:
        lines += ["measured", *_table(_metric_rows(artifact.metrics), right=(2, 3))]
    lines += ["lineage", *("  " + line for line in artifact.lineage().splitlines())]
    return "\n".join(lines)


def report_of(ref: str | Path | Artifact) -> Path:
    """Where the page lies that compares a tuned model with its base; UserError where there is none."""
    path = resolve(ref)
    page = path / "report.html"
    if not page.is_file():
        raise UserError(f"{path}: there is no report.html in it: `criadero tune` puts one into what it makes")
    return page.resolve()


def needs_of(ref: str | Path | Artifact, *, context: int | None = None, speed: bool = False) -> dict[str, Any] | None:
    """What computing with a model takes on this machine (`criadero.engine.fit.needs`); None for what is no model."""
    from criadero.engine.fit import needs

    return needs(resolve(ref), context=context, speed=speed)


def _needs(path: str, context: int | None, speed: bool) -> list[str]:
    """`needs_of` in words."""
    from criadero.engine.fit import said

    found = needs_of(path, context=context, speed=speed)
    if found is None:
        return []
    free = "" if found["free_bytes"] is None else f"; {said(found['free_bytes'])} is free"
    if found["free_bytes"] is not None and found["total_bytes"] > found["free_bytes"]:
        free += ": it does not fit"
    tokens = _count(found["context"], "token")
    lines = [
        f"memory    {said(found['total_bytes'])} with {tokens} of context: {said(found['weights_bytes'])} of weights, "
        f"{said(found['token_bytes'])} a token, {said(found['overhead_bytes'])} beside{free}"
    ]
    if speed:
        lines.append(
            f"speed     at most {found['tokens_per_second']:,.0f} tokens/s, one answer at a time: {said(found['read_bytes'])} are read "
            f"for each, at {said(found['bandwidth'])}/s measured here"
        )
    return lines


def licence_of(ref: str | Path | Artifact) -> dict[str, Any] | None:
    """What the licences along the lineage ask, by today's rules (`criadero.trust.licences.computed`); None without a passport."""
    from criadero.trust.licences import check, computed

    path = resolve(ref)
    return computed(check(ref)) if path.is_dir() and read_passport(path) is not None else None


def _owed(ref: str | Path | Artifact) -> str:
    """The verdict on the licences in a line; the report is another command's."""
    from criadero.trust.licences import check

    try:
        report = check(ref)
    except UserError as error:  # a lineage with a loop is no reason to show nothing
        return f"not known: {error}"
    counts = {kind: sum(one.severity == kind for one in report.findings) for kind in ("conflict", "unknown", "duty")}
    nouns = {"conflict": "conflict", "unknown": "unknown licence", "duty": "duty"}
    some = [_count(n, nouns[kind]).replace("dutys", "duties") for kind, n in counts.items() if n]
    return (
        f"{', '.join(some) or 'nothing'} (criadero licence check {ref if not isinstance(ref, Artifact) else ref.path})"
    )


def code_line(step: dict[str, Any]) -> str:
    """Which code made it, whether all of that was committed, and the seeds, from a passport's ``step``."""
    code = step.get("code") or {}
    commit = f" ({str(code['git'])[:12]}{', with changes' if code.get('dirty') else ''})" if code.get("git") else ""
    seeds = ", ".join(f"{name} {value}" for name, value in (step.get("seeds") or {}).items())
    return str(code.get("package", "unknown")) + commit + (f", {seeds}" if seeds else "")


def _source_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    table = [["source", "licence", "documents", "tokens", "removed"]]
    for row in rows:
        removed = row.get("removed")
        if isinstance(removed, dict):
            removed = sum(value for value in removed.values() if isinstance(value, int))
        cells = [row.get("name") or row.get("source"), row.get("licence")]
        documents = row.get("documents_out", row.get("documents"))
        table.append([*(str(cell or "?") for cell in cells), *map(_number, (documents, row.get("tokens"), removed))])
    return table


def _metric_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    table = [["metric", "on", "value", "n"]]
    for row in rows:
        value = _number(row.get("value", "?"))
        value = f"{float(value):.4g}" if "." in value and value.replace(".", "", 1).lstrip("-").isdigit() else value
        where = " ".join(str(row[key]) for key in ("suite", "slice") if row.get(key))
        table.append([str(row.get("metric") or row.get("name") or "?"), where, value, _number(row.get("n"))])
    return table


def _table(rows: list[list[str]], right: Sequence[int]) -> list[str]:
    """Aligned columns, those without any value left out."""
    keep = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
    widths = {n: max(len(row[n]) for row in rows) for n in keep}
    lines = []
    for row in rows:
        cells = [row[n].rjust(widths[n]) if n in right else row[n].ljust(widths[n]) for n in keep]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:,}" if _is_count(value) else "" if value is None else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
