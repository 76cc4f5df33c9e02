"""What the server remembers, in SQLite and in a real PostgreSQL: whose it is, what is found, what deleting leaves."""

from __future__ import annotations

import contextlib
import inspect
import os
import sqlite3
import stat
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from criadero.errors import UserError
from criadero.serve import tables
from criadero.serve.store import Store, StoreError, open_store

SECRET = "Zanahoria-7731"


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: Any, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        made = open_store(tmp_path / "folder" / "criadero.db")
    else:
        url = request.getfixturevalue("cluster")
        empty(url)
        made = open_store(url)
    yield made
    made.close()


def empty(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    engine.dispose()


def filled(store: Store, owner: str, text: str = "hola") -> dict[str, str]:
    """One of everything that an owner can have; its ids."""
    chat = store.add_chat(owner, title=f"chat {text}", model="cria", system=text, params={"temperature": 0.5})["id"]
    user = store.add_message(owner, chat, {"parent": None, "role": "user", "content": f"¿{text}?"})
    assert user
    receipt = f"rcpt_{owner}"
    store.add_receipt(
        owner,
        {
            "id": receipt,
            "key": f"key_{owner}",
            "usage": {"prompt": 7, "completion": 5},
            "prompt_ids": [1],
            "paths": {"model": "/x"},
            "said": text,
        },
    )
    answer = store.add_message(
        owner, chat,
        {
            "parent": user["id"], "role": "assistant", "content": f"answer {text}", "model": "cria", "model_hash": "sha256:aa",
            "seed": 2**64 - 1, "finish_reason": "stop", "usage": {"prompt": 7}, "criadero": {"context": {"limit": 10}},
            "receipt_id": receipt, "tokens": [{"text": text, "logprob": -0.5, "top": [[text, -0.5]]}], "params": {"top_p": 0.9},
        },
    )  # fmt: skip
    assert answer
    store.set_consent(owner, True)
    store.set_feedback(owner, answer["id"], rating=-1, better=f"better {text}")
    comparison = store.add_comparison(
        owner, chat=chat, parent=user["id"], left="cria", right="shop", params={}, seed=2**64 - 1
    )
    assert comparison
    for side in ("left", "right"):
        assert store.set_answer(owner, comparison, side, {"role": "assistant", "content": f"{side} {text}"})
    response = f"resp_{owner}"
    store.add_response(
        owner, id=response, previous=None, input=[{"role": "user", "content": text}], body={"id": response}
    )
    return {
        "chat": chat, "message": answer["id"], "user": user["id"], "receipt": receipt, "comparison": comparison,
        "response": response,
    }  # fmt: skip


def test_a_chat_is_a_tree_of_messages(store: Store) -> None:
    chat = store.add_chat("ana", title="Compras", system="Sé breve.")["id"]
    first = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "a"})
    assert first
    left, right = (
        store.add_message("ana", chat, {"parent": first["id"], "role": "assistant", "content": text})
        for text in ("b1", "b2")
    )
    assert left
    assert right
    last = store.add_message("ana", chat, {"parent": right["id"], "role": "user", "content": "c"})
    assert last
    assert [one["content"] for one in store.messages("ana", chat)] == ["a", "b1", "b2", "c"]
    path = store.path("ana", chat, last["id"])
    assert path is not None
    assert [one["content"] for one in path] == ["a", "b2", "c"]
    assert store.path("ana", chat, "msg_0") is None
    other = store.add_chat("ana")["id"]
    assert store.path("ana", other, last["id"]) is None
    assert store.add_message("ana", other, {"parent": last["id"], "role": "user", "content": "d"}) is None
    assert store.delete_chat("ana", chat)
    assert store.messages("ana", chat) == []
    assert store.chat("ana", chat) is None
    assert store.chat("ana", other)


@pytest.mark.parametrize(
    "text", ["", "a\0b", "\ud800 alone", "🦙 ñ \u2028", "\\u0000 '\"", "x" * 300_000], ids=lambda text: repr(text)[:12]
)
def test_any_text_comes_back_as_it_was(store: Store, text: str) -> None:
    chat = store.add_chat("ana", title=text, system=text, model=text, params={"stop": [text]})
    again = store.chat("ana", chat["id"])
    assert again is not None
    assert (again["title"], again["system"], again["model"], again["params"]) == (text, text, text, {"stop": [text]})
    made = store.add_message("ana", chat["id"], {"parent": None, "role": "user", "content": text})
    assert made
    assert store.message("ana", made["id"]) == made
    assert made["content"] == text


