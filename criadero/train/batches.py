"""Rows of tokens for the loop, as pure functions of a seed and a step.

Nothing here has a position that could be lost: batch number n of a run is the same whether the run reached it in one go or
was killed and resumed (exact resume needs no more of the data than the step).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from criadero.chat import Example
from criadero.errors import UserError

IGNORE = -100  # a target that takes no part in the loss; the field's usual number


@dataclass(frozen=True)
class Batch:
    """Packed rows. All ``[B, T]`` int64; ``targets`` are already shifted and -100 where nothing is learned; ``segments``
    number the documents within a row (-1: padding); ``positions`` restart at 0 in each document."""

    ids: Tensor
    targets: Tensor
    segments: Tensor
    positions: Tensor
    dtype: torch.dtype = torch.float32  # of the computation
    teacher: tuple[Tensor, Tensor] | None = None  # likeliest tokens, their probabilities [M, k]; M: learned tokens

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int((self.segments >= 0).sum())


def rows_to_batch(
    rows: Sequence[Sequence[Example]], length: int, pad: int, dtype: torch.dtype, device: str = "cpu"
) -> Batch:
    """Rows of examples, each row's examples one after another, padded on the right to ``length``.

    The last token of an example predicts nothing; no loss crosses a border.
    """
    shape = (len(rows), length)
    ids, targets = np.full(shape, pad, np.int64), np.full(shape, IGNORE, np.int64)
    segments, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    for r, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            n = len(example.ids)
            tokens = np.asarray(example.ids, np.int64)
            ids[r, at : at + n] = tokens
            learn = np.asarray(example.loss_mask, bool)[1:]
            targets[r, at : at + n - 1] = np.where(learn, tokens[1:], IGNORE)
            segments[r, at : at + n] = number
            positions[r, at : at + n] = np.arange(n)
            at += n
    a, b, c, d = (torch.from_numpy(array).to(device) for array in (ids, targets, segments, positions))
    return Batch(a, b, c, d, dtype)


def pack_examples(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit-decreasing packing: rows of example numbers whose lengths add up to at most ``row_length``. Drops nothing."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    room: list[int] = []
    by_room: dict[int, list[int]] = {}  # room left -> rows
    for i in order:
        fit = next((r for r in range(lengths[i], row_length + 1) if by_room.get(r)), None)
        if fit is None:
            row = len(rows)
            rows.append([])
            room.append(row_length)
        else:
            row = by_room[fit].pop()
        rows[row].append(i)
        room[row] -= lengths[i]
        if room[row] > 0:
            by_room.setdefault(room[row], []).append(row)
    return rows


class ExampleBatches:
    """Batches of packed chat examples: each epoch is shuffled by its own seed, then packed, then cut into steps."""

    def __init__(
        self, examples: Sequence[Example], *, row_length: int, rows: int, pad: int, seed: int, dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.examples, self.row_length, self.rows, self.pad = examples, row_length, rows, pad
        self.seed, self.dtype, self.device = seed, dtype, device
        self._epochs: dict[int, list[list[list[int]]]] = {}
        self.steps_per_epoch = len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        if epoch not in self._epochs:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
            # Packing sees a shuffled order, so equal lengths land in different company each epoch; the number of rows is the same.
            packed = pack_examples([len(self.examples[i].ids) for i in order], self.row_length)
            packed = [[int(order[i]) for i in row] for row in packed]
            shuffled = [packed[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(packed))]
            self._epochs = {epoch: [shuffled[i : i + self.rows] for i in range(0, len(shuffled), self.rows)]}
        return self._epochs[epoch]

    def rows_at(self, step: int) -> list[list[int]]:
        """The numbers of the examples in each row of a batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def __call__(self, step: int) -> Batch:
        rows = self.rows_at(step)
        length = max(sum(len(self.examples[i].ids) for i in row) for row in rows)
        return rows_to_batch(
            [[self.examples[i] for i in row] for row in rows], length, self.pad, self.dtype, self.device
        )


