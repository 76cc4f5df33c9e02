"""The repository itself: what may lie in it, and what an installed package brings."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import postgres
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".py", ".md", ".toml", ".sh", ".txt", ".jinja", ".jsonl", ".json", ".yml", ".cfg", ""}
PEERS = {"trl", "datasets", "mergekit"}  # make compat-peers brings them
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"}


def listed() -> list[Path]:
    """What git has, or would take: tracked files, and untracked ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    return [(f, f.read_text(encoding="utf-8")) for f in listed() if f.suffix in TEXT and "bundled" not in f.parts]


def test_no_code_above_800_lines() -> None:
    code = [f for f in listed() if f.suffix in (".py", ".sh", ".cpp", ".h", ".ts", ".svelte")]
    assert [str(f.relative_to(ROOT)) for f in code if len(f.read_text(encoding="utf-8").splitlines()) > 800] == []


def test_no_paths_of_a_machine() -> None:
    """Somebody's home or working folder in a file of the project is a mistake (and so is one in a passport)."""
    wrong = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|mnt|scratch)/[A-Za-z0-9_.-]+")
    passports = [(f, f.read_text(encoding="utf-8")) for f in listed() if f.name in ("passport.json", "lineage.jsonl")]
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file, text in [*texts(), *passports]
        if file != Path(__file__)
        for match in wrong.finditer(text)
    ]
    assert found == []


def test_no_pickles() -> None:
    """Neither by name nor by content: a zip or a pickle's first bytes under another name."""
    assert [f.name for f in listed() if f.suffix in PICKLES] == []
    heads = {f: f.open("rb").read(4) for f in listed()}
    assert [
        f.name for f, head in heads.items() if head[:2] in (b"\x80\x02", b"\x80\x04") or head == b"PK\x03\x04"
    ] == []


def test_nothing_large_but_the_bundled_models() -> None:
    assert [f.name for f in listed() if f.stat().st_size > 2_000_000 and "bundled" not in f.parts] == []
    assert sum(f.stat().st_size for f in listed() if "bundled" in f.parts) <= 64e6


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])


