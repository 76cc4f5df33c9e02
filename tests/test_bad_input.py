"""What is wrong with what was given: through the command line, one clear line, exit code 2, and nothing left behind.

Mistakes in words, flags and recipe files are in test_cli.py, test_recipe.py and test_run.py; every way to damage a weight
file in test_checkpoints_*.py; a full disk and kill -9 in training in test_sft.py and test_resume.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from criadero import cli
from criadero.artifact import verify

RECIPE = """\
root = "."
held_out = 0.2
near_dedup = 0.0
quality_filter = false
[[source]]
name = "notes"
path = "{path}"
licence = "CC0-1.0"
lang = "en"
"""
TUNE = "tune base chats.jsonl --dtype float32 --epochs 0.1 --out new"


def write(path: str, *lines: str | bytes) -> None:
    Path(path).write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))


def call(command: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(command))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, its GGUF file, chats, documents, and the artifacts made of these."""
    folder, before = tmp_path_factory.mktemp("kit"), Path.cwd()
    os.chdir(folder)
    try:
        tiny.base(Path("base"))
        tiny.write_chats(Path("chats.jsonl"))
        write("notes.jsonl", *(json.dumps({"text": f"Note {n}. {line}"}) for n in range(30) for line in tiny.LINES))
        write("data.toml", RECIPE.format(path="notes.jsonl"))
        for command in (
            "export base --out base.gguf --type f32",
            "export base --to hf --out sealed",
            "data build --recipe data.toml --out docs",
            "data tokenizer docs --vocab_size 300 --out words",
            "data pack docs --tokenizer words --out tokens",
        ):
            assert call(command) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kit, and the working directory."""
    shutil.copytree(kit, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, str]:
    """Every path below `folder`, with the hash of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def cut(path: str, *, to: float = 0.5) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * to)])


def lie(path: str, at: int, value: int, size: int = 8) -> None:
    data = bytearray(Path(path).read_bytes())
    data[at : at + size] = value.to_bytes(size, "little")
    Path(path).write_bytes(data)


def template(text: str) -> Callable[[], None]:
    return lambda: write("base/chat_template.jinja", text)


def recipe(**lines: str) -> Callable[[], None]:
    return lambda: write("data.toml", RECIPE.format(path=lines["path"]) + lines.get("more", ""))


def nothing() -> None:
    pass


