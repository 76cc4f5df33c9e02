"""The recipes of synth: every one can be read, and the first stage of those that need no other data is made as it stands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from criadero.artifact import bundled_models, verify
from criadero.run import plan, run

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", ["alpaca", "dolly", "documents", "vicuna", "wizardlm"])
def test_recipes_are_whole(name: str, tmp_path: Path) -> None:
    steps = plan(RECIPES / name, tmp_path)
    assert steps[-1].stage == "sft"
    assert len((RECIPES / name / "card.md").read_text().split()) > 80


@pytest.mark.parametrize(
    ("name", "source", "removed"),
    [
        ("alpaca", "self_instruct", {"alike", "enough", "short"}),
        ("wizardlm", "evol_instruct", set()),
        ("documents", "documents", set()),
        ("vicuna", "shared", {"duplicate", "empty", "language"}),
    ],
)
def test_first_stage(name: str, source: str, removed: set[str], tmp_path: Path) -> None:
    """A prompt that was changed would not find its recorded answer any more."""
    if name == "vicuna" and "cria" not in bundled_models():
        pytest.skip("criadero/bundled/cria is not there yet")
    first = plan(RECIPES / name, tmp_path)[0]
    made = first.function(first.recipe, first.out)
    row = next(row for row in made.passport["data"]["by_source"] if row["name"] == source)
    assert row["removed"].keys() == removed
    assert row["documents_out"] > 7


def shortened(name: str, folder: Path) -> Path:
    """A copy of a recipe that asks for less: few tasks and chats, one pass."""
    copy = folder / name
    shutil.copytree(RECIPES / name, copy)
    turns = (RECIPES / "cria" / "turns.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "cria").mkdir(exist_ok=True)
    (folder / "cria" / "turns.jsonl").write_text("".join(turns[:60]), encoding="utf-8")
    for file in copy.glob("*.toml"):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"(?m)^epochs = .*$", "epochs = 1", text).replace("tasks = 40", "tasks = 10")
        if name == "dolly":  # without the data that are not in the project
            text = re.sub(r'\[\[source\]\]\nname = "dolly".*?(?=\[\[source\]\])', "", text, flags=re.DOTALL)
            text = text.replace("held_out = 0.05", "held_out = 0.2")
        file.write_text(text, encoding="utf-8")
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpaca", "dolly", "documents", "vicuna", "wizardlm"])
def test_runs_end_to_end(name: str, tmp_path: Path) -> None:
    """Both stages with the bundled model: what is made has been measured, compared and sealed."""
    if "cria" not in bundled_models():
        pytest.skip("criadero/bundled/cria is not there")
    made = run(shortened(name, tmp_path), out=tmp_path / "out")
    tuned = made[-1]
    losses = {row["slice"]: float(row["value"]) for row in tuned.metrics if row["metric"] == "loss"}
    assert losses["after"] < losses["before"] + 0.05
    assert (tuned.path / "report.html").is_file()
    assert tuned.passport["model"]["method"] == "lora"
    assert verify(tuned.path) == []
