"""The GGUF container: a header of typed keys, a table of tensors, aligned data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). A file comes from
strangers, so every count, length, offset, alignment, type and size in it is compared with the size of the file before
anything of that size is allocated or read. Data is read, not mapped: a file that shrinks meanwhile is an error, no crash.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from criadero.checkpoints.ggml import FORMATS, unpack, unpack_array
from criadero.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 32
HEADER_LIMIT = 1 << 28  # bytes of keys and tensor table; a 256k vocabulary with merges takes about 10 MB
STRING, ARRAY = 8, 9
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip
KINDS = {format.code: kind for kind, format in FORMATS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` in torch's order (rows first), ``offset`` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """A checked GGUF header: every tensor in it lies inside the file and overlaps no other."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """Reads the header front to back and never beyond the file or `HEADER_LIMIT`."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.path, self.at, self.end = file, path, 0, min(size, HEADER_LIMIT)
        self.limited = size > HEADER_LIMIT

    def bad(self, reason: str) -> UserError:
        reason = reason if len(reason) <= 200 else reason[:120] + " ... " + reason[-60:]  # a damaged name may be long
        return UserError(f"{self.path}: damaged GGUF file: {reason}; get the file again")

    def room(self, count: int, each: int, what: str) -> None:
        """Refuse ``count`` things of at least ``each`` bytes where the file has no room for them."""
        if count * each > self.end - self.at:
            limit = "the header may take" if self.limited else "the file has left"
            raise self.bad(f"{what} needs {count * each} bytes at byte {self.at}, more than {limit}")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, 1, what)
        data = self.file.read(count)
        if len(data) != count:
            raise self.bad(f"it ends inside {what}")
        self.at += count
        return data

    def number(self, form: str, what: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = SCALARS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize, what), dtype=np.uint8 if kind == 7 else dtype)
        if kind == 7:
            if (values > 1).any():
                raise self.bad(f"{what} is neither true nor false")
            values = values.astype(bool)
        if kind == 6:  # the shortest decimal of the float32: 1e-05, not 9.999999747378752e-06
            return [float(str(value)) for value in values]
        return values.tolist()

    def value(self, what: str) -> Any:
        kind = self.number("I", what)
        if kind == ARRAY:
            kind, count = self.number("I", what), self.number("Q", what)
            if kind == STRING:
                self.room(count, 8, what)
                return [self.string(what) for _ in range(count)]
            if kind in SCALARS:
                self.room(count, SCALARS[kind].itemsize, what)
                return self.scalars(kind, count, what)
            raise self.bad(f"{what} is an array of unknown type {kind}")
        if kind == STRING:
            return self.string(what)
        if kind in SCALARS:
            return self.scalars(kind, 1, what)[0]
        raise self.bad(f"{what} has unknown type {kind}")


