"""data/show.py: what `criadero data show` says of chats, documents and broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from criadero.data.show import show
from criadero.errors import UserError


def test_chats(tmp_path: Path) -> None:
    rows = [{"instruction": f"Question {n}?", "input": "", "output": f"Answer {n}."} for n in range(5)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(2, "{broken")
    (tmp_path / "shop.jsonl").write_text("\n".join(lines) + "\n")
    text = show(tmp_path / "shop.jsonl", limit=2)
    assert "5 chats, 10 turns, 5 assistant turns" in text
    assert "Alpaca: 'instruction'" in text
    assert "1 bad line:" in text
    assert "shop.jsonl:3" in text
    assert "  user: Question 1?\n  assistant: Answer 1." in text
    assert "Question 2?" not in text


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n\n" + "word " * 200)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"txt": "three"}\n')
    text = show(tmp_path)
    assert "1 document, " in text
    assert "[...]" in text
    assert "b.jsonl: 2 documents, 6 characters" in text
    assert "no text in the field 'text' (fields: 'txt')" in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "nothing to read"),
        ("a.jsonl", "{\n", "the first complaint: .*a.jsonl:1"),
        ("a.jsonl", '{"x": 1}\n', "neither chats nor documents"),
        ("a.exe", "x", "unknown format"),
    ],
)
def test_nothing_to_show(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        show(tmp_path / name)
