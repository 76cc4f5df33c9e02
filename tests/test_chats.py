"""Shapes of chat files: detected, said, never guessed; what is no chat is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from criadero.data.chats import check_messages, detect, read_chats, to_messages
from criadero.errors import UserError

TURNS = [{"role": "user", "content": "¿Abren hoy?"}, {"role": "assistant", "content": "Sí, hasta las ocho."}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "¿Abren hoy?"}, {"from": "gpt", "value": "Sí, hasta las ocho."}]
    },
    "alpaca": {"instruction": "¿Abren hoy?", "input": "", "output": "Sí, hasta las ocho."},
    "dolly": {"instruction": "¿Abren hoy?", "context": "", "response": "Sí, hasta las ocho.", "category": "open_qa"},
    "completion": {"prompt": "¿Abren hoy?", "completion": "Sí, hasta las ocho."},
    "response": {"prompt": "¿Abren hoy?", "response": "Sí, hasta las ocho."},
    "answer": {"question": "¿Abren hoy?", "answer": "Sí, hasta las ocho."},
    "openai_in_conversations": {"conversations": TURNS},
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_gives_the_same_turns(tmp_path: Path, name: str) -> None:
    file = read_chats(write(tmp_path / "a.jsonl", [ROWS[name]] * 3))
    assert file.chats == [TURNS] * 3
    assert file.counts == {"chats": 3, "turns": 6, "assistant_turns": 3, "with_system": 0, "bad": 0}
    for theirs in dict(file.shape.fields).values():
        assert repr(theirs) in file.shape.sentence


def test_alpaca_input_system_and_history() -> None:
    row = {
        "instruction": "Traduce.",
        "input": "casa",
        "output": "house",
        "system": "Sé breve.",
        "history": [["Hola", "¡Hola!"]],
    }
    shape = detect([row, {"instruction": "Di algo.", "output": "Algo."}])
    assert [(m["role"], m["content"]) for m in to_messages(row, shape)] == [
        ("system", "Sé breve."), ("user", "Hola"), ("assistant", "¡Hola!"), ("user", "Traduce.\n\ncasa"), ("assistant", "house"),
    ]  # fmt: skip
    assert "'input'" in shape.sentence
    assert "'history'" in shape.sentence


def test_ambiguous_mixed_and_unknown_name_the_rows() -> None:
    both = {**ROWS["messages"], **ROWS["alpaca"]}
    with pytest.raises(UserError, match=r"row 2: ambiguous, it could be messages .* or alpaca"):
        detect([ROWS["messages"], both])
    with pytest.raises(
        UserError, match=r"row 3: rows of two shapes in one file: .* row 1 is alpaca .*, this one is prompt"
    ):
        detect([ROWS["alpaca"], ROWS["alpaca"], ROWS["completion"]])
    with pytest.raises(UserError, match="rows of two shapes"):
        detect([ROWS["completion"], ROWS["answer"]])
    with pytest.raises(UserError, match=r"row 1: no chat in this row \(fields: 'chosen', 'rejected'\)"):
        detect([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match="there are no rows"):
        detect([])


BAD = {
    "unknown role": ([("user", "a"), ("tool", "b")], "turn 2 has the unknown role 'tool'"),
    "empty": ([("user", "a"), ("assistant", " \n")], "turn 2 \\(assistant\\) is empty"),
    "not text": ([("user", "a"), ("assistant", 3)], "not text but int"),
    "no answer": ([("user", "a")], "no assistant turn"),
    "two users": ([("user", "a"), ("user", "b"), ("assistant", "c")], "turns 1 and 2 are both user"),
    "late system": ([("user", "a"), ("system", "b"), ("assistant", "c")], "only the first"),
    "assistant first": ([("system", "s"), ("assistant", "a")], "speaks first"),
    "unhashable role": ([(["user"], "a")], "unknown role"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_chats(name: str) -> None:
    turns, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        check_messages(turns)


def test_bad_rows_are_named_or_counted(tmp_path: Path) -> None:
    bad_rows = [{"messages": [{"role": "user"}]}, {"messages": []}, {"messages": TURNS[:1]}, {"other": 1}]
    for n, row in enumerate(bad_rows):
        path = write(tmp_path / f"{n}.jsonl", [ROWS["messages"], row])
        with pytest.raises(UserError, match=rf"{n}\.jsonl:2: "):
            read_chats(path)
    path = write(tmp_path / "all.jsonl", [ROWS["messages"], *bad_rows, ROWS["messages"]])
    with path.open("a") as file:
        file.write("{cut\n")
    chats = read_chats(path, skip_bad=True)
    assert len(chats.chats) == 2
    assert chats.counts["bad"] == len(chats.bad) == 5
    assert chats.places[1].endswith("all.jsonl:6")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no chat in it"):
        read_chats(path)
    with pytest.raises(UserError, match="every row is bad"):
        read_chats(write(tmp_path / "bad.jsonl", [{"messages": TURNS[:1]}]), skip_bad=True)


def test_a_named_shape_is_obeyed(tmp_path: Path) -> None:
    both = {**ROWS["alpaca"], **ROWS["answer"], "answer": "Otra cosa."}
    path = write(tmp_path / "a.jsonl", [both])
    with pytest.raises(UserError, match="ambiguous"):
        read_chats(path)
    chats = read_chats(path, shape=detect([ROWS["answer"]]))
    assert chats.chats[0][1]["content"] == "Otra cosa."


def test_public_chat_files(shared: Path) -> None:
    chats = read_chats(shared / "instruct/chatterbot/chatterbot.jsonl", skip_bad=True)
    assert chats.shape.name == "messages"
    assert chats.counts["chats"] > 2000
    seeds = shared / "instruct/seed_tasks_175/seed_tasks_175.jsonl"
    with pytest.raises(UserError, match=r"seed_tasks_175\.jsonl:1: no chat in this row"):
        read_chats(seeds)