def test_git_leaves_sealed_files_alone() -> None:
    """A line end that git converts breaks a passport."""
    command = ["git", "check-attr", "text", "--", "criadero/bundled/cria/passport.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert done.stdout.strip().endswith("text: unset")


def test_every_dependency_is_pinned() -> None:
    """constraints.txt has each package that pyproject.toml names, in a version that pyproject.toml allows."""
    from packaging.requirements import Requirement  # pytest needs packaging, so it is here
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    wanted = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    for requirement in map(Requirement, wanted):
        assert pins.get(canonicalize_name(requirement.name), "") in requirement.specifier, requirement.name
    assert not any("+" in version or "/" in version for version in pins.values())


def test_the_pins_are_written_once() -> None:
    """`make constraints` where nothing changed changes nothing, on whatever machine; what it changes it says."""
    spec = importlib.util.spec_from_file_location("constraints", ROOT / "tools" / "constraints.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    file = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in file.splitlines() if "==" in line)
    assert tool.written(file, pins, set()) == (file, [])  # as it is: canonical names, in order
    asked = tool.elsewhere(
        ["Colorama>=0.4; sys_platform == 'win32'", "a[b] (>1) ; python_version < '3.11'", "c; extra == 'x'", "d"]
    )
    assert asked == {"colorama", "a"}
    old = tool.HEAD + "Colorama==0.4.6\nhttpx==1\nhttpx2==2\nleft==1\nscikit_build_core==1\n"
    here = {
        "scikit_build_core": "1",
        "httpx": "1.1",
        "httpx2": "2",
        "Torch": "2.13.0+cpu",
        "pip": "23",
        "criadero": "0.1",
    }
    text, notes = tool.written(old, here, asked)
    assert text == tool.HEAD + "colorama==0.4.6\nhttpx==1.1\nhttpx2==2\nscikit-build-core==1\ntorch==2.13.0\n"
    assert notes == [
        "kept   colorama: not installed here, asked for elsewhere", "changed httpx 1.1", "dropped left 1", "added   torch 2.13.0"
    ]  # fmt: skip
    assert tool.written(text, here, asked)[0] == text
    assert (
        tool.written(text, {"HTTPX": "1.1", "httpx2": "2", "scikit-build-core": "1", "torch": "2.13.0"}, asked)[0]
        == text
    )


@pytest.mark.slow
def test_the_wheel_has_what_the_demo_needs(tmp_path: Path) -> None:
    """Templates, bundled models and examples, in a wheel made without compiling; and no C++."""
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed here")
    code = f"from scikit_build_core.build import build_wheel as b; b({str(tmp_path)!r}, {{'wheel.cmake': 'false'}})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    [wheel] = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "criadero/templates/criadero.jinja" in packed
    assert {"criadero/examples/tienda.jsonl", "criadero/examples/tienda.held-out.jsonl"} <= packed
    bundled = {f.relative_to(ROOT).as_posix() for f in listed() if "bundled" in f.parts}
    assert bundled <= packed
    assert not any("__pycache__" in one or "csrc" in one or one.startswith("tests/") for one in packed)


def test_the_wheel_is_told_what_to_pack() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["scikit-build"]
    assert settings["wheel"]["packages"] == {"criadero": "criadero", "criadero/examples": "examples"}
    [failed] = settings["overrides"]
    assert failed == {"if": {"failed": True}, "wheel": {"cmake": False}}  # no compiler: installed without the kernels


@pytest.mark.parametrize("script", ["tools/venv.sh", "tests/compat/install.sh", "tests/compat/peers.sh", ".ci/run"])
def test_scripts_parse_and_can_be_run(script: str) -> None:
    file = ROOT / script
    assert file.stat().st_mode & 0o111
    shell = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("#!")
    assert subprocess.run([shell, "-n", str(file)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("python", "uname", "message"),
    [
        ("", "Linux x86_64", "and no Python is here: install one"),
        ("[ $1 = -V ] && echo Python 3.9.2 && exit 0; exit 1", "Linux x86_64", "and Python 3.9.2 is here: install one"),
        (
            "case $2 in *ensurepip*) exit 1;; esac",
            "Linux aarch64",
            "python3 cannot make environments: install its venv",
        ),
        ("exit 0", "Darwin x86_64", "PyTorch is no longer built for Macs with Intel processors"),
    ],
)
def test_installing_says_what_is_missing(tmp_path: Path, python: str, uname: str, message: str) -> None:
    """tools/venv.sh on a machine of which we make up the commands; it stops before it makes or removes anything."""
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools" / "venv.sh"
    script.write_text((ROOT / "tools" / "venv.sh").read_text(encoding="utf-8"), encoding="utf-8")
    system, machine = uname.split()
    commands = {
        "dirname": "echo ${1%/*}",
        "uname": f"[ $1 = -s ] && echo {system} || echo {machine}",
        "python3": python,
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        if body:
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
            (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(["/bin/sh", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bin", "tools"]


@pytest.mark.skipif(not os.environ.get("CI"), reason="only the checks that have to pass must have everything")
def test_the_checks_have_what_tests_would_skip_without() -> None:
    assert shutil.which("chromium") or shutil.which("google-chrome"), "the page's journeys need Chromium"
    assert (ROOT / "web" / "node_modules" / "axe-core").is_dir(), "the page's checks need axe: make page-check"
    assert postgres.programs(), "the database's tests need PostgreSQL"


@pytest.mark.skipif(not os.environ.get("CI"), reason="only the checks that have to pass must have everything")
def test_the_checks_have_the_packages_that_tests_would_skip_without() -> None:
    asked = {
        name
        for file in (ROOT / "tests").glob("*.py")
        for name in re.findall(r'importorskip\("(\w+)', file.read_text(encoding="utf-8"))
    }
    absent = {name for name in asked - PEERS if importlib.util.find_spec(name) is None}
    assert not absent, f"the extra dev has to bring {', '.join(sorted(absent))}"
