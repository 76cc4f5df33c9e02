"""Checking a passport: quickly by samples, wholly, or deeply; and its signature.

Whole: every file is hashed (`criadero.artifact.verify`). Quick: names and sizes of all files, the chain of ids, and some chunks
against the hash tree, with the chance of missing a change said. Deep: whole, and what the passport claims is computed again from the
files: the tree, the document table and its root, counts, metrics, parameters, the order of dates.
"""

from __future__ import annotations

import itertools
import math
import random
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from criadero import artifact
from criadero.artifact import RELATIONS, resolve
from criadero.errors import UserError
from criadero.merkle import WIDTH, chunk_leaf, folder_root, hash_file
from criadero.passport import (
    BAD_FILES,
    BAD_PASSPORT,
    CHUNKS,
    LINEAGE,
    PASSPORT,
    UNSEALED,
    Problem,
    chain_problems,
    compare,
    own_problems,
    parse_json,
    read_chunks,
    read_limited,
    read_lineage,
    read_passport,
    tree_flaw,
    walk,
)
from criadero.trust.sign import read_public, signature_of, signature_problems

SAMPLES = 64  # chunks that a quick check reads: 256 MiB
SKEW = timedelta(days=1)  # so far may the clocks of two machines, or one before and after it was set, lie apart