CASES: dict[str, tuple[Callable[[], object], str, str]] = {
    # files that are not there, are something else, or hold nothing
    "missing data": (nothing, "tune base none.jsonl --out new", "none.jsonl: no such file"),
    "missing held-out": (nothing, TUNE + " --held_out none.jsonl", "none.jsonl: no such file"),
    "missing source": (recipe(path="none.jsonl"), "data build --recipe data.toml --out new", "source notes: nothing at"),
    "missing dataset": (nothing, "data tokenizer none --out new", "no such model 'none'"),
    "missing tokens": (nothing, "pretrain none --out new", "no such model 'none'"),
    "missing tokenizer": (nothing, "data pack docs --tokenizer none --out new", "none"),
    "missing model to export": (nothing, "export none --out new", "no such model 'none'"),
    "missing model to chat with": (nothing, "chat none", "no such model 'none'"),
    "missing card": (nothing, TUNE + " --card none.md", "none.md cannot be read: No such file or directory"),
    "a folder for a file": (lambda: os.mkdir("f.jsonl"), "tune base f.jsonl --out new", "f.jsonl: the folder has no file"),
    "a folder for a card": (nothing, TUNE + " --card base", "base cannot be read: Is a directory"),
    "a link to itself": (lambda: os.symlink("l.jsonl", "l.jsonl"), "tune base l.jsonl --out new", "l.jsonl: no such file"),
    "an empty word": (nothing, "tune base '' --out new", "DATA is an empty word"),
    "an unknown format": (lambda: write("a.pdf", "x"), "tune base a.pdf --out new", "a.pdf: unknown format '.pdf'"),
    "empty chats": (lambda: write("e.jsonl"), "tune base e.jsonl --out new", "e.jsonl: no chat in it (it is empty)"),
    "empty documents": (lambda: write("notes.jsonl"), "data build --recipe data.toml --out new", "no document is left"),
    "a damaged .gz": (lambda: write("c.jsonl.gz", "x"), "tune base c.jsonl.gz --out new", "c.jsonl.gz: cannot be read"),
    "a dataset for tokens": (nothing, "pretrain docs --out new", "docs: not a readable tokens artifact"),
    "tokens for a dataset": (nothing, "data tokenizer tokens --out new", "tokens"),
    # malformed lines, by file and line
    "a malformed chat": (lambda: write("b.jsonl", '{"prompt": "a", "completion": "b"}', "{"), "tune base b.jsonl --out new",
                         "b.jsonl:2: not valid JSON"),
    "a malformed document": (lambda: write("notes.jsonl", '{"text": "a"}', '{"text": 5}'), "data build --recipe data.toml --out new",
                             "notes.jsonl:2: no text in the field 'text'"),
    "not UTF-8": (lambda: write("b.jsonl", '{"prompt": "a", "completion": "b"}'.encode("utf-16")), "tune base b.jsonl --out new",
                  "b.jsonl:1: not UTF-8"),
    "half of a character": (lambda: write("b.jsonl", '{"prompt": "\\ud83d", "completion": "b"}'), "tune base b.jsonl --out new",
                            "b.jsonl:1: half of a character (\\ud83d)"),
    "an endless number": (lambda: write("b.jsonl", '{"prompt": ' + "9" * 5000 + "}"), "tune base b.jsonl --out new",
                          "b.jsonl:1: not valid JSON (Exceeds the limit"),
    "every line is bad": (lambda: write("b.jsonl", "{", "["), "tune base b.jsonl --skip_bad --out new", "no chat in it (every row"),
    # recipes
    "unknown key": (lambda: write("r.toml", "lora_rnak = 3"), TUNE + " --recipe r.toml",
                    "r.toml and flags: unknown key 'lora_rnak': did you mean 'lora_rank'?"),
    "unknown key of a source": (recipe(path="notes.jsonl", more='licnce = "x"'), "data build --recipe data.toml --out new",
                                "unknown key 'licnce': did you mean 'licence'?"),
    "wrong type": (lambda: write("r.toml", 'lora_rank = "8"'), TUNE + " --recipe r.toml", "lora_rank: must be a whole number, not '8'"),
    "a seed no generator takes": (nothing, TUNE + " --seed -1", "seed must be between 0 and 4294967295, not -1"),
    "a vocabulary too small": (nothing, "data tokenizer docs --vocab_size 100 --out new", "vocab_size 100: at least"),
    "a vocabulary too large": (nothing, "data tokenizer docs --vocab_size 99999 --out new", "the texts give only"),
    "a number below the least": (nothing, "data show chats.jsonl --limit -1", "Invalid value for '--limit'"),
    # examples longer than the context
    "too long": (lambda: write("l.jsonl", json.dumps({"prompt": "word " * 300, "completion": "b"})),
                 "tune base l.jsonl --out new --held_out_share 0", "longer than 128 tokens"),
    "all too long": (lambda: write("l.jsonl", json.dumps({"prompt": "word " * 300, "completion": "b"})),
                     "tune base l.jsonl --out new --held_out_share 0 --too_long drop", "l.jsonl"),
    # models
    "a base that is no model": (lambda: os.mkdir("m"), "tune m chats.jsonl --out new", "m: not a model folder"),
    "a base that is a file of chats": (nothing, "tune chats.jsonl chats.jsonl --out new", "chats.jsonl: not a model"),
    "a truncated safetensors": (lambda: cut("base/model.safetensors"), TUNE, "base/model.safetensors: damaged"),
    "a lying safetensors": (lambda: lie("base/model.safetensors", 0, 2**60), TUNE, "base/model.safetensors: damaged"),
    "a truncated GGUF": (lambda: cut("base.gguf"), "tune base.gguf chats.jsonl --out new", "base.gguf: damaged"),
    "a lying GGUF": (lambda: lie("base.gguf", 8, 2**40), "tune base.gguf chats.jsonl --out new", "base.gguf: damaged"),
    "a truncated GGUF to chat with": (lambda: cut("base.gguf", to=0.9), "chat base.gguf", "base.gguf: damaged"),
    "a link that leads nowhere": (lambda: os.symlink("nowhere", "base/notes.txt"), TUNE, "base/notes.txt: cannot be read"),
    "a tampered base": (lambda: write("sealed/generation_config.json", "{}"), TUNE.replace("base", "sealed"),
                        "sealed does not match its passport (generation_config.json: changed"),
    "a tampered dataset": (lambda: write("docs/sources.json", "[]"), "data tokenizer docs --out new", "docs does not match its passport"),
    "a passport that is none": (lambda: write("sealed/passport.json", "[]"), "show sealed", "sealed/passport.json: is not a passport"),
    # templates
    "a template that loops": (template("{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"), TUNE,
                              "chats.jsonl:1: chat template base/chat_template.jinja: it runs for more than 1 seconds"),
    "a template that reaches for attributes": (template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), TUNE,
                                               "chats.jsonl:1: chat template base/chat_template.jinja: it reaches for the attribute"),
    "a template that fills the memory": (template("{{ 'x' * 10**10 }}"), TUNE, "base/chat_template.jinja: it takes more than"),
    "a template that is no Jinja": (template("{% if %}"), TUNE, "base/chat_template.jinja: line 1 is not Jinja"),
    # places
    "out exists": (nothing, TUNE + "/../docs", "docs exists"),
    "out is a file": (lambda: write("new", "x"), TUNE, "new exists"),
    "out is not an artifact": (nothing, TUNE + "/../base --overwrite", "base exists and is not an artifact"),
    "out below a file": (nothing, TUNE + "/../chats.jsonl/new", "chats.jsonl is not a folder"),
    "out without a name": (nothing, TUNE + "/..", "--out .: an artifact is a folder with a name of its own"),
    "out with too long a name": (nothing, TUNE + "w" * 300, "cannot be made (File name too long)"),
    "out that UTF-8 cannot hold": (nothing, TUNE + "\udcff", "is not UTF-8, so no passport can hold it"),
    "new folders above out": (lambda: write("e.jsonl"), "tune base e.jsonl --out a/b/new", "e.jsonl: no chat in it"),
    "a .gguf file below a file": (nothing, "export base --out chats.jsonl/a.gguf", "chats.jsonl/a.gguf: cannot be made (File exists)"),
    "a .gguf file that exists": (nothing, "export base --out base.gguf", "base.gguf exists"),
    "a row too short for Q8_0": (lambda: tiny.base(Path("odd"), hidden_size=24, num_attention_heads=2, num_key_value_heads=1),
                                 "export odd --out odd.gguf", "Q8_0 needs a multiple of 32: choose type F16"),
}  # fmt: skip
ON_LINUX = {
    "no file system": (
        nothing,
        TUNE.replace("new", "/proc/new"),
        "/proc/new: cannot be made (No such file or directory)",
    )
}


