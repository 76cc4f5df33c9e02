"""``criadero data show``: the shape of a file of data, how much there is, and a few examples."""

from __future__ import annotations

import textwrap
from itertools import chain, islice
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
    chats: list[Path] = []
    documents: list[Path] = []
    bad: list[str] = []
    for file in files:
        complaints: list[str] = []
        first = next(iter(read_rows(file, skip_bad=True, bad=complaints)), None)
        if first is not None:
            (chats if shapes_of(first[1]) else documents).append(file)
        else:
            bad.append(complaints[0] if complaints else f"{file}: empty")
    if not chats and not documents:
        raise UserError(f"{path}: nothing to read in it; the first complaint: {bad[0]}")
    parts = [_chats(file, limit) for file in chats]
    if documents:
        parts.append(_documents(path, documents, limit, bad))
    elif bad:
        parts.append("\n".join(_complaints(bad)))
    return "\n\n".join(parts)


def _chats(file: Path, limit: int) -> str:
    found = read_chats(file, skip_bad=True)
    names = {"chats": "chat", "turns": "turn", "assistant_turns": "assistant turn"}
    counts = [_count(found.counts[key], noun) for key, noun in names.items()]
    lines = [
        f"{file}: {', '.join(counts)}, {found.counts['with_system']:,} with system",
        found.shape.sentence,
        *_complaints(found.bad),
    ]
    for place, chat in islice(zip(found.places, found.chats, strict=True), limit):
        lines += ["", place, *(line for turn in chat for line in _wrapped(f"{turn['role']}: {turn['content']}"))]
    return "\n".join(lines)


def _documents(path: Path, files: list[Path], limit: int, bad: list[str]) -> str:
    """All files of documents together: a folder of notes is one thing, however many files it has.

    Rows of a dataset that are chats are counted apart.
    """
    count = characters = chats = 0
    samples: list[str] = []
    for where, row in chain.from_iterable(read_rows(file, skip_bad=True, bad=bad) for file in files):
        text = row.get("text")
        if shapes_of(row):
            chats += 1
        elif not isinstance(text, str) or not text.strip():
            bad.append(f"{where}: no text in the field 'text' (fields: {', '.join(map(repr, list(row)[:8]))})")
        else:
            count, characters = count + 1, characters + len(text)
            if count <= limit:
                samples += ["", where, *_wrapped(text)]
    if not count:
        raise UserError(f"{path}: neither chats nor documents; the first complaint: {bad[0]}")
    name = f"{files[0]}" if len(files) == 1 else f"{path}, {len(files):,} files"
    parts = [_count(count, "document"), _count(characters, "character"), *([_count(chats, "chat")] if chats else [])]
    return "\n".join([f"{name}: {', '.join(parts)}", *_complaints(bad), *samples])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _complaints(bad: list[str]) -> list[str]:
    if not bad:
        return []
    more = [f"  and {len(bad) - 5:,} more"] if len(bad) > 5 else []
    return [f"{_count(len(bad), 'bad line')}:", *("  " + line for line in bad[:5]), *more]


def _wrapped(text: str) -> list[str]:
    """The first 400 characters in lines, indented."""
    lines = (text if len(text) <= 400 else text[:400] + " [...]").splitlines()
    return [
        piece for line in lines for piece in textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    ]
