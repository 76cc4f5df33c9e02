"""Figures of the index of training data: building it, tracing answers in it, the guard, and infini-gram on the same tokens.

``python benchmarks/trust_trace.py --tokens 1e7 [--folder DIR] [--json] [--peer]``: the corpus is public text of ../shared/data
(at most half of it) and documents of Zipf-distributed tokens, in which 10,000 spans are planted. Answers are 450 tokens, of
copied and other passages in turns. Each measurement runs in a process of its own. ``--peer`` also builds infini-gram's index.

A folder that is given is kept, so a large corpus is built once (``--folder DIR --measures build,prepare,peer_build``) and asked
as often as wanted (``--folder DIR --measures trace,recall,guard,stream,peer``); the figures of earlier runs are told with it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("CRIADERO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
SPANS = 10_000
ANSWER = 450
ANSWERS = 100
SEED = 1


# -- the corpus -------------------------------------------------------------------------------------------------------


def texts(folder: str) -> Iterator[str]:
    """The texts of a folder of public data, file by file."""
    from criadero.data.documents import read_rows

    for file in sorted((SHARED / folder).glob("*.jsonl*")):
        for _, row in read_rows(file):
            yield row["text"] if "text" in row else "\n".join(one["content"] for one in row["messages"])


def make_corpus(folder: Path, tokens: int) -> None:
    """A tokens artifact of about `tokens`, and planted.npz: the spans (padded with -1) and how often each was planted."""
    from criadero.artifact import create, resolve
    from criadero.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve("cria"))
    random = np.random.default_rng(SEED)
    plain = min(tokenizer.special.values())  # below it are ordinary tokens
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    lengths = random.integers(16, 65, SPANS)
    spans = np.full((SPANS, 64), -1, np.int64)
    for n, length in enumerate(lengths.tolist()):
        spans[n, :length] = random.integers(0, plain, length)
    copies = random.choice([1, 1, 1, 2, 5], SPANS)
    share = 1 / (np.arange(plain) + 2.7)
    steps = np.cumsum(share / share.sum())
    names = random.permutation(plain).astype(np.uint16)
    borders: list[tuple[int, int, int]] = []
    at = 0
    with create(folder / "tokens", kind="tokens", config={"tokens": tokens}, overwrite=True) as draft:
        with (draft.path / "train.bin").open("wb") as file:

            def write(ids: np.ndarray, source: int) -> None:
                nonlocal at
                file.write(np.concatenate([[bos], ids, [eos]]).astype("<u2").tobytes())
                borders.append((at, at + len(ids) + 2, source))
                at += len(ids) + 2

            chunk: list[str] = []
            for text in texts("pretrain"):
                chunk.append(text)
                if len(chunk) == 256:
                    for some in tokenizer.encode_batch(chunk):
                        write(np.asarray(some), 0)
                    chunk = []
                if at > tokens // 2:
                    break
            order = random.permutation(np.repeat(np.arange(SPANS), copies))
            filler = max(0, tokens - at)
            documents = max(len(order) // 8 + 1, filler // 800)
            where = np.sort(random.integers(0, documents, len(order)))
            done = 0
            for n in range(documents):
                size = max(100, filler // documents)
                ids = names[np.minimum(np.searchsorted(steps, random.random(size)), plain - 1)].astype(np.int64)
                spot = 3
                while done < len(order) and where[done] == n:
                    span = spans[order[done]]
                    span = span[span >= 0]
                    ids = np.concatenate([ids[:spot], span, ids[spot:]])
                    spot += len(span) + 3
                    done += 1
                write(ids, 1)
        np.save(draft.path / "train.docs.npy", np.asarray(borders, np.uint64))
        tokenizer.save(draft.path)
        table = [{"name": name, "lang": "en", "kind": "text"} for name in ("public", "zipf")]
        about = {"dtype": "uint16", "vocab_size": tokenizer.vocab_size, "sources": table}
        (draft.path / "tokens.json").write_text(json.dumps(about))
        draft.data["by_source"] = [
            {"name": "public", "licence": "public domain"}, {"name": "zipf", "licence": "CC-BY-NC-4.0"}
        ]  # fmt: skip
    np.savez(folder / "planted.npz", spans=spans, copies=copies)


def answers(index: Any) -> list[str]:
    """Texts of about 450 tokens: passages of the corpus and of other texts in turns. Kept, so that measuring does not hold
    what they are made of."""
    kept = index.path.parent / "answers.json"
    if not kept.exists():
        kept.write_text(json.dumps(make_answers(index)))
    return json.loads(kept.read_text())


def make_answers(index: Any) -> list[str]:
    random = np.random.default_rng(SEED + 1)
    other = index.tokenizer.encode(" ".join(itertools.islice(texts("instruct/gsm8k_train"), 3000)))
    limit = int(np.searchsorted(index.rows, 1)) if (index.rows == 1).any() else index.documents  # public documents
    found: list[str] = []
    while len(found) < ANSWERS:
        ids: list[int] = []
        while len(ids) < ANSWER:
            n = int(random.integers(15, 60))
            if len(found) % 2 and random.random() < 0.5:
                place = index.document(int(random.integers(limit)))
                start = int(random.integers(place.start + 1, max(place.start + 2, place.end - n - 1)))
                ids += index.tokens[start : min(start + n, place.end - 1)].tolist()
            else:
                start = int(random.integers(len(other) - n))
                ids += other[start : start + n]
        found.append(index.tokenizer.decode(ids[:ANSWER]))
    return found


# -- what is measured -------------------------------------------------------------------------------------------------


def rss() -> float:
    """Megabytes of memory that the process holds, with what it has mapped."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def percentiles(seconds: list[float]) -> dict[str, float]:
    ms = np.array(seconds) * 1e3
    return {"p50": round(float(np.percentile(ms, 50)), 2), "p95": round(float(np.percentile(ms, 95)), 2)}