def test_what_is_not_given_is_null(store: Store) -> None:
    chat = store.add_chat("ana")["id"]
    made = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "a"})
    assert made
    assert made["feedback"] is None
    assert made["tokens"] is None
    assert set(made) == {
        "id", "parent", "role", "content", "created", "model", "model_hash", "params", "seed", "finish_reason", "usage", "criadero",
        "receipt_id", "tokens", "feedback",
    }  # fmt: skip
    assert abs(made["created"] - time.time()) < 60


def test_search_regards_neither_case_nor_accents(store: Store) -> None:
    for title, said in (("Ñandúes", "uno"), ("b", "el CAFÉ de 100%"), ("c", "50 or 1000"), ("d_e", "tres")):
        chat = store.add_chat("ana", title=title)["id"]
        store.add_message("ana", chat, {"parent": None, "role": "user", "content": said})

    def found(query: str, owner: str = "ana") -> list[str]:
        return [one["title"] for one in store.chats(owner, query=query)[0]]

    assert found("ñandú") == found("NANDU") == ["Ñandúes"]
    assert found("café") == found("Cafe") == ["b"]
    assert found("100%") == ["b"]
    assert found("d_e") == ["d_e"]
    assert found("_") == ["d_e"]
    assert found("\\") == []
    assert found("cafe", "eva") == []
    assert found("\0") == found(" ")
    assert set(found("")) == {"Ñandúes", "b", "c", "d_e"}


def test_pages_of_chats_miss_none_and_repeat_none(store: Store) -> None:
    made = [store.add_chat("ana", title=str(number))["id"] for number in range(7)]
    store.change_chat("ana", made[2], {"title": "2, changed"})
    seen: list[str] = []
    before = None
    while True:
        page, before = store.chats("ana", before=before, limit=3)
        seen += [one["id"] for one in page]
        if before is None:
            break
    assert seen == [made[2], *(id for id in reversed(made) if id != made[2])]
    for bad in ("x", "", "1", "1-", "-1", "1-2-3", "9" * 40 + "-1", "²-1"):
        with pytest.raises(ValueError, match="before"):
            store.chats("ana", before=bad)


def test_every_method_sees_only_its_owners_rows(store: Store) -> None:
    """S12: whatever ana has, eva cannot read, change, delete or learn to exist."""
    mine = filled(store, "ana", SECRET)
    filled(store, "eva", "eva's")
    before = store.export("ana")
    calls: dict[str, Any] = {
        "consent": None,  # takes no id
        "set_consent": None,
        "add_chat": None,
        "chats": lambda: [one["id"] for one in store.chats("eva", query=SECRET)[0]],
        "chat": lambda: store.chat("eva", mine["chat"]),
        "change_chat": lambda: store.change_chat("eva", mine["chat"], {"title": "stolen"}),
        "delete_chat": lambda: store.delete_chat("eva", mine["chat"]),
        "add_message": lambda: store.add_message("eva", mine["chat"], {"parent": None, "role": "user", "content": "x"}),
        "message": lambda: store.message("eva", mine["message"]),
        "messages": lambda: store.messages("eva", mine["chat"]),
        "path": lambda: store.path("eva", mine["chat"], mine["message"]),
        "set_feedback": lambda: store.set_feedback("eva", mine["message"], rating=1, better=None),
        "consented_feedback": lambda: [
            one for one in store.consented_feedback("eva") if one["message"] == mine["message"]
        ],
        "add_comparison": lambda: store.add_comparison(
            "eva", chat=mine["chat"], parent=mine["user"], left="a", right="b", params={}, seed=1
        ),
        "comparison": lambda: store.comparison("eva", mine["comparison"]),
        "set_answer": lambda: store.set_answer("eva", mine["comparison"], "left", {"content": "x"}),
        "vote": lambda: store.vote("eva", mine["comparison"], "left"),
        "votes": lambda: store.votes("eva"),
        "add_receipt": None,  # its id is unique: see below
        "receipt": lambda: store.receipt("eva", mine["receipt"]),
        "delete_receipt": lambda: store.delete_receipt("eva", mine["receipt"]),
        "tokens_since": lambda: store.tokens_since("eva", "key_ana", 0),
        "add_response": None,
        "response": lambda: store.response("eva", mine["response"]),
        "delete_response": lambda: store.delete_response("eva", mine["response"]),
        "export": lambda: [text for text in [str(store.export("eva"))] if SECRET in text],
        "delete_everything": lambda: store.delete_everything("eva")["chats"] - 1,  # her own
    }
    owned = {
        name
        for name, method in inspect.getmembers(Store, inspect.isfunction)
        if not name.startswith("_") and "owner" in inspect.signature(method).parameters
    } - {"add_key"}
    assert set(calls) == owned, "a method of Store is not tried here as somebody else"
    for name, call in calls.items():
        assert call is None or not call(), name
    with pytest.raises(sa.exc.IntegrityError):
        store.add_receipt("eva", {"id": mine["receipt"]})
    assert store.export("ana") | {"exported": 0} == before | {"exported": 0}


