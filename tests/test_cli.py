"""cli.py: what is printed, on which stream, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import criadero
from criadero import cli
from criadero.artifact import create
from criadero.errors import UserError
from criadero.trust import verify


def criadero_command(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "criadero.cli", *args], capture_output=True, text=True, **more)


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(arg) for arg in args])
    streams = capsys.readouterr()
    return int(caught.value.code or 0), streams.out, streams.err


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small chain: dataset -> base -> chat, in ./data ./base ./chat."""
    monkeypatch.chdir(tmp_path)
    with create("data", kind="dataset", config={}) as draft:
        (draft.path / "train-00000.jsonl").write_text("{}\n")
        draft.data = {
            "documents": 1200,
            "by_source": [
                {
                    "name": "shop",
                    "licence": "CC0-1.0",
                    "documents": 1200,
                    "tokens": 34567,
                    "removed": {"dup": 3, "lang": 1},
                }
            ],
        }
    with create("base", kind="base", config={}, seeds={"seed": 1}, licence="Apache-2.0") as draft:
        draft.add_input("trained_on", "data", licence="CC0-1.0")
        draft.model = {"params": 12345678, "context": 512, "vocab": 8192}
        draft.step["tokens"] = 1000000
        draft.metrics = [{"suite": "held_out", "metric": "loss", "slice": "en", "value": 2.345678, "n": 500}]
        (draft.path / "model.safetensors").write_text("w")
    with create("chat", kind="chat", config={}) as draft:
        draft.add_input("finetune_of", "base")
        (draft.path / "model.safetensors").write_text("c")
    return tmp_path