def build(folder: Path) -> dict[str, Any]:
    """Sort the tokens: seconds of write_index alone, and of the whole stage with hashing; peak memory."""
    from criadero.trust.index import IndexRecipe, build_index

    began = time.monotonic()
    made = build_index(IndexRecipe(str(folder / "tokens")), folder / "index", overwrite=True)
    seconds = time.monotonic() - began
    metrics = {row["name"]: float(row["value"]) for row in made.metrics}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {
        "tokens": int(metrics["tokens"]), "bytes_a_token": metrics["bytes a token"],
        "tokens_a_second": metrics["tokens a second"], "stage_seconds": round(seconds, 1), "peak_mb": round(peak),
    }  # fmt: skip


def trace(folder: Path) -> dict[str, Any]:
    """Latency of whole traces (encoding, search, documents, texts around) warm and cold, and memory."""
    from criadero.trust.search import open_index
    from criadero.trust.trace import trace as trace_text

    index = open_index(folder / "index")
    some = answers(index)
    began = rss()
    warm: list[float] = []
    peak = 0.0
    for turn in range(2):
        for text in some:
            start = time.perf_counter()
            found = trace_text(index, text)
            if turn:
                warm.append(time.perf_counter() - start)
            peak = max(peak, rss())
    cold = []
    for text in some[:40]:
        index.forget()
        start = time.perf_counter()
        found = trace_text(index, text)
        cold.append(time.perf_counter() - start)
    return {
        "warm_ms": percentiles(warm), "cold_ms": percentiles(cold), "rss_mb_before": round(began), "rss_mb": round(peak),
        "spans_of_last": len(found.spans), "shards": len(index.sizes),
    }  # fmt: skip


