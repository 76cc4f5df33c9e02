"""Documents, and readers of every format that they come in.

A row is a ``dict``; a reader yields ``(where, row)``, where ``where`` is ``FILE:LINE`` (or ``FILE row N``), so that any
complaint can name the place. Formats go by the file's name: ``.jsonl`` ``.ndjson`` ``.json`` ``.parquet`` ``.csv`` ``.tsv``
``.txt`` ``.md``, each of them also with ``.gz`` or ``.zst`` behind it (not Parquet), and folders of such files.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from criadero.errors import UserError

ROWS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
TEXTS = (".txt", ".md", ".markdown")
PACKED = (".gz", ".zst")
FORMATS = "JSONL, JSON, Parquet, CSV, TSV, plain text or Markdown, also packed as .gz or .zst"

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One text and where it comes from. ``meta["messages"]`` holds the turns when the document is a chat."""

    id: str
    text: str
    lang: str
    source: str
    licence: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``chat`` or ``text``."""
        return "chat" if "messages" in self.meta else "text"


def file_format(path: Path) -> str:
    """The format's suffix, packing taken off: ``chats.jsonl.zst`` -> ``.jsonl``; UserError when unknown."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    suffix = name.suffix.lower()
    if suffix not in ROWS + TEXTS:
        raise UserError(f"{path}: unknown format {suffix or '(no suffix)'!r}; give {FORMATS}")
    return suffix


def find_files(path: str | Path) -> list[Path]:
    """The file itself, or the readable files of a folder in order of name (hidden ones left out)."""
    path = Path(path)
    if path.is_file():
        file_format(path)
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; check the name")
    found = []
    for each in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in each.relative_to(path).parts) or not each.is_file():
            continue
        name = each.with_suffix("") if each.suffix.lower() in PACKED else each
        if name.suffix.lower() in ROWS + TEXTS:
            found.append(each)
    if not found:
        raise UserError(f"{path}: the folder has no file to read; put {FORMATS} in it")
    return found