@dataclass(frozen=True)
class TokenFile:
    """A split of a ``tokens`` artifact: one long memory-mapped row of ids and the borders of its documents."""

    ids: np.ndarray  # [n] uint16 or uint32
    docs: np.ndarray  # [documents, 3]: start, end, source number
    sources: list[dict]  # tokens.json: name, lang, ... by source number

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenFile:
        """Read ``train`` or ``held_out`` of a tokens folder; sizes are checked against ``tokens.json``."""
        try:
            about = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
            dtype = np.dtype(about["dtype"]).newbyteorder("<")
            docs = np.load(folder / f"{split}.docs.npy", allow_pickle=False)
            path = folder / f"{split}.bin"
            ids = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        except (OSError, KeyError, ValueError, TypeError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.strerror:
                reason = f"{Path(error.filename).name}: {error.strerror}" if error.filename else error.strerror
            raise UserError(
                f"{folder}: not a readable tokens artifact ({reason}); make one with `criadero data pack`"
            ) from None
        if docs.ndim != 2 or docs.shape[1] != 3 or (len(docs) and int(docs[:, 1].max()) > len(ids)):
            raise UserError(
                f"{folder}: {split}.docs.npy does not match {split}.bin; build it again with `criadero data pack`"
            )
        return cls(ids, docs, about["sources"])


class TokenBatches:
    """Rows of pretraining text.

    Documents are laid end to end in a shuffled order, each as often as its source's weight says (2.5 = twice, and a third
    time for a random half), cut into rows of ``length`` tokens, and the rows shuffled. One pass over that is an epoch; the
    next has its own order. With ``isolate`` no token sees another document.
    """

    def __init__(
        self, file: TokenFile, *, weights: Sequence[float], length: int, rows: int, seed: int, dtype: torch.dtype,
        device: str = "cpu", isolate: bool = True,
    ) -> None:  # fmt: skip
        self.file, self.weights, self.length, self.rows = file, np.asarray(weights, float), length, rows
        self.seed, self.dtype, self.device, self.isolate = seed, dtype, device, isolate
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.rows_per_epoch = len(self._epoch(0)[2])
        self.tokens_per_epoch = self.rows_per_epoch * length
        if self.rows_per_epoch < 1:
            raise UserError(
                f"the training text ({len(file.ids)} tokens) does not fill one row of {length}; give more text or a shorter context"
            )

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            times = self.weights[self.file.docs[:, 2].astype(np.int64)]
            copies = np.floor(times).astype(np.int64) + (rng.random(len(times)) < times % 1)
            order = rng.permutation(np.repeat(np.arange(len(times)), copies))
            docs = self.file.docs[order]
            ends = np.cumsum((docs[:, 1] - docs[:, 0]).astype(np.int64))  # where each document ends in the long row
            total = int(ends[-1]) if len(ends) else 0
            rows = rng.permutation(max(0, (total - 1) // self.length))
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1} | {epoch: (docs, ends, rows)}
        return self._epochs[epoch]

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """``length + 1`` ids (the last is only a target) and the document number of each."""
        epoch, number = divmod(number, self.rows_per_epoch)
        docs, ends, rows = self._epoch(epoch)
        start = int(rows[number % len(rows)]) * self.length
        doc = int(np.searchsorted(ends, start, side="right"))
        pieces, segments, need, segment = [], [], self.length + 1, 0
        while need > 0:
            begin, end = int(docs[doc, 0]), int(docs[doc, 1])
            begin += start - (int(ends[doc]) - (end - begin))
            piece = self.file.ids[begin : min(end, begin + need)]
            pieces.append(piece)
            segments.append(np.full(len(piece), segment))
            need, start, doc, segment = need - len(piece), start + len(piece), doc + 1, segment + 1
        return np.concatenate(pieces).astype(np.int64), np.concatenate(segments)

    def __call__(self, step: int) -> Batch:
        got = [self.row(step * self.rows + r) for r in range(self.rows)]
        ids = np.stack([ids for ids, _ in got])  # [B, T + 1]
        segments = np.stack([segments for _, segments in got])
        if not self.isolate:
            segments = np.zeros_like(segments)
        targets = np.where(segments[:, 1:] == segments[:, :-1], ids[:, 1:], IGNORE)
        ids, segments = ids[:, :-1], segments[:, :-1]
        first = np.concatenate([np.ones((len(ids), 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
        index = np.arange(self.length)
        positions = index - np.maximum.accumulate(np.where(first, index, 0), axis=1)
        arrays = (np.ascontiguousarray(array) for array in (ids, targets, segments, positions))
        a, b, c, d = (torch.from_numpy(array).to(self.device) for array in arrays)
        return Batch(a, b, c, d, self.dtype)


def held_out_batches(
    file: TokenFile, *, length: int, rows: int, dtype: torch.dtype, max_tokens: int, device: str = "cpu"
) -> dict[str, list[Batch]]:
    """Held-out text by ``source language`` group, in file order, every document cut into rows; at most ``max_tokens`` a group."""
    groups: dict[str, list[list[Example]]] = {}
    used: dict[str, int] = {}
    for start, end, source in file.docs.astype(np.int64):
        name = group_name(file.sources[source])
        for at in range(start, end - 1, length):
            if used.get(name, 0) >= max_tokens:
                break
            ids = file.ids[at : min(end, at + length)].astype(np.int64).tolist()
            used[name] = used.get(name, 0) + len(ids)
            groups.setdefault(name, []).append([Example(ids, [True] * len(ids))])
    out: dict[str, list[Batch]] = {}
    for name, singles in groups.items():
        packed = pack_examples([len(row[0].ids) for row in singles], length)
        merged = [[singles[i][0] for i in row] for row in packed]
        out[name] = [rows_to_batch(merged[i : i + rows], length, 0, dtype, device) for i in range(0, len(merged), rows)]
    return out


def group_name(source: dict) -> str:
    """What held-out figures are reported by: ``es text``, ``en chat`` ..."""
    return f"{source.get('lang', 'und')} {source.get('kind', 'text')}"