def recall(folder: Path) -> dict[str, Any]:
    """Planted spans found among other tokens, and counts against going through all tokens."""
    from criadero.trust.search import open_index
    from criadero.trust.trace import long_matches, maximal

    index = open_index(folder / "index")
    with np.load(folder / "planted.npz") as planted:
        spans, copies = planted["spans"], planted["copies"]
    random = np.random.default_rng(SEED + 2)
    plain = int(spans.max()) + 1
    found = equal = 0
    for n in range(0, SPANS, 500):
        ids: list[int] = []
        places = []
        for span in spans[n : n + 500]:
            ids += random.integers(0, plain, 12).tolist()
            places.append((len(ids), len(ids) + int((span >= 0).sum())))
            ids += span[span >= 0].tolist()
        runs = maximal(long_matches(index, ids, 8), np.arange(len(ids)), len(ids), 8)
        starts = np.array([start for start, _ in runs])
        for (start, end), count in zip(places, copies[n : n + 500].tolist(), strict=True):
            at = int(np.searchsorted(starts, start, "right")) - 1
            found += at >= 0 and runs[at][1] >= end
            equal += index.count(ids[start:end]) == count
    checked, agree = 0, 0
    for length in (1, 2, 3, 5, 8, 13):
        for at in random.integers(0, index.size - 20, 3).tolist():
            part = index.tokens[at : at + length].astype(np.int64)
            if np.isin(part, index.ends).any():
                continue
            checked += 1
            agree += index.count(part) == brute(index.tokens, part)
    return {
        "planted": SPANS,
        "recalled": found,
        "planted_counts_equal": equal,
        "counted_by_hand": checked,
        "equal": agree,
    }


def brute(tokens: np.ndarray, part: np.ndarray) -> int:
    """How often `part` stands in `tokens`, one comparison of everything a token."""
    total = 0
    for at in range(0, len(tokens), 1 << 24):
        piece = tokens[at : at + (1 << 24) + len(part) - 1]
        same = np.ones(max(0, len(piece) - len(part) + 1), bool)
        for k, token in enumerate(part.tolist()):
            same &= piece[k : k + len(same)] == token
        total += int(same.sum())
    return total


def guard(folder: Path) -> dict[str, Any]:
    """Microseconds a token of the guard, on texts that are not copied and on ones that are, and their share of the time that
    the bundled model takes for a token: the smallest there is, so the share is the largest."""
    from criadero.engine.llm import LLM
    from criadero.trust.guard import Guard
    from criadero.trust.search import open_index

    index = open_index(folder / "index")
    some = [index.encode(text) for text in answers(index)]
    rates = {}
    for name, mine in (("other", some[0::2]), ("half_copied", some[1::2])):
        for _ in range(2):  # the second time warm
            start, pushed = time.perf_counter(), 0
            for ids in mine:
                watch = Guard(index)
                for token in ids:
                    watch.push(token)
                pushed += len(ids)
            rates[name] = (time.perf_counter() - start) / pushed * 1e6
    llm = LLM("cria")
    speeds = []
    for n in range(4):  # the first one warms up
        start = time.perf_counter()
        done = llm.complete(some[0][:20], max_tokens=200, temperature=0.8, seed=n)
        speeds.append(done.usage.completion / (time.perf_counter() - start))
    speed = float(np.median(speeds[1:]))
    return {
        "us_a_token": {name: round(rate, 2) for name, rate in rates.items()}, "cria_tokens_a_second": round(speed),
        "percent_of_its_time": {name: round(rate * speed / 1e4, 2) for name, rate in rates.items()},
    }  # fmt: skip


