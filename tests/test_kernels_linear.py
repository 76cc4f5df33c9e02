"""The compiled linear kernels: against float64, against their twin in PyTorch, and row by row against themselves."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criadero import kernels
from criadero.checkpoints.layout import to_rotate_half
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, unpack_nibbles

native = kernels.native()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled kernels are not installed, or turned off")
LEVELS = native.levels() if native is not None else []
EPS = 2.0**-24  # rounding of one float operation


@pytest.fixture(autouse=True)
def same_level_afterwards() -> Iterator[None]:
    before = native.level()
    yield
    native.set_level(before)


def make(kind: str, rows: int, columns: int, seed: int, scale_type: type = np.float16) -> QuantTensor | np.ndarray:
    """`int4 g32`, `int4m g128` (with mins), `int8 row`, `int8 g16`, `bf16`, `f32`."""
    rng = np.random.default_rng(seed)
    if not kind.startswith("int"):
        w = rng.standard_normal((rows, columns), dtype=np.float32)
        return w if kind == "f32" else (w.view(np.uint32) >> 16).astype(np.uint16)
    name, how = kind.split()
    group = columns if how == "row" else int(how[1:])
    bits = int(name[3])
    q = rng.integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)
    scales = (rng.random((rows, columns // group)) * 0.1 * 10.0 ** rng.integers(-3, 3)).astype(scale_type)
    mins = (rng.random((rows, columns // group)) * 0.5).astype(scale_type) if name.endswith("m") else None
    return QuantTensor(bits, group, q if bits == 4 else q.view(np.int8), scales, mins)


def dense(weights: QuantTensor | np.ndarray) -> np.ndarray:
    if isinstance(weights, QuantTensor):
        return weights.dequantise().astype(np.float64)
    return ((weights.astype(np.uint32) << 16).view(np.float32) if weights.dtype == np.uint16 else weights).astype(float)


def sizes(weights: QuantTensor | np.ndarray) -> np.ndarray:
    """|w|, but of the two parts of a weight with a minimum: what an error relative to each part is relative to."""
    if isinstance(weights, QuantTensor) and weights.mins is not None:
        u = unpack_nibbles(weights.q).astype(float)
        spread = [np.repeat(t.astype(float), weights.group, axis=1) for t in (weights.scales, weights.mins)]
        return u * spread[0] + spread[1]
    return np.abs(dense(weights))


def tolerance(weights: QuantTensor | np.ndarray, x: np.ndarray, level: str) -> np.ndarray:
    """How far `[M, N]` may be from the exact product, by what the kernels say they do."""
    size = sizes(weights)
    products = np.abs(x.astype(float)) @ size.T
    steps = x.shape[1] + 16  # more than the float operations of any path
    if not isinstance(weights, QuantTensor):
        rounded = 2.0**-8 if weights.dtype == np.uint16 and level == "avx512" else 0.0  # activations in bf16, summed up
        return products * (steps * EPS + rounded) + 1e-30
    # int8 activations: half a step of the largest in each span of 128
    error = np.zeros_like(products)
    for k in range(0, x.shape[1], 128):
        step = np.abs(x[:, k : k + 128]).max(axis=1) / 127
        error += 0.5001 * step[:, None] * size[:, k : k + 128].sum(axis=1)
    stored = 2.0**-11 if weights.scales.dtype == np.float32 and weights.group < x.shape[1] else 0.0
    return error + (products + error) * (stored + steps * EPS) + 1e-28


KINDS = ["int4 g32", "int4 g128", "int4m g32", "int4m g128", "int8 row", "int8 g16", "int8 g32", "int8 g128", "bf16"]
KINDS += ["f32", "int4 g64", "int4 g96", "int4m g160", "int8 g256"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 70),
    groups=st.integers(1, 5),
    columns=st.integers(1, 300),
    m=st.integers(1, 40),
    threads=st.sampled_from([1, 1, 1, 2]),  # more are waited for on a busy machine, and add little here
    scale_type=st.sampled_from([np.float16, np.float32]),
    seed=st.integers(0, 2**32 - 1),
)
def test_products(
    kind: str, rows: int, groups: int, columns: int, m: int, threads: int, scale_type: type, seed: int
) -> None:
    """Any shape, at every level: within the derived bound of float64, and close to the twin."""
    import torch

    from criadero.kernels import reference

    torch.set_num_threads(1)  # small matrices: threads would only wait for each other
    if " g" in kind:
        columns = groups * int(kind.split("g")[1])
    weights = make(kind, rows, columns, seed, scale_type)
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((m, columns), dtype=np.float32) * np.float32(10.0 ** rng.integers(-6, 4))
    x[:, rng.integers(columns)] *= 50  # models have such columns
    if seed % 3 == 0:
        x[rng.integers(m)] = 0
    exact = x.astype(float) @ dense(weights).T
    twin = None
    if isinstance(weights, QuantTensor):
        twin = reference.linear(torch.from_numpy(x), weights).numpy()
        assert (np.abs(twin - exact) <= tolerance(weights, x, "reference")).all()
    packed = kernels.pack(weights, threads)
    assert (packed.rows, packed.columns) == (rows, columns)
    for level in LEVELS:
        native.set_level(level)
        got = packed.apply(x, threads)
        assert got.shape == (m, rows)
        assert got.dtype == np.float32
        assert (np.abs(got - exact) <= tolerance(weights, x, level)).all(), level
        if twin is not None:
            # the same whole numbers; only the rounding of a few dozen float operations differs
            assert (np.abs(got - twin) <= (np.abs(x) @ sizes(weights).T) * 64 * EPS + 1e-28).all(), level


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS[:10])
def test_rows_do_not_depend_on_the_batch(level: str, kind: str) -> None:
    """To the bit: alone, in a batch of any size, at any place in it, and with any number of threads."""
    native.set_level(level)
    columns = 672 if kind in ("int8 row", "int8 g16", "int8 g32", "int4 g32", "int4m g32") else 640  # two chunks
    packed = kernels.pack(make(kind, 50, columns, 3), 2)
    x = np.random.default_rng(4).standard_normal((70, columns), dtype=np.float32)
    alone = np.concatenate([packed.apply(x[i : i + 1], 1) for i in range(70)])
    for m in range(1, 71):
        assert np.array_equal(packed.apply(x[:m], 1 + m % 3), alone[:m]), m
    for start in (1, 7, 33):
        assert np.array_equal(packed.apply(x[start:], 2), alone[start:])


def file_rows(kind: str, rows: int, columns: int, seed: int, offset: int = 0) -> np.ndarray:
    """The bytes of a BF16 or Q8_0 matrix as they lie in a file, `offset` bytes from where memory begins; nothing behind them."""
    rng = np.random.default_rng(seed)
    if kind == "BF16":
        raw = make("bf16", rows, columns, seed).view(np.uint8).reshape(-1)  # type: ignore[union-attr]
    else:
        blocks = rng.integers(0, 256, (rows * columns // 32, 34), dtype=np.uint8)
        scales = (rng.standard_normal((len(blocks), 1)) * 10.0 ** rng.integers(-3, 3)).astype(np.float16)
        blocks[:, :2] = scales.view(np.uint8)
        raw = blocks.reshape(-1)
    room = np.empty(offset + len(raw), np.uint8)
    room[offset:] = raw
    return room[offset:]


def pack_file_rows(kind: str, raw: np.ndarray, rows: int, columns: int, heads: int) -> Any:
    if kind == "Q8_0":
        return native.Linear.pack_ggml(kind, raw, rows, columns, heads, 1)
    weights = np.frombuffer(raw.tobytes(), np.uint16).reshape(rows, columns)
    return kernels.pack(np.ascontiguousarray(to_rotate_half(weights, heads)) if heads else weights, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["BF16", "Q8_0"]),
    rows=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([512, 1056, 2048])),
    heads=st.sampled_from([0, 0, 1, 3]),
    m=st.integers(1, 40),
    threads=st.sampled_from([1, 1, 2]),
    offset=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_where_they_lie(
    kind: str, rows: int, columns: int, heads: int, m: int, threads: int, offset: int, seed: int
) -> None:
    """Not repacked, of any shape, at any address and number of rows: the packed form's products to the bit, at every level."""
    rows = rows * 2 * heads if heads else rows
    columns = (columns + 31) // 32 * 32 if kind == "Q8_0" else columns
    raw = file_rows(kind, rows, columns, seed, offset)
    packed, mapped = (
        pack_file_rows(kind, raw, rows, columns, heads),
        native.Linear.map_rows(kind, raw, rows, columns, heads),
    )
    assert (mapped.rows, mapped.columns, mapped.nbytes) == (rows, columns, raw.nbytes)
    for n in (0, rows // 2, rows - 1):
        assert np.array_equal(mapped.row(n), packed.row(n))
    x = np.random.default_rng(seed + 1).standard_normal((m, columns), dtype=np.float32)
    del raw  # the matrix holds it
    for level in LEVELS:
        native.set_level(level)
        assert np.array_equal(mapped.apply(x, threads), packed.apply(x, threads)), level


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_batches_of_rows_where_they_lie(kind: str) -> None:
    """Every width of a block, one block and several, columns that end within a chunk, and more tiles than are shared out together."""
    raw = file_rows(kind, 1630, 64, 3)
    packed, mapped = pack_file_rows(kind, raw, 1630, 64, 0), native.Linear.map_rows(kind, raw, 1630, 64, 0)
    x = np.random.default_rng(4).standard_normal((33, 64), dtype=np.float32)
    for m in (1, 5, 33):
        assert np.array_equal(mapped.apply(x[:m], 1 + m % 2), packed.apply(x[:m], 1)), m
    raw = file_rows(kind, 50, 672, 3)
    packed, mapped = pack_file_rows(kind, raw, 50, 672, 0), native.Linear.map_rows(kind, raw, 50, 672, 0)
    x = np.random.default_rng(4).standard_normal((70, 672), dtype=np.float32)
    for m in (*range(1, 41), 64, 70):
        assert np.array_equal(mapped.apply(x[:m], 1 + m % 2), packed.apply(x[:m], 1)), m


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_what_is_not_finite_in_a_row_that_stays(level: str, kind: str) -> None:
    """It shows in that output, and in no other."""
    native.set_level(level)
    raw = file_rows(kind, 20, 64, 5)
    fine = native.Linear.map_rows(kind, raw.copy(), 20, 64, 0)
    at = 7 * (128 if kind == "BF16" else 68)
    raw[at : at + 2] = (0xC0, 0x7F) if kind == "BF16" else (0, 0x7E)
    mapped = native.Linear.map_rows(kind, raw, 20, 64, 0)
    for m in (1, 4, 33):
        x = np.ones((m, 64), np.float32)
        got = mapped.apply(x, 1)
        assert np.isnan(got[:, 7]).all()
        assert np.array_equal(np.delete(got, 7, axis=1), np.delete(fine.apply(x, 1), 7, axis=1))


def test_wrong_sizes_of_rows_that_stay() -> None:
    raw = file_rows("Q8_0", 4, 64, 6)
    for arguments, message in (
        (("Q4_0", raw, 4, 64, 0), "BF16 and Q8_0"), (("Q8_0", raw[1:], 4, 64, 0), "272 bytes are needed"),
        (("Q8_0", raw, 5, 64, 0), "340 bytes are needed"), (("Q8_0", raw, 4, 65, 0), "no whole blocks"),
        (("BF16", raw, 4, 64, 0), "512 bytes are needed"), (("Q8_0", raw, 4, 64, 3), "3 heads"), (("Q8_0", raw, 4, 64, -1), "-1 heads"),
        (("Q8_0", raw, 0, 64, 0), "0 x 64"), (("Q8_0", raw, 4, -32, 0), "4 x -32"), (("Q8_0", raw.view(np.int8), 4, 64, 0), "needed"),
        (("Q8_0", raw, 2**30, 2**30, 0), "needed"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            native.Linear.map_rows(*arguments)


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith(("64", "96", "160", "256"))])
def test_a_row_of_weights_comes_back(kind: str) -> None:
    """float16 scales are kept exactly, however large or small, and rows are what was packed."""
    columns = 50 if kind in ("bf16", "f32", "int8 row") else 384
    weights = make(kind, 35, columns, 5)
    packed = kernels.pack(weights, 2)
    want = dense(weights)
    for n in (0, 15, 16, 34):
        # with mins two float operations are rounded, in the engine as in numpy
        np.testing.assert_allclose(packed.row(n)[0], want[n], rtol=0, atol=2e-6 * np.abs(want).max())
    with pytest.raises(ValueError, match="row 35 of 35"):
        packed.row(35)
    with pytest.raises(ValueError, match="row -1"):
        packed.row(-1)


@pytest.mark.parametrize("top", [6e-8, 1e-3, 60000.0])
def test_scales_of_any_size(top: float) -> None:
    """The smallest subnormal and nearly the largest float16."""
    weights = make("int4 g32", 20, 96, 6)
    assert isinstance(weights, QuantTensor)
    scales = np.linspace(top / 8, top, weights.scales.size).reshape(weights.scales.shape).astype(np.float16)
    tensor = QuantTensor(4, 32, weights.q, scales)
    packed = kernels.pack(tensor)
    assert np.array_equal(np.concatenate([packed.row(n) for n in range(20)]), tensor.dequantise())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["int4 g32", "int4m g128", "int8 row", "int8 g16", "bf16", "f32"])