def test_feedback_is_kept_with_the_consent_of_its_moment(store: Store) -> None:
    chat = store.add_chat("ana")["id"]
    user = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "a"})
    assert user
    one, two = (
        store.add_message("ana", chat, {"parent": user["id"], "role": "assistant", "content": text}) for text in "bc"
    )
    assert one
    assert two
    assert store.consent("ana") is False
    said = store.set_feedback("ana", one["id"], rating=1, better=None)
    assert said
    assert said["feedback"] == {"rating": 1, "better": None}
    store.set_consent("ana", True)
    assert store.consented_feedback("ana") == []  # given before
    store.set_feedback("ana", two["id"], rating=None, better="d")
    assert [(row["message"], row["better"]) for row in store.consented_feedback("ana")] == [(two["id"], "d")]
    assert store.consenting() == ["ana"]
    store.set_consent("ana", False)
    assert store.consented_feedback("ana") == []
    assert store.consenting() == []
    store.set_consent("ana", True)
    assert len(store.consented_feedback("ana")) == 1
    gone = store.set_feedback("ana", two["id"], rating=None, better=None)
    assert gone
    assert gone["feedback"] is None
    assert store.set_feedback("ana", user["id"], rating=1, better=None) is None  # not an answer


def test_a_comparison_enters_the_chat_with_its_one_vote(store: Store) -> None:
    chat = store.add_chat("ana")["id"]
    user = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "a"})
    assert user
    id = store.add_comparison("ana", chat=chat, parent=user["id"], left="x", right="y", params={"top_p": 0.5}, seed=3)
    assert id
    assert store.set_answer("ana", id, "left", {"role": "assistant", "content": "l", "model": "x"})
    assert not store.set_answer("ana", id, "left", {"role": "assistant", "content": "again", "model": "x"})
    with pytest.raises(ValueError, match="both answers"):
        store.vote("ana", id, "left")
    store.set_answer("ana", id, "right", {"role": "assistant", "content": "r", "model": "y"})
    assert len(store.messages("ana", chat)) == 1
    with pytest.raises(ValueError, match="winner"):
        store.vote("ana", id, "none")
    done = store.vote("ana", id, "right")
    assert done
    tree = store.messages("ana", chat)
    assert [(one["content"], one["model"], one["parent"]) for one in tree[1:]] == [
        ("l", "x", user["id"]),
        ("r", "y", user["id"]),
    ]
    assert [done["left_message"], done["right_message"]] == [tree[1]["id"], tree[2]["id"]]
    with pytest.raises(ValueError, match="its vote already"):
        store.vote("ana", id, "left")
    assert [row["winner"] for row in store.votes("ana")] == ["right"]
    assert store.votes("ana", consented=True) == []


def test_keys_are_found_by_hash_until_they_are_revoked(store: Store) -> None:
    assert not store.has_keys()
    made = store.add_key("ab" * 32, name="laptop", hint="wxyz", limits={"requests_per_minute": 3})
    assert made.owner == made.id
    shared = store.add_key("cd" * 32, name="phone", hint="1234", owner=made.owner)
    assert shared.owner == made.owner
    assert store.key_by_hash("ab" * 32) == made
    assert store.key_by_hash("ab") is None
    assert store.list_keys() == [made, shared]
    assert store.revoke_key(made.id)
    assert not store.revoke_key(made.id)
    assert not store.revoke_key("key_0")
    assert store.key_by_hash("ab" * 32) is None
    assert store.list_keys()[0].revoked
    assert store.has_keys()


def test_receipts_count_tokens_and_go_with_their_chat(store: Store) -> None:
    mine = filled(store, "ana")
    assert store.tokens_since("ana", "key_ana", time.time() - 60) == 12
    assert store.tokens_since("ana", "key_ana", time.time() + 60) == 0
    assert store.tokens_since("ana", "key_other", 0) == 0
    seen, whole = store.receipt("ana", mine["receipt"]), store.any_receipt(mine["receipt"])
    assert seen
    assert whole == seen | {"paths": {"model": "/x"}}
    store.add_receipt("ana", {"id": "rcpt_1"})
    assert store.forget_receipts(time.time() - 60) == 0
    assert store.forget_receipts(time.time() + 60) == 1  # the other one holds text and belongs to a message
    assert store.receipt("ana", mine["receipt"])
    store.delete_chat("ana", mine["chat"])
    assert store.receipt("ana", mine["receipt"]) is None


