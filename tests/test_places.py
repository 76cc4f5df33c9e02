"""What is sealed may be published: it must not say whose home folder it was made in, and still find its way back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny

from criadero import places
from criadero.artifact import create, open_artifact, resolve, verify
from criadero.checkpoints import load_model
from criadero.recipe import parse
from criadero.run import read_recipe, run
from criadero.train.sft import SftRecipe, sft

PEDRO = "/home" + "/pedro/llama"  # somebody else's; in two parts, because no file of the project may hold such a path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a folder to work in, which is the current one."""
    home = tmp_path / "maria"
    (home / "desk").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(home / "desk")
    return home


def test_paths_are_told_without_the_home_folder(home: Path) -> None:
    for given, said in {
        "shop.jsonl": "shop.jsonl",
        "./shop.jsonl": "./shop.jsonl",
        "../base": "../base",
        f"{home}/desk/shop.jsonl": "shop.jsonl",
        f"{home}/desk": "~/desk",
        f"{home}/base/*.txt": "~/base/*.txt",
        "/srv/models/llama": "/srv/models/llama",
        PEDRO: "llama",
        f"../../../../../../..{PEDRO}": "llama",
        f"recorded://{home}/a": "recorded://~/a",
        f"{home}to/x": f"{home}to/x",
        "/no_think": "/no_think",
        "Wait... what?": "Wait... what?",
        "": "",
    }.items():
        assert places.told(given) == said
        assert places.told(said) == said
    assert places.told({f"{home}/a": [f"{home}/b", 3, None]}) == {"~/a": ["~/b", 3, None]}
    assert places.find("~/base") == home / "base"
    assert places.find("base") == Path("base")


def test_from_outside_of_the_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert places.told("../" + tmp_path.name + "/maria/base") == "~/base"
    assert places.told(str(home / "base")) == "~/base"
    assert places.from_folder(home / "base", tmp_path / "out") == "~/base"
    assert places.from_folder(home / "base", home / "out") == "../base"
    monkeypatch.setenv("HOME", "/")  # a container's user without a home
    assert places.told("/srv/x") == "/srv/x"


def test_a_command_can_be_given_again_to_a_shell(home: Path) -> None:
    words = ["criadero", "tune", f"{home}/my base", f"--data={home}/x.jsonl", "--out", f"{home}/desk/o", "--note=a b"]
    assert places.command(words) == "criadero tune ~/'my base' --data ~/x.jsonl --out o '--note=a b'"


def test_nothing_sealed_names_the_home_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.base(home / "models" / "small")
    (home / "Documents").mkdir()
    data = tiny.write_chats(home / "Documents" / "shop.jsonl")
    settings = {"dtype": "float32", "epochs": 1.0, "batch_tokens": 256, "micro_tokens": 256, "licence": "CC0-1.0"}
    for where in (home / "desk", tmp_path):  # in the home folder, and outside of it
        monkeypatch.chdir(where)
        monkeypatch.setattr(sys, "argv", ["/usr/bin/criadero", "tune", str(base), str(data), "--out", "tuned"])
        recipe = parse(SftRecipe, {"base": str(base), "data": str(data), **settings}, where="test")
        tuned = sft(recipe, Path("tuned"))
        for file in tuned.path.rglob("*"):
            assert not file.is_file() or b"maria" not in file.read_bytes(), file.name
        step = tuned.passport["step"]
        assert step["command"] == "criadero tune ~/models/small ~/Documents/shop.jsonl --out tuned"
        assert (step["config"]["base"], step["config"]["data"]) == ("~/models/small", "~/Documents/shop.jsonl")
        assert [row["locator"] for row in tuned.inputs] == ["~/models/small", "~/Documents/shop.jsonl"]
        assert verify(tuned.path) == []
        assert resolve(tuned.inputs[0]["locator"]) == base
        load_model(tuned.path)  # the adapter still finds its base
        again = parse(SftRecipe, read_recipe(tuned.path / "recipe.toml", "sft"), where="test")
        assert again == recipe  # and its recipe means the same files


def test_what_lies_in_the_home_folder_is_up_to_date_until_it_changes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "Documents").mkdir()
    text = home / "Documents" / "a.txt"
    text.write_text("The shop opens at nine and closes at eight.\n")
    (home / "desk" / "story").mkdir()
    for path in (str(text), "~/Documents/a.txt", str(text.parent), str(text.parent / "*.txt")):
        lines = f'stage = "data"\n[[source]]\nname = "a"\npath = "{path}"\nlicence = "CC0-1.0"\ntrusted = true\n'
        (home / "desk" / "story" / "01-data.toml").write_text(lines)
        text.write_text("The shop opens at nine and closes at eight.\n")
        shutil.rmtree("out", ignore_errors=True)
        run("story")
        assert "making" in capsys.readouterr().out
        run("story")
        assert "up to date" in capsys.readouterr().out
        text.write_text("The shop opens at ten and closes at eight.\n")
        run("story", dry_run=True)
        assert "would be made" in capsys.readouterr().out


def test_a_passport_of_before_stays_valid_and_is_not_told_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "a.txt"
    file.write_text("a")
    with monkeypatch.context() as before:
        before.setattr(places, "told", lambda value: value)
        with create("old", kind="dataset", config={"path": str(file)}) as draft:
            draft.add_input("contains", file)
    assert open_artifact("old").inputs[0]["locator"] == str(file)
    assert verify("old") == []
    with create("new", kind="base", config={}) as draft:
        draft.add_input("trained_on", "old")
    new = open_artifact("new")
    assert new.ancestors()[0] == open_artifact("old").passport  # an ancestor is what its hash says
    assert verify("new") == []