def test_what_is_not_finite_is_not_hidden(level: str, bad: float, kind: str) -> None:
    """A NaN or infinity spoils its own row and no other."""
    native.set_level(level)
    packed = kernels.pack(make(kind, 20, 256, 7))
    x = np.random.default_rng(8).standard_normal((5, 256), dtype=np.float32)
    fine = packed.apply(x, 1)
    x[2, 100] = bad
    got = packed.apply(x, 1)
    assert not np.isfinite(got[2]).any()
    assert np.array_equal(np.delete(got, 2, axis=0), np.delete(fine, 2, axis=0))


def test_no_rows() -> None:
    assert kernels.pack(make("int4 g32", 20, 64, 9)).apply(np.zeros((0, 64), np.float32), 2).shape == (0, 20)


def test_extreme_numbers_do_not_saturate() -> None:
    """The largest magnitudes everywhere: where 16-bit sums would overflow."""
    x = np.full((3, 256), 1.0, np.float32)
    x[1] = -1
    x[2, ::2] = -1
    for kind, value in itertools.product(("int4 g32", "int4m g32", "int8 g32", "int8 row"), (0x00, 0x7F, 0x80, 0xFF)):
        like = make(kind, 17, 256, 10)
        assert isinstance(like, QuantTensor)
        q = np.full(like.q.shape, value, np.uint8).view(like.q.dtype)
        tensor = QuantTensor(like.bits, like.group, q, np.ones_like(like.scales), like.mins)
        exact = x.astype(float) @ tensor.dequantise().astype(float).T
        for level in LEVELS:
            native.set_level(level)
            np.testing.assert_allclose(kernels.pack(tensor).apply(x, 1), exact, rtol=1e-5, atol=1e-3)


