"""Read an index of training tokens: where a sequence of tokens stands, how often, and how far a text can be followed.

An index is a suffix array (Manber and Myers 1993): for every token of the data, where the sequence that begins there stands
in the order of all of them. A sequence that occurs is an interval of that order, found by bisection. Files are mapped,
not read: what a query does not touch costs nothing.

Tokens are stored with the high byte first, so that comparing bytes compares token numbers. Every document ends with
an end token, and what is looked for never holds one: no match goes across two documents, nor across two shards.

An index of format 1 may have ``grams.bin`` (index.json: ``grams``), a filter that says which shards need not be looked at
(:mod:`criadero.trust.grams`); without it the same is found, more slowly.
"""

from __future__ import annotations

import functools
import itertools
import json
import mmap
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from criadero.artifact import Artifact, open_artifact
from criadero.errors import UserError
from criadero.trust.grams import BLOCK, GRAM, PROBES, bits_of, block_of, hashes, in_runs, shards_with

FORMAT = "criadero-index/1"
STEP = 128  # every so many suffixes, the first 8 bytes of one stand in keys.bin: a sixteenth of a byte a token
NAMES = 256  # documents in one compressed block of names.bin
PADDING = 16  # bytes behind the last token, so that 8 of them can be read anywhere
BATCH = 1 << 15  # bisections at once: bounds the memory of a query of any length
HELD = 96 << 20  # bytes of the files that may stay in the process's memory
LOOKS = 1024  # values read between two looks at that: each may bring 64 kB of the system's cache into the process
COLD = 10e-6  # seconds a value beyond which it came from the disk
AWAKE = 64  # looks after a slow one for which pages are asked for ahead
PAGE = mmap.PAGESIZE
WHOLE = 1 << 25  # a documents.bin of this size is read whole when the disk is slow

Positions = np.ndarray  # int64 [n], tokens counted from the start of the index


class Interval(NamedTuple):
    """Suffixes `lo` to `hi` (excluded) of a shard's order: the places where a sequence stands."""

    shard: int
    lo: int
    hi: int


@dataclass(frozen=True)
class Place:
    """A document of the index. `name` is its id in the dataset, or its number where the dataset was not at hand."""

    number: int
    name: str
    source: str
    lang: str
    licence: str
    start: int  # tokens from the start of the index, its bos first
    end: int  # behind its eos
    date: str = ""
    url: str = ""
    attribution: str = ""
    sha256: str = ""  # of its normal form (criadero.data.docset), where the dataset was at hand


