"""The recipes of synth: every one can be read, and the first stage of those that need no other data is made as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from criadero.artifact import bundled_models
from criadero.run import plan

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
