"""Thumbs, better answers and votes as training data, and the tally of blind comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from criadero.cli import main
from criadero.data.chats import read_chats
from criadero.serve.feedback import collect, tally
from criadero.serve.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store(tmp_path / "criadero.db")
    yield made
    made.close()


def say(store: Store, chat: str, parent: str | None, role: str, content: str, owner: str = "ana", **more: Any) -> str:
    made = store.add_message(owner, chat, {"parent": parent, "role": role, "content": content, **more})
    assert made
    return str(made["id"])


def answered(store: Store, chat: str, parent: str, text: str, owner: str = "ana") -> str:
    more = {"model": "cria-chat", "model_hash": "sha256:11", "params": {"system": "Sé breve."}}
    return say(store, chat, parent, "assistant", text, owner, **more)


def conversation(store: Store, owner: str = "ana") -> tuple[str, str]:
    """A chat, and the message that waits for an answer."""
    chat = store.add_chat(owner, system="Changed since.")["id"]
    first = say(store, chat, None, "user", "¿Abren hoy?", owner)
    reply = answered(store, chat, first, "Sí.", owner)
    return chat, say(store, chat, reply, "user", "¿Hasta qué hora?", owner)


PROMPT = [
    {"role": "system", "content": "Sé breve."},
    {"role": "user", "content": "¿Abren hoy?"},
    {"role": "assistant", "content": "Sí."},
    {"role": "user", "content": "¿Hasta qué hora?"},
]
MODEL = {"model": "cria-chat", "model_hash": "sha256:11"}


def test_a_better_answer_is_a_pair_and_a_correction(store: Store) -> None:
    store.set_consent("ana", True)
    chat, question = conversation(store)
    bad = answered(store, chat, question, "A las nueve.")
    store.set_feedback("ana", bad, rating=-1, better="Hasta las ocho.")
    found = collect(store)
    assert found.pairs == [
        {
            "prompt": PROMPT, "chosen": [{"role": "assistant", "content": "Hasta las ocho."}],
            "rejected": [{"role": "assistant", "content": "A las nueve."}],
            "why": "better answer", "chosen_from": {"by": "person"}, "rejected_from": MODEL,
        }
    ]  # fmt: skip
    assert found.corrections == [
        {"messages": [*PROMPT, {"role": "assistant", "content": "Hasta las ocho."}], "corrects": MODEL}
    ]


def test_thumbs_on_two_answers_to_one_question_are_a_pair(store: Store) -> None:
    store.set_consent("ana", True)
    chat, question = conversation(store)
    good, bad, worse, unrated = (answered(store, chat, question, text) for text in ("a", "b", "c", "d"))
    for id, rating in ((good, 1), (bad, -1), (worse, -1)):
        store.set_feedback("ana", id, rating=rating, better=None)
    other = say(store, chat, good, "user", "¿Y mañana?")
    store.set_feedback("ana", answered(store, chat, other, "e"), rating=-1, better=None)  # to another question
    found = collect(store)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found.pairs] == [
        ("a", "b"),
        ("a", "c"),
    ]
    assert all(row["prompt"] == PROMPT and row["why"] == "thumbs" for row in found.pairs)
    assert found.corrections == []
    assert unrated not in json.dumps(found.pairs)


@pytest.mark.parametrize("winner", ["left", "right", "tie"])
def test_a_vote_is_a_pair_unless_it_is_a_tie(store: Store, winner: str) -> None:
    store.set_consent("ana", True)
    chat, question = conversation(store)
    id = store.add_comparison("ana", chat=chat, parent=question, left="cria-chat", right="shop", params={}, seed=1)
    assert id
    for side, model in (("left", "cria-chat"), ("right", "shop")):
        answer = {"role": "assistant", "content": side, "model": model, "model_hash": f"sha256:{model}"}
        store.set_answer("ana", id, side, {**answer, "params": {"system": "Sé breve."}})
    store.vote("ana", id, winner)
    found = collect(store)
    if winner == "tie":
        assert found.pairs == []
        assert found.left_out == {"the vote was a tie": 1}
        return
    loser = "right" if winner == "left" else "left"
    (row,) = found.pairs
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"], row["why"]) == (winner, loser, "vote")
    assert row["prompt"] == PROMPT
    assert row["chosen_from"]["model"] == {"left": "cria-chat", "right": "shop"}[winner]


def test_nothing_leaves_without_consent(store: Store) -> None:
    for owner, before, after in (
        ("ana", True, True),
        ("eva", True, False),
        ("leo", False, True),
        ("sol", False, False),
    ):
        store.set_consent(owner, before)
        chat, question = conversation(store, owner)
        store.set_feedback(owner, answered(store, chat, question, "x", owner), rating=None, better=f"by {owner}")
        store.set_consent(owner, after)
    assert [row["chosen"][0]["content"] for row in collect(store).pairs] == ["by ana"]


def test_what_teaches_nothing_is_left_out_and_counted(store: Store) -> None:
    store.set_consent("ana", True)
    chat, question = conversation(store)
    empty, same, first, again = (answered(store, chat, question, text) for text in ("", "x", "y", "y"))
    for id, better in ((empty, "z"), (same, "x"), (first, "w"), (again, "w")):
        store.set_feedback("ana", id, rating=None, better=better)
    found = collect(store)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found.pairs] == [("w", "y")]
    assert found.left_out == {
        "an answer or a turn before it is empty": 1, "both answers are the same": 1, "it was said before": 2
    }  # fmt: skip
    assert {row["messages"][-1]["content"] for row in found.corrections} == {"z", "x", "w"}


def test_the_tally_has_wilsons_interval_and_keeps_versions_apart() -> None:
    def vote(left: tuple[str, str], right: tuple[str, str], winner: str) -> dict[str, Any]:
        answers = {
            f"{side}_answer": {"model": name, "model_hash": hash}
            for side, (name, hash) in (("left", left), ("right", right))
        }
        return {"left": left[0], "right": right[0], "winner": winner, **answers}

    base, shop, shop2 = ("cria", "1"), ("shop", "2"), ("shop", "3")
    votes = [
        *[vote(base, shop, "right")] * 6, *[vote(shop, base, "left")] * 2, vote(shop, base, "right"), vote(base, shop, "left"),
        vote(base, shop, "tie"), vote(shop2, base, "tie"),
    ]  # fmt: skip
    first, second = tally(votes)
    assert {name: first[name] for name in ("a", "b", "a_wins", "b_wins", "ties", "share")} == {
        "a": "cria", "b": "shop", "a_wins": 2, "b_wins": 8, "ties": 1, "share": 0.2
    }  # fmt: skip
    # scipy.stats.binomtest(2, 10).proportion_ci(method="wilson")
    assert (first["low"], first["high"]) == pytest.approx((0.05668215, 0.50983753), abs=1e-6)
    assert (second["b_hash"], second["ties"], second["share"], second["low"], second["high"]) == ("3", 1, None, 0, 1)
    assert tally([]) == []


# --- criadero data feedback ---


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, args)])
    return int(left.value.code or 0)


def test_the_files_are_for_dpo_and_for_tune(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    store.set_consent("ana", True)
    for better in ("Hasta las ocho.", "Hasta las 20 h."):
        chat, question = conversation(store)
        store.set_feedback("ana", answered(store, chat, question, "A las nueve."), rating=None, better=better)
    out = tmp_path / "prefs.jsonl"
    assert run("data", "feedback", "--out", out, "--database", store.name) == 0
    said = capsys.readouterr()
    assert "2 preference pairs" in said.out
    assert "2 corrections" in said.out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPT, PROMPT]
    chats = read_chats(tmp_path / "prefs.corrections.jsonl")
    assert [chat[-1]["content"] for chat in chats.chats] == ["Hasta las ocho.", "Hasta las 20 h."]
    assert chats.bad == []
    assert run("data", "feedback", "--out", out, "--database", store.name) == 2
    assert "is there already" in capsys.readouterr().err
    assert run("data", "feedback", "--out", out, "--database", store.name, "--overwrite") == 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--out", "FOLDER/p.jsonl"], "nobody has consented"),
        (["--out", "FOLDER"], "is a folder"),
        (["--out", "FOLDER/none/p.jsonl"], "is no folder"),
        (["--out", "FOLDER/p.jsonl", "--corrections", "FOLDER/p.jsonl"], "two files"),
        (["--out", "FOLDER/p.jsonl", "--database", "FOLDER/missing.db"], "there is no database"),
        ([], "--out"),
    ],
)
def test_what_cannot_be_written_is_told(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    given = [text.replace("FOLDER", str(tmp_path)) for text in args]
    where = [] if "--database" in args else ["--database", store.name]
    assert run("data", "feedback", *given, *where) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "p.jsonl").exists()


# --- criadero keys ---


def test_a_key_is_shown_once_and_kept_as_its_hash(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from criadero.serve.keys import hash_key

    where = ("--database", store.name)
    assert run("keys", "create", "laptop", "--requests-per-minute", 30, *where) == 0
    made = capsys.readouterr()
    secret = made.out.strip()
    assert len(secret) >= 43
    assert "only now" in made.err
    found = store.key_by_hash(hash_key(secret))
    assert found
    assert (found.name, found.owner, found.limits, found.hint) == (
        "laptop",
        found.id,
        {"requests_per_minute": 30},
        secret[-4:],
    )
    assert run("keys", "create", "phone", "--owner", found.owner, *where) == 0
    other = capsys.readouterr().out.strip()
    assert run("keys", "list", *where) == 0
    listed = capsys.readouterr().out
    assert found.id in listed
    assert "laptop" in listed
    assert secret not in listed
    assert run("keys", "list", "--json", *where) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["laptop", "phone"]
    assert rows[1]["owner"] == found.owner
    assert run("keys", "revoke", found.id, *where) == 0
    assert store.key_by_hash(hash_key(secret)) is None
    assert store.key_by_hash(hash_key(other))
    assert run("keys", "revoke", found.id, *where) == 2
    assert all(secret.encode() not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["create", ""], "name"),
        (["create", "x", "--owner", "a b"], "owner"),
        (["create", "x", "--tokens-per-day", "0"], "tokens-per-day"),
        (["revoke", "key_0"], "no key"),
        (["list", "--database", "FOLDER/missing.db"], "there is no database"),
    ],
)
def test_what_is_wrong_with_a_key_is_told(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    given = [text.replace("FOLDER", str(tmp_path)) for text in args]
    where = [] if "--database" in args else ["--database", store.name]
    assert run("keys", *given, *where) == 2
    assert said in capsys.readouterr().err