def stream(folder: Path) -> dict[str, Any]:
    """Tokens a second of cria-chat while it answers, alone and with each token followed in the index by a guard, in turns; and
    with the trace of the whole answer behind it, as a chat page asks for it. Beside other work the difference of two runs says
    little: `percent_of_time` is the guard's own share of the seconds of its runs."""
    from criadero.engine.llm import LLM
    from criadero.engine.request import SamplingParams
    from criadero.trust.guard import Guard
    from criadero.trust.search import open_index
    from criadero.trust.trace import trace as trace_text

    index, llm = open_index(folder / "index"), LLM("cria-chat")
    questions = [" ".join(text.split()[:12]) for text in answers(index)[:12]]

    shares: list[float] = []

    def answer(n: int, way: str) -> tuple[int, float]:
        watch, watched, said, tokens = Guard(index), 0.0, "", 0
        start = time.perf_counter()
        params = SamplingParams(max_tokens=200, temperature=0.9, seed=n)
        llm.engine.add(llm.chat_request([{"role": "user", "content": questions[n]}], params)[0])
        while llm.engine.busy:
            for output in llm.engine.step():
                said += output.text
                tokens += len(output.ids)
                if way != "alone":
                    began = time.perf_counter()
                    for token in output.ids:
                        watch.push(token)
                    watched += time.perf_counter() - began
        if way == "guard_and_trace" and said.strip():
            trace_text(index, said)
        seconds = time.perf_counter() - start
        shares.extend([100 * watched / seconds] if way == "guard" else [])
        return tokens, seconds

    ways = ("alone", "guard", "guard_and_trace")
    rounds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(6):  # the first one warms up
        spent = dict.fromkeys(ways, (0, 0.0))
        for n in range(len(questions)):
            for k in range(len(ways)):
                way = ways[(turn + n + k) % len(ways)]
                tokens, seconds = answer(n, way)
                spent[way] = (spent[way][0] + tokens, spent[way][1] + seconds)
        for way, (tokens, seconds) in spent.items():
            rounds[way] += [tokens / seconds] if turn else []
    alone = np.array(rounds["alone"])
    return {
        "tokens_a_second": {way: round(float(np.median(rates))) for way, rates in rounds.items()},
        "percent_of_time": {"median": round(float(np.median(shares)), 2), "most": round(max(shares), 2)},
        "percent_lost": {
            way: {"median": round(float(np.median(lost)), 2), "least": round(float(lost.min()), 2), "most": round(float(lost.max()), 2)}
            for way in ways[1:] for lost in [100 * (1 - np.array(rounds[way]) / alone)]
        },
    }  # fmt: skip


ABSENT = {"skipped": "infini-gram is not installed (Linux only)"}


def peer_build(folder: Path) -> dict[str, Any]:
    """infini-gram's index of the same tokens, made with its own program."""
    try:
        import infini_gram
    except ImportError:
        return ABSENT
    from criadero.trust.search import open_index

    index = open_index(folder / "index")
    other = folder / "infini"
    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    offsets, at = [], 0
    with (other / "tokenized.0").open("wb") as file:  # its format: a separator, then the tokens of a document
        for start, end in zip(index.borders[:-1].tolist(), index.borders[1:].tolist(), strict=True):
            part = b"\xff\xff" + index.tokens[start:end].astype("<u2").tobytes()
            file.write(part)
            offsets.append(at)
            at += len(part)
    np.asarray(offsets, np.uint64).tofile(other / "offset.0")
    began = time.monotonic()
    build_peer(Path(infini_gram.__path__[0]) / "rust_indexing", other, at)
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in other.iterdir())
    return {"bytes_a_token": round(size / index.size, 3), "build_tokens_a_second": round(index.size / seconds)}


def peer(folder: Path) -> dict[str, Any]:
    """infini-gram beside ours on the same tokens: counts compared, its attribution beside our search."""
    try:
        from infini_gram.engine import InfiniGramEngine
    except ImportError:
        return ABSENT
    from criadero.trust.search import open_index
    from criadero.trust.trace import long_matches, maximal

    index, other = open_index(folder / "index"), folder / "infini"
    engine = InfiniGramEngine(str(other), eos_token_id=index.ends[1], vocab_size=65535, token_dtype="u16")
    random = np.random.default_rng(SEED + 3)
    checked = agree = 0
    parts = []
    for length in (1, 2, 3, 5, 8, 13, 30):
        for at in random.integers(0, index.size - 40, 60).tolist():
            part = index.tokens[at : at + length].tolist()
            if not set(part) & set(index.ends):
                parts.append(part)
    for part in parts:
        checked += 1
        agree += index.count(part) == engine.count(part)["count"]
    some = [index.encode(text) for text in answers(index)]
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    same = often = 0
    differ: list[dict[str, Any]] = []
    seldom = 10  # its own default leaves out spans that stand more often, in what it calls attribution; equal is asked of all
    for turn in range(2):
        for ids in some:
            start = time.perf_counter()
            runs = maximal(long_matches(index, ids, 8), np.arange(len(ids)), len(ids), 8)
            counts = [index.find(ids[a:b]) for a, b in runs]
            middle = time.perf_counter()
            found = engine.attribute(ids, delim_ids=[], min_len=8, max_cnt=1 << 40, enforce_bow=False)
            done = time.perf_counter()
            if turn:
                times["ours"].append(middle - start)
                times["theirs"].append(done - middle)
                theirs = [(one["l"], one["r"], one["count"]) for one in found["spans"]]
                ours = [(a, b, sum(hi - lo for _, lo, hi in where)) for (a, b), where in zip(runs, counts, strict=True)]
                same += theirs == ours
                differ += [] if theirs == ours else [{"ours": ours, "theirs": theirs}]
                often += any(count > seldom for *_, count in ours)
    count_times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for part in parts:
        start = time.perf_counter()
        index.count(part)
        middle = time.perf_counter()
        engine.count(part)
        count_times["ours"].append(middle - start)
        count_times["theirs"].append(time.perf_counter() - middle)
    return {
        "counts_compared": checked, "counts_equal": agree, "answers": len(some), "answers_with_equal_spans": same,
        "answers_that_differ": differ[:3], f"answers_with_spans_over_{seldom}_times": often,
        "spans_ms": {name: percentiles(some) for name, some in times.items()},
        "count_ms": {name: percentiles(some) for name, some in count_times.items()},
    }  # fmt: skip