def read_rows(path: str | Path, *, skip_bad: bool = False, bad: list[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ``(where, row)`` of a file or of every file of a folder; a text file is one row ``{"text": ...}``.

    A malformed line raises UserError naming file and line; with ``skip_bad`` its complaint is appended to ``bad`` instead.
    A file that cannot be opened or unpacked always raises: that is not one bad line.
    """
    bad = bad if bad is not None else []
    for file in find_files(path):
        suffix = file_format(file)
        try:
            if suffix == ".parquet":
                yield from _read_parquet(file)
                continue
            with open_binary(file) as stream:
                if suffix in (".jsonl", ".ndjson"):
                    yield from _read_jsonl(file, stream, skip_bad, bad)
                elif suffix == ".json":
                    yield from _read_json(file, stream, skip_bad, bad)
                elif suffix in (".csv", ".tsv"):
                    yield from _read_csv(file, stream, "\t" if suffix == ".tsv" else ",", skip_bad, bad)
                else:
                    yield from _read_text(file, stream, skip_bad, bad)
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file}: cannot be read ({reason}); check the file and its permissions") from error


def open_binary(path: Path) -> BinaryIO:
    """Open for reading, unpacked when the name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 20)
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """Unpacked bytes of a .zst file, frame after frame. A damaged or cut-off file raises OSError: zstandard's own reader ends
    quietly where a file was cut, which would lose rows without a word."""

    def __init__(self, path: Path) -> None:
        import zstandard

        # 2**27: files packed with `zstd --long=27` need the larger window
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
        self.error = zstandard.ZstdError
        self.file = path.open("rb")
        self.frame = self.decompressor.decompressobj()
        self.inside = False  # within a frame that has not ended
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.file.read(1 << 18)
            if not packed:
                if self.inside:
                    raise OSError("the .zst is cut off before its end")
                return 0
            self.ready = b"".join(self._unpack(packed))
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def _unpack(self, packed: bytes) -> Iterator[bytes]:
        while packed:
            try:
                yield self.frame.decompress(packed)
            except self.error as error:
                raise OSError(f"damaged .zst: {error}") from error
            self.inside = not self.frame.eof
            packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = self.decompressor.decompressobj()

    def close(self) -> None:
        self.file.close()
        super().close()


def _complain(message: str, skip_bad: bool, bad: list[str]) -> None:
    if not skip_bad:
        raise UserError(f"{message}; mend it, or skip bad lines with skip_bad")
    bad.append(message)


def _read_jsonl(file: Path, stream: BinaryIO, skip_bad: bool, bad: list[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            _complain(f"{where}: not UTF-8 (byte {error.start} of the line)", skip_bad, bad)
        except (ValueError, RecursionError) as error:
            _complain(f"{where}: not valid JSON ({_json_reason(error)})", skip_bad, bad)
        else:
            if (reason := _no_row(row, line)) is None:
                yield where, row
            else:
                _complain(f"{where}: {reason}", skip_bad, bad)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]  # an endless number


def _no_row(row: Any, written: bytes) -> str | None:
    """Why a JSON value is no row, or None. `written` is the JSON that it comes from."""
    if not isinstance(row, dict):
        return f"expected an object {{...}}, got {type(row).__name__}"
    if b"\\ud" in written or b"\\uD" in written:  # an escaped pair is one character; half of one is no text
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = json.dumps(error.object[error.start]).strip('"')
            return f"half of a character ({half}), which no text can hold"
    return None


def _read_json(file: Path, stream: BinaryIO, skip_bad: bool, bad: list[str]) -> Iterator[tuple[str, Row]]:
    data = stream.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({_json_reason(error)}); mend it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({_json_reason(error)}); mend it") from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(lists) != 1:
            raise UserError(
                f"{file}: expected a list of objects, or one object that holds exactly one; got {len(lists)} lists"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise UserError(f"{file}: expected a list of objects, got {type(value).__name__}; wrap the rows in [...]")
    for number, row in enumerate(value, 1):
        where = f"{file} row {number}"
        if (reason := _no_row(row, data)) is None:
            yield where, row
        else:
            _complain(f"{where}: {reason}", skip_bad, bad)


def _read_csv(
    file: Path, stream: BinaryIO, delimiter: str, skip_bad: bool, bad: list[str]
) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise UserError(
                f"{file}:1: the header has empty or repeated column names {header}; give each column one name"
            )
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                _complain(f"{file}:{reader.line_num}: not valid CSV ({error})", skip_bad, bad)
                continue
            if not cells:
                continue
            where = f"{file}:{reader.line_num}"
            if len(cells) == len(header):
                yield where, dict(zip(header, cells, strict=True))
            else:
                _complain(f"{where}: {len(cells)} columns where the header has {len(header)}", skip_bad, bad)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 after line {reader.line_num}; save it as UTF-8") from error


def _read_text(file: Path, stream: BinaryIO, skip_bad: bool, bad: list[str]) -> Iterator[tuple[str, Row]]:
    data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _complain(f"{file}:{line}: not UTF-8 (byte {error.start})", skip_bad, bad)
        return
    if text.strip():
        yield str(file), {"text": text}
    else:
        _complain(f"{file}: empty", skip_bad, bad)


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"{file}: reading Parquet needs pyarrow; install it with: pip install 'criadero[parquet]'"
        ) from error
    try:
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not a readable Parquet file ({str(error).splitlines()[0]}); check the file"
        ) from error


def read_documents(
    path: str | Path,
    *,
    source: str,
    licence: str,
    lang: str = "",
    text_field: str = "text",
    licence_field: str = "",
    skip_bad: bool = False,
    bad: list[str] | None = None,
) -> Iterator[Document]:
    """Documents of a file or folder. ``id`` is the row's own ``id`` or its place; ``lang`` the row's own or the given one.

    ``meta["row"]`` is the row without its text. A row whose text is missing, not a string or blank is a bad line.
    """
    bad = bad if bad is not None else []
    base = Path(path)
    for where, row in read_rows(path, skip_bad=skip_bad, bad=bad):
        text = row.get(text_field)
        if not isinstance(text, str) or not text.strip():
            have = ", ".join(map(repr, list(row)[:8]))
            _complain(f"{where}: no text in the field {text_field!r} (fields: {have})", skip_bad, bad)
            continue
        place = where.replace(str(base.parent) + "/", "", 1)
        yield Document(
            id=str(row.get("id") or place),
            text=text,
            lang=str(row.get("lang") or lang),
            source=source,
            licence=str(row.get(licence_field) or licence) if licence_field else licence,
            meta={"row": {k: v for k, v in row.items() if k != text_field}},
        )
