"""The model card: computed from the tables, for a model from scratch, a tuned one, and one on a base of unknown origin."""

from __future__ import annotations

from pathlib import Path

from criadero.artifact import create, open_artifact
from criadero.card import write_card

MODEL = {"params": 10_000_000, "context": 512, "vocab": 8192}


def make(folder: Path, kind: str, source: str, tokens: int, base: Path | None = None) -> str:
    with create(folder, kind=kind, name=folder.name, config={}, licence="CC-BY-4.0") as draft:
        if base:
            draft.add_input("finetune_of", base)
        row = {"name": source, "licence": "MIT", "documents": 3, "tokens": tokens, "url": "https://example.org/x"}
        draft.data.update({"by_source": [row], "by_language": {"es": {}, "en": {}}})
        draft.model.update(MODEL)
        draft.step.update({"tokens": tokens, "seconds": 30.0})
        draft.metrics.append({"suite": "held_out", "metric": "loss", "slice": "es", "value": 1.25, "n": 7})
        (draft.path / "weights").write_text(source)
        write_card(
            draft, folder, name="", kind=kind, licence="CC-BY-4.0", base=str(base) if base else None, words="Ours."
        )
    return (open_artifact(folder).path / "README.md").read_text(encoding="utf-8")


def test_a_model_from_scratch(tmp_path: Path) -> None:
    text = make(tmp_path / "first", "base", "books", 5000)
    assert text.startswith("---\nlicense: cc-by-4.0\nlanguage:\n- en\n- es\n")
    for part in (
        "# first",
        "It has read 5,000 tokens",
        "[books](https://example.org/x) | MIT | 3 | 5,000",
        "Ours.",
        "1.25",
    ):
        assert part in text
    assert "30 seconds of computing" in text
    assert "base_model" not in text


def test_a_tuned_model_has_read_what_its_base_has_read(tmp_path: Path) -> None:
    make(tmp_path / "first", "base", "books", 5000)
    text = make(tmp_path / "second", "chat", "chats", 70, base=tmp_path / "first")
    assert "base_model: first" in text
    assert "Made from `first`" in text
    assert "It has read 5,070 tokens" in text
    assert "[chats](" in text
    assert "[books (read by first)](" in text


def test_a_base_of_unknown_origin_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "config.json").write_text("{}")
    text = make(tmp_path / "second", "chat", "chats", 70, base=tmp_path / "found")
    assert "base_model: found" in text
    assert "It has read" not in text
