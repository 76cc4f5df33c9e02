"""Which shards of an index may hold a sequence: a Bloom filter of its runs of five tokens, asked before anything is bisected.

Most of what is looked for stands nowhere, or in one shard of many. A match of n tokens holds n - 4 runs of five (grams) one after
another, so where one of these is in no filter, nothing is bisected. A filter errs on one side only: it never denies what is there.

``grams.bin`` is one row for each block number: 64 bytes a shard, one beside the other, so that what all shards know of a gram lies in one
page. A gram's hash names a block and 3 bits in it (Putze, Sanders and Singler 2007: blocked Bloom filters); 5 bits a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap
from pathlib import Path

import numpy as np

GRAM = 5  # tokens
BITS = 5  # a token of the largest shard
BLOCK = 64  # bytes, of one shard
PROBES = 3  # bits of a gram within its block: 9 to 10 of 100 grams that are not there seem to be
PIECE = 1 << 16  # small enough for the cache
MASK = (1 << 64) - 1
FACTOR = 0x9E3779B97F4A7C15  # odd: 2**64 over the golden ratio


def hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 [len(ids) - 4]: a hash of each run of five tokens. Part of the file's format."""
    count = max(0, len(ids) - GRAM + 1)
    ids = ids.astype(np.uint64)
    out = np.zeros(count, np.uint64)
    for k in range(GRAM):
        out *= np.uint64(FACTOR)
        out += ids[k : k + count] + np.uint64(1)
    out ^= out >> np.uint64(31)
    out *= np.uint64(FACTOR)
    out ^= out >> np.uint64(29)
    return out


def blocks_for(tokens: int) -> int:
    """How many blocks the filter of a shard of so many tokens has."""
    return max(1, -(-tokens * BITS // (8 * BLOCK)))


def block_of(hashed: np.ndarray, blocks: int) -> np.ndarray:
    """int64: the block of each hash, by its upper half."""
    return (((hashed >> np.uint64(32)) * np.uint64(blocks)) >> np.uint64(32)).astype(np.int64)


def bits_of(hashed: np.ndarray, probe: int) -> np.ndarray:
    """int64: the bit of each hash within its block, by nine of its lower bits."""
    return ((hashed >> np.uint64(9 * probe)) & np.uint64(8 * BLOCK - 1)).astype(np.int64)


def filter_of(tokens: np.ndarray, blocks: int) -> np.ndarray:
    """The filter of one shard's tokens: uint8 [blocks * 64]. Takes 8 times that in memory meanwhile."""
    flags = np.zeros(blocks * BLOCK * 8, bool)
    for at in range(0, len(tokens) - GRAM + 1, PIECE):
        hashed = hashes(tokens[at : at + PIECE + GRAM - 1])
        first = block_of(hashed, blocks) * (8 * BLOCK)
        for probe in range(PROBES):
            flags[first + bits_of(hashed, probe)] = True
    return np.packbits(flags, bitorder="little")


def interleave(parts: Path, out: Path, blocks: int, shards: int) -> None:
    """`parts` holds one shard's filter behind the other; `out` one block of every shard, then the next of every shard."""
    step = max(1, (1 << 24) // (BLOCK * shards))
    with parts.open("rb") as source, out.open("wb") as target:
        for at in range(0, blocks, step):
            many = min(step, blocks - at)
            rows = np.empty((many, shards, BLOCK), np.uint8)
            for shard in range(shards):
                source.seek((shard * blocks + at) * BLOCK)
                rows[:, shard] = np.frombuffer(source.read(many * BLOCK), np.uint8).reshape(many, BLOCK)
            rows.tofile(target)


def in_runs(present: np.ndarray, length: int) -> np.ndarray:
    """Which of `present` (bool [grams, shards]) lie in a run of `length` that are all there, one behind the other."""
    if length > len(present):
        return np.zeros_like(present)
    begins, have = present, 1  # begins[i]: whether i and the next have - 1 are there
    while have < length:
        more = min(have, length - have)
        begins = begins[:-more] & begins[more:]
        have += more
    within = np.pad(begins, ((0, length - 1), (0, 0)))
    have = 1  # within[i]: whether a run begins at i, or up to have - 1 before
    while have < length:
        more = min(have, length - have)
        within[more:] |= within[:-more].copy()
        have += more
    return within


def shards_with(gram: Sequence[int], blocks: int, shards: int, read: mmap | bytes) -> list[int]:
    """The shards that may hold a gram, by its bits in the bytes `read` of grams.bin: the slow twin, and faster for a single one."""
    hashed = 0
    for token in gram:
        hashed = (hashed * FACTOR + int(token) + 1) & MASK
    hashed ^= hashed >> 31
    hashed = hashed * FACTOR & MASK
    hashed ^= hashed >> 29
    first = ((hashed >> 32) * blocks >> 32) * shards * BLOCK
    row = read[first : first + shards * BLOCK]
    bits = [(hashed >> 9 * probe) & (8 * BLOCK - 1) for probe in range(PROBES)]
    (x, one), (y, two), (z, three) = ((bit & 7, row[bit >> 3 :: BLOCK]) for bit in bits)  # a byte a shard
    return [shard for shard, (a, b, c) in enumerate(zip(one, two, three, strict=True)) if a >> x & b >> y & c >> z & 1]
