"""Stage ``index``: tokens -> a suffix array over the training split, by which text is found in the data in an instant.

Data is cut at ends of documents into shards, each sorted by libdivsufsort (Yuta Mori; package ``pydivsufsort``). It sorts
bytes, so tokens are laid out with the high byte first and the suffixes that begin within a token are left out afterwards.

Files: ``tokens.bin`` (big-endian, 2 bytes a token below 65 536 entries, else 4), ``suffixes.bin`` (positions in the shard, in
order, in as many bits as they need), ``keys.bin`` (uint64: the first 8 bytes of every 128th suffix), ``grams.bin`` (which runs of
five tokens a shard may hold: :mod:`criadero.trust.grams`), ``documents.bin`` (uint64: where each begins, and the end), ``rows.bin``
(uint16: its row of index.json's ``rows``: source, language, licence), ``names.bin`` (ids, dates and hashes of documents, compressed
by 256), ``unigrams.bin`` (uint64), ``index.json``, and the tokenizer's files.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from criadero import places
from criadero.artifact import Artifact, create, open_artifact
from criadero.errors import UserError
from criadero.trust.grams import BLOCK, GRAM, PROBES, blocks_for, filter_of, interleave
from criadero.trust.search import FORMAT, NAMES, PADDING, STEP

SHARD_BYTES = 1 << 27  # of tokens: sorting takes 5 bytes of memory a byte, and two shards are sorted at once: 1.4 GB
PIECE = 1 << 22


@dataclass(frozen=True)
class IndexRecipe:
    """Which tokens to index."""

    tokens: str = field(metadata={"help": "a tokens artifact (criadero data pack)"})
    data: str = field(
        default="", metadata={"help": "its dataset, for ids and licences of documents; empty: where it was when packed"}
    )


def build_index(recipe: IndexRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Build an ``index`` artifact of the training split; a minute for 60 million tokens and two cores, nothing to resume.

    UserError: tokens that are none, a document that does not end with eos, another dataset, no ``pydivsufsort``.
    """
    sorter()
    tokens = open_artifact(recipe.tokens)
    if tokens.kind != "tokens":
        raise UserError(f"{tokens.path} is a {tokens.kind}, not tokens: make them with criadero data pack")
    about = json.loads((tokens.path / "tokens.json").read_text(encoding="utf-8"))
    dataset = dataset_of(tokens, recipe.data)
    with create(out, kind="index", recipe=recipe, overwrite=overwrite) as draft:
        draft.add_input("converted_from", recipe.tokens)
        if recipe.data:
            draft.add_input("contains", recipe.data)
        documents = np.load(tokens.path / "train.docs.npy", allow_pickle=False)
        ids = np.memmap(tokens.path / "train.bin", np.dtype(about["dtype"]).newbyteorder("<"), "r")
        boundaries = boundary_tokens(tokens.path)
        if dataset is None:
            said = recipe.data or "the dataset"
            print(
                f"note: {said} is not at hand: documents have numbers, and the licence of their source", file=sys.stderr
            )
        rows = write_documents(draft.path, documents, about["sources"], tokens.sources(), dataset)
        began = time.monotonic()
        built = write_index(draft.path, ids, documents[:, :2], about["vocab_size"], boundaries)
        seconds = time.monotonic() - began
        built |= rows
        (draft.path / "index.json").write_text(json.dumps(built, ensure_ascii=False) + "\n", encoding="utf-8")
        copy_tokenizer(tokens.path, draft.path)
        draft.data["by_source"] = tokens.sources()
        size = sum(file.stat().st_size for file in draft.path.glob("*.bin"))
        draft.metrics += [
            {"name": "tokens", "value": len(ids)},
            {"name": "bytes a token", "value": round(size / max(1, len(ids)), 3)},
            {"name": "tokens a second", "value": round(len(ids) / max(1e-9, seconds))},
        ]
    return open_artifact(out)