def test_a_deleted_response_takes_its_receipt_along(store: Store) -> None:
    store.add_receipt("ana", {"id": "rcpt_1", "prompt_ids": [1]})
    block = {"receipt": {"id": "rcpt_1"}}
    store.add_response("ana", id="resp_1", previous=None, input=[], body={"id": "resp_1", "criadero": block})
    kept = store.response("ana", "resp_1")
    assert kept
    assert kept["body"]["criadero"] == block
    assert store.delete_response("ana", "resp_1")
    assert store.receipt("ana", "rcpt_1") is None


def test_exported_is_everything_but_secrets(store: Store) -> None:
    mine = filled(store, "ana", SECRET)
    store.add_key("ab" * 32, name="laptop", hint="wxyz", owner="ana")
    out = store.export("ana")
    assert {name for name, rows in out.items() if isinstance(rows, list)} == {
        table.name for table in (*tables.OWNED, tables.keys)
    }
    assert all(out[table.name] for table in (*tables.OWNED, tables.keys))
    assert out["chats"][0]["id"] == mine["chat"]
    assert out["feedback"][0]["better"] == f"better {SECRET}"
    assert out["feedback_consent"] is True
    assert "ab" * 32 not in str(out)
    assert "paths" not in str(out)


def test_deleting_everything_leaves_no_byte_of_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "criadero.db")
    filled(store, "eva", "eva's own")
    kept = store.export("eva")
    filled(store, "ana", SECRET)
    store.chats("ana", query=SECRET)
    for number in range(50):  # pages that are freed, and some in the journal only
        store.delete_chat("ana", store.add_chat("ana", title=f"{SECRET} {number}" * 50)["id"])
    assert any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())
    counts = store.delete_everything("ana")
    assert counts == {
        "chats": 1, "messages": 2, "feedback": 1, "comparisons": 1, "receipts": 1, "responses": 1, "erased": True
    }  # fmt: skip
    assert not store.consent("ana")
    for file in tmp_path.iterdir():  # while the server still runs
        assert SECRET.encode() not in file.read_bytes(), file.name
        assert SECRET.lower().encode() not in file.read_bytes(), file.name
    assert store.export("eva") | {"exported": 0} == kept | {"exported": 0}
    store.close()


def test_deleting_everything_in_postgresql_rewrites_the_tables(cluster: str) -> None:
    empty(cluster)
    store = open_store(cluster)
    filled(store, "ana", SECRET)
    with store.engine.connect() as connection:
        sizes = sa.text("SELECT pg_relation_size('messages'), pg_relation_size('receipts')")
        assert all(size > 0 for size in connection.execute(sizes).one())
    assert store.delete_everything("ana")["erased"] is True
    with store.engine.connect() as connection:
        assert tuple(connection.execute(sizes).one()) == (0, 0)
    store.close()


