"""run.py: a folder of recipes, with tiny stages handed in instead of the real ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from criadero.artifact import Artifact, create, open_artifact
from criadero.errors import UserError
from criadero.run import NEEDS, STAGES, Stages, make, run, tuned_name


@dataclass(frozen=True)
class Source:
    path: str
    licence: str = "CC0-1.0"


@dataclass(frozen=True)
class DataRecipe:
    source: tuple[Source, ...] = ()
    lower: bool = False


@dataclass(frozen=True)
class SftRecipe:
    base: str = field(metadata={"help": "the model to start from"})
    data: str = ""
    lr: float = 0.1


class Fakes:
    """A data stage that joins texts and an sft stage that names its inputs; `done` is what ran."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.interrupt = False
        self.stages: Stages = {"data": lambda: (DataRecipe, self.data), "sft": lambda: (SftRecipe, self.sft)}

    def data(self, recipe: DataRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
        config = asdict(recipe)
        with create(out, kind="dataset", config=config, overwrite=overwrite, resume=resume) as draft:
            for source in recipe.source:
                draft.add_input("contains", source.path, licence=source.licence)
            text = "".join(Path(source.path).read_text() for source in recipe.source)
            (draft.path / "train-00000.jsonl").write_text(text.lower() if recipe.lower else text)
        self.done.append(out.name)
        return open_artifact(out)

    def sft(self, recipe: SftRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
        with create(out, kind="chat", config=asdict(recipe), overwrite=overwrite, resume=resume) as draft:
            draft.add_input("finetune_of", recipe.base)
            if recipe.data:
                draft.add_input("trained_on", recipe.data)
            if self.interrupt:
                (draft.path / "resume").mkdir()
                (draft.path / "resume" / "step").write_text("1")
                raise KeyboardInterrupt
            self.done.append(out.name + (" resumed" if draft.resumed else ""))
        return open_artifact(out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/story with a data stage and two sft stages, run from the folder above."""
    monkeypatch.chdir(tmp_path)
    story = tmp_path / "recipes" / "story"
    story.mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A")
    (tmp_path / "texts" / "b.txt").write_text("B")
    (story / "own.txt").write_text("own")
    (story / "01-data.toml").write_text(
        'stage = "data"\n[[source]]\npath = "../../texts/a.txt"\n[[source]]\npath = "./own.txt"\n'
    )
    (story / "02-first.toml").write_text('stage = "sft"\nbase = "01-data"\n')
    (story / "10-second.toml").write_text('stage = "sft"\nbase = "02-first"\ndata = "../../texts/b.txt"\n')
    return tmp_path


def go(fakes: Fakes, **more: Any) -> list[str]:
    """Run the story; returns what ran, in order."""
    fakes.done.clear()
    run("recipes/story", stages=fakes.stages, **more)
    return list(fakes.done)


ALL = ["01-data", "02-first", "10-second"]


def test_runs_in_order_then_skips(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes = Fakes()
    assert go(fakes) == ALL
    said = capsys.readouterr().out
    assert said.count("making: not made yet") == 3
    assert [f"made: out/story/{name} (" in said for name in ALL] == [True] * 3
    last = open_artifact("out/story/10-second")
    assert [row["locator"] for row in last.inputs] == ["out/story/02-first", "texts/b.txt"]
    assert "own.txt" in last.lineage()
    assert go(fakes) == []
    assert capsys.readouterr().out.count("up to date") == 3


@pytest.mark.parametrize(
    ("change", "again", "reason"),
    [
        (lambda p: (p / "texts/a.txt").write_text("AA"), ALL, "texts/a.txt has changed"),
        (lambda p: (p / "texts/b.txt").write_text("BB"), ["10-second"], "texts/b.txt has changed"),
        (lambda p: _append(p / "recipes/story/02-first.toml", "lr = 0.2\n"), ALL[1:], "lr is 0.2, it was 0.1"),
        (lambda p: _lower(p), ALL, "lower is True, it was False"),
        (lambda p: shutil.rmtree(p / "out/story/02-first"), ALL[1:], "not made yet"),
        (lambda p: (p / "out/story/01-data/train-00000.jsonl").unlink(), ALL, "train-00000.jsonl in it is missing"),
        (lambda p: _append(p / "recipes/story/01-data.toml", 'licence = "MIT"\n'), ALL, "source[2].licence is MIT"),
        (lambda p: _append(p / "recipes/story/01-data.toml", '[[source]]\npath = "./own.txt"\n'), ALL, "source is "),
        (lambda p: _append(p / "recipes/story/02-first.toml", "lr = 0.1\n"), [], "up to date"),
    ],
)
def test_makes_again_what_changed_and_what_stands_on_it(
    here: Path, capsys: pytest.CaptureFixture[str], change: Any, again: list[str], reason: str
) -> None:
    fakes = Fakes()
    go(fakes)
    change(here)
    capsys.readouterr()
    assert go(fakes, dry_run=True) == []
    foreseen = capsys.readouterr().out
    assert foreseen.count("would be made") == len(again)
    assert go(fakes) == again
    assert reason in capsys.readouterr().out
    assert go(fakes) == []


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _lower(here: Path) -> None:
    path = here / "recipes/story/01-data.toml"
    path.write_text("lower = true\n" + path.read_text())


def test_a_later_stage_is_not_remade_when_the_new_input_is_the_same(here: Path) -> None:
    """The same text under another name is the same input: ids decide, not paths."""
    fakes = Fakes()
    go(fakes)
    (here / "texts" / "c.txt").write_text("B")
    path = here / "recipes/story/10-second.toml"
    path.write_text(path.read_text().replace("b.txt", "c.txt"))
    assert go(fakes) == []
    (here / "texts" / "c.txt").write_text("C")
    assert go(fakes) == ["10-second"]


def test_a_setting_that_is_newer_than_the_artifact_changes_nothing_until_it_is_set(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class NewerRecipe(DataRecipe):
        upper: bool = False

    fakes = Fakes()
    assert go(fakes) == ALL
    fakes.stages = {**fakes.stages, "data": lambda: (NewerRecipe, fakes.data)}
    assert go(fakes) == []
    recipe = here / "recipes/story/01-data.toml"
    recipe.write_text("upper = true\n" + recipe.read_text())
    assert go(fakes) == ALL
    assert "upper is True, it was not set" in capsys.readouterr().out


def test_from_another_working_directory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    go(fakes)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    fakes.done.clear()
    run("../recipes/story", out="../out/story", stages=fakes.stages)
    assert fakes.done == []


def test_a_folder_whose_files_were_recorded_one_by_one_is_not_hashed_whole(
    here: Path,
) -> None:
    """`root` is a folder of gigabytes, of which the recipe reads two files."""

    @dataclass(frozen=True)
    class DataRecipe:
        root: str

    def data(recipe: DataRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
        with create(out, kind="dataset", config=asdict(recipe), overwrite=overwrite) as draft:
            draft.add_input("contains", Path(recipe.root) / "a.txt")
        ran.append(out.name)
        return open_artifact(out)

    ran: list[str] = []
    (here / "big").mkdir()
    (here / "big" / "01-data.toml").write_text('stage = "data"\nroot = "../texts"\n')
    stages: Stages = {"data": lambda: (DataRecipe, data)}
    run("big", stages=stages)
    (here / "texts" / "b.txt").write_text("not read by the stage")
    run("big", stages=stages)
    assert ran == ["01-data"]
    (here / "texts" / "a.txt").write_text("changed")
    run("big", stages=stages)
    assert ran == ["01-data", "01-data"]


def test_from(here: Path) -> None:
    fakes = Fakes()
    with pytest.raises(UserError, match="01-data before it is not made yet"):
        go(fakes, start="02-first")
    go(fakes)
    for start in ("02-first", "2", "02", "sft", "02-first.toml"):
        assert go(fakes, start=start) == ALL[1:]
    with pytest.raises(UserError, match="did you mean '10-second'"):
        go(fakes, start="10-secnd")


def test_an_interrupted_stage_is_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes = Fakes()
    fakes.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        go(fakes)
    assert fakes.done == ["01-data"]
    fakes.interrupt = False
    capsys.readouterr()
    assert go(fakes) == ["02-first resumed", "10-second"]
    assert "resuming" in capsys.readouterr().out


def test_a_failure_keeps_the_finished_artifact(here: Path) -> None:
    fakes = Fakes()
    go(fakes)
    before = open_artifact("out/story/02-first").id
    _append(here / "recipes/story/02-first.toml", "lr = 0.2\n")
    fakes.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        go(fakes)
    assert open_artifact("out/story/02-first").id == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("02-first.toml", 'base = "x"', r"stage = None is not a stage: write one of data, sft"),
        ("02-first.toml", 'stage = "stf"', r"02-first\.toml: stage = 'stf' is not a stage: did you mean 'sft'"),
        ("02-first.toml", 'stage = "sft"', r"02-first\.toml: 'base' must be given"),
        ("02-first.toml", 'stage = "sft"\nbse = "x"', r"02-first\.toml: unknown key 'bse': did you mean 'base'"),
        ("02-first.toml", 'stage = "sft"\nbase = "10-second"', "'10-second' is not made before it"),
        ("02-first.toml", 'stage = "sft"\nbase = "02-first"', "'02-first' is not made before it"),
        ("02-first.toml", 'stage = "sft"\nbase = "01-dta"', "'01-dta' is no earlier stage: did you mean '01-data'"),
        ("02-first.toml", 'stage = "sft"\nbase = "../../texts/z.txt"', r"'\.\./\.\./texts/z\.txt' is not there"),
        ("02-first.toml", 'stage = "sft', r"02-first\.toml, line 1: not TOML"),
        ("first.toml", 'stage = "sft"', "its name has no number"),
    ],
)
def test_every_recipe_is_checked_before_the_first_stage(here: Path, name: str, text: str, message: str) -> None:
    (here / "recipes/story" / name).write_text(text)
    fakes = Fakes()
    with pytest.raises(UserError, match=message):
        go(fakes)
    assert fakes.done == []
    assert not (here / "out").exists()


def test_a_package_that_a_late_stage_needs_is_asked_for_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = Fakes()
    monkeypatch.setitem(NEEDS, "sft", ("no_such_package", "extra"))
    with pytest.raises(UserError, match=r"02-first needs the package no_such_package: pip install no_such_package"):
        go(fakes)
    assert fakes.done == []
    go(fakes, dry_run=True)
    monkeypatch.delitem(NEEDS, "sft")
    assert go(fakes) == ALL
    monkeypatch.setitem(NEEDS, "sft", ("no_such_package", "extra"))
    assert go(fakes) == []  # nothing to make: nothing is needed
    with pytest.raises(UserError, match="10-second needs"):
        go(fakes, start="10")


def test_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "none")
    with pytest.raises(UserError, match="holds no recipe"):
        run(tmp_path)


def test_make_takes_artifacts_and_values(here: Path) -> None:
    fakes = Fakes()
    data = make("data", {"source": [{"path": "texts/a.txt"}]}, "d", stages=fakes.stages)
    tuned = make("sft", {"base": data, "lr": 1}, "t", stages=fakes.stages)
    assert tuned.inputs[0]["id"] == data.id
    assert json.dumps(tuned.passport["step"]["config"]) == '{"base": "d", "data": "", "lr": "1.0"}'
    with pytest.raises(UserError, match="settings: unknown key 'lrr'"):
        make("sft", {"base": "d", "lrr": 1}, "u", stages=fakes.stages)
    assert tuned_name("cria", "x/shop.jsonl.zst") == "cria-shop"
    assert tuned_name(tuned, Path("shop.jsonl")) == "t-shop"


def test_the_stages_have_the_names_that_recipes_use() -> None:
    old = ["data", "tokenizer", "tokens", "index", "unique", "pretrain", "sft"]  # recipes that people have name these
    assert [stage for stage in STAGES if stage in old] == old
