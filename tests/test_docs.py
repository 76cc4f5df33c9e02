"""The documents: every ``console`` and ``python`` example is run, and the reference is what the code says.

A document is a story, run from top to bottom in an empty folder. There ``cria`` is a folder with a tiny model of that name
(which goes before the bundled one), so the examples take a second or two; the slow twin runs them with the bundled model.

In a ``console`` block a line that begins with ``$ `` is a command, and what follows is its output: each of these lines has to
appear, in that order, where a run of digits or of hexadecimal digits matches any other, and ``...`` anything. After
``criadero chat`` the lines that begin with ``you>`` are typed in. A command whose documented output begins with ``error:`` has
to exit with 2 to 5, others with 0. Comments before a block say more:

    <!-- file: shop.jsonl -->       the block is this file (its first lines are repeated where a test needs more)
    <!-- output varies -->          the output is not compared: a model's own words, or a clock
    <!-- not run: REASON -->        the block is not run
    <!-- exits with 3 -->           each command of the block does, and says no error
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from criadero import cli
from criadero.artifact import create

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("README*.md")),
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "reference"),
]
LANGUAGES = {"console", "python"}
TALK = ["Hola, ¿abren los domingos?", "Do you deliver at home?", "Sí, de 10 a 13 horas.", "Thank you, good bye!"]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line where it starts, and what the comment before it says."""

    language: str
    text: str
    line: int
    note: str


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    note = ""
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(n for n in range(number + 1, len(lines)) if lines[n].startswith("```"))
            found.append(Block(line[3:].strip(), "\n".join(lines[number + 1 : end]), number + 1, note))
            number, note = end, ""
        elif match := re.fullmatch(r"<!-- (.*) -->", line):
            note = match[1]
        elif line.strip():
            note = ""
        number += 1
    return found


def story(page: Path) -> list[Block]:
    """The blocks of a page that are run or written; none of architecture.md, whose blocks are sketches of interfaces."""
    if page.name == "architecture.md":
        return []
    return [b for b in blocks_of(page) if b.note.startswith("file: ") or b.language in LANGUAGES]


@pytest.fixture(scope="session")
def tiny_cria(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed base model of a few thousand random weights, with a tokenizer and our chat template."""
    import torch

    from criadero.chat import builtin_template
    from criadero.checkpoints import save_hf
    from criadero.model import Llama, ModelConfig
    from criadero.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("docs") / "cria"
    tokenizer = train_bpe(TALK * 20, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with create(folder, kind="base", config={}, licence="CC-BY-SA-4.0") as draft:
        save_hf(Llama(config), config, draft.path)
        tokenizer.save(draft.path, chat_template=builtin_template("criadero").source)
        draft.model = {"params": config.parameters(), "context": 512, "vocab": tokenizer.vocab_size}
        draft.data = {"by_source": [{"name": "talk", "licence": "Apache-2.0", "documents": 4, "tokens": 40}]}
        draft.step["tokens"] = 40
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if story(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_examples(
    page: Path, tiny_cria: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("cria", "cria-chat"):
        (tmp_path / name).symlink_to(tiny_cria)
    run_story(page, tmp_path, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if story(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_with_the_bundled_model(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from criadero.artifact import bundled_models

    if "cria" not in bundled_models():
        pytest.skip("criadero/bundled/cria is not there yet: it is raised by recipes/cria")
    run_story(page, tmp_path, monkeypatch, capfd)


def test_the_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = {
        "command-line.md": generate.command_line(),
        "recipes.md": generate.recipes(),
        "python.md": generate.python_names(),
        "api.md": generate.api(),
    }
    for name, text in pages.items():
        committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
        assert committed == text, f"docs/reference/{name} is out of date: run make docs and commit it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), f"{page.name}: {target} is not there"
            if anchor and file.endswith(".md"):
                heads = re.findall(r"^#+ (.+)$", (page.parent / file).read_text(encoding="utf-8"), flags=re.M)
                assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


# -- running a page ---------------------------------------------------------------------------------------------------


def run_story(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in story(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.note.startswith("not run: "):
            continue
        if block.note.startswith("file: "):
            file = Path(block.note.removeprefix("file: "))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text + "\n", encoding="utf-8")
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        else:
            for command, expected in commands_of(block.text):
                code, output = run_command(command, expected, capfd)
                wanted: tuple[int, ...] = (2, 3, 4, 5) if expected and expected[0].startswith("error:") else (0,)
                if match := re.fullmatch(r"exits with (\d)", block.note):
                    wanted = (int(match[1]),)
                assert code in wanted, f"{where}: {command} exits with {code}:\n{output}"
                if block.note != "output varies":
                    compare(expected, output, f"{where}: {command}")


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Each command of a console block, continued lines joined, with its output's lines."""
    found: list[tuple[str, list[str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            found.append((line[2:].strip(), []))
        else:
            assert found, f"a console block begins with a command, not {line!r}"
            found[-1][1].append(line)
    return found


def run_command(command: str, expected: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and both streams together. ``criadero`` runs in this process: importing torch each time takes seconds."""
    capfd.readouterr()
    words = shlex.split(command, comments=True)
    if words[0] != "criadero" or {"|", ">", "<"} & set(words):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=600)
        return done.returncode, done.stdout + done.stderr
    typed = "".join(line.removeprefix("you>").strip() + "\n" for line in expected if line.startswith("you>"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(typed))
        patch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main(words[1:])
    streams = capfd.readouterr()
    return int(caught.value.code or 0), streams.err + streams.out


def compare(expected: list[str], output: str, where: str) -> None:
    """Each documented line appears in the output, in order; see the head of this file."""
    lines = iter([plain(line) for line in output.splitlines()])
    for line in filter(None, map(str.strip, expected)):
        if line == "..." or re.match(r"\w+>  ", line):
            continue
        pattern = re.compile(".*".join(map(re.escape, plain(line).split("..."))))
        assert any(pattern.search(one) for one in lines), (
            f"{where}: nothing like this line in its output: {line}\n{output}"
        )


def plain(line: str) -> str:
    """Numbers and hashes made equal, runs of spaces made one."""
    return re.sub(r"\s+", " ", re.sub(r"\b[0-9a-f]{12,}\b|[+-]?\d[\d,.]*", "#", line)).strip()
