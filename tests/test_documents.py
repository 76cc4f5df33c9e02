"""Readers: every format gives the same rows, and every malformed file is named with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
import zstandard

from criadero.data.documents import Document, find_files, read_documents, read_rows
from criadero.errors import UserError

ROWS = [{"id": "a", "text": "Hola, ¿qué tal?\nBien."}, {"id": "b", "text": 'She said "yes", twice; 3 < 4.'}]


def write(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    jsonl = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.endswith(".jsonl.zst"):
        path.write_bytes(zstandard.ZstdCompressor().compress(jsonl.encode()))
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(jsonl.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(jsonl, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / name))] == ROWS


def test_long_window_and_several_frames(tmp_path: Path) -> None:
    data = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(1000)).encode()
    params = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=params).compress(data)
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(packed + packed)
    assert len(list(read_rows(path))) == 2000


def test_folder_of_markdown_and_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# Dos\n\nTexto.\n", encoding="utf-8")
    (tmp_path / "one.txt").write_text("\ufeffUno", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no", encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    documents = list(read_documents(tmp_path, source="s", licence="CC0-1.0", lang="es"))
    assert [d.text for d in documents] == ["# Dos\n\nTexto.\n", "Uno"]
    assert documents[0].id.endswith("b/two.md")
    assert documents[1] == Document(documents[1].id, "Uno", "es", "s", "CC0-1.0", {"row": {}})


def test_json_with_one_list_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [row for _, row in read_rows(path)] == ROWS
    path.write_text(json.dumps({"a": ROWS, "b": ROWS}))
    with pytest.raises(UserError, match="exactly one; got 2"):
        list(read_rows(path))


BAD_LINES = {
    b'{"text": "ok"}\n{"text": \n': ":2: not valid JSON",
    b'{"text": "ok"}\n[1, 2]\n': ":2: expected an object",
    b'{"text": "ok"}\n\n{"text": "\xff"}\n': ":3: not UTF-8",
    b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n": ":2: not valid JSON",
}


@pytest.mark.parametrize("data", BAD_LINES, ids=["cut", "list", "latin1", "deep"])
def test_malformed_line_is_named_or_counted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert str(path) + BAD_LINES[data] in str(caught.value)
    assert "\n" not in str(caught.value)
    bad: list[str] = []
    assert [row for _, row in read_rows(path, skip_bad=True, bad=bad)] == [{"text": "ok"}]
    assert len(bad) == 1
    assert BAD_LINES[data] in bad[0]


def test_csv_complaints(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,id\n"two\nlines",1\nonly one\nlast,2\n')
    with pytest.raises(UserError, match=r"a\.csv:4: 1 columns where the header has 2"):
        list(read_rows(path))
    bad: list[str] = []
    assert [row["id"] for _, row in read_rows(path, skip_bad=True, bad=bad)] == ["1", "2"]
    assert len(bad) == 1
    path.write_text("text,text\na,b\n")
    with pytest.raises(UserError, match="repeated column names"):
        list(read_rows(path))
    path.write_bytes(b"text\nok\n\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_damaged_packing_is_one_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS * 500)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        list(read_rows(path, skip_bad=True))
    path.write_bytes(b"not packed at all, of no format " * 10)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        list(read_rows(path, skip_bad=True))


def test_missing_unknown_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_files(tmp_path / "none.jsonl")
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"unknown format '\.docx'"):
        find_files(tmp_path / "a.docx")
    with pytest.raises(UserError, match="no file to read"):
        find_files(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"criadero\[parquet\]"):
        list(read_rows(path))


def test_text_field_and_licence_of_the_row(tmp_path: Path) -> None:
    rows = [{"body": "uno", "license": "CC0"}, {"body": "  ", "license": "CC0"}, {"body": "two", "license": ""}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:1: no text in the field 'text' \(fields: 'body', 'license'\)"):
        list(read_documents(path, source="s", licence="x"))
    bad: list[str] = []
    documents = list(
        read_documents(
            path, source="s", licence="x", text_field="body", licence_field="license", skip_bad=True, bad=bad
        )
    )
    assert [(d.text, d.licence, d.id) for d in documents] == [("uno", "CC0", "a.jsonl:1"), ("two", "x", "a.jsonl:3")]
    assert len(bad) == 1


def test_csv_reader_agrees_with_the_standard_library(tmp_path: Path) -> None:
    text = 'a,b\n"x, ""y""","line\nbreak"\n,"é"\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == list(csv.DictReader(io.StringIO(text)))
