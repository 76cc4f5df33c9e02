"""Figures of the passport: tampering found, false alarms, proofs of membership, speed beside plain sha256 and OpenSSF's tool.

    python benchmarks/trust.py [--json] [--parts tampering,quick,alarms,membership,speed,licences,trace] [--scale 1.0]
                               [--tokens 1e6] [--folder DIR] [--measures trace,recall,...]

Tampering: 10,000 mutations of a signed model folder (a bit flipped, a file cut, two files swapped, a file added, a metric or an ancestor
edited and every hash made right again, an old signature put on a newer folder), each verified whole with the signer's key.
Membership: 10,000 proofs, half of them of documents that are absent, over a million documents. ``licences`` and ``trace`` are
benchmarks of their own (trust_licences.py, trust_trace.py), which run here when they are there: the trace over `--tokens` (a million by
default), in an index that `--folder` may hold already, beside infini-gram where that is installed. ``--scale 0.01`` is what the tests run.

The last part of the output (``table`` in JSON) has a row for each figure to reach: what was aimed at, what was measured, met or missed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from criadero import artifact, merkle
from criadero.artifact import create
from criadero.data.docset import DocumentSet, document_hash, write_set
from criadero.machine import cpu
from criadero.passport import passport_id
from criadero.recipe import canonical_json
from criadero.trust import prove, sign
from criadero.trust.verify import missed, verify


def make(
    out: Path, draw: random.Random, *, kind: str = "base", loss: float = 1.5, size: int = 30_000, **inputs: Path
) -> Path:
    """A small artifact with weights, texts and a metric."""
    with create(out, kind=kind, config={"lr": 0.1}, licence="MIT", overwrite=True) as draft:
        for relation, ref in inputs.items():
            draft.add_input(relation, ref)
        for name in ("model-1.bin", "model-2.bin"):
            (draft.path / name).write_bytes(draw.randbytes(size))
        (draft.path / "config.json").write_text("{}")
        (draft.path / "README.md").write_text("A card.\n")
        draft.metrics.append({"suite": "held_out", "metric": "loss", "slice": "en", "value": loss, "n": 4})
    return out


# -- tampering --------------------------------------------------------------------------------------------------------


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a passport and give it the id and the bytes that belong to it, as whoever forges one would."""
    file = folder / "passport.json"
    one = json.loads(file.read_bytes())
    change(one)
    one["id"] = passport_id(one)
    file.write_bytes(canonical_json(one) + b"\n")


def flip(folder: Path, draw: random.Random) -> None:
    file = draw.choice([path for path in sorted(folder.iterdir()) if path.stat().st_size])
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(folder: Path, draw: random.Random) -> None:
    file = draw.choice([path for path in sorted(folder.iterdir()) if path.stat().st_size])
    os.truncate(file, draw.randrange(file.stat().st_size))


def swap(folder: Path, draw: random.Random) -> None:
    a, b = draw.sample(sorted(folder.iterdir()), 2)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def add_file(folder: Path, draw: random.Random) -> None:
    (folder / f"extra-{draw.randrange(10**9)}.{draw.choice(['py', 'bin', 'json'])}").write_bytes(
        draw.randbytes(draw.randrange(9))
    )


def edit_metric(folder: Path, draw: random.Random) -> None:
    reseal(folder, lambda p: p["metrics"][0].update(value=str(draw.random())))


def edit_ancestor(folder: Path, draw: random.Random) -> None:
    """Edit an ancestor in lineage.jsonl; half of the time also its id, and each hash that leads to it."""
    file = folder / "lineage.jsonl"
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    chosen = draw.choice(rows)
    old = chosen["id"]
    chosen["licence"] = {"declared": f"licence {draw.randrange(10**9)}"}
    if draw.random() < 0.5:
        chosen["id"] = passport_id(chosen)
    file.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))

    def hashes(p: dict[str, Any]) -> None:
        row = next(row for row in p["files"] if row["path"] == "lineage.jsonl")
        row |= {"size": file.stat().st_size, "sha256": merkle.sha256_file(file)[7:]}
        for one in p["inputs"]:
            one["id"] = chosen["id"] if one["id"] == old else one["id"]

    reseal(folder, hashes)


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flip": flip, "truncate": truncate, "swap": swap, "add file": add_file, "edit metric": edit_metric,
    "edit ancestor": edit_ancestor,
}  # fmt: skip


