"""Rows of tokens: nothing lost, nothing across a border, and every batch a pure function of seed and step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from criadero.chat import Example
from criadero.errors import UserError
from criadero.train.batches import (
    IGNORE,
    Batch,
    ExampleBatches,
    TokenBatches,
    TokenFile,
    held_out_batches,
    pack_examples,
    rows_to_batch,
)

F32 = torch.float32


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60), more=st.integers(0, 40))
def test_packing_loses_nothing_and_never_overfills(lengths: list[int], more: int) -> None:
    row = max(lengths, default=1) + more
    rows = pack_examples(lengths, row)
    assert sorted(i for one in rows for i in one) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= row for one in rows)
    if lengths:  # best fit decreasing: no two rows would fit into one
        fill = sorted(sum(lengths[i] for i in one) for one in rows)
        assert len(fill) < 2 or fill[0] + fill[1] > row


def example(start: int, length: int, learned: Sequence[bool] | None = None) -> Example:
    return Example(list(range(start, start + length)), list(learned or [True] * length))


def test_rows_hold_the_documents_their_places_and_their_targets() -> None:
    batch = rows_to_batch([[example(10, 3), example(20, 2)], [example(30, 4, [False, False, True, True])]], 6, 99, F32)
    assert batch.ids.tolist() == [[10, 11, 12, 20, 21, 99], [30, 31, 32, 33, 99, 99]]
    assert batch.targets.tolist() == [[11, 12, -100, 21, -100, -100], [-100, 32, 33, -100, -100, -100]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert batch.tokens == 9


def test_a_padding_token_that_is_also_a_real_one_is_learned_where_it_is_real() -> None:
    """The trap of pad == eos: the end would never be learned."""
    end = Example([5, 6, 99], [False, True, True])
    batch = rows_to_batch([[end]], 5, 99, F32)
    assert batch.targets.tolist() == [[6, 99, -100, -100, -100]]


def many(count: int = 37, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    at, out = 0, []
    for length in rng.integers(2, 15, count):  # every token of all examples is different
        out.append(example(at, int(length)))
        at += int(length)
    return out


def test_every_epoch_sees_every_example_once_in_its_own_order() -> None:
    examples = many()
    batches = ExampleBatches(examples, row_length=32, rows=2, pad=0, seed=3, dtype=F32)
    orders = []
    for epoch in range(3):
        seen: list[int] = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            batch = batches(step)
            assert batch.ids.shape[1] <= 32
            seen += batch.ids[batch.segments >= 0].tolist()
        assert sorted(seen) == list(range(sum(len(e.ids) for e in examples)))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


def test_batches_are_pure_functions_of_seed_and_step() -> None:
    examples = many()

    def make(seed: int) -> ExampleBatches:
        return ExampleBatches(examples, row_length=32, rows=2, pad=0, seed=seed, dtype=F32)

    there = [make(1)(step).ids for step in range(12)]
    jumping = make(1)
    for step in (11, 0, 7, 3, 11):
        assert torch.equal(jumping(step).ids, there[step])
    other = make(2)
    assert any(not torch.equal(other(step).ids, there[step]) for step in range(4))


# --- pretraining ---


def token_file(lengths: Sequence[int], sources: Sequence[int] | None = None, names: int = 1) -> TokenFile:
    ends = np.cumsum(lengths)
    rows = [(int(e - n), int(e), s) for e, n, s in zip(ends, lengths, sources or [0] * len(lengths), strict=True)]
    table = [{"name": f"source{n}", "lang": "en", "kind": "text"} for n in range(names)]
    return TokenFile(np.arange(sum(lengths), dtype=np.uint32), np.asarray(rows, np.uint64).reshape(-1, 3), table)


def batches_of(file: TokenFile, weights: Sequence[float] = (1.0,), **changes: object) -> TokenBatches:
    settings = {"length": 16, "rows": 2, "seed": 5, "dtype": F32} | changes
    return TokenBatches(file, weights=weights, **settings)


def epoch_rows(batches: TokenBatches, epoch: int) -> list[np.ndarray]:
    per = batches.rows_per_epoch
    return [batches.row(number)[0] for number in range(epoch * per, (epoch + 1) * per)]


def test_an_epoch_covers_the_stream_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 50).tolist()
    batches = batches_of(token_file(lengths))
    total = sum(lengths)
    assert batches.rows_per_epoch == (total - 1) // 16
    assert batches.tokens_per_epoch == batches.rows_per_epoch * 16
    seen = []
    for epoch in range(2):
        rows = epoch_rows(batches, epoch)
        inputs = np.concatenate([row[:-1] for row in rows])
        assert len(set(inputs.tolist())) == len(inputs) == batches.tokens_per_epoch  # none twice
        assert total - len(inputs) <= 16  # at most one row's worth is left over
        seen.append(inputs.tolist())
    assert seen[0] != seen[1]


def test_weights_repeat_leave_out_and_draw_by_half() -> None:
    lengths = [8] * 120
    file = token_file(lengths, [n % 3 for n in range(120)], names=3)
    counts: Counter[int] = Counter()
    for epoch in range(4):
        batches = batches_of(file, (0.0, 0.5, 2.0))
        for row in epoch_rows(batches, epoch):
            counts.update(int(file.docs[token // 8, 2]) for token in row[:-1])
    assert counts[0] == 0
    assert 4 * 40 * 8 * 2 - 70 <= counts[2] <= 4 * 40 * 8 * 2
    assert 0.3 < counts[1] / (4 * 40 * 8) < 0.7
    with pytest.raises(UserError, match="does not fill one row"):
        batches_of(file, (0.0, 0.0, 0.0))


def check_batch(batch: Batch, file: TokenFile, isolate: bool) -> None:
    document = np.searchsorted(file.docs[:, 1].astype(int), batch.ids.numpy(), side="right")
    for r in range(batch.ids.shape[0]):
        for t in range(batch.ids.shape[1]):
            here, aim = int(batch.ids[r, t]), int(batch.targets[r, t])
            last = here + 1 == int(file.docs[document[r, t], 1])
            if isolate:
                assert aim == (IGNORE if last else here + 1)
            elif not last:
                assert aim == here + 1
            if t and isolate:
                same = document[r, t] == document[r, t - 1] and here == int(batch.ids[r, t - 1]) + 1
                assert bool(batch.segments[r, t] == batch.segments[r, t - 1]) == same
                assert int(batch.positions[r, t]) == (int(batch.positions[r, t - 1]) + 1 if same else 0)
            if not isolate:
                assert int(batch.positions[r, t]) == t
    assert int(batch.positions[:, 0].max()) == 0
    assert batch.tokens == batch.ids.numel()


@pytest.mark.parametrize("isolate", [True, False])
def test_no_loss_crosses_a_border_and_positions_restart(isolate: bool) -> None:
    file = token_file(np.random.default_rng(1).integers(1, 30, 40).tolist())
    batches = batches_of(file, isolate=isolate)
    for step in range(batches.rows_per_epoch // 2):
        check_batch(batches(step), file, isolate)
    if not isolate:  # the next document's first token is learned too
        targets = torch.cat([batches(step).targets.flatten() for step in range(batches.rows_per_epoch // 2)])
        assert not bool((targets == IGNORE).any())


def test_pretraining_batches_are_pure_functions_of_seed_and_step() -> None:
    file = token_file(np.random.default_rng(2).integers(1, 30, 40).tolist(), None)
    there = [batches_of(file, (1.5,))(step) for step in range(60)]
    jumping = batches_of(file, (1.5,))
    for step in (59, 0, 31, 30, 59):
        got = jumping(step)
        for part in ("ids", "targets", "segments", "positions"):
            assert torch.equal(getattr(got, part), getattr(there[step], part))
    other = batches_of(file, (1.5,), seed=6)
    assert not all(torch.equal(other(step).ids, there[step].ids) for step in range(3))


def test_empty_documents_do_no_harm() -> None:
    batches = batches_of(token_file([0, 20, 0, 0, 30, 0]))
    assert batches.rows_per_epoch == 3
    for step in range(4):
        assert len(batches.row(step)[0]) == 17


def write_tokens(folder: Path, ids: Sequence[int], docs: Sequence[tuple[int, int, int]], dtype: str = "uint16") -> Path:
    folder.mkdir(exist_ok=True)
    about = {"dtype": dtype, "sources": [{"name": "a", "lang": "en", "kind": "text"}]}
    (folder / "tokens.json").write_text(json.dumps(about))
    for split in ("train", "held_out"):
        (folder / f"{split}.bin").write_bytes(np.asarray(ids, np.dtype(dtype).newbyteorder("<")).tobytes())
        np.save(folder / f"{split}.docs.npy", np.asarray(docs, np.uint64).reshape(-1, 3))
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_read_and_checked(tmp_path: Path, dtype: str) -> None:
    folder = write_tokens(tmp_path / "t", [1, 2, 60000], [(0, 2, 0), (2, 3, 0)], dtype)
    file = TokenFile.open(folder, "train")
    assert file.ids.tolist() == [1, 2, 60000]
    write_tokens(folder, [1, 2], [(0, 3, 0)], dtype)
    with pytest.raises(UserError, match=r"train\.docs\.npy does not match"):
        TokenFile.open(folder, "train")
    (folder / "train.docs.npy").write_bytes(b"\x93NUMPY nonsense")
    with pytest.raises(UserError, match="not a readable tokens artifact"):
        TokenFile.open(folder, "train")
    with pytest.raises(UserError, match=r"not a readable tokens artifact \(tokens\.json: No such file or directory\)"):
        TokenFile.open(tmp_path / "nowhere", "train")


def test_held_out_text_comes_by_group_and_every_token_once() -> None:
    file = token_file([5, 40, 1, 18], [0, 1, 0, 1], names=2)
    file.sources[1] = {"name": "b", "lang": "es", "kind": "chat"}
    groups = held_out_batches(file, length=16, rows=2, dtype=F32, max_tokens=1000)
    assert list(groups) == ["en text", "es chat"]
    spanish = sorted(int(i) for batch in groups["es chat"] for i in batch.ids[batch.segments >= 0])
    assert spanish == [*range(5, 45), *range(46, 64)]
    assert all(batch.ids.shape[1] == 16 for batches in groups.values() for batch in batches)
    small = held_out_batches(file, length=16, rows=2, dtype=F32, max_tokens=20)
    assert sum(batch.tokens for batch in small["es chat"]) == 32  # whole rows, until the limit is reached
