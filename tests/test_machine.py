"""machine.py: energy by counters or by estimate, and what a passport says of the machine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from criadero import machine
from criadero.artifact import create, open_artifact


def counter(folder: Path, name: str, value: int, limit: int = 1000) -> Path:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{value}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / name / "energy_uj"


def test_counters_are_added_up_over_packages_and_past_their_end(tmp_path: Path) -> None:
    first, second = (counter(tmp_path, f"intel-rapl:{n}", 900, 1000) for n in range(2))
    counter(tmp_path, "intel-rapl:0:0", 5)  # a part of the first package: it is in that one's counter
    meter = machine.EnergyMeter(tmp_path, every=3600)
    first.write_text("950\n")
    meter._add()  # as the watcher does now and then
    first.write_text("100\n")  # ran over at 1000
    second.write_text("930\n")
    said = meter.stop()
    assert said["method"] == "rapl"
    assert said["kwh"] == pytest.approx((50 + 150 + 30) / 1e6 / 3.6e6, rel=0.01)


def test_without_counters_it_is_an_estimate_and_says_so(tmp_path: Path) -> None:
    meter = machine.EnergyMeter(tmp_path / "absent")
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    said = meter.stop()
    assert said["method"] == "estimate"
    assert "CPU seconds x 7 W" in said["how"]
    assert said["kwh"] == pytest.approx(said["cpu_seconds"] * 7 / 3.6e6, rel=0.6)  # cpu_seconds is rounded to tenths


def test_a_passport_names_hardware_and_energy(tmp_path: Path) -> None:
    with create(tmp_path / "m", kind="base", config={}) as draft:
        (draft.path / "config.json").write_text("{}")
    step = open_artifact(tmp_path / "m").passport["step"]
    assert step["hardware"]["cores"] >= 1
    assert step["hardware"]["cpu"] == step["env"]["cpu"]
    assert step["energy"].keys() == {"kwh", "method", "how", "seconds", "cpu_seconds"}
    assert float(step["energy"]["kwh"]) >= 0
