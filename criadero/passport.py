"""Passports: reading them with bounded time and memory, and comparing a folder with what its passport says.

What is read here may have been written to deceive: sizes and depths are bounded, keys stand once, numbers are whole, and
every id is computed again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from criadero.errors import UserError
from criadero.merkle import WIDTH, chunks_of, folder_root, sha256_file
from criadero.recipe import canonical_json, digest

FORMAT = "criadero/1"
PASSPORT, LINEAGE, CHUNKS, SIGNATURE = "passport.json", "lineage.jsonl", "passport.chunks", "passport.sig"
MARK = ".criadero-draft"  # in OUT.partial: says that it is ours, with which settings, and holds the lock
UNSEALED = (PASSPORT, SIGNATURE, "model.sig", MARK)  # not listed in a passport, and no surprise beside one
LARGEST = 16 << 20  # bytes of a passport, or of one line of lineage.jsonl; real ones have kilobytes
LARGEST_LINEAGE = 64 << 20
MOST_ANCESTORS = 10_000

# Exit codes of `criadero passport verify`, by what is wrong; of several the largest is given.
BAD_INPUT, BAD_FILES, BAD_PASSPORT, BAD_SIGNATURE = 2, 3, 4, 5


@dataclass(frozen=True)
class Problem:
    """One way in which a folder differs from its passport, or a passport from the truth.

    `detail` says more where `what` does not say it all; `code` is the exit code that it stands for.
    """

    path: str
    what: Literal["changed", "missing", "extra", "inconsistent", "not signed"]
    detail: str = field(default="", compare=False)
    code: int = field(default=BAD_FILES, compare=False)

    def __str__(self) -> str:
        return f"{self.path}: {self.what}" + (f" ({self.detail})" if self.detail else "")


# -- reading ----------------------------------------------------------------------------------------------------------


def parse_json(data: bytes) -> Any:
    """JSON of the kind that a passport holds: no key twice, no fractions (they are text). ValueError otherwise."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def whole(text: str) -> Any:
        raise ValueError(f"the number {text[:20]} is not whole")

    try:
        return json.loads(data, object_pairs_hook=once, parse_float=whole, parse_constant=whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_limited(file: Path, limit: int) -> bytes:
    """A regular file's bytes, at most `limit`. FileNotFoundError as usual; ValueError for what is no file or too large."""
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not make us wait
    with open(handle, "rb") as stream:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a regular file")
        if about.st_size > limit:
            raise ValueError(f"it has {about.st_size:,} bytes, more than the {limit:,} that are read")
        return stream.read(limit + 1)[:limit]


def read_passport(folder: Path) -> dict[str, Any] | None:
    """The passport of a folder, its shape checked; None when the folder has none. UserError when it cannot be read."""
    file = folder / PASSPORT
    try:
        return checked(parse_json(read_limited(file, LARGEST)), str(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a passport: {error}") from None


def checked(passport: Any, where: str) -> dict[str, Any]:
    """The same object when it has a passport's shape; UserError naming `where` when not, or when its format is newer."""
    if not isinstance(passport, dict):
        raise UserError(f"{where}: is not a passport ({FORMAT})")
    said = passport.get("passport")
    if isinstance(said, str) and said != FORMAT and said.startswith("criadero/"):
        raise UserError(f"{where}: its format is {said[:40]!r}, this version reads {FORMAT!r}: upgrade criadero")
    texts, lists = ("id", "kind", "name"), ("files", "inputs", "metrics")
    data, step = _table(passport, "data"), _table(passport, "step")
    sources = data.get("by_source") or []
    tables = ("licence", "step", "data", "model", "merkle")
    if not (
        all(isinstance(passport.get(key), str) for key in texts)
        and all(isinstance(passport.get(key), list) for key in lists)
        and all(isinstance(row, dict) for key in lists for row in passport[key])
        and all(isinstance(row.get(key), str) for row in passport["files"] for key in ("path", "sha256"))
        and all(isinstance(row.get("size"), int | None) for row in passport["files"])
        and all(isinstance(row.get("id"), str) for row in passport["inputs"])
        and all(isinstance(passport.get(key), dict | None) for key in tables)
        and all(
            isinstance(step.get(key), dict | None) for key in ("code", "env", "seeds", "hardware", "energy", "config")
        )
        and all(isinstance(row.get("value"), str | int) for row in passport["metrics"])
        and isinstance(sources, list)
        and all(isinstance(row, dict) and isinstance(row.get("removed"), dict | int | None) for row in sources)
    ):
        raise UserError(f"{where}: is not a passport ({FORMAT})")
    if said != FORMAT:
        raise UserError(f"{where}: its format is {said!r:.40}, this version reads {FORMAT!r}")
    return passport


def _table(passport: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = passport.get(key)
    return found if isinstance(found, dict) else {}


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The ancestors' passports in lineage.jsonl, nearest first. UserError when it cannot be read or a line is no passport."""
    file = folder / LINEAGE
    try:
        lines = read_limited(file, LARGEST_LINEAGE).splitlines()
        if len(lines) > MOST_ANCESTORS or any(len(line) > LARGEST for line in lines):
            raise ValueError(f"more than {MOST_ANCESTORS:,} ancestors, or one of more than {LARGEST:,} bytes")
        found = [parse_json(line) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    return [checked(one, f"{file}, line {number}") for number, one in enumerate(found, 1)]


def passport_id(passport: Mapping[str, Any]) -> str:
    """``sha256:`` of the canonical JSON of a passport without its ``id``."""
    return digest({key: value for key, value in passport.items() if key != "id"})


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """(posix path, path) of every file, sorted; not the top-level ``resume/``. Linked folders are entered once."""
    found: list[tuple[str, Path]] = []
    seen: set[str] = set()
    for root, dirs, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            dirs.clear()
            continue
        seen.add(real)
        here = Path(root)
        if here == folder and "resume" in dirs:
            dirs.remove("resume")
        found += [((here / name).relative_to(folder).as_posix(), here / name) for name in files]
    return iter(sorted(found))


# -- comparing --------------------------------------------------------------------------------------------------------


def compare(folder: Path) -> list[Problem]:
    """How a folder differs from its passport: every file is hashed, and the chain of ids looked at. See `artifact.verify`."""
    if not (folder / PASSPORT).is_file():
        return [Problem(PASSPORT, "missing", code=BAD_INPUT)]
    try:
        passport = read_passport(folder)
    except UserError as error:
        detail = str(error).removeprefix(f"{folder / PASSPORT}: ")
        return [Problem(PASSPORT, "changed", detail, BAD_INPUT)]
    assert passport is not None
    problems = own_problems(folder, passport)
    seen, there = set(), {name: file for name, file in walk(folder) if name not in UNSEALED}
    for row in passport["files"]:
        if row["path"] in seen:
            problems.append(Problem(PASSPORT, "inconsistent", f"{row['path']} is listed twice", BAD_PASSPORT))
            continue
        seen.add(row["path"])
        file = there.pop(row["path"], None)
        try:
            if file is None:
                problems.append(Problem(row["path"], "missing"))
            elif not stat.S_ISREG(file.stat().st_mode):
                problems.append(Problem(row["path"], "changed", "not a regular file"))
            elif file.stat().st_size != row.get("size") or sha256_file(file) != "sha256:" + row["sha256"]:
                problems.append(Problem(row["path"], "changed"))
        except OSError:  # a dangling link, or a file that may not be read
            problems.append(Problem(row["path"], "missing"))
    problems += [Problem(name, "extra") for name in there]
    if all(problem.path not in (LINEAGE, CHUNKS) for problem in problems):
        problems += chain_problems(folder, passport)
        if (flaw := tree_flaw(folder, passport)) is not None:
            problems.append(Problem(PASSPORT, "inconsistent", flaw, BAD_PASSPORT))
    return problems


def own_problems(folder: Path, passport: Mapping[str, Any]) -> list[Problem]:
    """Whether a passport has its own id and is written as passports are: canonical JSON and a newline."""
    try:
        honest = passport["id"] == passport_id(passport)
        written = read_limited(folder / PASSPORT, LARGEST) == canonical_json(passport) + b"\n"
    except (UserError, TypeError, ValueError, RecursionError):
        honest = written = False
    if not honest:
        return [Problem(PASSPORT, "changed", "its id is not its hash", BAD_PASSPORT)]
    return [] if written else [Problem(PASSPORT, "changed", "not written as canonical JSON", BAD_PASSPORT)]


def chain_problems(folder: Path, passport: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with lineage.jsonl: an ancestor that is missing, forged, of another format, or not one at all."""

    def flaw(detail: str) -> list[Problem]:
        return [Problem(LINEAGE, "changed", detail, BAD_PASSPORT)]

    try:
        known: dict[str, dict[str, Any]] = {}
        for number, one in enumerate(read_lineage(folder), 1):
            name = str(one.get("name"))[:60]
            try:
                honest = one["id"] == passport_id(one)
            except (TypeError, ValueError, RecursionError):
                honest = False
            if not honest:
                return flaw(f"ancestor {number}, {name}: its id is not its hash")
            known[one["id"]] = one
    except UserError as error:
        return flaw(str(error))
    reached, todo = {passport["id"]}, [passport]
    while todo:
        here = todo.pop()
        for row in here.get("inputs") or []:
            behind = known.get(row["id"])
            if behind is None and row.get("verified"):
                return flaw(f"{str(row.get('name'))[:60]}, of which {str(here.get('name'))[:60]} was made, is missing")
            if behind is not None and row["id"] not in reached:
                reached.add(row["id"])
                todo.append(behind)
    stray = [one for id, one in known.items() if id not in reached]
    return flaw(f"{str(stray[0].get('name'))[:60]} is no ancestor") if stray else []


def read_chunks(folder: Path, passport: Mapping[str, Any]) -> dict[str, bytes] | None:
    """The packed chunk hashes of each file, from ``passport.chunks``; None when the passport has no tree, or no such file.

    ValueError when their number is not that of the files' chunks.
    """
    merkle = passport.get("merkle")
    if not merkle or "leaves" not in merkle:
        return None
    chunk = merkle.get("chunk")
    rows = [row for row in passport["files"] if row["path"] != CHUNKS]
    if not isinstance(chunk, int) or chunk <= 0 or not all(isinstance(row.get("size"), int) for row in rows):
        raise ValueError("its chunk size or a file's size is no number")
    counts = [chunks_of(row["size"], chunk) * WIDTH for row in rows]
    packed = read_limited(folder / CHUNKS, sum(counts))
    if len(packed) != sum(counts):
        raise ValueError("there are not as many chunk hashes as chunks")
    found, at = {}, 0
    for row, count in zip(rows, counts, strict=True):
        found[row["path"]] = packed[at : at + count]
        at += count
    return found


def tree_flaw(folder: Path, passport: Mapping[str, Any]) -> str | None:
    """What is wrong with the tree's root against the chunk hashes beside the passport, in words; None when nothing is."""
    try:
        chunks = read_chunks(folder, passport)
        if chunks is None:
            return None
        sizes = {row["path"]: row["size"] for row in passport["files"]}
        root = folder_root((path, sizes[path], packed) for path, packed in chunks.items())
    except (OSError, ValueError) as error:
        return f"{CHUNKS}: {error}"
    return None if root == passport["merkle"].get("root") else f"{CHUNKS} does not give the root of its hash tree"


# -- roles ------------------------------------------------------------------------------------------------------------

_ROLES = {
    "config.json": "config",
    "generation_config.json": "config",
    "adapter_config.json": "config",
    "recipe.toml": "recipe",
    "README.md": "card",
    "metrics.jsonl": "metrics",
    "curves.svg": "metrics",
    "chat_template.jinja": "template",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
    "tokenizer.model": "tokenizer",
    "removed.jsonl.zst": "removed",
    "removals.jsonl": "removals",
    "documents.jsonl.zst": "sources",
    "documents.sha256": "sources",
    "sources.json": "sources",
    LINEAGE: "lineage",
    CHUNKS: "chunks",
}


def role_of(path: str) -> str:
    """What a file of an artifact is there for, by its name."""
    name = PurePosixPath(path).name
    if name in _ROLES:
        return _ROLES[name]
    if name.endswith((".safetensors", ".gguf", ".safetensors.index.json")):
        return "weights"
    if name.endswith((".jsonl.zst", ".jsonl", ".parquet")):
        return "documents"
    if name.endswith((".bin", ".npy")):
        return "tokens"
    if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
        return "licence"
    return "other"