class Index:
    """An opened index; see :func:`open_index`. All of it is read-only, and threads may share it."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.path = folder
        self.about = about
        self.width: int = about["width"]  # bytes a token
        self.per = 8 // self.width  # tokens in 8 bytes
        self.ends: tuple[int, ...] = tuple(about["boundaries"])  # tokens that never lie within a match
        self.starts = np.array([row[0] for row in about["shards"]], np.int64)
        self.sizes = np.array([row[1] for row in about["shards"]], np.int64)
        self.size = int(self.sizes.sum())  # tokens
        self.documents: int = about["documents"]
        counts = [-(-int(size) // STEP) for size in self.sizes]
        self.key_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        w, n = self.width, self.size
        self.bits: int = about["bits"]  # of an entry of the suffix array
        self._mask = (1 << self.bits) - 1
        groups = -(-self.sizes // 4) * (self.bits // 2)  # bytes a shard: four entries take bits / 2 of them
        self._order_at = np.cumsum(groups) - groups
        shards = len(self.sizes)
        # 0: an index of before there were filters
        self._blocks: int = int(about["grams"]["blocks"]) if "grams" in about else 0
        if self._blocks and (about["grams"]["tokens"], about["grams"]["probes"]) != (GRAM, PROBES):
            raise UserError(f"{folder}: its grams.bin is of a newer version: update criadero, or build it again")
        self._maps = {
            name: _mapped(folder / name, size)
            for name, size in {
                "tokens.bin": n * w + PADDING, "suffixes.bin": int(groups.sum()) + PADDING, "keys.bin": int(self.key_starts[-1]) * 8,
                "documents.bin": (self.documents + 1) * 8, "rows.bin": self.documents * 2,
                **({"grams.bin": self._blocks * shards * BLOCK} if self._blocks else {}),
            }.items()
        }  # fmt: skip
        self._text, self._order = self._maps["tokens.bin"], self._maps["suffixes.bin"]
        self._before = _mapped_bytes()
        self._looks = 0
        # the looks for which pages are asked for together, ahead of the look: some after one that came from the disk
        self._cold = AWAKE
        # [n]: the 8 bytes from each token on, as one big-endian number that orders as the tokens do
        self.eights = np.ndarray((n,), ">u8", self._text, strides=(w,))
        self.tokens = np.frombuffer(self._text, f">u{w}", n)
        # the 8 bytes from each byte of the suffix array on: an entry begins within a byte
        self._entries = np.ndarray((int(groups.sum()) + 8,), "<u8", self._order, strides=(1,))
        self.keys = np.frombuffer(self._maps["keys.bin"], "<u8", int(self.key_starts[-1]))
        # the same for looking up one sequence, without numpy's time for a call
        self._keys = self.keys.astype(np.uint64, copy=False).data
        self._key_ends, self._sizes = self.key_starts.tolist(), self.sizes.tolist()
        self._grams = np.frombuffer(self._maps["grams.bin"], np.uint8) if self._blocks else np.empty(0, np.uint8)
        self.borders = np.frombuffer(self._maps["documents.bin"], "<u8", self.documents + 1)
        self.rows = np.frombuffer(self._maps["rows.bin"], "<u2", self.documents)
        self.unigrams = np.fromfile(folder / "unigrams.bin", "<u8")
        if len(self.unigrams) != about["vocab_size"] or int(self.unigrams.sum()) != n:
            raise UserError(f"{folder}: unigrams.bin is damaged: build the index again (criadero data index)")

    @functools.cached_property
    def tokenizer(self) -> Any:
        from criadero.tokenizer import load_tokenizer

        return load_tokenizer(self.path)

    @functools.cached_property
    def log_probs(self) -> np.ndarray:
        """float64 [vocab]: natural logarithm of each token's share of the data; one that never occurs counts as half of one."""
        return np.log(np.maximum(self.unigrams.astype(np.float64), 0.5) / max(1, self.size))

    # -- one sequence -------------------------------------------------------------------------------------------------

    def pack(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Token ids as the index stores them. UserError for an id that the vocabulary does not have."""
        array = np.asarray(ids, np.int64)
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < self.about["vocab_size"]):
            raise UserError(
                f"token {int(array.max())} is not one of the {self.about['vocab_size']} that {self.path} knows: "
                "encode the text with the index's own tokenizer"
            )
        return array.astype(f">u{self.width}").tobytes()

    def find(self, ids: Sequence[int] | np.ndarray) -> list[Interval]:
        """Where a sequence of one token or more stands; O(log n) a shard. Nothing for one that holds an end token."""
        pattern = self.pack(ids)
        if not pattern:
            raise UserError("there is nothing to look for: the text has no tokens")
        if len(pattern) > self.size * self.width or any(int(one) in self.ends for one in ids):
            return []
        first = pattern[:8]
        low = int.from_bytes(first.ljust(8, b"\0"), "big")
        high = int.from_bytes(first.ljust(8, b"\xff"), "big")
        found = []
        for shard in self._shards_of(ids):
            start, end, size = self._key_ends[shard], self._key_ends[shard + 1], self._sizes[shard]
            lo = max(bisect_left(self._keys, low, start, end) - start - 1, 0) * STEP
            hi = min((bisect_right(self._keys, high, start, end) - start) * STEP, size)
            if lo < hi:
                left = self._bisect(shard, pattern, lo, hi, False)
                right = self._bisect(shard, pattern, left, hi, True)
                if left < right:
                    found.append(Interval(shard, left, right))
        return found

    def _shards_of(self, ids: Sequence[int] | np.ndarray) -> Sequence[int]:
        """The shards that may hold a sequence, by its first and its last gram."""
        shards = len(self.sizes)
        if not self._blocks or len(ids) < GRAM:
            return range(shards)
        read = self._maps["grams.bin"]
        found = shards_with([int(one) for one in ids[:GRAM]], self._blocks, shards, read)
        if found and len(ids) > GRAM:
            last = shards_with([int(one) for one in ids[-GRAM:]], self._blocks, shards, read)
            found = [one for one in found if one in last]
        return found

    def _bisect(self, shard: int, pattern: bytes, lo: int, hi: int, right: bool) -> int:
        """The first suffix of lo to hi that is not before `pattern` (`right`: that neither is before nor begins with it)."""
        start, w, n, read = int(self.starts[shard]), self.width, len(pattern), struct.unpack_from
        text, order, first, bits, mask = self._text, self._order, int(self._order_at[shard]), self.bits, self._mask
        head, short = pattern[:64], min(n, 64)
        while lo < hi:
            mid = (lo + hi) >> 1
            bit = mid * bits
            at = (start + (read("<Q", order, first + (bit >> 3))[0] >> (bit & 7) & mask)) * w
            there = text[at : at + short]
            if there == head and n > 64:  # long sequences: only what ties is compared whole
                there = text[at : at + n]
                before = there < pattern or (right and there == pattern)
            else:
                before = there < head or (right and there == head)
            if before:
                lo = mid + 1
            else:
                hi = mid
        return lo

    def extend(self, intervals: Sequence[Interval], depth: int, token: int) -> list[Interval]:
        """The places of a sequence of `depth` tokens, narrowed to those where `token` comes next; O(log n)."""
        if token in self.ends:
            return []
        want = token.to_bytes(self.width, "big")
        found = []
        for shard, lo, hi in intervals:
            left = self._bisect_next(shard, depth, want, lo, hi, False)
            right = self._bisect_next(shard, depth, want, left, hi, True)
            if left < right:
                found.append(Interval(shard, left, right))
        return found

    def _bisect_next(self, shard: int, depth: int, want: bytes, lo: int, hi: int, right: bool) -> int:
        start, w, read, text, order = int(self.starts[shard]), self.width, struct.unpack_from, self._text, self._order
        first, bits, mask = int(self._order_at[shard]), self.bits, self._mask
        while lo < hi:
            mid = (lo + hi) >> 1
            bit = mid * bits
            at = (start + (read("<Q", order, first + (bit >> 3))[0] >> (bit & 7) & mask) + depth) * w
            there = text[at : at + w]
            if there < want or (right and there == want):
                lo = mid + 1
            else:
                hi = mid
        return lo

    def count(self, ids: Sequence[int] | np.ndarray) -> int:
        """How often a sequence of tokens stands in the data."""
        return sum(hi - lo for _, lo, hi in self.find(ids))

    def positions(self, intervals: Sequence[Interval], most: int | None = None) -> Positions:
        """Where the sequences of `intervals` begin, in order; of more than `most`, that many evenly from the intervals."""
        total = sum(hi - lo for _, lo, hi in intervals)
        if most is None or total <= most:
            wanted = np.arange(total, dtype=np.int64)
        else:
            wanted = np.arange(most, dtype=np.int64) * total // most
        found, before = [], 0
        for shard, lo, hi in intervals:
            here = wanted[(wanted >= before) & (wanted < before + hi - lo)] - before
            found.append(self.places(lo + here, np.full(len(here), shard)))
            before += hi - lo
        return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)

    def places(self, entries: np.ndarray, shards: np.ndarray) -> Positions:
        """The positions that entries of the shards' orders name. UserError when one lies outside its shard."""
        bit = entries * self.bits
        eights = self.look("suffixes.bin", self._entries, self._order_at[shards] + (bit >> 3), 1).astype(np.int64)
        inside = (eights >> (bit & 7)) & self._mask  # at most 32 + 7 bits: the sign does not matter
        if inside.size and bool((inside >= self.sizes[shards]).any()):
            raise UserError(f"{self.path}: suffixes.bin is damaged: build the index again (criadero data index)")
        return self.starts[shards] + inside

    def look(self, name: str, values: np.ndarray, where: np.ndarray, step: int, ahead: bool = False) -> np.ndarray:
        """values[where], `step` bytes apart in the file `name`. From a slow disk a page at a time would cost its latency each
        time, so for some looks after a slow one, and where `ahead` is asked for, their pages are asked for first, all together."""
        began = time.perf_counter()
        if ahead or self._cold:
            self._cold = max(0, self._cold - 1)
            pages = np.unique((where * step) // PAGE)
            for page in pages.tolist():
                self._maps[name].madvise(mmap.MADV_WILLNEED, page * PAGE, PAGE)
        out = values[where]
        if len(where) and time.perf_counter() - began > COLD * len(where) + 1e-4:
            self._cold = AWAKE
        self._looks += len(where)
        if self._looks > LOOKS >= len(where):  # many sequences at once are held until they are through
            self._looks = 0
            self.trim()
        return out

    def covering(self, ids: Sequence[int] | np.ndarray, length: int) -> np.ndarray | None:
        """Which tokens of `ids` a match of `length` tokens may cover with the gram that begins there, by shard: bool [ids, shards].

        Where it says no there is none. None when there is no filter, or `length` is less than a gram. Takes some bytes a token and shard.
        """
        run = length - GRAM + 1  # grams of such a match, one behind the other
        if not self._blocks or run < 1:
            return None
        hashed = hashes(np.asarray(ids, np.int64))
        shards = len(self.sizes)
        # what has not been asked counts as there: first one gram of each run, then those halfway, where it is still possible, ...
        present, asked = np.ones((len(hashed), shards), bool), np.zeros(len(hashed), bool)
        possible, stride = present, run
        while True:
            wanted = np.zeros(len(hashed), bool)
            wanted[stride - 1 :: stride] = True
            wanted &= ~asked & possible.any(1)
            present[wanted] = self._present(hashed[wanted])
            asked |= wanted
            possible = in_runs(present, run)
            if stride == 1:
                return np.pad(possible, ((0, len(ids) - len(hashed)), (0, 0)))
            stride = -(-stride // 2)

    def _present(self, hashed: np.ndarray) -> np.ndarray:
        """Whether each gram, given its hash, may be in each shard: bool [grams, shards]."""
        shards = len(self.sizes)
        out = np.ones((len(hashed), shards), bool)
        step = max(1, BATCH // shards)
        for at in range(0, len(hashed), step):
            some = hashed[at : at + step]
            first = (block_of(some, self._blocks)[:, None] * shards + np.arange(shards)) * BLOCK  # [some, shards]
            for probe in range(PROBES):
                bit = bits_of(some, probe)[:, None]
                byte = self.look("grams.bin", self._grams, (first + (bit >> 3)).ravel(), 1, ahead=probe == 0).reshape(
                    first.shape
                )
                out[at : at + step] &= (byte >> (bit & 7).astype(np.uint8) & 1).astype(bool)
        return out

    # -- many sequences at once ---------------------------------------------------------------------------------------

    def longest(
        self, ids: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray | None = None, within: np.ndarray | None = None
    ) -> np.ndarray:  # fmt: skip
        """How many tokens of `ids` from each of `starts` (default: every one) stand together somewhere in the data.

        int64 [starts]: the matching statistics (Chang and Lawler 1994), from one bisection a start and shard, all together,
        and comparing with both neighbours of the place where the text would stand. `within` (bool [starts, shards]) names the
        shards to look at.
        """
        query = Query(self, ids)
        starts = np.arange(len(query.ids)) if starts is None else np.asarray(starts, np.int64)
        out = np.zeros(len(starts), np.int64)
        shards = len(self.sizes)
        step = max(1, BATCH // shards)
        for at in range(0, len(starts), step):
            wanted = np.ones((len(starts[at : at + step]), shards), bool) if within is None else within[at : at + step]
            row, shard = np.nonzero(wanted & (query.left[starts[at : at + step]] > 0)[:, None])
            pairs = starts[at + row]
            place = self._insertion(query, pairs, query.left[pairs], shard, upper=False)
            for side in (place - 1, place):
                there = np.flatnonzero((side >= 0) & (side < self.sizes[shard]))
                spots = self.places(side[there], shard[there])
                np.maximum.at(out, at + row[there], query.common(spots, pairs[there]))
            self.trim()
        return out

    def intervals(
        self, ids: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, length: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where ids[start : start + length] stands, for each start: ``lo`` and ``hi``, int64 [starts, shards].

        A sequence that goes over the end of `ids` or an end token stands nowhere.
        """
        query = Query(self, ids)
        starts = np.asarray(starts, np.int64)
        lengths = np.broadcast_to(np.asarray(length, np.int64), starts.shape)
        shards = len(self.sizes)
        lo, hi = np.zeros((len(starts), shards), np.int64), np.zeros((len(starts), shards), np.int64)
        hashed = hashes(query.ids) if self._blocks else None
        step = max(1, BATCH // shards)
        for at in range(0, len(starts), step):
            some, many = starts[at : at + step], lengths[at : at + step]
            wanted = np.repeat(((query.left[some] >= many) & (many > 0))[:, None], shards, 1)
            if hashed is not None:
                asked = np.flatnonzero(wanted[:, 0] & (many >= GRAM))
                for gram in (some[asked], some[asked] + many[asked] - GRAM):  # the first and the last of each
                    wanted[asked] &= self._present(hashed[gram])
            row, shard = np.nonzero(wanted)
            for upper, out in ((False, lo), (True, hi)):
                out[at + row, shard] = self._insertion(query, some[row], many[row], shard, upper=upper)
            self.trim()
        return lo, hi

    def counts(
        self, ids: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, length: int | np.ndarray
    ) -> np.ndarray:
        """How often ids[start : start + length] stands in the data, for each start: int64 [starts]."""
        lo, hi = self.intervals(ids, starts, length)
        return (hi - lo).sum(1)

    def _insertion(
        self, query: Query, starts: np.ndarray, left: np.ndarray, shard: np.ndarray, *, upper: bool
    ) -> np.ndarray:
        """How many suffixes of `shard` are before the query from `starts` on, `left` tokens of it (`upper`: or begin with it).

        Bisection of all at once, [n] each. What both ends share with the query is not compared again (Manber and Myers 1993).
        """
        mask = query.masks[np.minimum(left, self.per)]
        key = query.keys[starts] & mask
        lo = np.maximum(self._keys_before(key, shard, False) - 1, 0) * STEP
        hi = np.minimum(self._keys_before(key | ~mask, shard, True) * STEP, self.sizes[shard])
        low_shared, high_shared = np.zeros(len(starts), np.int64), np.zeros(len(starts), np.int64)  # blocks of 8 bytes
        open_ = np.flatnonzero(lo < hi)
        while open_.size:
            middle = (lo[open_] + hi[open_]) >> 1
            spots = self.places(middle, shard[open_])
            shared = np.minimum(low_shared[open_], high_shared[open_])
            before = query.before(spots, starts[open_], left[open_], shared, upper)
            low, high = open_[before], open_[~before]
            lo[low], low_shared[low] = middle[before] + 1, shared[before]
            hi[high], high_shared[high] = middle[~before], shared[~before]
            open_ = open_[lo[open_] < hi[open_]]
        return lo

    def _keys_before(self, key: np.ndarray, shard: np.ndarray, same: bool) -> np.ndarray:
        """How many keys of `shard` are before each `key` (`same`: or equal to it)."""
        first = self.key_starts[shard]
        lo, hi = first.copy(), self.key_starts[shard + 1].copy()
        open_ = np.flatnonzero(lo < hi)
        while open_.size:
            middle = (lo[open_] + hi[open_]) >> 1
            there = self.look("keys.bin", self.keys, middle, 8)
            before = there <= key[open_] if same else there < key[open_]
            lo[open_[before]] = middle[before] + 1
            hi[open_[~before]] = middle[~before]
            open_ = open_[lo[open_] < hi[open_]]
        return lo - first

    # -- documents ----------------------------------------------------------------------------------------------------

    def document_of(self, positions: Positions | int) -> np.ndarray:
        """The number of the document in which each position lies."""
        if self._cold and len(self._maps["documents.bin"]) <= WHOLE:
            self._maps["documents.bin"].madvise(mmap.MADV_WILLNEED)
        return np.searchsorted(self.borders, np.asarray(positions, np.uint64), "right") - 1

    def document(self, number: int) -> Place:
        """What is known of a document. IndexError when there is none of that number."""
        if not 0 <= number < self.documents:
            raise IndexError(number)
        source = self.about["rows"][int(self.rows[number])]
        name, date, *hashed = self._names(number // NAMES)[number % NAMES]  # an older index has no hashes
        return Place(
            number, name or f"{source['name']} #{number}", source["name"], source["lang"], source["licence"],
            int(self.borders[number]), int(self.borders[number + 1]), date, source.get("url", ""), source.get("attribution", ""),
            *hashed,
        )  # fmt: skip

    def _names(self, block: int) -> list[list[str]]:
        return _names_of(self.path, self.about["names"][block], self.about["names"][block + 1])

    def text(self, start: int, end: int) -> str:
        """The text of tokens `start` to `end`, clipped to the index; turns of a chat, and what else stands between special
        tokens, in lines of their own."""
        ids = self.tokens[max(0, start) : max(0, end)].tolist()
        parts = (list(part) for special, part in itertools.groupby(ids, self.special.__contains__) if not special)
        return "\n".join(self.tokenizer.decode(part, continues=True) for part in parts)

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """The tokens that stand for no text."""
        return frozenset(self.tokenizer.special.values())

    def encode(self, text: str) -> list[int]:
        """A text's tokens. UserError when it has none, or cannot be read."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As :meth:`encode`, and the characters that each token stands for."""
        if not text.strip():
            raise UserError("the text is empty: give some words to look for")
        try:
            ids, offsets = self.tokenizer.encode_with_offsets(text)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(f"the text is not UTF-8 ({error}): convert it first") from None
        if not ids:
            raise UserError("the text has no tokens in this vocabulary: there is nothing to look for")
        return ids, offsets

    def ways(self, text: str, plain: list[int] | None = None) -> list[list[int]]:
        """A text's tokens (`plain`, where they are at hand) as they are at the start of a line and, when those differ, behind a space:
        within a sentence."""
        plain = self.encode(text) if plain is None else plain
        if text[0].isspace():
            return [plain]
        spaced = self.encode(" " + text)
        # where the space is a token of its own, the plain tokens stand behind it as well
        return [plain] if spaced[-len(plain) :] == plain else [plain, spaced]

    def release(self) -> None:
        """Give back the memory of what was touched; it stays in the system's cache, and is mapped again when needed."""
        for one in self._maps.values():
            one.madvise(mmap.MADV_DONTNEED)

    def trim(self) -> None:
        """Release when more than `HELD` has been touched since the index was opened, as far as the system tells."""
        if _mapped_bytes() - self._before > HELD:
            self.release()

    def forget(self) -> None:
        """As :meth:`release`, and out of the system's cache too (to measure a cold start). Linux only."""
        import os

        self.release()
        for name in self._maps:
            with (self.path / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def everything(self) -> Iterator[tuple[int, np.ndarray]]:
        """(start, tokens) of the whole index in pieces of some million tokens."""
        for start in range(0, self.size, 1 << 22):
            yield start, self.tokens[start : min(start + (1 << 22), self.size)]


class Query:
    """A text made ready to be compared with many suffixes at once."""

    def __init__(self, index: Index, ids: Sequence[int] | np.ndarray) -> None:
        packed = index.pack(ids)
        self.index, self.per = index, index.per
        self.ids = np.frombuffer(packed, f">u{index.width}").astype(np.int64)
        n = len(self.ids)
        # [n + per]: the 8 bytes from each token on, zeros behind the end
        padded = packed + bytes(16)
        self.keys = np.ndarray((n + 1,), ">u8", padded, strides=(index.width,)).astype(np.uint64)
        self.keys = np.concatenate([self.keys, np.zeros(self.per, np.uint64)])
        # left[i]: tokens from i to the next end token, or to the end of the text
        stops = np.append(np.flatnonzero(np.isin(self.ids, index.ends)), n)
        self.left = stops[np.searchsorted(stops, np.arange(n + 1))] - np.arange(n + 1)
        bits = 8 * index.width
        self.masks = np.array(
            [(1 << 64) - (1 << (64 - bits * k)) for k in range(self.per + 1)], np.uint64
        )  # first k tokens

    def before(
        self, spots: np.ndarray, starts: np.ndarray, left: np.ndarray, shared: np.ndarray, upper: bool
    ) -> np.ndarray:
        """Whether the suffix at each spot stands before the query (`upper`: or begins with it). Raises `shared`, the number of
        whole 8-byte blocks that are known to be equal, in place."""
        out = np.full(len(spots), upper)
        act = np.arange(len(spots))
        while act.size:
            offset = shared[act] * self.per
            mask = self.masks[np.minimum(left[act] - offset, self.per)]
            here = self.keys[starts[act] + offset] & mask
            there = self._eights(spots[act] + offset) & mask
            differs = there != here
            out[act[differs]] = there[differs] < here[differs]
            act = act[~differs & (left[act] - offset > self.per)]
            shared[act] += 1
        return out

    def _eights(self, spots: np.ndarray) -> np.ndarray:
        # behind the last token there is only padding, and an end token before it has settled the comparison
        index = self.index
        return index.look("tokens.bin", index.eights, np.minimum(spots, index.size - 1), index.width).astype(np.uint64)

    def common(self, spots: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """How many tokens the data from each spot and the query from each start have in common, int64."""
        out = np.zeros(len(spots), np.int64)
        left = self.left[starts]
        act = np.arange(len(spots))
        while act.size:
            there = self._eights(spots[act] + out[act])
            differ = there ^ self.keys[starts[act] + out[act]]
            same = np.zeros(len(act), np.int64)
            for k in range(1, self.per + 1):
                same += (differ & self.masks[k]) == 0  # the first k tokens are equal
            out[act] += same
            act = act[(same == self.per) & (out[act] < left[act])]
        return np.minimum(out, left)


@functools.lru_cache(maxsize=512)
def _names_of(folder: Path, start: int, end: int) -> list[list[str]]:
    import zstandard

    try:
        with (folder / "names.bin").open("rb") as file:
            file.seek(start)
            text = zstandard.ZstdDecompressor().decompress(file.read(end - start))
        return [list(row) for row in json.loads(text)]
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise UserError(f"{folder}: names.bin is damaged ({error}): build the index again") from None


def _mapped(file: Path, size: int) -> mmap.mmap:
    try:
        there = file.stat().st_size
        if there != size:
            what = "cut short" if there < size else "longer than it says"
            raise UserError(
                f"{file.parent}: the index is {what}: {file.name} has {there:,} bytes instead of {size:,}; build it again "
                "(criadero data index)"
            )
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): build the index again") from None
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # a bisection reads one page here and one there: reading ahead is waste
    return mapped


def _mapped_bytes() -> int:
    """Bytes of files that this process has in memory (Linux; 0 elsewhere)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * PAGE
    except OSError:
        return 0


def open_index(ref: str | Path | Artifact) -> Index:
    """Open an artifact of kind ``index``. UserError when it is none, cut short, or of another format."""
    artifact = open_artifact(ref)
    if artifact.kind != "index":
        raise UserError(
            f"{artifact.path} is a {artifact.kind}, not an index: build one with criadero data index TOKENS"
        )
    file = artifact.path / "index.json"
    try:
        about = json.loads(file.read_bytes())
        if about["format"] != FORMAT:
            raise UserError(f"{file}: its format is {about['format']!r}, this version reads {FORMAT!r}")
        return Index(artifact.path, about)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{file}: cannot be read as an index ({error!r}): build it again (criadero data index)"
        ) from None


def tokens_id(artifact: Artifact) -> str:
    """The id of the tokens artifact that an index was built of."""
    for one in artifact.inputs:
        if one.get("relation") == "converted_from":
            return str(one["id"])
    raise UserError(f"{artifact.path}: its passport does not say which tokens it is of: build it again")
