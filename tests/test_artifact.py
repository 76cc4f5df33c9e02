"""artifact.py: sealing, verifying, lineage, and every way a run can be cut off."""

# ruff: noqa: PT012 - what fails stands inside the block under test

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from criadero import artifact
from criadero.artifact import Problem, create, input_of, open_artifact, resolve, sha256_file, verify
from criadero.errors import UserError
from criadero.recipe import canonical_json


def make(out: Path, text: str = "weights", kind: str = "base", **more: Any) -> artifact.Artifact:
    with create(out, kind=kind, config=more.pop("config", {"lr": 0.001}), **more) as draft:
        (draft.path / "model.safetensors").write_text(text)
        (draft.path / "config.json").write_text("{}")
    return open_artifact(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_sealed_folder_says_what_it_holds(tmp_path: Path) -> None:
    with create(
        tmp_path / "m", kind="base", config={"lr": 1e-05, "steps": 7}, seeds={"init": 1}, licence="MIT"
    ) as draft:
        assert draft.path == tmp_path / "m.partial"
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "model.safetensors").write_bytes(b"abc")
        draft.metrics.append({"name": "loss", "value": 0.25})
        draft.step["tokens"] = 5
        draft.data["by_source"] = [{"name": "shop", "licence": "CC0-1.0", "documents": 3, "tokens": 9}]
    one = open_artifact(tmp_path / "m")
    assert (one.kind, one.name) == ("base", "m")
    assert one.files == [
        {"path": "sub/model.safetensors", "size": 3, "sha256": hashlib.sha256(b"abc").hexdigest(), "role": "weights"}
    ]
    assert one.passport["step"]["config"] == {"lr": "0.00001", "steps": 7}
    assert one.passport["step"]["tokens"] == 5
    assert one.passport["step"]["seeds"] == {"init": 1}
    assert one.metrics == [{"name": "loss", "value": "0.25"}]
    assert one.passport["licence"] == {"declared": "MIT"}
    assert one.sources()[0]["licence"] == "CC0-1.0"
    assert not (tmp_path / "m.partial").exists()
    assert verify(tmp_path / "m") == []
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["passport.json", "sub"]


def test_files_are_as_readable_as_any_that_are_made_here(tmp_path: Path) -> None:
    with create(tmp_path / "m", kind="base", config={}) as draft:
        (draft.path / "config.json").write_text("{}")
        (draft.path / "model.safetensors").write_text("w")
        (draft.path / "model.safetensors").chmod(0o600)
    modes = [(tmp_path / "m" / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]


def test_id_is_the_hash_of_the_canonical_passport(tmp_path: Path) -> None:
    """Against an independent spelling: for ASCII keys RFC 8785 is sorted, compact JSON."""
    one = make(tmp_path / "m")
    body = {key: value for key, value in one.passport.items() if key != "id"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert one.id == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_no_machine_path_in_a_passport(tmp_path: Path) -> None:
    step = make(tmp_path / "m").passport["step"]
    assert str(Path.cwd()) not in json.dumps(step)
    assert str(Path.home()) + "/" not in json.dumps(step)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda m: (m / "model.safetensors").write_text("Weights"), Problem("model.safetensors", "changed")),
        (lambda m: (m / "model.safetensors").write_text("weights "), Problem("model.safetensors", "changed")),
        (lambda m: (m / "config.json").unlink(), Problem("config.json", "missing")),
        (lambda m: (m / "evil.py").write_text(""), Problem("evil.py", "extra")),
        (lambda m: (m / "passport.json").unlink(), Problem("passport.json", "missing")),
        (lambda m: (m / "passport.json").write_text("{"), Problem("passport.json", "changed")),
        (lambda m: _edit(m, "name", "other"), Problem("passport.json", "changed")),
        (lambda m: _edit(m, "metrics", [{"name": "loss", "value": "0.1"}]), Problem("passport.json", "changed")),
        (lambda m: _edit(m, "metrics", [{"name": "loss", "value": float("nan")}]), Problem("passport.json", "changed")),
    ],
)
def test_verify_names_the_problem(tmp_path: Path, harm: Any, problem: Problem) -> None:
    make(tmp_path / "m")
    harm(tmp_path / "m")
    assert verify(tmp_path / "m") == [problem]


def _edit(folder: Path, key: str, value: Any) -> None:
    passport = json.loads((folder / "passport.json").read_text())
    (folder / "passport.json").write_text(json.dumps(passport | {key: value}))