def test_help_without_torch() -> None:
    code = (
        "import sys\nfrom criadero import cli\n"
        "try: cli.main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "print('loaded', sorted({'torch', 'tokenizers', 'numpy', 'transformers', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded []\n")
    for verb in ("demo", "chat", "tune", "pretrain", "data", "run", "show", "passport", "export"):
        assert verb in done.stdout


def test_the_module_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "criadero", "show", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nothing" in done.stderr


def test_bare_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert "Usage: criadero" in out
    assert call(capsys, "--version") == (0, f"criadero {criadero.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tnue"], "error: No such command 'tnue'. Did you mean 'tune'"),
        (["show"], "error: Missing argument 'REF'"),
        (["show", "--jsn", "x"], "error: No such option"),
        (["show", "no/such"], "error: no such file or folder 'no/such'"),
        (["passport", "verify", "no/such"], "error: no such file or folder 'no/such'"),
        (["run", "no/such"], "error: no/such: no such folder of recipes"),
        (["export", "x", "--out", "y", "--to", "onnx"], "error: --to onnx: cannot be written: choose gguf or hf"),
        (["export", "x", "--out", "y", "--type", "q3"], "error: --type q3: not a type of gguf: choose one of q8_0,"),
        (["chat", "m", "--seed", "x"], "error: Invalid value for '--seed'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_show(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "show", "base")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("base · base · ")
    assert "model 12,345,678 parameters, context 512, vocabulary 8,192" in lines
    assert "trained on 1,000,000 tokens" in lines
    assert "licence Apache-2.0" in lines
    assert "source licence documents tokens removed" in lines
    assert "shop CC0-1.0 1,200 34,567 4" in lines
    assert "loss held_out en 2.346 500" in lines
    assert any(line.startswith("code criadero==") and line.endswith("seed 1") for line in lines)
    assert any(line.startswith("└─ trained on: data · dataset") for line in lines)
    _, out, _ = call(capsys, "show", "chat")  # the sources of what it stands on
    assert "shop    CC0-1.0" in out


def test_show_json(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "show", "chat", "--json")
    facts = json.loads(out)
    assert code == 0
    assert list(facts)[:7] == ["path", "kind", "id", "name", "inputs", "files", "metrics"]
    assert (facts["path"], facts["kind"], facts["name"]) == ("chat", "chat", "chat")
    assert facts["inputs"][0]["relation"] == "finetune_of"
    assert facts["step"]["code"]["package"].startswith("criadero==")


def test_show_a_folder_without_passport(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "hf").mkdir()
    (shop / "hf" / "config.json").write_text("{}")
    code, out, _ = call(capsys, "show", "hf")
    assert code == 0
    assert "imported · no passport" in out
    facts = json.loads(call(capsys, "show", "hf", "--json")[1])
    assert (facts["kind"], facts["id"], facts["files"]) == ("imported", None, [{"path": "config.json", "size": 2}])


def test_passport_verify(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "passport", "verify", "chat") == (0, "chat: every file is as its passport says\n", "")
    (shop / "chat" / "model.safetensors").write_text("d")
    (shop / "chat" / "lineage.jsonl").unlink()
    (shop / "chat" / "x.py").write_text("")
    code, out, err = call(capsys, "passport", "verify", "chat")
    assert (code, out) == (3, "")
    assert sorted(err.splitlines()) == [
        "error: lineage.jsonl: missing",
        "error: model.safetensors: changed",
        "error: x.py: extra",
    ]
    code, out, _ = call(capsys, "passport", "verify", "chat", "--json")
    facts = json.loads(out)
    assert (code, facts["ok"], facts["code"]) == (3, False, 3)
    assert {"path": "x.py", "what": "extra", "detail": "", "code": 3} in facts["problems"]


def test_tune_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    from criadero.recipe import recipe_fields
    from criadero.train.sft import SftRecipe

    code, out, _ = call(capsys, "tune", "--help")
    assert code == 0
    assert "BASE DATA" in out
    assert "--out" in out
    for name in recipe_fields(SftRecipe):
        assert f"--{name}" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tune"], "error: BASE and DATA must be given"),
        (["tune", "cria"], "error: DATA must be given"),
        (["tune", "a", "b", "c"], "error: unexpected argument 'c'"),
        (["tune", "a", "b", "--lora_rnak", "3"], "error: no such option --lora_rnak: did you mean 'lora_rank'?"),
        (["tune", "--lora-rank", "x", "a", "b"], "error: --lora-rank: must be a whole number, not 'x'"),
        (["tune", "a", "b", "--ovewrite"], "error: no such option --ovewrite: did you mean 'overwrite'?"),
        (["tune", "a", "b", "--base", "c"], "error: base is given twice"),
        (["tune", "a", "b", "--recipe", "none.toml"], "error: none.toml: no such file"),
        (["pretrain", "a"], "error: --out must be given"),
        (["data", "pack"], "error: DATA must be given"),
    ],
)
def test_flags_of_recipes(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_recipe_file_of_another_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text('stage = "data"\n')
    code, _, err = call(capsys, "tune", "a", "b", "--recipe", str(tmp_path / "r.toml"))
    assert code == 2
    assert "stage = 'data' is not a sft recipe" in err


def test_ctrl_c_exits_130(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "01-data.toml")  # reading it waits for ever
    process = subprocess.Popen(
        [sys.executable, "-m", "criadero.cli", "run", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer = os.open(tmp_path / "01-data.toml", os.O_WRONLY)  # returns once the command has opened it
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert (out, err) == (b"", b"")


def test_a_closed_pipe_is_quiet(shop: Path) -> None:
    for args in (["show", "chat", "--json"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-m", "criadero.cli", *args], stdout=write, stderr=subprocess.PIPE, env=env
        )
        os.close(write)
        assert done.stderr == b""


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "resolve", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["passport", "verify", "."])


def test_data_show(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "a.txt").write_text("Hola.")
    assert call(capsys, "data", "show", "a.txt") == (0, "a.txt: 1 document, 5 characters\n\na.txt\n  Hola.\n", "")


def test_run_dry(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "r").mkdir()
    (shop / "r" / "01-tune.toml").write_text('stage = "sft"\nbase = "base"\ndata = "./shop.jsonl"\n')
    (shop / "r" / "shop.jsonl").write_text("{}\n")
    code, out, err = call(capsys, "run", "r", "--dry-run")
    assert (code, err) == (0, "")
    assert out == "01-tune  sft        would be made: not made yet\n"
    assert not (shop / "out").exists()


def test_public_names(shop: Path) -> None:
    import criadero as cr

    assert cr.open("chat").kind == "chat"
    assert cr.show("chat").startswith("chat · chat")
    assert cr.verify("chat") == []
    assert "tune" in dir(cr)
    with pytest.raises(AttributeError, match="no attribute 'tnue'"):
        _ = cr.tnue
    with pytest.raises(UserError, match="no such file or folder"):
        cr.open("no/such")
    for name in cr.__all__:
        assert getattr(cr, name)