PART_BYTES = 1 << 28  # infini-gram sorts in 8 bytes a byte of a part


def build_peer(program: Path, folder: Path, size: int, jobs: int = 2) -> None:
    """The three steps of infini_gram/indexing.py on tokenized.0, with `jobs` threads."""
    data, ratio = folder / "tokenized.0", int(np.ceil(np.log2(size) / 8))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        parts, merged = Path(work) / "parts", Path(work) / "merged"
        parts.mkdir()
        merged.mkdir()
        count = jobs * -(-size // (jobs * PART_BYTES))
        step = size // count + size // count % 2
        common = ["--data-file", str(data), "--ratio", str(ratio), "--token-width", "2"]

        def do(command: str, *more: str) -> None:
            subprocess.run([str(program), command, *common, *more], stdout=subprocess.DEVNULL, check=True)

        def make_part(n: int) -> None:
            ends = ["--start-byte", str(n * step), "--end-byte", str(min((n + 1) * step + 100_000, size))]
            do("make-part", "--parts-dir", str(parts), *ends)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(make_part, range(count)))
        threads = ["--num-threads", str(jobs)]
        do("merge", *threads, "--parts-dir", str(parts), "--merged-dir", str(merged), "--hacksize", "100000")
        shutil.rmtree(parts)
        do("concat", *threads, "--merged-dir", str(merged), "--merged-file", str(folder / "table.0"))


def prepare(folder: Path) -> dict[str, Any]:
    """Make the answers."""
    from criadero.trust.search import open_index

    return {"answers": len(answers(open_index(folder / "index")))}


MEASURES = {
    "prepare": prepare,
    "build": build,
    "trace": trace,
    "recall": recall,
    "guard": guard,
    "stream": stream,
    "peer_build": peer_build,
    "peer": peer,
}


def measure(folder: Path, names: list[str]) -> dict[str, Any]:
    """Each measurement in a process of its own, so that its memory is its own; with those that were made in the folder before."""
    kept = folder / "figures.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, "--folder", str(folder), "--only", name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[name] = {**json.loads(done.stdout.splitlines()[-1]), "measured": time.strftime("%Y-%m-%d %H:%M")}
        kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, default=1e6, help="size of the corpus")
    parser.add_argument("--folder", type=Path, help="where corpus and index are kept; default: a temporary folder")
    parser.add_argument("--peer", action="store_true", help="also build and ask infini-gram")
    parser.add_argument("--measures", default="build,prepare,trace,recall,guard,stream", help="which, with commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=MEASURES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(MEASURES[given.only](given.folder)))
        return
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trace-")))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokens" / "passport.json").exists():
            make_corpus(folder, int(given.tokens))
        names = [name for name in given.measures.split(",") if name] + ["peer_build", "peer"] * given.peer
        found = measure(folder, names)
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for name, values in found.items():
        print(f"{name}")
        for key, value in values.items():
            print(f"  {key:<34} {value}")


if __name__ == "__main__":
    main()