def test_a_path_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "m")
    (tmp_path / "secret").write_text("s")
    passport = json.loads((tmp_path / "m" / "passport.json").read_text())
    passport["files"].append({"path": "../secret", "size": 1, "sha256": sha256_file(tmp_path / "secret")[7:]})
    (tmp_path / "m" / "passport.json").write_text(json.dumps(passport))
    assert Problem("../secret", "missing") in verify(tmp_path / "m")


def test_resume_is_removed_at_seal_and_never_verified(tmp_path: Path) -> None:
    for keep in (False, True):
        with create(tmp_path / f"m{keep}", kind="base", config={}) as draft:
            (draft.path / "resume").mkdir()
            (draft.path / "resume" / "state").write_text("x")
            (draft.path / "config.json").write_text("{}")
            draft.keep_resume = keep
        assert (tmp_path / f"m{keep}" / "resume").exists() == keep
        assert [row["path"] for row in open_artifact(tmp_path / f"m{keep}").files] == ["config.json"]
        assert verify(tmp_path / f"m{keep}") == []


# -- lineage --------------------------------------------------------------------------------------------------------


def test_one_folder_proves_its_chain(tmp_path: Path) -> None:
    (tmp_path / "shop.jsonl").write_text('{"a": 1}\n')
    data = make(tmp_path / "data", kind="dataset", licence="CC0-1.0")
    with create(tmp_path / "base", kind="base", config={}) as draft:
        draft.add_input("trained_on", data)
        (draft.path / "model.safetensors").write_text("b")
    with create(tmp_path / "chat", kind="chat", config={}) as draft:
        draft.add_input("finetune_of", tmp_path / "base")
        one = draft.add_input("trained_on", tmp_path / "shop.jsonl", licence="CC-BY-4.0", locator="shop.jsonl")
    assert one.id == sha256_file(tmp_path / "shop.jsonl")
    chat = open_artifact(tmp_path / "chat")
    assert [(row["relation"], row["verified"]) for row in chat.inputs] == [("finetune_of", True), ("trained_on", False)]
    assert [passport["name"] for passport in chat.ancestors()] == ["base", "data"]
    assert chat.ancestors()[1]["id"] == data.id
    lines = chat.lineage().splitlines()
    assert lines[0].startswith("chat · chat · ")
    assert lines[1].startswith("├─ finetune of: base · base · ")
    assert lines[2].startswith("│  └─ trained on: data · dataset · ")
    assert lines[2].endswith("CC0-1.0")
    assert lines[3].startswith("└─ trained on: shop.jsonl · ")
    assert lines[3].endswith("CC-BY-4.0 · no passport")
    # the ancestors are part of what is hashed
    (tmp_path / "chat" / "lineage.jsonl").write_text("")
    assert verify(tmp_path / "chat") == [Problem("lineage.jsonl", "changed")]


@pytest.mark.parametrize("forge", [lambda line: None, lambda line: line | {"name": "other"}, lambda line: 3])
def test_a_forged_ancestor_is_found_though_the_hashes_were_made_again(tmp_path: Path, forge: Any) -> None:
    make(tmp_path / "base")
    with create(tmp_path / "chat", kind="chat", config={}) as draft:
        draft.add_input("finetune_of", tmp_path / "base")
    lineage, file = tmp_path / "chat" / "lineage.jsonl", tmp_path / "chat" / "passport.json"
    lines = [forge(json.loads(line)) for line in lineage.read_text().splitlines()]
    lineage.write_text("".join(json.dumps(line) + "\n" for line in lines if line is not None))
    passport = json.loads(file.read_text())
    passport["files"][0] |= {"size": lineage.stat().st_size, "sha256": sha256_file(lineage)[7:]}
    passport["id"] = artifact.passport_id(passport)
    file.write_bytes(canonical_json(passport) + b"\n")
    assert verify(tmp_path / "chat") == [Problem("lineage.jsonl", "changed")]


def test_an_ancestor_used_twice_is_shown_once(tmp_path: Path) -> None:
    data = make(tmp_path / "data", kind="dataset")
    with create(tmp_path / "base", kind="base", config={}) as draft:
        draft.add_input("trained_on", data)
        draft.add_input("evaluated_on", data)
    assert open_artifact(tmp_path / "base").lineage().count("(above)") == 1


