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
    (tmp_path / "c.md").write_text("")
    text = show(tmp_path, limit=2)
    assert text.startswith(f"{tmp_path}, 2 files: 3 documents, 1,015 characters\n2 bad lines:\n")
    assert "[...]" in text
    assert "c.md: empty" in text
    assert "no text in the field 'text' (fields: 'txt')" in text
    assert "b.jsonl:1\n  one" in text
    assert "two" not in text


def test_a_dataset_of_both(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ({"text": "one"}, chat, chat)))
    (tmp_path / "b.json").write_text(json.dumps([chat]))
    text = show(tmp_path)
    assert f"{tmp_path / 'a.jsonl'}: 1 document, 3 characters, 2 chats\n" in text
    assert f"{tmp_path / 'b.json'}: 1 chat, 2 turns, 1 assistant turn, 0 with system\n" in text


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