def tampering(root: Path, scale: float) -> dict[str, Any]:
    """How many of the mutations are found, by kind, and the exit codes they give."""
    draw = random.Random(1)
    (root / "keys").mkdir()
    private, public = sign.keygen(root / "keys" / "k")
    data = make(root / "data", draw, kind="dataset")
    base = make(root / "base", draw, trained_on=data)
    old = make(root / "old", draw, kind="chat", finetune_of=base)
    stale = sign.sign(old, private).read_bytes()
    folder = make(root / "chat", draw, kind="chat", loss=1.4, finetune_of=base)
    sign.sign(folder, private)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def replay(folder: Path, draw: random.Random) -> None:
        """The signature of an earlier version on this one, which has another metric and is sealed rightly."""
        reseal(folder, lambda p: p["metrics"][0].update(value=str(draw.random())))
        (folder / "passport.sig").write_bytes(stale)

    kinds = {**MUTATIONS, "replay old signature": replay}
    found: Counter[str] = Counter()
    made: Counter[str] = Counter()
    codes: dict[str, Counter[int]] = {name: Counter() for name in kinds}
    for n in range(round(10_000 * scale)):
        name = list(kinds)[n % len(kinds)]
        kinds[name](folder, draw)
        if {path.name: path.read_bytes() for path in folder.iterdir()} == whole:
            continue  # two equal files swapped: nothing has changed
        made[name] += 1
        try:
            code = verify(folder, pubkey=public).code
        except artifact.UserError:
            code = 2
        found[name] += code != 0
        codes[name][code] += 1
        for path in folder.iterdir():
            if path.name not in whole:
                path.unlink()
        for file, data_ in whole.items():
            (folder / file).write_bytes(data_)
    assert verify(folder, pubkey=public, deep=True).code == 0
    return {
        "mutations": sum(made.values()),
        "found": sum(found.values()),
        "by_kind": {name: {"made": made[name], "found": found[name], "codes": dict(codes[name])} for name in kinds},
    }