def test_a_folder_without_passport_is_hashed_and_not_vouched_for(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    (folder / "sub").mkdir(parents=True)
    (folder / "b").write_text("2")
    (folder / "sub" / "a").write_text("1")
    rows = [[name, "sha256:" + hashlib.sha256(text).hexdigest()] for name, text in (("b", b"2"), ("sub/a", b"1"))]
    expected = hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    one = input_of("finetune_of", folder)
    assert (one.id, one.verified, one.ancestors) == (f"sha256:{expected}", False, ())
    with pytest.raises(UserError, match=r"has no passport\.json"):
        open_artifact(folder)
    assert resolve(folder) == folder


def test_an_input_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{ }")
    with (
        pytest.raises(UserError, match=r"does not match its passport \(config.json: changed\)"),
        create(tmp_path / "chat", kind="chat", config={}) as draft,
    ):
        draft.add_input("finetune_of", tmp_path / "base")
    assert not (tmp_path / "chat").exists()
    assert not (tmp_path / "chat.partial").exists()


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(artifact, "BUNDLED", tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    artifact._note.cache_clear()
    make(tmp_path / "bundled" / "cria")
    return tmp_path


def test_bundled_model(bundle: Path) -> None:
    assert open_artifact("cria").path == bundle / "bundled" / "cria"
    with pytest.raises(UserError, match="no such model 'crai': did you mean 'cria'"):
        open_artifact("crai")
    with pytest.raises(UserError, match=r"no such file or folder '\./cria'"):
        open_artifact("./cria")
    with pytest.raises(UserError, match="or a bundled model: cria"):
        open_artifact("zzzzz")


def test_a_model_folder_here_goes_before_the_bundled_one_and_it_is_said(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bundle / "cria").mkdir()
    assert resolve("cria") == bundle / "bundled" / "cria"
    assert "the bundled model" in capsys.readouterr().err
    (bundle / "cria" / "config.json").write_text("{}")
    assert resolve("cria") == Path("cria")
    assert resolve("cria") == Path("cria")
    assert capsys.readouterr().err.count("taken from the folder ./cria") == 1


def test_near_miss_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "mine")
    with pytest.raises(UserError, match="did you mean 'mine'"):
        open_artifact("mien")
    (tmp_path / "half.partial").mkdir()
    with pytest.raises(UserError, match="half is not finished"):
        open_artifact("half")


@pytest.mark.parametrize("text", ["[]", "{}", '{"id": 1}', '{"passport": "criadero/1"}', "\x00", "\ud800"])
def test_what_is_no_passport(tmp_path: Path, text: str) -> None:
    (tmp_path / "passport.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match="passport"):
        open_artifact(tmp_path)


def test_a_passport_of_another_format(tmp_path: Path) -> None:
    make(tmp_path / "m")
    _edit(tmp_path / "m", "passport", "criadero/9")
    with pytest.raises(UserError, match="criadero/9"):
        open_artifact(tmp_path / "m")


# -- what is in the way ---------------------------------------------------------------------------------------------


def test_existing_out_is_refused_before_work_starts(tmp_path: Path) -> None:
    make(tmp_path / "m")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"exists: .*--overwrite"):
        make(tmp_path / "m", "new")
    assert tree(tmp_path) == before


def test_overwrite_replaces_only_after_sealing(tmp_path: Path) -> None:
    make(tmp_path / "m", "old")
    with pytest.raises(RuntimeError), create(tmp_path / "m", kind="base", config={}, overwrite=True) as draft:
        (draft.path / "config.json").write_text("[]")
        raise RuntimeError
    assert (tmp_path / "m" / "model.safetensors").read_text() == "old"
    make(tmp_path / "m", "new", overwrite=True)
    assert (tmp_path / "m" / "model.safetensors").read_text() == "new"
    assert verify(tmp_path / "m") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_overwrite_never_replaces_a_folder_that_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(UserError, match="not an artifact"):
            make(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert verify(make(tmp_path / "m").path) == []


def test_cut_off_between_the_two_renames(tmp_path: Path) -> None:
    make(tmp_path / "m", "old")
    os.rename(tmp_path / "m", tmp_path / "m.replaced")
    with pytest.raises(UserError, match=r"rename .*m\.replaced back"):
        open_artifact(tmp_path / "m")
    with pytest.raises(UserError, match="exists"):
        make(tmp_path / "m", "new")
    assert (tmp_path / "m" / "model.safetensors").read_text() == "old"


def test_out_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        make(tmp_path / "f" / "m")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "locked" / "m")


def test_read_only_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"), create(tmp_path / "m", kind="base", config={}) as draft:
        raise PermissionError(errno.EACCES, "denied", str(draft.path / "x"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("resumable", [False, True])
def test_full_disk(tmp_path: Path, error: Exception, resumable: bool) -> None:
    with pytest.raises(UserError, match="disk is full"), create(tmp_path / "m", kind="base", config={}) as draft:
        if resumable:
            (draft.path / "resume").mkdir()
            (draft.path / "resume" / "state").write_text("x")
        raise error
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "m.partial").exists() == resumable


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_for_real(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk is full"), create(tmp_path / "m", kind="base", config={}):
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


# -- a run that did not finish --------------------------------------------------------------------------------------


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), create(tmp_path / "m", kind="base", config={}) as draft:
            (draft.path / "big").write_text("x")
            raise error
        assert list(tmp_path.iterdir()) == []


def interrupted(out: Path, config: dict[str, Any], data: Path | None = None) -> None:
    with pytest.raises(KeyboardInterrupt), create(out, kind="base", config=config) as draft:
        if data:
            draft.add_input("trained_on", data)
        (draft.path / "resume").mkdir()
        (draft.path / "resume" / "step").write_text("3")
        raise KeyboardInterrupt


def test_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(tmp_path / "m", {"lr": 0.1})
    assert "run the same again to go on" in capsys.readouterr().err
    with create(tmp_path / "m", kind="base", config={"lr": 0.1}, resume=True) as draft:
        assert draft.resumed
        assert (draft.path / "resume" / "step").read_text() == "3"
        (draft.path / "config.json").write_text("{}")
    assert verify(tmp_path / "m") == []
    assert not (tmp_path / "m" / "resume").exists()


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "m", {"lr": 0.1, "steps": 4})
    with pytest.raises(UserError, match=r"other settings \(lr = 0\.1\)"):
        make(tmp_path / "m", config={"lr": 0.2, "steps": 4}, resume=True)
    assert (tmp_path / "m.partial" / "resume" / "step").exists()


def test_resume_with_changed_data_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("1")
    interrupted(tmp_path / "m", {}, data)
    data.write_text("2")
    with (
        pytest.raises(UserError, match=r"d\.jsonl has changed since"),
        create(tmp_path / "m", kind="base", config={}, resume=True) as draft,
    ):
        draft.add_input("trained_on", data)
    assert (tmp_path / "m.partial" / "resume" / "step").exists()


def test_without_resume_the_left_over_is_removed_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(tmp_path / "m", {})
    capsys.readouterr()
    make(tmp_path / "m")
    assert "removing" in capsys.readouterr().err
    assert [row["path"] for row in open_artifact(tmp_path / "m").files] == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_partial_folder_that_is_not_ours_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not ours"):
        make(tmp_path / "m", resume=resume)
    assert (tmp_path / "m.partial" / "thesis.txt").exists()


def test_two_runs_on_one_out(tmp_path: Path) -> None:
    with create(tmp_path / "m", kind="base", config={}) as draft:
        for resume in (False, True):
            with pytest.raises(UserError, match="another run is making m now"):
                make(tmp_path / "m", resume=resume)
        (draft.path / "config.json").write_text("{}")
    assert verify(tmp_path / "m") == []


KILLED = """
import sys, time
from pathlib import Path
from criadero.artifact import create
with create(sys.argv[1], kind="base", config={{}}, overwrite=True, resume=True) as draft:
    (draft.path / "model.safetensors").write_text("half")
    if {resumable}:
        (draft.path / "resume").mkdir()
        (draft.path / "resume" / "step").write_text("3")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("resumable", [False, True])
def test_kill_9_in_the_middle(tmp_path: Path, resumable: bool) -> None:
    """No half-sealed artifact, the finished ones whole, and the next run goes through."""
    make(tmp_path / "m", "old")
    make(tmp_path / "other")
    for name in ("m", "new"):
        code = textwrap.dedent(KILLED.format(resumable=resumable))
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "m" / "model.safetensors").read_text() == "old"
    assert verify(tmp_path / "m") == verify(tmp_path / "other") == []
    with create(tmp_path / "new", kind="base", config={}, resume=True) as draft:
        assert draft.resumed == resumable
        assert (draft.path / "model.safetensors").exists() == resumable
        (draft.path / "model.safetensors").write_text("whole")
    assert verify(tmp_path / "new") == []


def test_a_link_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a link"), create(tmp_path / "m", kind="base", config={}) as draft:
        (draft.path / "weights").symlink_to("/etc/hostname")
    assert list(tmp_path.iterdir()) == []
