"""``criadero data show``: the shape of a file of data, how much there is, and a few examples."""

from __future__ import annotations

import textwrap
from itertools import islice
from pathlib import Path

from criadero.data.chats import read_chats, shapes_of
from criadero.data.documents import find_files, read_rows
from criadero.errors import UserError

WIDTH = 100


def show(path: str | Path, *, limit: int = 3) -> str:
    """Text that says whether `path` (a file, a folder, or a dataset artifact) holds chats or documents, and shows `limit`.

    Bad lines are counted and the first five named. UserError when there is nothing to read.
    """
    path = Path(path)
    if (path / "passport.json").is_file():
        files = sorted(path.glob("train-*.jsonl.zst")) + sorted(path.glob("held_out-*.jsonl.zst"))
        if not files:
            raise UserError(f"{path} is an artifact without documents: see criadero show {path}")
    else:
        files = find_files(path)
    return "\n\n".join(_show_file(file, limit) for file in files)


def _show_file(file: Path, limit: int) -> str:
    bad: list[str] = []
    first = next(iter(read_rows(file, skip_bad=True, bad=bad)), None)
    if first is None:
        why = f"; the first complaint: {bad[0]}" if bad else ""
        raise UserError(f"{file}: nothing to read in it{why}")
    return _chats(file, limit) if shapes_of(first[1]) else _documents(file, limit)


def _chats(file: Path, limit: int) -> str:
    found = read_chats(file, skip_bad=True)
    counts = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in found.counts.items() if name != "bad")
    lines = [f"{file}: {counts}", found.shape.sentence, *_complaints(found.bad)]
    for place, chat in islice(zip(found.places, found.chats, strict=True), limit):
        lines += ["", place, *(line for turn in chat for line in _wrapped(f"{turn['role']}: {turn['content']}"))]
    return "\n".join(lines)


def _documents(file: Path, limit: int) -> str:
    bad: list[str] = []
    count = characters = 0
    samples: list[str] = []
    for where, row in read_rows(file, skip_bad=True, bad=bad):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            bad.append(f"{where}: no text in the field 'text' (fields: {', '.join(map(repr, list(row)[:8]))})")
            continue
        count, characters = count + 1, characters + len(text)
        if count <= limit:
            samples += ["", where, *_wrapped(text)]
    if not count:
        raise UserError(f"{file}: neither chats nor documents; the first complaint: {bad[0]}")
    noun = "document" if count == 1 else "documents"
    return "\n".join([f"{file}: {count:,} {noun}, {characters:,} characters", *_complaints(bad), *samples])


def _complaints(bad: list[str]) -> list[str]:
    if not bad:
        return []
    more = [f"  and {len(bad) - 5:,} more"] if len(bad) > 5 else []
    return [f"{len(bad):,} bad " + ("line:" if len(bad) == 1 else "lines:"), *("  " + line for line in bad[:5]), *more]


def _wrapped(text: str) -> list[str]:
    """The first 400 characters in lines, indented."""
    lines = (text if len(text) <= 400 else text[:400] + " [...]").splitlines()
    return [
        piece for line in lines for piece in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]