def dataset_of(tokens: Artifact, given: str) -> Path | None:
    """The folder of the dataset that tokens were made of: the one given, or where it was then; None when it is not there."""
    for one in tokens.inputs:
        if one.get("relation") != "converted_from":
            continue
        if given:
            data = open_artifact(given)
            if data.id != one["id"]:
                raise UserError(
                    f"{data.path} is not the dataset that {tokens.path} was packed from ({one.get('name')})"
                )
            return data.path
        # a recipe's path is relative to where it was run; a pipeline's folders stand side by side
        where = places.find(str(one.get("locator")))
        for place in (where, tokens.path.parent / where.name):
            try:
                found = open_artifact(place)
                if found.id == one["id"] and found.kind == "dataset":
                    return found.path
            except UserError:
                continue
    return None


def boundary_tokens(folder: Path) -> tuple[int, int]:
    """(bos, eos) of the tokenizer in a tokens artifact."""
    from criadero.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UserError(f"{folder}: its tokenizer has no bos or eos, so documents cannot be told apart; pack it again")
    return tokenizer.bos_id, tokenizer.eos_id


def copy_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


# -- documents --------------------------------------------------------------------------------------------------------


def write_documents(
    folder: Path, documents: np.ndarray, sources: list[dict[str, Any]], by_source: list[dict[str, Any]], dataset: Path | None
) -> dict[str, Any]:  # fmt: skip
    """Write rows.bin and names.bin; ``rows`` and ``names`` of index.json. A row is a source with one licence and language."""
    import zstandard

    known = {row["name"]: row for row in by_source}
    rows: dict[tuple[int, str], int] = {}  # (source number, licence) -> row
    numbers = np.zeros(len(documents), "<u2")
    offsets = [0]
    packer = zstandard.ZstdCompressor(level=9)
    names: list[tuple[str, str, str]] = []
    with (folder / "names.bin").open("wb") as file:
        for n, (name, licence, date, sha256) in enumerate(described(documents, sources, known, dataset)):
            key = (int(documents[n, 2]), licence)
            numbers[n] = rows.setdefault(key, len(rows))
            if len(rows) > 65535:
                raise UserError(f"{dataset}: more than 65,535 licences: give rows of one source the same words")
            names.append((name, date, sha256))
            if len(names) == NAMES or n == len(documents) - 1:
                file.write(packer.compress(json.dumps(names, ensure_ascii=False).encode()))
                offsets.append(file.tell())
                names = []
    numbers.tofile(folder / "rows.bin")
    table = [
        {
            "name": sources[number]["name"], "lang": sources[number]["lang"], "kind": sources[number]["kind"], "licence": licence,
            **{key: known.get(sources[number]["name"], {}).get(key) or "" for key in ("url", "attribution")},
        }
        for number, licence in rows
    ]  # fmt: skip
    return {"rows": table, "names": offsets}


def described(
    documents: np.ndarray, sources: list[dict[str, Any]], known: dict[str, dict[str, Any]], dataset: Path | None
) -> Iterator[tuple[str, str, str, str]]:
    """(id, licence, date, sha256) of each document in order: of the dataset's rows, which stand in the order of the tokens."""
    if dataset is None:
        for number in documents[:, 2].tolist():
            yield "", str(known.get(sources[number]["name"], {}).get("licence") or "unknown"), "", ""
        return
    from criadero.data.docset import ROWS, read_table
    from criadero.data.documents import read_rows

    n = -1
    files = sorted(dataset.glob("train-*.jsonl.zst"))
    listed = read_table(dataset) if (dataset / ROWS).is_file() else iter(())
    hashes = (str(row["sha256"]) for _, row in listed if row["split"] == "train")
    for n, (where, row) in enumerate(one for file in files for one in read_rows(file)):
        if n >= len(documents) or row.get("source") != sources[int(documents[n, 2])]["name"]:
            raise UserError(f"{where}: the tokens were not packed from this dataset: pack it again")
        licence, date = str(row.get("licence") or "unknown"), str(row.get("date") or "")
        yield str(row.get("id") or ""), licence, date, next(hashes, "")
    if n + 1 != len(documents):
        raise UserError(f"{dataset}: it has {n + 1} documents, the tokens {len(documents)}: pack it again")