def read_header(path: str | Path) -> Header:
    """Read and check everything but the data of the tensors.

    The last one is kept, for as long as its file is not written to: opening a model asks for it five times, and a vocabulary of
    32,000 tokens takes a tenth of a second.
    """
    path = Path(path)
    try:
        now = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if time.time_ns() - now.st_mtime_ns < 10**9:  # it may be written to once more in the same tick of its clock
        return _read_header(path)
    return _kept(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _kept(path: Path, version: tuple[int, ...]) -> Header:
    return _read_header(path)


def _read_header(path: Path) -> Header:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, size, path)
        if size < 24 or cursor.take(4, "the magic number") != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
        version = cursor.number("I", "the version")
        if version in (2 << 24, 3 << 24):
            raise UserError(f"{path}: a big-endian GGUF file; convert it to little-endian first")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported, only 2 and 3: convert the model anew")
        tensor_count, key_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
        cursor.room(key_count, 13, f"{key_count} keys")
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = cursor.string(f"the name of key {index}")
            if key in metadata:
                raise cursor.bad(f"key {key!r} occurs twice")
            metadata[key] = cursor.value(f"key {key!r}")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment > 1 << 20 or alignment & (alignment - 1):
            raise cursor.bad(f"general.alignment is {alignment!r}, not a power of two from 8 up")
        cursor.room(tensor_count, 32, f"{tensor_count} tensors")
        table = [_tensor_entry(cursor, index) for index in range(tensor_count)]
        start = -(-cursor.at // alignment) * alignment
    tensors = _checked_tensors(table, start, size, alignment, cursor.bad)
    return Header(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor, index: int) -> TensorInfo:
    """One row of the table; the offset is still counted from the start of the data."""
    name = cursor.string(f"the name of tensor {index}")
    dimensions = cursor.number("I", f"tensor {name!r}")
    if not 1 <= dimensions <= 4:
        raise cursor.bad(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.number("Q", f"tensor {name!r}") for _ in range(dimensions))[::-1]
    code, offset = cursor.number("I", f"tensor {name!r}"), cursor.number("Q", f"tensor {name!r}")
    if code not in KINDS:
        known = ", ".join(FORMATS)
        raise UserError(f"{cursor.path}: tensor {name!r} has type number {code}; only {known} can be read")
    kind = KINDS[code]
    if min(shape) < 1 or shape[-1] % FORMATS[kind].block:
        raise cursor.bad(f"tensor {name!r} of type {kind} cannot have shape {list(shape)}")
    size = math.prod(shape) // FORMATS[kind].block * FORMATS[kind].size
    return TensorInfo(name, shape, kind, offset, size)


def _checked_tensors(
    table: Sequence[TensorInfo], start: int, size: int, alignment: int, bad: Callable[[str], UserError]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in table:
        if info.name in tensors:
            raise bad(f"tensor {info.name!r} occurs twice")
        if info.offset % alignment:
            raise bad(f"tensor {info.name!r} starts at {info.offset}, not a multiple of {alignment}")
        if start + info.offset + info.size > size:
            missing = start + info.offset + info.size - size
            raise bad(f"tensor {info.name!r} ends {missing} bytes after the file does")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.kind, start + info.offset, info.size)
    order = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in pairwise(order):
        if before.offset + before.size > after.offset:
            raise bad(f"tensors {before.name!r} and {after.name!r} overlap")
    return tensors


def read_bytes(header: Header, name: str) -> NDArray[np.uint8]:
    """The bytes of one tensor as they stand in the file."""
    info = header.tensors[name]
    raw = np.fromfile(header.path, dtype=np.uint8, count=info.size, offset=info.offset)
    if len(raw) != info.size:
        raise UserError(f"{header.path}: the file shrank while it was read; get the file again")
    return raw


def read_array(header: Header, name: str) -> np.ndarray:
    """One tensor; see `criadero.checkpoints.ggml.unpack_array`."""
    info = header.tensors[name]
    return unpack_array(read_bytes(header, name), info.kind, info.shape)


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor: as stored when it is F32, F16 or BF16, unpacked to float32 otherwise."""
    info = header.tensors[name]
    return unpack(read_bytes(header, name), info.kind, info.shape)


# --- writing ---


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """bool, int (uint32), float (float32), str, or a list of one of these (ints in lists are int32)."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    items = list(value)
    head = struct.pack("<I", ARRAY)
    if items and isinstance(items[0], str):
        return head + struct.pack("<IQ", STRING, len(items)) + b"".join(map(_string, items))
    kind = 6 if items and isinstance(items[0], float) else 5
    return head + struct.pack("<IQ", kind, len(items)) + np.asarray(items, SCALARS[kind]).tobytes()


def write_file(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    data: Callable[[str], np.ndarray],
) -> None:
    """Write a GGUF file (version 3). ``tensors``: name, shape, kind; ``data(name)`` gives the packed bytes of one.

    The file appears under its name only when it is whole.
    """
    path = Path(path)
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    sizes = {}
    for name, shape, kind in tensors:
        sizes[name] = math.prod(shape) // FORMATS[kind].block * FORMATS[kind].size
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(_string(name) + dimensions + struct.pack("<IQ", FORMATS[kind].code, offset))
        offset += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(b"".join(head))
            for name, _, _ in tensors:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                packed = data(name)
                assert packed.nbytes == sizes[name], name
                file.write(packed.data)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