def quick(root: Path, scale: float) -> dict[str, Any]:
    """The rate at which a quick check finds one changed chunk, beside what it says of itself (chunks of 1 KiB here)."""
    size, chunk = 200, 1 << 10
    saved = artifact.CHUNK, artifact.hash_file
    artifact.CHUNK, artifact.hash_file = chunk, functools.partial(merkle.hash_file, chunk=chunk)
    try:
        folder = make(root / "quick", random.Random(2), size=size * chunk // 2)
    finally:
        artifact.CHUNK, artifact.hash_file = saved
    file = folder / "model-2.bin"
    data = bytearray(file.read_bytes())
    data[33 * chunk + 5] ^= 1
    file.write_bytes(data)
    chunks = (folder / "passport.chunks").stat().st_size // 32
    rows = []
    for samples in (20, 64, 128):
        tries = round(1000 * scale) or 1
        hits = sum(verify(folder, quick=True, samples=samples).code != 0 for _ in range(tries))
        rows.append(
            {
                "chunks": chunks,
                "read": samples,
                "tries": tries,
                "found": hits / tries,
                "theory": 1 - missed(chunks, samples),
            }
        )
    return {"rows": rows}


def alarms(root: Path, scale: float) -> dict[str, Any]:
    """Checks of whole folders that raise an alarm: none should."""
    draw = random.Random(3)
    tries, raised = round(1000 * scale), 0
    for n in range(tries):
        folder = make(root / "alarm", draw, size=draw.randrange(0, 60_000))
        raised += verify(folder, quick=n % 3 == 1, deep=n % 3 == 2).code != 0
    return {"tries": tries, "alarms": raised}


# -- membership -------------------------------------------------------------------------------------------------------


def membership(root: Path, scale: float) -> dict[str, Any]:
    """Proofs over a million documents: right or wrong, bytes, and milliseconds to make and to check one."""
    count, queries = round(1_000_000 * scale), round(10_000 * scale)
    began = time.perf_counter()
    hashes = {document_hash(f"This is document number {n}.") for n in range(count)}
    hashed = time.perf_counter() - began
    began = time.perf_counter()
    target = write_set(root / "set", sorted(hashes))
    built = time.perf_counter() - began
    members = DocumentSet(root / "set")
    draw = random.Random(4)
    right, sizes, making, checking = 0, [], [], []
    for n in range(queries):
        inside = n % 2 == 0
        text = f"This is document number {draw.randrange(count) if inside else count + n}."
        began = time.perf_counter()
        proof = prove.prove(members, text)
        making.append(time.perf_counter() - began)
        sizes.append(len(prove.dumps(proof)))
        began = time.perf_counter()
        right += prove.check(proof, target).included == inside
        checking.append(time.perf_counter() - began)
    return {
        "documents": count, "queries": queries, "right": right, "largest_proof_bytes": max(sizes),
        "prove_ms": _ms(making), "check_ms": _ms(checking), "hash_seconds": round(hashed, 2), "tree_seconds": round(built, 2),
        "file_bytes": (root / "set").stat().st_size,
    }  # fmt: skip


def _ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50": round(1e3 * statistics.median(ordered), 3),
        "p99": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 3),
        "max": round(1e3 * ordered[-1], 3),
    }


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(root: Path, scale: float) -> dict[str, Any]:
    """Bytes a second of sealing's and verifying's hashing beside sha256 alone, on one file in the page cache."""
    size = max(1 << 20, round((1 << 30) * scale))
    with create(root / "big", kind="base", config={}) as draft, (draft.path / "model.bin").open("wb") as file:
        block = random.Random(5).randbytes(min(size, 1 << 24))
        for _ in range(size // len(block)):
            file.write(block)
    path = root / "big" / "model.bin"

    def plain() -> None:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")

    (root / "speed keys").mkdir()
    private, public = sign.keygen(root / "speed keys" / "k")
    ways: dict[str, Callable[[], object]] = {
        "sha256 alone": plain, "sealing: sha256 and chunks in one pass": lambda: merkle.hash_file(path),
        "verify": lambda: verify(root / "big"), "verify --quick": lambda: verify(root / "big", quick=True),
    }  # fmt: skip
    try:
        import model_signing

        signature = root / "theirs.sig"
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=private)
        check = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
        ways["model_signing sign (OpenSSF)"] = lambda: config.sign(root / "big", signature)
        ways["model_signing verify (OpenSSF)"] = lambda: check.verify(root / "big", signature)
        ways["passport sign, with verify before"] = lambda: sign.sign(root / "big", private)
    except ImportError:
        pass
    best: dict[str, float] = {}
    for _ in range(3):  # in turns, so that a slow moment hits all alike
        for name, way in ways.items():
            (root / "big" / "passport.sig").unlink(missing_ok=True)
            began = time.perf_counter()
            way()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - began)
    base = best["sha256 alone"]
    rows = {
        name: {
            "seconds": round(seconds, 3),
            "gb_per_second": round(size / seconds / 1e9, 3),
            "share": round(base / seconds, 3),
        }
        for name, seconds in best.items()
    }
    return {
        "bytes": size,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "rows": rows,
    }


# -- all of it --------------------------------------------------------------------------------------------------------


def licences(root: Path, scale: float) -> dict[str, Any]:
    """What trust_licences.py measures, when it is there."""
    try:
        found: dict[str, Any] = importlib.import_module("trust_licences").measure()
    except ImportError as error:
        return {"skipped": str(error)}
    return found


TRACE = {"tokens": "1e6", "folder": "", "measures": "build,prepare,trace,recall,guard,stream,peer_build,peer"}