@dataclass
class Report:
    """What a check found: `problems` (none: all is well) and `notes` on what was and was not looked at."""

    folder: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The exit code: 0, or the largest among the problems (2 unreadable, 3 files, 4 passport or lineage, 5 signature)."""
        return max((problem.code for problem in self.problems), default=0)


def verify(
    ref: str | Path,
    *,
    quick: bool = False,
    deep: bool = False,
    pubkey: str | Path | None = None,
    samples: int = SAMPLES,
) -> Report:
    """Check a sealed folder. UserError when there is none, its passport cannot be read or is of a newer format, or the key is bad."""
    if quick and deep:
        raise UserError("--quick and --deep exclude each other: choose one")
    if samples < 1:
        raise UserError(f"--samples must be at least 1, not {samples}")
    folder = resolve(ref)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: an artifact is a folder with a {PASSPORT}")
    public = read_public(pubkey) if pubkey is not None else None
    passport = read_passport(folder)
    if passport is None:
        raise UserError(f"{folder} has no {PASSPORT}: nothing says what it should be")
    report = Report(folder)
    if quick:
        _quick(folder, passport, samples, report)
    else:
        report.problems += compare(folder)
    if deep and not report.problems:
        report.problems += deep_problems(folder, passport)
        report.notes.append("deep: tree, lineage, documents, counts, metrics and dates were computed again")
    if public is not None:
        found = signature_problems(folder, passport, public)
        report.problems += found
        if not found:
            report.notes.append(f"signed with the key {pubkey}")
    elif signature_of(folder) is not None:
        report.notes.append("a signature is there and was not checked: give the signer's key with --pubkey")
    return report


def require(ref: str | Path, *, pubkey: str | Path | None = None) -> Path:
    """The folder, once it (and with `pubkey` its signature, and an adapter's base) has been verified; UserError otherwise.

    A base need not be signed with the same key: the adapter's passport names it by its id, and loading holds it to that.
    """
    report = verify(ref, pubkey=pubkey)
    if report.problems:
        more = f" and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
        raise UserError(f"{report.folder} is not opened, a passport is required: {report.problems[0]}{more}")
    if (report.folder / "adapter_config.json").is_file():
        from criadero.checkpoints import adapter_base

        artifact.require(adapter_base(report.folder))
    return report.folder


# -- quick ------------------------------------------------------------------------------------------------------------


def missed(chunks: int, read: int, changed: int = 1) -> float:
    """The chance that `read` chunks, drawn from `chunks`, hold none of the `changed` ones (hypergeometric)."""
    unread = chunks - read
    if changed > unread:
        return 0.0
    return math.prod((unread - n) / (chunks - n) for n in range(changed))


def _quick(folder: Path, passport: Mapping[str, Any], samples: int, report: Report) -> None:
    merkle = passport.get("merkle")
    if not merkle or merkle.get("alg") != "sha256":
        report.notes.append(
            "quick: this passport has no hash tree (it was made by an older version): every file was hashed"
        )
        report.problems += compare(folder)
        return
    problems = own_problems(folder, passport)
    there = {name: file for name, file in walk(folder) if name not in UNSEALED}
    rows = {row["path"]: row for row in passport["files"]}
    for path, row in rows.items():
        try:
            about = there[path].stat()
            if not stat.S_ISREG(about.st_mode) or about.st_size != row.get("size"):
                problems.append(Problem(path, "changed"))
        except (KeyError, OSError):
            problems.append(Problem(path, "missing"))
    problems += [Problem(name, "extra") for name in there if name not in rows]
    problems += chain_problems(folder, passport)
    if (flaw := tree_flaw(folder, passport)) is not None:
        problems.append(Problem(CHUNKS, "changed", flaw, BAD_FILES))
    if not problems:
        problems += _sample(folder, passport, there, samples, report)
    report.problems += problems


def _sample(
    folder: Path, passport: Mapping[str, Any], there: Mapping[str, Path], samples: int, report: Report
) -> list[Problem]:
    """Read some chunks, drawn at random, and compare them with the tree's leaves (with the root, where all are read)."""
    chunk, known = passport["merkle"]["chunk"], read_chunks(folder, passport)
    if known is None:  # no file has more than one chunk: all are read
        hashed = [(row["path"], hash_file(there[row["path"]])) for row in passport["files"]]
        report.notes.append(f"quick: all {len(hashed):,} files were read, each is one chunk")
        problems = [
            Problem(path, "changed")
            for (path, one), row in zip(hashed, passport["files"], strict=True)
            if one.sha256 != row["sha256"]
        ]
        if not problems and folder_root((p, one.size, one.leaves) for p, one in hashed) != passport["merkle"]["root"]:
            problems = [Problem(PASSPORT, "inconsistent", "its files do not give the root of its tree", BAD_PASSPORT)]
        return problems
    places = [(path, n) for path, packed in known.items() for n in range(len(packed) // WIDTH)]
    drawn = sorted(random.SystemRandom().sample(places, min(samples, len(places))))
    problems = []
    for path, n in drawn:
        if chunk_leaf(there[path], n, chunk) != known[path][n * WIDTH : (n + 1) * WIDTH]:
            problems.append(Problem(path, "changed", f"chunk {n:,}"))
    one, ten = (missed(len(places), len(drawn), changed) for changed in (1, 10))
    report.notes.append(
        f"quick: {len(drawn):,} of {len(places):,} chunks of {chunk >> 20} MiB were read; one changed chunk is missed with "
        f"probability {one:.1%}, ten with {ten:.1%}"
    )
    return problems


# -- deep -------------------------------------------------------------------------------------------------------------


def deep_problems(folder: Path, passport: Mapping[str, Any]) -> list[Problem]:
    """What a passport claims that its own files, ancestors or dates contradict."""
    found = []
    for check in (_tree, _table, _removals, _counts, _metrics, _parameters, _ancestors):
        try:
            found += [Problem(where, "inconsistent", detail, BAD_PASSPORT) for where, detail in check(folder, passport)]
        except UserError as error:
            found.append(Problem(PASSPORT, "inconsistent", str(error), BAD_PASSPORT))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = f"{check.__name__.lstrip('_')} cannot be checked: {type(error).__name__}: {error}"
            found.append(Problem(PASSPORT, "inconsistent", detail[:200], BAD_PASSPORT))
    return found


Flaws = Iterator[tuple[str, str]]  # (file, what is wrong with it)


def _tree(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    merkle = passport.get("merkle")
    if not merkle:
        return
    rows = [row["path"] for row in passport["files"] if row["path"] != CHUNKS]
    hashed = [(path, hash_file(folder / path, merkle["chunk"])) for path in rows]
    if folder_root((path, one.size, one.leaves) for path, one in hashed) != merkle["root"]:
        yield PASSPORT, "its files do not give the root of its hash tree"


def _table(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """A dataset's rows against its shards, and the shards against the root of the documents."""
    from criadero.data.build import read_dataset
    from criadero.data.docset import NORMAL_FORM, ROWS, SET, DocumentSet, document_hash, read_table
    from criadero.merkle import set_root

    data = passport.get("data") or {}
    if "doc_root" not in data:
        return
    if data.get("normal_form") != NORMAL_FORM:
        yield (
            ROWS,
            f"its documents were hashed in the form {data.get('normal_form')!r}, which this version does not know",
        )
        return
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": []}
    for _, row in read_table(folder):
        rows[row["split"]].append(row)
    for split, listed in rows.items():
        documents = read_dataset(folder, split)
        number = 0
        for number, document in enumerate(documents, 1):
            row = listed[number - 1] if number <= len(listed) else {}
            facts = (document.id, document.source, document.licence, document_hash(document.text).hex())
            if facts != tuple(row.get(key) for key in ("id", "source", "licence", "sha256")):
                yield ROWS, f"its row {number:,} of {split} is not the document that stands there ({document.id[:40]})"
                return
        if number != len(listed):
            yield ROWS, f"it lists {len(listed):,} documents of {split}, there are {number:,}"
    members = {bytes.fromhex(row["sha256"]) for row in rows["train"]}
    if set_root(members) != data["doc_root"]:
        yield PASSPORT, "doc_root is not the root of its training documents"
    if DocumentSet(folder / SET).root != data["doc_root"]:
        yield SET, "its root is not the passport's doc_root"
    if (len(members), sum(map(len, rows.values()))) != (data.get("documents"), data.get("document_rows")):
        yield PASSPORT, "the number of documents is not that of the table"


def _removals(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """No document of the ledger may be among those of the table."""
    from criadero.data.docset import read_removals, read_table

    removals = (passport.get("data") or {}).get("removals")
    if not removals:
        return
    ledger = read_removals(folder / "removals.jsonl")
    if len(ledger) != removals["listed"]:
        yield "removals.jsonl", f"it lists {len(ledger):,} documents, the passport says {removals['listed']}"
    kept = next((row for _, row in read_table(folder) if bytes.fromhex(row["sha256"]) in ledger), None)
    if kept:
        yield "removals.jsonl", f"document {kept['sha256'][:12]} is listed as removed and is still in {kept['shard']}"


def _counts(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """A dataset's table by source must add up to its documents."""
    data = passport.get("data") or {}
    rows = data.get("by_source") or []
    if passport.get("kind") == "dataset" and "document_rows" in data:
        total = sum(row["documents_out"] for row in rows)
        if total != data["document_rows"]:
            yield PASSPORT, f"by_source adds up to {total:,} documents, the table has {data['document_rows']:,}"


def _metrics(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """Metrics must be numbers inside their intervals, and agree with the last line of metrics.jsonl."""
    for row in passport["metrics"]:
        name = str(row.get("metric") or row.get("name"))
        value = float(row["value"])
        if "ci" in row and not float(row["ci"][0]) <= value <= float(row["ci"][1]):
            yield PASSPORT, f"metric {name}: {value:g} lies outside its own interval"
        if "n" in row and (not isinstance(row["n"], int) or row["n"] < 0):
            yield PASSPORT, f"metric {name}: n is no count"
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return
    import json

    lines = [line for line in read_limited(file, 1 << 30).splitlines() if line.strip()]
    last, step = (json.loads(lines[-1]) if lines else {}), passport.get("step") or {}
    for ours, theirs in (("steps", "step"), ("tokens", "tokens")):
        if ours in step and theirs in last and step[ours] != last[theirs]:
            yield "metrics.jsonl", f"it ends at {theirs} {last[theirs]}, the passport says {step[ours]}"
    for row in passport["metrics"]:
        there = (last.get("held_out") or {}).get(row.get("slice"))
        if not isinstance(there, dict) or row.get("suite") != "held_out" or row.get("metric") not in there:
            continue
        if not math.isclose(there[row["metric"]], float(row["value"]), rel_tol=1e-4, abs_tol=1e-5):
            yield (
                PASSPORT,
                f"{row['metric']} of {row['slice']} is {row['value']:.8}, metrics.jsonl says {there[row['metric']]}",
            )


def _parameters(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """The parameters that the passport counts must be those in the weights (whole models in floating point)."""
    said = (passport.get("model") or {}).get("params")
    files = [row["path"] for row in passport["files"] if row["path"].endswith(".safetensors")]
    if passport.get("kind") not in ("base", "chat") or not isinstance(said, int) or not files:
        return
    total = 0
    for path in files:
        with open(folder / path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(min(length, 1 << 27)))
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        if not all(about["dtype"] in ("F32", "F16", "BF16", "F64") for about in tensors.values()):
            return
        total += sum(math.prod(about["shape"]) for about in tensors.values())
    if total != said:
        yield PASSPORT, f"it says {said:,} parameters, the weights have {total:,}"


def _ancestors(folder: Path, passport: Mapping[str, Any]) -> Flaws:
    """Relations that are known, dates in order, and nothing made of what came after it."""
    known = {one["id"]: one for one in read_lineage(folder)}
    for one in (passport, *known.values()):
        name = str(one.get("name"))[:60]
        step = one.get("step") or {}
        dates = [("started", step.get("started")), ("ended", step.get("ended")), ("created", one.get("created"))]
        moments = [(label, _date(text)) for label, text in dates if text is not None]
        for (earlier, a), (later, b) in itertools.pairwise(moments):
            if a > b + SKEW:
                yield (PASSPORT if one is passport else LINEAGE), f"{name}: {later} comes before {earlier}"
        for row in one.get("inputs") or []:
            if row.get("relation") not in RELATIONS:
                yield (
                    PASSPORT if one is passport else LINEAGE,
                    f"{name}: unknown relation {str(row.get('relation'))[:40]!r}",
                )
            behind = known.get(row["id"])
            if (
                behind
                and behind.get("created")
                and one.get("created")
                and _date(behind["created"]) > _date(one["created"]) + SKEW
            ):
                yield LINEAGE, f"{name} is older than {str(behind.get('name'))[:60]}, of which it was made"


def _date(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
