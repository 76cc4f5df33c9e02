"""Tracking: what the tools' own stores hold is what metrics.jsonl holds; a missing package is one line."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criadero.errors import UserError
from criadero.train import checkpoint
from criadero.train.track import check_tracker, figures, tracker

LINES: list[dict[str, Any]] = [
    {"step": n, "loss": 3.0 / n, "lr": 1e-3, "answers": [f"answer {n}", "¿sí?"], "held_out": {"es": {"loss": 2.0 / n}}}
    for n in range(1, 6)
]
FLAT = {"loss", "lr", "held_out/es/loss"}


def killed_after(folder: Path, written: list[dict[str, Any]], step: int) -> None:
    """What is there when a run that wrote these lines is gone on with from its resume point after ``step``."""
    text = "".join(json.dumps(line) + "\n" for line in written)
    (folder / "out.partial" / "metrics.jsonl").write_text(text + '{"step": 99, "lo', encoding="utf-8")
    checkpoint.save(folder / "out.partial" / "resume", step, {}, {})


def follow(which: str, folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "out.partial").mkdir(exist_ok=True)
    with tracker(which, folder / "out", folder / "out.partial", {"lora_rank": 8, "base": "cria", "card": None}) as tell:
        assert tell
        for line in lines:
            tell(line)


def test_figures_are_flat() -> None:
    assert figures(LINES[0]) == {"loss": 3.0, "lr": 1e-3, "held_out/es/loss": 2.0}
    assert figures({"step": 3, "fine": True, "n": 2}) == {"n": 2.0}


def test_nobody_asked(tmp_path: Path) -> None:
    with tracker("none", tmp_path / "out", tmp_path, {}) as tell:
        assert tell is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("which", "package"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("trackio", "trackio")]
)
def test_a_missing_package_is_one_line(which: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"the package {package} is not installed: pip install 'criadero\[{which}\]'"):
        check_tracker(which)
    check_tracker("none")


def records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, the bytes, their checksum (masked CRC-32C)."""
    from tensorboardX.crc32c import crc32c

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length, crc) = struct.unpack_from("<QI", data, at)
        assert crc == masked(data[at : at + 8])
        payload = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked(payload)
        yield payload
        at += 16 + length


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    follow("tensorboard", tmp_path, [LINES[0], LINES[3]])  # killed after step 4; lines 2 and 3 were never written
    killed_after(tmp_path, LINES[:4], 2)
    follow("tensorboard", tmp_path, LINES[2:])
    shown: dict[str, dict[int, float]] = {}
    texts: dict[int, str] = {}
    for file in sorted((tmp_path / "runs" / "out").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in map(Event.FromString, records(file)):
            if event.session_log.status == SessionLog.START:
                for values in shown.values():  # as TensorBoard does: what was there from this step on is not
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert event.step not in shown.setdefault(value.tag, {})
                    shown[value.tag][event.step] = value.simple_value
                elif value.tag.startswith("answers"):
                    texts[event.step] = value.tensor.string_val[0].decode()
                elif value.tag.startswith("settings"):
                    assert "| lora_rank | 8 |" in value.tensor.string_val[0].decode()
                    assert "card" not in value.tensor.string_val[0].decode()
    assert shown.keys() == FLAT
    for name in FLAT:
        assert shown[name] == pytest.approx({line["step"]: figures(line)[name] for line in LINES})
    assert texts[3] == "1. answer 3\n\n2. ¿sí?"


# what the tool had when the run was killed; the resume point was after step 3
KILLED = {"as much as the point": 3, "less than the point": 2, "more than the point": 5}


@pytest.mark.parametrize("had", KILLED.values(), ids=KILLED)
def test_mlflow_store_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had: int) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    follow("mlflow", tmp_path, LINES[:had])
    killed_after(tmp_path, LINES, 3)
    follow("mlflow", tmp_path, LINES[3:])
    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")  # one run: the second went on in the first
    rows = [line.split() for line in losses.read_text().splitlines()]
    assert [(int(step), float(value)) for _, value, step in rows] == [(n, 3.0 / n) for n in range(1, 6)]
    run = losses.parents[1]
    assert {str(path.relative_to(run / "metrics")) for path in (run / "metrics").rglob("*") if path.is_file()} == FLAT
    assert (run / "params" / "lora_rank").read_text() == "8"
    assert (run / "artifacts" / "answers" / "step-00000005.txt").read_text() == "1. answer 5\n\n2. ¿sí?"


def test_another_run_of_the_same_name_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    follow("mlflow", tmp_path, LINES)
    follow("mlflow", tmp_path, LINES[:2])  # begun anew: there is nothing to resume
    counts = [len(path.read_text().splitlines()) for path in (tmp_path / "mlruns").glob("*/*/metrics/loss")]
    assert sorted(counts) == [2, 5]


@pytest.mark.parametrize("had", KILLED.values(), ids=KILLED)
def test_trackio_database_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, had: int) -> None:
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    from trackio import utils

    for module in (storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    follow("trackio", tmp_path, LINES[:had])
    killed_after(tmp_path, LINES, 3)
    follow("trackio", tmp_path, LINES[3:])
    (database,) = tmp_path.rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, run_name, metrics from metrics order by step").fetchall()
    assert [step for step, _, _ in rows] == [1, 2, 3, 4, 5]
    assert {name for _, name, _ in rows} == {"out"}
    for (step, _, text), line in zip(rows, LINES, strict=True):
        found = json.loads(text)
        assert "1. answer" in json.dumps(found.pop("answers"))
        assert found == pytest.approx(figures(line)), step


def test_a_run_that_breaks_off_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(KeyboardInterrupt), tracker("mlflow", tmp_path / "out", tmp_path, {}):
        raise KeyboardInterrupt
    (meta,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    assert "status: 5" in meta.read_text()  # KILLED
