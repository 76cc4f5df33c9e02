"""Small versions of benchmarks/trust.py: every mutation is found, nothing whole raises an alarm, every proof is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def trust() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "trust.py"
    spec = importlib.util.spec_from_file_location("benchmark_trust", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutation_is_found_and_no_folder_that_is_whole_alarms(trust: ModuleType, tmp_path: Path) -> None:
    found = trust.tampering(tmp_path, 0.02)
    assert found["found"] == found["mutations"] >= 190
    assert found["by_kind"]["replay old signature"]["codes"].keys() == {5}
    assert found["by_kind"]["edit metric"]["codes"].keys() == {5}  # every hash is right: only the signature tells
    assert trust.alarms(tmp_path, 0.02) == {"tries": 20, "alarms": 0}


def test_proofs_are_right_and_small(trust: ModuleType, tmp_path: Path) -> None:
    found = trust.membership(tmp_path, 0.005)
    assert (found["right"], found["documents"]) == (found["queries"], 5000)
    assert found["largest_proof_bytes"] < 1500


def test_every_figure_has_a_row(trust: ModuleType) -> None:
    result = {
        "trace": {"trace": {"warm_ms": {"p50": 60}}, "recall": {"recalled": 9, "planted": 10}, "build": {"bytes_a_token": 6.0},
                  "peer_build": {"bytes_a_token": 6.1}},
        "alarms": {"alarms": 0},
    }  # fmt: skip
    result["trace"] |= trust.ratios(result["trace"])
    rows = {row["what"]: row for row in trust.table(result)}
    assert len(rows) == len(trust.FIGURES)
    assert rows["trace of a 450-token answer, warm, p50"] == {
        "what": "trace of a 450-token answer, warm, p50", "target": "<= 50 ms", "value": 60, "met": False,
    }  # fmt: skip
    assert (rows["planted spans found"]["target"], rows["planted spans found"]["met"]) == ("all of 10", False)
    assert (rows["our size over infini-gram's"]["value"], rows["our size over infini-gram's"]["met"]) == (0.984, True)
    assert rows["false alarms"]["met"] is True
    assert rows["mutations found"]["met"] is None