def test_wrong_sizes_are_refused() -> None:
    pack = native.Linear.pack_quant
    q4, q8 = np.zeros((4, 32), np.uint8), np.zeros((4, 64), np.int8)
    s = np.zeros((4, 2), np.float16)
    wrong = [
        ((q4, s, None, 5, 32, 1), "5 bits"),
        ((q8, s, None, 4, 32, 1), "q: uint8"),
        ((q4, s, None, 8, 32, 1), "q: int8"),
        ((q4[0], s, None, 4, 32, 1), "q: uint8"),
        ((q4, s[:3], None, 4, 32, 1), "scales:"),
        ((q4, s[:, :1], None, 4, 32, 1), "scales:"),
        ((q4, s.astype(np.float64), None, 4, 32, 1), "scales: float16 or float32"),
        ((q4, s, s[:3], 4, 32, 1), "mins:"),
        ((q8, s, s, 8, 32, 1), "mins go with 4 bits"),
        ((q4, s, None, 4, 0, 1), "groups of 0"),
        ((q4, s, None, 4, -32, 1), "groups of -32"),
        ((q4, s, None, 4, 48, 1), "groups of 48"),
        ((q4, np.zeros((4, 4), np.float16), None, 4, 16, 1), "groups of 16"),
        ((q8, np.zeros((4, 8), np.float16), None, 8, 8, 1), "groups of 8"),
        ((q4[:0], s[:0], None, 4, 32, 1), "0 x 64"),
        ((q4, np.full_like(s, np.nan), None, 4, 32, 1), "not finite"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            pack(*arguments)
    with pytest.raises(ValueError, match="float32 is needed"):
        native.Linear.pack_dense(q8, "f32", 1)
    with pytest.raises(ValueError, match="f32 and bf16"):
        native.Linear.pack_dense(q8, "f64", 1)
    packed = pack(q4, s, None, 4, 32, 1)
    for x in (np.zeros((2, 63), np.float32), np.zeros((2, 64)), np.zeros(64, np.float32)):
        with pytest.raises(ValueError, match="x:"):
            packed.apply(x, 1)
    with pytest.raises(ValueError, match='no level "sse"'):
        native.set_level("sse")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[2]), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("level", [*LEVELS, "reference"])
def test_the_level_can_be_forced(level: str) -> None:
    done = run("from criadero import kernels as k; print(k.level(), k.native() is None)", CRIADERO_KERNELS=level)
    assert done.stdout.split() == [level, str(level == "reference")], done.stderr


def test_a_level_that_is_not_there() -> None:
    code = "from criadero import kernels as k\ntry: k.level()\nexcept k.UserError as e: print(e)"
    assert "CRIADERO_KERNELS: sse is not one of portable" in run(code, CRIADERO_KERNELS="sse").stdout
    # without the module: said once, and the reference path is taken
    gone = "import sys; sys.modules['criadero.kernels._native'] = None; "
    done = run(gone + "from criadero import kernels as k; print(k.level(), k.level())", CRIADERO_NATIVE="")
    assert done.stdout.split() == ["reference", "reference"]
    assert done.stderr.count("without its compiled kernels") == 1
    assert "needs the compiled kernels" in run(gone + code, CRIADERO_KERNELS="avx2", CRIADERO_NATIVE="").stdout
    assert "no _native*.so in" in run(code, CRIADERO_NATIVE=str(Path(__file__).parent)).stdout


def test_packing_needs_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native", lambda: None)
    with pytest.raises(UserError, match="packing needs"):
        kernels.pack(np.zeros((2, 32), np.float32))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_pool(threads: int) -> None:
    """Barriers hold, tickets are unique, and workers wake up again after sleeping; with more threads than cores too."""
    assert native.test_pool(threads, 130 if threads < 3 else 10, 20 if threads < 3 else 3) == 0


def test_several_callers_take_turns() -> None:
    packed = kernels.pack(make("int4 g32", 64, 256, 11), 2)
    x = np.random.default_rng(12).standard_normal((9, 256), dtype=np.float32)
    want, wrong = packed.apply(x, 2), []

    def call() -> None:
        for _ in range(50):
            if not np.array_equal(packed.apply(x, 2), want):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong


def test_a_forked_child_makes_its_own_threads() -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore")
import numpy as np
from criadero import kernels
w = kernels.pack(np.ones((64, 64), np.float32), 2)
x = np.ones((4, 64), np.float32)
w.apply(x, 2)
child = os.fork()
if child == 0:
    os._exit(0 if (w.apply(x, 2) == 64).all() else 1)
print(os.waitpid(child, 0)[1], (w.apply(x, 2) == 64).all())
"""
    done = run(code)
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_what_the_benchmark_calls() -> None:
    weights = [kernels.pack(make(kind, 32, 128, 13)) for kind in ("int4 g32", "bf16", "f32", "int8 g16")]
    for level in LEVELS:
        native.set_level(level)
        assert native.time_products(weights, np.ones((3, 128), np.float32), 2) > 0
        assert native.bandwidth(1 << 20, 1, 0.0) > 0
        assert native.peak("f32", 1, 0.0) >= 0
    with pytest.raises(ValueError, match="columns"):
        native.time_products(weights, np.ones((3, 64), np.float32), 2)