@pytest.mark.parametrize("name", [*CASES, *(ON_LINUX if sys.platform == "linux" else ())])
def test_one_line_and_nothing_left(
    here: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("criadero.template_sandbox._ask.__defaults__", (1.0,))
    prepare, command, message = (CASES | ON_LINUX)[name]
    prepare()
    before = everything(here)
    assert call(command) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert message in lines[-1]
    assert "Traceback" not in err
    assert everything(here) == before


def test_skipped_lines_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open("chats.jsonl", "a", encoding="utf-8") as file:
        file.write('{"messages": 5}\n{\n')
    assert call(TUNE + " --skip_bad") == 0
    assert "2 bad" in capsys.readouterr().err
    assert json.loads(Path("new/passport.json").read_text())["data"]["counts"]["bad"] == 2
    write("notes.jsonl", '{"text": "One note that can be read."}', "{", '{"text": ""}')
    write("data.toml", RECIPE.format(path="notes.jsonl") + "skip_bad = true\nheld_out = 0.0\n")
    assert call("data build --recipe data.toml --out few") == 0
    assert json.loads(Path("few/sources.json").read_text())[0]["removed"] == {"bad_row": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("chats.jsonl", "base/model.safetensors", "base/chat_template.jinja"):
        os.chmod(path, 0)
        assert call(TUNE) == 2
        assert path in capsys.readouterr().err.splitlines()[-1]
        os.chmod(path, 0o644)
    assert not Path("new").exists()


def test_what_the_system_refuses_is_no_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ref: str, **options: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", f"{ref}/config.json")

    monkeypatch.setattr("criadero.summary.describe", refuse)
    assert call("show m") == 2
    assert capsys.readouterr().err == "error: m/config.json: Permission denied\n"


# -- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file above ``size`` bytes: what a full disk does, at a place that is always the same. Not a fixture: pytest reports a test
    before it ends its fixtures, maybe to a file that is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "command",
    [
        "data build --recipe data.toml --out new",
        "data tokenizer docs --vocab_size 300 --out new",
        "data pack docs --tokenizer words --out new",
        "export base --to hf --out new",
        "export base --type f16 --out new",
        "export base --type f16 --out new.gguf",
        TUNE,
    ],
)
def test_a_full_disk(here: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(here)
    with small_files(300 if "data build" in command else 2000):  # what that one writes would be packed into 2,000
        assert call(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "new" in lines[-1]
    assert "File too large" in lines[-1]
    assert everything(here) == before


# -- Ctrl-C and kill -9 -----------------------------------------------------------------------------------------------

STOPS = """\
import sys, time
import {module} as module
def stop(*args, **kwargs):
    print("ready", flush=True)
    time.sleep(60)
module.{name} = stop
from criadero import cli
cli.main(sys.argv[1:])
"""
STAGES = {  # the command, and where it is stopped: when its largest files are written, and not sealed
    "data": ("data build --recipe data.toml --out docs --overwrite", "criadero.data.build", "Table.rows"),
    "tokenizer": ("data tokenizer docs --vocab_size 300 --out words --overwrite", "criadero.data.train_tokenizer", "measure"),
    "tokens": ("data pack docs --tokenizer words --out tokens --overwrite", "criadero.tokenizer", "Tokenizer.save"),
    "export": ("export base --to hf --out sealed --overwrite", "criadero.tokenizer", "Tokenizer.save"),
}  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_the_middle(
    here: Path, stage: str, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was finished stays whole; nothing half-made looks finished; the same command then goes through."""
    command, module, name = STAGES[stage]
    words = shlex.split(command)
    out = Path(words[words.index("--out") + 1])
    before = everything(here)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS.format(module=module, name=name), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    left = {path: hash for path, hash in everything(here).items() if not path.startswith(f"{out}.partial")}
    assert left == before
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err
        assert not Path(f"{out}.partial").exists()
    else:
        assert Path(f"{out}.partial").is_dir()
        assert not Path(f"{out}.partial/passport.json").exists()
    sealed = json.loads((out / "passport.json").read_text())
    assert call(command) == 0
    assert verify(out) == []
    assert not Path(f"{out}.partial").exists()
    assert json.loads((out / "passport.json").read_text())["files"] == sealed["files"]