def test_a_reader_elsewhere_is_told_not_hidden(tmp_path: Path) -> None:
    store = open_store(tmp_path / "criadero.db")
    filled(store, "ana", SECRET)
    other = sqlite3.connect(tmp_path / "criadero.db", isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT * FROM messages").fetchall()
    with store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout=50")  # this pooled connection is the one used next
    assert store.delete_everything("ana")["erased"] is False
    assert store.messages("ana", "x") == []
    other.execute("COMMIT")
    other.close()
    assert store.delete_everything("ana")["erased"] is True
    store.close()


def test_a_locked_database_is_said_to_be_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BUSY", 50)
    store = open_store(tmp_path / "criadero.db")
    chat = store.add_chat("ana")["id"]
    other = sqlite3.connect(tmp_path / "criadero.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as caught:
        store.add_chat("ana")
    assert caught.value.code == "database_busy"
    assert store.chat("ana", chat)  # readers do not wait
    other.execute("ROLLBACK")
    assert store.add_chat("ana")
    other.close()
    store.close()


def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    store = open_store(tmp_path / "criadero.db")
    with store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError) as caught:
        store.add_chat("ana", title=SECRET * 10_000)
    assert caught.value.code == "database_full"
    assert SECRET not in "".join(traceback.format_exception(caught.value))  # which the server's log would have
    assert str(tmp_path) not in str(caught.value)
    assert store.chats("ana")[0] == []
    store.close()


def test_many_writers_at_once_lose_nothing(store: Store) -> None:
    chat = store.add_chat("ana")["id"]
    root = store.add_message("ana", chat, {"parent": None, "role": "user", "content": "root"})
    assert root
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for turn in range(20):
                message = {"parent": root["id"], "role": "assistant", "content": f"{number} {turn}"}
                assert store.add_message("ana", chat, message)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    said = {one["content"] for one in store.messages("ana", chat)}
    assert said == {"root", *(f"{number} {turn}" for number in range(8) for turn in range(20))}


def test_it_is_all_there_when_opened_again(store: Store) -> None:
    filled(store, "ana")
    before = store.export("ana")
    again = open_store(store.engine.url.render_as_string(hide_password=False))
    assert again.export("ana") | {"exported": 0} == before | {"exported": 0}
    assert again.works()
    again.close()


# --- what cannot be opened ---


def test_the_file_is_for_its_user_only(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new" / "criadero.db")
    store.add_chat("ana")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    files = list((tmp_path / "new").iterdir())
    assert len(files) == 3  # the file, its journal, and the journal's index
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    store.close()


def test_the_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store = open_store()
    assert store.name == str(tmp_path / "criadero" / "criadero.db")
    store.close()
    monkeypatch.delenv("XDG_DATA_HOME")
    assert tables.default_file() == Path.home() / ".local" / "share" / "criadero" / "criadero.db"


def test_a_newer_schema_is_refused(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.execute(tables.schema.update().values(version=tables.VERSION + 1))
    with pytest.raises(UserError, match="newer Criadero"):
        open_store(store.engine.url.render_as_string(hide_password=False))


def test_an_older_schema_is_migrated_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(store, "ana")
    before = store.export("ana")
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    steps = ("ALTER TABLE chats ADD COLUMN pinned INTEGER", "UPDATE chats SET pinned = 1")
    monkeypatch.setitem(tables.MIGRATIONS, tables.VERSION, steps)
    address = store.engine.url.render_as_string(hide_password=False)
    for _ in range(2):  # the second time there is nothing to do, or the column would be there twice
        again = open_store(address)
        with again.engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT pinned FROM chats").scalar() == 1
            assert connection.execute(sa.select(tables.schema.c.version)).scalar() == tables.VERSION
        assert again.export("ana") | {"exported": 0} == before | {"exported": 0}
        again.close()


def test_a_database_of_the_first_version_is_migrated(store: Store) -> None:
    with store.engine.begin() as connection:
        connection.exec_driver_sql('ALTER TABLE receipts DROP COLUMN "key"')
        connection.execute(tables.schema.update().values(version=1))
    with contextlib.closing(open_store(store.engine.url.render_as_string(hide_password=False))) as again:
        filled(again, "ana")
        assert again.tokens_since("ana", "key_ana", 0) == 12


def test_a_migration_that_fails_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "VERSION", tables.VERSION + 1)
    steps = ("ALTER TABLE chats ADD COLUMN pinned INTEGER", "UPDATE nothing SET pinned = 1")
    monkeypatch.setitem(tables.MIGRATIONS, tables.VERSION, steps)
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(store.engine.url.render_as_string(hide_password=False))
    assert "pinned" not in {column["name"] for column in sa.inspect(store.engine).get_columns("chats")}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "empty"),
        ("mysql://root@localhost/x", "neither"),
        ("sqlite://", "neither"),
        ("postgresql://ana:geheim@127.0.0.1:1/nothing", "cannot be opened"),
        ("://x", "address cannot be read"),
        ("FOLDER", "cannot be opened"),
        ("FOLDER/text.txt", "cannot be opened"),
        ("FOLDER/text.txt/criadero.db", "cannot be opened"),
        ("FOLDER/others.db", "not Criadero's"),
        ("FOLDER/a\0b", "empty"),
    ],
)
def test_what_cannot_be_opened_is_told_in_a_line(tmp_path: Path, given: str, said: str) -> None:
    (tmp_path / "text.txt").write_text("this is no database, and long enough to be seen as none" * 100)
    others = sqlite3.connect(tmp_path / "others.db")
    others.execute("CREATE TABLE people (name)")
    others.commit()
    others.close()
    with pytest.raises(UserError, match=said) as caught:
        open_store(given.replace("FOLDER", str(tmp_path)))
    assert "geheim" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be opened"):
        open_store(tmp_path / "criadero.db")