def trace(root: Path, scale: float) -> dict[str, Any]:
    """What trust_trace.py measures, when it is there, as `TRACE` says."""
    script = Path(__file__).with_name("trust_trace.py")
    if not script.exists():
        return {"skipped": f"no {script.name}"}
    command = [sys.executable, str(script), "--json", "--tokens", TRACE["tokens"], "--measures", TRACE["measures"]]
    done = subprocess.run(
        [*command, "--folder", TRACE["folder"] or str(root / "trace")], capture_output=True, text=True
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- the table --------------------------------------------------------------------------------------------------------

# what, (part, key, ...), how the value stands to the target, target, unit
FIGURES: list[tuple[str, tuple[str, ...], str, float, str]] = [
    ("trace of a 450-token answer, warm, p50", ("trace", "trace", "warm_ms", "p50"), "<=", 50, "ms"),
    ("trace of a 450-token answer, warm, p95", ("trace", "trace", "warm_ms", "p95"), "<=", 250, "ms"),
    ("trace of a 450-token answer, cold, p95", ("trace", "trace", "cold_ms", "p95"), "<=", 1000, "ms"),
    ("memory while tracing, mapped pages counted", ("trace", "trace", "rss_mb"), "<=", 300, "MB"),
    ("index on disk", ("trace", "build", "bytes_a_token"), "<=", 6.2, "bytes a token"),
    ("building the index", ("trace", "build", "tokens_a_second"), ">=", 1e6, "tokens/s"),
    ("building the index, peak memory", ("trace", "build", "peak_mb"), "<=", 2000, "MB"),
    ("planted spans found", ("trace", "recall", "recalled"), "of", 0, "trace recall planted"),
    ("planted spans counted rightly", ("trace", "recall", "planted_counts_equal"), "of", 0, "trace recall planted"),
    ("counts equal to brute force", ("trace", "recall", "equal"), "of", 0, "trace recall counted_by_hand"),
    ("counts equal to infini-gram's", ("trace", "peer", "counts_equal"), "of", 0, "trace peer counts_compared"),
    ("answers with the spans of infini-gram", ("trace", "peer", "answers_with_equal_spans"), "of", 0, "trace peer answers"),
    ("our size over infini-gram's", ("trace", "size_ratio"), "<=", 1, "times"),
    ("our time for spans over infini-gram's, p50", ("trace", "span_ratio"), "<=", 1, "times"),
    ("our time for a count over infini-gram's, p50", ("trace", "count_ratio"), "<=", 1, "times"),
    ("trace while streaming, tokens/s lost", ("trace", "stream", "percent_lost", "guard", "median"), "<=", 3, "%"),
    ("trace while streaming, its share of the time", ("trace", "stream", "percent_of_time", "median"), "<=", 3, "%"),
    ("mutations found", ("tampering", "found"), "of", 0, "tampering mutations"),
    ("false alarms", ("alarms", "alarms"), "<=", 0, "of 1,000"),
    ("membership proofs that are right", ("membership", "right"), "of", 0, "membership queries"),
    ("largest membership proof", ("membership", "largest_proof_bytes"), "<=", 2000, "bytes"),
    ("making a membership proof, longest", ("membership", "prove_ms", "max"), "<=", 5, "ms"),
    ("checking a membership proof, longest", ("membership", "check_ms", "max"), "<=", 5, "ms"),
    ("sealing's hashing over sha256's speed", ("speed", "rows", "sealing: sha256 and chunks in one pass", "share"), ">=", 0.8, "times"),
    ("verifying over sha256's speed", ("speed", "rows", "verify", "share"), ">=", 0.8, "times"),
    ("licence findings of labelled lineages, recall", ("licences", "labelled", "recall"), ">=", 1, ""),
    ("licence findings of labelled lineages, precision", ("licences", "labelled", "precision"), ">=", 0.95, ""),
    ("licence findings of their mutants, recall", ("licences", "mutants", "recall"), ">=", 1, ""),
    ("licence findings of their mutants, precision", ("licences", "mutants", "precision"), ">=", 0.95, ""),
]  # fmt: skip


def at(values: Any, keys: Iterable[str]) -> Any:
    """values[key][key]..., None where one is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Ours over infini-gram's, where both were measured: below 1 is ahead."""
    pairs = {
        "size_ratio": (at(found, ("build", "bytes_a_token")), at(found, ("peer_build", "bytes_a_token"))),
        "span_ratio": tuple(at(found, ("peer", "spans_ms", who, "p50")) for who in ("ours", "theirs")),
        "count_ratio": tuple(at(found, ("peer", "count_ms", who, "p50")) for who in ("ours", "theirs")),
    }
    return {name: round(ours / theirs, 3) for name, (ours, theirs) in pairs.items() if ours and theirs}


def table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure to reach: what, target, value, and whether it was met (None: not measured in this run)."""
    rows = []
    for what, keys, way, target, unit in FIGURES:
        value = at(result, keys)
        if way == "of":
            many = at(result, unit.split())
            target, met, said = many, None if value is None else value == many, f"all of {many:,}" if many else "all"
        else:
            met = None if value is None else value <= target if way == "<=" else value >= target
            said = f"{way} {target:,.10g} {unit}".strip()
        rows.append({"what": what, "target": said, "value": value, "met": met})
    return rows


PARTS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "tampering": tampering, "quick": quick, "alarms": alarms, "membership": membership, "speed": speed, "licences": licences,
    "trace": trace,
}  # fmt: skip


def measure(parts: list[str], scale: float = 1.0) -> dict[str, Any]:
    """The figures of each part."""
    result: dict[str, Any] = {"cpu": cpu(), "scale": scale}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"{part} ...", file=sys.stderr, flush=True)
            began = time.perf_counter()
            result[part] = PARTS[part](Path(folder), scale)
            result[part]["took_seconds"] = round(time.perf_counter() - began, 1)
    if "trace" in result:
        result["trace"] |= ratios(result["trace"])
    result["table"] = table(result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="fewer mutations, documents and bytes")
    parser.add_argument("--tokens", default=TRACE["tokens"], help="size of the index of the trace")
    parser.add_argument("--folder", default="", help="where it is kept, or lies already; default: a temporary folder")
    parser.add_argument("--measures", default=TRACE["measures"], help="of trust_trace.py, with commas")
    given = parser.parse_args()
    TRACE.update(tokens=given.tokens, folder=given.folder, measures=given.measures)
    parts = [part for part in given.parts.split(",") if part]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    result = measure(parts, given.scale)
    if given.json:
        print(json.dumps(result, indent=2))
        return
    if one := result.get("tampering"):
        print(f"tampering: {one['found']:,} of {one['mutations']:,} found")
        for name, row in one["by_kind"].items():
            print(f"  {name:<22} {row['found']:>6,} of {row['made']:>6,}   exit codes {row['codes']}")
    for row in result.get("quick", {}).get("rows", []):
        print(
            f"quick: {row['read']} of {row['chunks']} chunks read: one changed chunk found {row['found']:.1%} (theory {row['theory']:.1%})"
        )
    if one := result.get("alarms"):
        print(f"false alarms: {one['alarms']} of {one['tries']:,}")
    if one := result.get("membership"):
        print(f"membership: {one['right']:,} of {one['queries']:,} right over {one['documents']:,} documents; largest proof "
              f"{one['largest_proof_bytes']:,} bytes; prove {one['prove_ms']} ms, check {one['check_ms']} ms")  # fmt: skip
    for name, row in result.get("speed", {}).get("rows", {}).items():
        print(
            f"speed: {name:<40} {row['seconds']:>7.3f} s  {row['gb_per_second']:>7.3f} GB/s  {row['share']:>6.2f} of sha256"
        )
    for part in ("licences", "trace"):
        if part in result:
            print(f"{part}: {json.dumps(result[part])[:400]}")
    print(f"\n{'':<50} {'target':<26} {'measured':>12}")
    for row in result["table"]:
        value = "-" if row["value"] is None else f"{row['value']:,.10g}"
        said = {True: "met", False: "MISSED", None: "not measured"}[row["met"]]
        print(f"{row['what']:<50} {row['target']:<26} {value:>12}  {said}")


if __name__ == "__main__":
    main()
