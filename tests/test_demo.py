"""The demo's parts on a tiny model; the whole of it where the bundled model is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from criadero import demo
from criadero.artifact import Artifact, bundled_models, create, open_artifact
from criadero.recipe import parse
from criadero.train.sft import SftRecipe


def seal(out: Path, seed: int = 0) -> Artifact:
    with create(out, kind="base", config={}) as draft:
        tiny.base(draft.path, seed=seed)
        draft.data["by_source"] = [{"name": "shop", "licence": "CC0-1.0"}, {"name": "tienda", "licence": "CC-BY-4.0"}]
        draft.model.update({"params": 25120, "context": 128})
        draft.step.update({"tokens": 1234567, "seconds": 90.0})
        draft.metrics.append({"metric": "bits_per_byte", "slice": "es text", "value": 1.2345, "n": 5})
        draft.metrics.append({"metric": "loss", "slice": "es text", "value": 3.5, "n": 5})
    return open_artifact(out)


def printed(*what: Any, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(*what)
    return out.getvalue()


def test_the_passport_in_a_few_lines(tmp_path: Path) -> None:
    base = seal(tmp_path / "base")
    said = printed(demo.passport_lines(base))
    for part in (
        base.id[:19], "Llama, 25,120 parameters, context 128", "2 sources: shop, tienda", "CC-BY-4.0; CC0-1.0",
        "1,234,567 tokens in 2 minutes", "criadero==", "es text: 1.234 bits per byte",
    ):  # fmt: skip
        assert part in said, part
    assert "3.5" not in said


def test_questions_are_the_first_of_each_chat(tmp_path: Path) -> None:
    rows = [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": "a"},
        ]
        for n in range(9)
    ]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n\n" for row in rows))
    assert demo.read_questions(tmp_path / "h.jsonl") == ["0?", "1?", "2?", "3?", "4?"]


def test_both_models_answer_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = seal(tmp_path / "one"), seal(tmp_path / "two", seed=1)

    class Speaker:
        def __init__(self, artifact: Artifact) -> None:
            self.name = artifact.name

        def chat(self, messages: list[dict], **settings: Any) -> Any:
            return iter([f"{self.name} [says] ", messages[-1]["content"].upper()])

    monkeypatch.setattr(demo, "LLM", Speaker)
    out = io.StringIO()
    demo.compare(Console(file=out, width=120), one, two, ["abierto?", "cash?"])
    said = out.getvalue()
    assert "one (before)" in said
    for answer in ("one [says] ABIERTO?", "two [says] ABIERTO?", "one [says] CASH?", "two [says] CASH?"):
        assert answer in said


def test_real_models_can_be_compared(tmp_path: Path) -> None:
    out = io.StringIO()
    demo.compare(Console(file=out, width=120), seal(tmp_path / "a"), seal(tmp_path / "b", 1), ["Can I pay by card?"])
    assert "Can I pay by card?" in out.getvalue()


def test_the_settings_are_those_of_a_recipe() -> None:
    parse(SftRecipe, {"base": "a", "data": "b", **demo.settings()}, where="the demo")


def small_shop(folder: Path, answer: str) -> Path:
    tiny.write_chats(folder / "tienda.jsonl", 24, answer=answer)
    tiny.write_chats(folder / "tienda.held-out.jsonl", 6, answer=answer)
    return folder


@pytest.mark.parametrize(("least", "code"), [(0.2, 0), (99.0, 1)])
def test_the_story_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], least: float, code: int
) -> None:
    """All four steps; and exit code 1 when the loss does not fall as it should."""
    seal(tmp_path / "base")
    small_shop(tmp_path, "Yes, we are open on Sundays.")
    monkeypatch.setattr(demo, "BASE", str(tmp_path / "base"))
    monkeypatch.setattr(demo, "LEAST_FALL", least)
    monkeypatch.setattr(demo, "examples_folder", lambda: tmp_path)
    monkeypatch.setattr(demo, "settings", lambda: {"epochs": 2.0, "batch_tokens": 256, "lr": 1e-2, "dtype": "float32"})
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert demo.demo(tmp_path / "out") == code
    said = capsys.readouterr()
    assert "pre-flight" in said.err
    assert "held-out loss:" in said.out
    if code:
        assert "the demo has failed" in said.out
    else:
        assert said.out.count("\nmodel: ") == len(demo.TRANSCRIPT) == 3
        assert demo.demo(tmp_path / "out") == 0  # again, over what is there


def test_the_examples_of_the_demo_are_there_and_apart() -> None:
    folder = Path(demo.__file__).resolve().parents[1] / "examples"
    if not (folder / "tienda.jsonl").is_file():
        pytest.skip("examples/tienda.jsonl is not written yet")
    assert demo.examples_folder().name == "examples"
    from criadero.data.chats import read_chats

    learned, held = (read_chats(folder / name).chats for name in ("tienda.jsonl", "tienda.held-out.jsonl"))
    assert len(learned) + len(held) >= 200
    asked = [{chat[-2]["content"].strip().casefold() for chat in part} for part in (learned, held)]
    assert not asked[0] & asked[1]


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    if "cria" not in bundled_models():
        pytest.skip("the bundled model is not raised yet")
    root = str(Path(demo.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "criadero.cli", "demo"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": root, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("1. The base model", "2. Make it yours", "3. Before and after", "4. Talk to it"):
        assert step in done.stdout
    assert done.stdout.count("\nmodel: ") == 3