# -- the suffix array -------------------------------------------------------------------------------------------------


def sorter() -> Any:
    """libdivsufsort, loaded. UserError when the package is not installed."""
    try:
        from pydivsufsort.dll import libdivsufsort
    except ImportError:
        raise UserError(
            "building an index needs the package pydivsufsort: pip install pydivsufsort, or 'criadero[trace]' (reading one does not)"
        ) from None
    return libdivsufsort


def cut(documents: np.ndarray, most: int) -> list[tuple[int, int]]:
    """(start, size) of shards of at most `most` tokens, about the same size each, that end where documents end."""
    ends = documents[:, 1].astype(np.int64)
    shards, start = [], 0
    while start < (total := int(ends[-1]) if len(ends) else 0):
        fair = start + -(-(total - start) // -(-(total - start) // most))
        fit = int(np.searchsorted(ends, fair))
        if int(ends[fit]) > start + most:
            fit -= 1
        end = int(ends[fit]) if fit >= 0 else start
        if end <= start:
            n = int(np.searchsorted(ends, start, "right"))
            raise UserError(
                f"document {n} has {int(ends[n]) - start:,} tokens, and a shard of the index holds {most:,}: split it"
            )
        shards.append((start, end - start))
        start = end
    return shards


def write_index(
    folder: Path, ids: np.ndarray, documents: np.ndarray, vocab_size: int, boundaries: tuple[int, int],
    *, shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:  # fmt: skip
    """Sort `ids`, in which `documents` (uint64 [n, 2]: start, end) stand end to end, and write the files of :class:`Index`.

    Returns the head of index.json. Two shards are sorted at once, each in about 5 times `shard_bytes` of memory.
    """
    width = 2 if vocab_size <= 65536 else 4
    check_documents(ids, documents, boundaries[1])
    shards = cut(documents, shard_bytes // width)
    unigrams = np.zeros(vocab_size, "<u8")
    with (folder / "tokens.bin").open("wb") as file:
        for at in range(0, len(ids), PIECE):
            piece = np.asarray(ids[at : at + PIECE])
            if int(piece.max()) >= vocab_size:
                raise UserError(
                    f"token {int(piece.max())} is beyond the vocabulary of {vocab_size}: pack the data again"
                )
            unigrams += np.bincount(piece, minlength=vocab_size).astype(np.uint64)
            piece.astype(f">u{width}").tofile(file)
            forget(ids)
        file.write(bytes(PADDING))
    unigrams.tofile(folder / "unigrams.bin")
    np.append(documents[:, 0], [len(ids)]).astype("<u8").tofile(folder / "documents.bin")
    longest = max(size for _, size in shards)
    bits = max(2, (longest - 1).bit_length() + (longest - 1).bit_length() % 2)  # even: four entries fill whole bytes
    with (folder / "suffixes.bin").open("wb") as suffixes, (folder / "keys.bin").open("wb") as keys:
        order_at = np.cumsum([0] + [-(-size // 4) * (bits // 2) for _, size in shards]).tolist()
        suffixes.truncate(order_at[-1] + PADDING)
        keys.truncate(sum(-(-size // STEP) for _, size in shards) * 8)
    key_at = np.concatenate([[0], np.cumsum([-(-size // STEP) for _, size in shards])]).astype(np.int64)

    blocks = blocks_for(longest)
    parts = folder / "grams.parts"
    parts.touch()

    def one(number: int) -> None:
        start, size = shards[number]
        gram_shard(folder, parts, start, size, number, blocks, width)
        sort_shard(folder, start, size, int(key_at[number]), order_at[number], width, bits)
        print(f"index: shard {number + 1} of {len(shards)}, {size:,} tokens", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(2) as pool:  # the sorting itself holds no lock of Python's
        list(pool.map(one, range(len(shards))))
    interleave(parts, folder / "grams.bin", blocks, len(shards))
    parts.unlink()
    return {
        "format": FORMAT, "width": width, "bits": bits, "vocab_size": vocab_size, "boundaries": sorted(set(boundaries)), "shards": shards,
        "documents": len(documents), "grams": {"tokens": GRAM, "probes": PROBES, "blocks": blocks},
    }  # fmt: skip


def check_documents(ids: np.ndarray, documents: np.ndarray, eos: int) -> None:
    """Documents stand end to end and each ends with `eos`: what keeps matches within a document. UserError otherwise."""
    if not len(documents) or not len(ids):
        raise UserError("there are no tokens to index")
    starts, ends = documents[:, 0].astype(np.int64), documents[:, 1].astype(np.int64)
    if starts[0] != 0 or ends[-1] != len(ids) or (starts[1:] != ends[:-1]).any() or (ends <= starts).any():
        raise UserError("the table of documents does not fit the tokens: pack the data again")
    for at in range(0, len(ends), 1 << 16):
        bad = np.flatnonzero(np.asarray(ids[ends[at : at + (1 << 16)] - 1]) != eos)
        if bad.size:
            raise UserError(f"document {at + int(bad[0])} does not end with eos: pack the data again")
        forget(ids)


def forget(ids: np.ndarray) -> None:
    """Let go of what has been read of a mapped file: the memory it takes stays bounded. Without a mapping nothing is done."""
    mapped = getattr(ids, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def gram_shard(folder: Path, parts: Path, start: int, size: int, number: int, blocks: int, width: int) -> None:
    """Write one shard's filter, at its place among the others'."""
    tokens = np.fromfile(folder / "tokens.bin", f">u{width}", size, offset=start * width)
    made = filter_of(tokens, blocks)
    with parts.open("r+b") as file:
        file.seek(number * blocks * BLOCK)
        made.tofile(file)


def sort_shard(folder: Path, start: int, size: int, key_at: int, order_at: int, width: int, bits: int) -> None:
    """Write one shard's part of suffixes.bin and keys.bin."""
    count = size * width
    text = np.zeros(count + 8, np.uint8)  # 8 more, so that 8 bytes can be read from the last token
    with (folder / "tokens.bin").open("rb") as file:
        file.seek(start * width)
        file.readinto(text[:count].data)
    order = np.empty(count, np.int32)
    status = sorter().divsufsort(
        text.ctypes.data_as(ctypes.c_void_p), order.ctypes.data_as(ctypes.c_void_p), ctypes.c_int32(count)
    )
    if status:
        raise MemoryError(f"divsufsort returned {status}")
    eights = np.ndarray((size,), ">u8", text.data, strides=(width,))
    keys = np.empty(-(-size // STEP), "<u8")
    done = 0
    with (folder / "suffixes.bin").open("r+b") as file:
        file.seek(order_at)
        rest = np.empty(0, "<u4")
        for at in range(0, count, PIECE):
            piece = order[at : at + PIECE]
            whole = (piece[(piece & (width - 1)) == 0] // width).astype("<u4")  # those that begin with a token
            rest = np.concatenate([rest, whole])
            fours = len(rest) // 4 * 4
            packed(rest[:fours], bits).tofile(file)
            rest = rest[fours:]
            sampled = whole[-done % STEP :: STEP]
            first = -(-done // STEP)
            keys[first : first + len(sampled)] = eights[sampled]
            done += len(whole)
        packed(np.pad(rest, (0, -len(rest) % 4)), bits).tofile(file)
    with (folder / "keys.bin").open("r+b") as file:
        file.seek(key_at * 8)
        keys.tofile(file)


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers below 2**bits (their count a multiple of 4, `bits` even) one behind the other, the low bits first: uint8."""
    four = values.reshape(-1, 4).astype(np.uint64)  # four take bits / 2 bytes, at most 16
    halves = np.zeros((len(four), 2), "<u8")
    for k in range(4):
        shift = k * bits
        if shift < 64:
            halves[:, 0] |= four[:, k] << np.uint64(shift)  # what goes over the top falls away
            if shift + bits > 64:
                halves[:, 1] |= four[:, k] >> np.uint64(64 - shift)
        else:
            halves[:, 1] |= four[:, k] << np.uint64(shift - 64)
    return np.ascontiguousarray(halves.view(np.uint8)[:, : bits // 2])
