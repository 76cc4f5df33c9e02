"""What the server remembers: chats, feedback, comparisons, receipts, stored responses, keys.

Every row has an owner, and every query names one: what is somebody else's is as if it were not there (None or False, never a
hint). The exceptions are for the command line on the machine itself, and say so. Methods are synchronous and may be called from
any thread. `StoreError` is the database's trouble, not the caller's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from criadero.serve import tables
from criadero.serve.keys import Key
from criadero.serve.tables import chats, comparisons, feedback, folded, keys, messages, preferences, receipts, responses

SIDES = ("left", "right")
WINNERS = (*SIDES, "tie")


class StoreError(Exception):
    """The database could not do it now: ``code`` is database_busy, database_full, or database_unreachable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class StoredKey(Key):
    """A key with what is known of it but its secret: ``hint`` is the secret's end."""

    name: str = ""
    hint: str = ""
    created: float = 0.0
    revoked: float | None = None


def new_id(kind: str) -> str:
    """An id that tells nothing and cannot be guessed: ``kind_`` and 24 hexadecimal digits."""
    return f"{kind}_{secrets.token_hex(12)}"


def open_store(database: str | os.PathLike[str] | None = None) -> Store:
    """Open the database: a file, a URL, or the default place (`criadero.serve.tables.default_file`). UserError: see `open_engine`."""
    return Store(tables.open_engine(database))


class Store:
    """An open database; see the module's docstring."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine

    @property
    def name(self) -> str:
        """The file, or the address without its password."""
        return tables.shown(self.engine.url)

    def close(self) -> None:
        self.engine.dispose()

    @contextlib.contextmanager
    def _do(self, writes: bool) -> Iterator[Connection]:
        try:
            with self.engine.connect().execution_options(writes=writes) as connection, connection.begin():
                yield connection
        except IntegrityError:
            raise
        except PoolTimeout as error:
            raise StoreError("database_busy", "the database has too much to do; try again") from error
        except DBAPIError as error:
            raise _trouble(error) from error

    def _read(self) -> contextlib.AbstractContextManager[Connection]:
        return self._do(False)

    def _write(self) -> contextlib.AbstractContextManager[Connection]:
        return self._do(True)

    def works(self) -> bool:
        """Whether the database answers (for ``/ready``)."""
        try:
            with self._read() as connection:
                connection.execute(sa.select(tables.schema.c.version)).scalar()
            return True
        except StoreError:
            return False

    # -- keys: the command line's, and the check of a request --

    def add_key(
        self, sha256: str, *, name: str, hint: str, owner: str | None = None, limits: Mapping[str, int] = {}
    ) -> StoredKey:
        """Keep a key by the SHA-256 of its secret. ``owner``: whose data it opens; by default it has some of its own."""
        id = new_id("key")
        row: dict[str, Any] = {
            "id": id,
            "owner": owner or id,
            "name": name,
            "sha256": sha256,
            "hint": hint,
            "limits": dict(limits),
            "created": _now(),
        }
        with self._write() as connection:
            connection.execute(keys.insert().values(row))
        return StoredKey(id, row["owner"], row["limits"], name, hint, row["created"] / 1e6)

    def key_by_hash(self, sha256: str) -> StoredKey | None:
        """The key whose secret has this SHA-256 (hexadecimal), unless it is revoked."""
        with self._read() as connection:
            row = connection.execute(sa.select(keys).where(keys.c.sha256 == sha256, keys.c.revoked.is_(None))).first()
        return _key(row) if row else None

    def has_keys(self) -> bool:
        """Whether there is any key that is not revoked."""
        with self._read() as connection:
            return connection.execute(sa.select(keys.c.id).where(keys.c.revoked.is_(None)).limit(1)).first() is not None

    def list_keys(self) -> list[StoredKey]:
        """All keys, the revoked ones too: for the command line."""
        with self._read() as connection:
            return [_key(row) for row in connection.execute(sa.select(keys).order_by(keys.c.number))]

    def revoke_key(self, id: str) -> bool:
        """Let a key open nothing from now on: for the command line. False when there is no such key, or it is revoked already."""
        with self._write() as connection:
            done = connection.execute(
                keys.update().where(keys.c.id == id, keys.c.revoked.is_(None)).values(revoked=_now())
            )
        return done.rowcount > 0

    # -- preferences --

    def consent(self, owner: str) -> bool:
        """Whether what the owner says of answers may become training data."""
        with self._read() as connection:
            return _consent(connection, owner)

    def set_consent(self, owner: str, value: bool) -> None:
        """Withdrawn, nothing of the owner is given out; given, what is said from now on is (not what was said before)."""
        row = {"feedback_consent": value, "changed": _now()}
        with self._write() as connection:
            if not connection.execute(preferences.update().where(preferences.c.owner == owner).values(row)).rowcount:
                connection.execute(preferences.insert().values(owner=owner, **row))

    # -- chats --

    def add_chat(
        self, owner: str, *, title: str = "", model: str | None = None, system: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        now = _now()
        row = {
            "id": new_id("chat"), "owner": owner, "title": title, "folded": folded(title), "model": model, "system": system,
            "params": dict(params or {}), "created": now, "updated": now,
        }  # fmt: skip
        with self._write() as connection:
            connection.execute(chats.insert().values(row))
        return _chat(row)

    def chats(
        self, owner: str, *, query: str = "", before: str | None = None, limit: int = 50
    ) -> tuple[list[dict[str, Any]], str | None]:
        """The chats last used first, and where to go on (``before`` of the next call; None at the end).

        ``query``: only chats whose title or messages hold it, without regard to case and accents. ValueError: no such ``before``.
        """
        chosen = sa.select(chats).where(chats.c.owner == owner)
        if query:
            like = f"%{_escaped(folded(query))}%"
            said = (
                sa.select(messages.c.chat)
                .where(messages.c.owner == owner)
                .where(messages.c.folded.like(like, escape="\\"))
            )
            chosen = chosen.where(sa.or_(chats.c.folded.like(like, escape="\\"), chats.c.id.in_(said)))
        if before is not None:
            updated, number = _cursor(before)
            chosen = chosen.where(
                sa.or_(chats.c.updated < updated, sa.and_(chats.c.updated == updated, chats.c.number < number))
            )
        chosen = chosen.order_by(chats.c.updated.desc(), chats.c.number.desc()).limit(limit + 1)
        with self._read() as connection:
            rows = connection.execute(chosen).all()
        more = f"{rows[limit - 1].updated}-{rows[limit - 1].number}" if len(rows) > limit else None
        return [_chat(row._asdict()) for row in rows[:limit]], more

    def chat(self, owner: str, id: str) -> dict[str, Any] | None:
        """A chat without its messages."""
        with self._read() as connection:
            row = _own(connection, chats, owner, id)
        return _chat(row._asdict()) if row else None

    def change_chat(self, owner: str, id: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
        """Change title, model, system or params."""
        values = {name: changes[name] for name in ("title", "model", "system", "params") if name in changes}
        if "title" in values:
            values["folded"] = folded(values["title"])
        with self._write() as connection:
            if values:
                connection.execute(
                    chats.update().where(chats.c.owner == owner, chats.c.id == id).values(**values, updated=_now())
                )
            row = _own(connection, chats, owner, id)
        return _chat(row._asdict()) if row else None

    def delete_chat(self, owner: str, id: str) -> bool:
        """Delete a chat with all that belongs to it, its receipts too."""
        with self._write() as connection:
            if _own(connection, chats, owner, id) is None:
                return False
            made = connection.execute(sa.select(messages.c.receipt).where(messages.c.chat == id)).scalars().all()
            pairs = connection.execute(
                sa.select(comparisons.c.left_answer, comparisons.c.right_answer).where(comparisons.c.chat == id)
            )
            ids = {*made, *(answer.get("receipt_id") for pair in pairs for answer in pair if answer)} - {None}
            connection.execute(chats.delete().where(chats.c.owner == owner, chats.c.id == id))
            for some in _pieces(sorted(ids)):
                connection.execute(receipts.delete().where(receipts.c.owner == owner, receipts.c.id.in_(some)))
        return True

    # -- messages: a tree by `parent` --

    def add_message(self, owner: str, chat: str, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Add a message (the fields of the page's Message; ``id`` optional). None when there is no such chat, or parent in it."""
        with self._write() as connection:
            return self._add_message(connection, owner, chat, message)

    def _add_message(
        self, connection: Connection, owner: str, chat: str, message: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        if _own(connection, chats, owner, chat) is None:
            return None
        parent = message.get("parent")
        if parent is not None:
            above = _own(connection, messages, owner, parent)
            if above is None or above.chat != chat:
                return None
        now = _now()
        same = (
            "role",
            "content",
            "model",
            "model_hash",
            "params",
            "seed",
            "finish_reason",
            "usage",
            "criadero",
            "tokens",
        )
        row = {name: message.get(name) for name in same} | {
            "id": message.get("id") or new_id("msg"), "owner": owner, "chat": chat, "parent": parent, "created": now,
            "folded": folded(message["content"]), "receipt": message.get("receipt_id"),
        }  # fmt: skip
        connection.execute(messages.insert().values(row))
        connection.execute(chats.update().where(chats.c.id == chat).values(updated=now))
        return _message(row)

    def message(self, owner: str, id: str) -> dict[str, Any] | None:
        with self._read() as connection:
            row = connection.execute(_with_feedback(owner).where(messages.c.id == id)).first()
        return _message(row._asdict()) if row else None

    def messages(self, owner: str, chat: str) -> list[dict[str, Any]]:
        """All messages of a chat, all branches, in the order they came."""
        with self._read() as connection:
            rows = connection.execute(
                _with_feedback(owner).where(messages.c.chat == chat).order_by(messages.c.number)
            ).all()
        return [_message(row._asdict()) for row in rows]

    def path(self, owner: str, chat: str, leaf: str | None) -> list[dict[str, Any]] | None:
        """The messages from the first to ``leaf``, along their parents: what a model is shown. None when it is not in this chat."""
        if leaf is None:
            return []
        by_id = {message["id"]: message for message in self.messages(owner, chat)}
        found = []
        at: str | None = leaf
        while at is not None:
            if at not in by_id:
                return None
            found.append(by_id[at])
            at = by_id[at]["parent"]
        return found[::-1]

    # -- feedback --

    def set_feedback(
        self, owner: str, message: str, *, rating: int | None, better: str | None
    ) -> dict[str, Any] | None:
        """Say of an answer that it is good (1) or bad (-1), and what would be better; both None takes it back.

        It is kept with the consent of this moment. None when there is no such message, or it is not an answer.
        """
        with self._write() as connection:
            row = _own(connection, messages, owner, message)
            if row is None or row.role != "assistant":
                return None
            connection.execute(feedback.delete().where(feedback.c.owner == owner, feedback.c.message == message))
            if rating is not None or better is not None:
                connection.execute(
                    feedback.insert().values(
                        id=new_id("fb"), owner=owner, message=message, rating=rating, better=better,
                        consent=_consent(connection, owner), created=_now(),
                    )
                )  # fmt: skip
            row = connection.execute(_with_feedback(owner).where(messages.c.id == message)).one()
        return _message(row._asdict())

    def consenting(self) -> list[str]:
        """Owners whose consent stands: for the command line."""
        with self._read() as connection:
            chosen = sa.select(preferences.c.owner).where(preferences.c.feedback_consent)
            return list(connection.execute(chosen.order_by(preferences.c.owner)).scalars())

    def consented_feedback(self, owner: str) -> list[dict[str, Any]]:
        """Rows of {message, chat, rating, better, created} that were given with consent, while it stands."""
        chosen = (
            sa.select(feedback, messages.c.chat)
            .join(messages, messages.c.id == feedback.c.message)
            .where(feedback.c.owner == owner, feedback.c.consent)
            .order_by(feedback.c.number)
        )
        with self._read() as connection:
            if not _consent(connection, owner):
                return []
            rows = connection.execute(chosen).all()
        return [
            {"message": row.message, "chat": row.chat, "rating": row.rating, "better": row.better, "created": row.created / 1e6}
            for row in rows
        ]  # fmt: skip

    # -- comparisons --

    def add_comparison(
        self, owner: str, *, chat: str, parent: str, left: str, right: str, params: Mapping[str, Any], seed: int
    ) -> str | None:  # fmt: skip
        """Keep who stands on which side. None when there is no such chat, or parent in it."""
        id = new_id("cmp")
        with self._write() as connection:
            above = _own(connection, messages, owner, parent)
            if above is None or above.chat != chat:
                return None
            connection.execute(
                comparisons.insert().values(
                    id=id, owner=owner, chat=chat, parent=parent, left=left, right=right, params=dict(params), seed=seed, created=_now()
                )
            )  # fmt: skip
        return id

    def comparison(self, owner: str, id: str) -> dict[str, Any] | None:
        with self._read() as connection:
            row = _own(connection, comparisons, owner, id)
        return _plain(row._asdict()) if row else None

    def set_answer(self, owner: str, comparison: str, side: str, answer: Mapping[str, Any]) -> bool:
        """Keep one side's answer (a Message without id), out of the chat until the vote. False once there is one."""
        column = {"left": comparisons.c.left_answer, "right": comparisons.c.right_answer}[side]
        with self._write() as connection:
            done = connection.execute(
                comparisons.update()
                .where(comparisons.c.owner == owner, comparisons.c.id == comparison, column.is_(None))
                .values({column.name: dict(answer)})
            )
        return done.rowcount > 0

    def vote(self, owner: str, comparison: str, winner: str) -> dict[str, Any] | None:
        """Keep the vote, once, and put both answers into the chat, the left one first; the comparison as it is then.

        None when there is none of this id. ValueError: the answers are not there yet, or it was voted on.
        """
        if winner not in WINNERS:
            raise ValueError(f"the winner is left, right or tie, not {winner!r:.40}")
        with self._write() as connection:
            row = _own(connection, comparisons, owner, comparison)
            if row is None:
                return None
            if row.left_answer is None or row.right_answer is None:
                raise ValueError("both answers have to be there before the vote")
            taken = connection.execute(
                comparisons.update()
                .where(comparisons.c.id == comparison, comparisons.c.winner.is_(None))
                .values(winner=winner, voted=_now(), consent=_consent(connection, owner))
            )
            if not taken.rowcount:
                raise ValueError("this comparison has its vote already")
            ids = {}
            for side, answer in (("left", row.left_answer), ("right", row.right_answer)):
                added = self._add_message(connection, owner, row.chat, {**answer, "parent": row.parent})
                ids[f"{side}_message"] = added["id"] if added else None
            connection.execute(comparisons.update().where(comparisons.c.id == comparison).values(ids))
            done = _own(connection, comparisons, owner, comparison)
        return _plain(done._asdict()) if done else None

    def votes(self, owner: str, *, consented: bool = False) -> list[dict[str, Any]]:
        """The comparisons that were voted on, in order; with ``consented`` those given with consent, while it stands."""
        chosen = sa.select(comparisons).where(comparisons.c.owner == owner, comparisons.c.winner.is_not(None))
        if consented:
            chosen = chosen.where(comparisons.c.consent)
        with self._read() as connection:
            if consented and not _consent(connection, owner):
                return []
            rows = connection.execute(chosen.order_by(comparisons.c.number)).all()
        return [_plain(row._asdict()) for row in rows]

    # -- receipts --

    def add_receipt(self, owner: str, receipt: Mapping[str, Any]) -> None:
        """Keep a receipt under its ``id``. Its ``usage`` counts towards the tokens of its ``key``."""
        usage = receipt.get("usage") or {}
        row = {
            "id": receipt["id"], "owner": owner, "tokens": int(usage.get("prompt", 0)) + int(usage.get("completion", 0)),
            "kept": "prompt_ids" in receipt, "body": dict(receipt), "key": receipt.get("key"), "created": _now(),
        }  # fmt: skip
        with self._write() as connection:
            connection.execute(receipts.insert().values(row))

    def receipt(self, owner: str, id: str) -> dict[str, Any] | None:
        """A receipt, without the paths of its model on this machine."""
        with self._read() as connection:
            row = _own(connection, receipts, owner, id)
        return _without_paths(row.body) if row else None

    def delete_receipt(self, owner: str, id: str) -> bool:
        """Delete a receipt, as of an answer that could not be kept."""
        with self._write() as connection:
            done = connection.execute(receipts.delete().where(receipts.c.owner == owner, receipts.c.id == id))
        return done.rowcount > 0

    def any_receipt(self, id: str) -> dict[str, Any] | None:
        """A receipt of whomever, with its paths: for the command line."""
        with self._read() as connection:
            return connection.execute(sa.select(receipts.c.body).where(receipts.c.id == id)).scalar()

    def tokens_since(self, owner: str, key: str, since: float) -> int:
        """Tokens of a key's prompts and answers since a time (seconds since 1970), by the receipts that are still there."""
        chosen = sa.select(sa.func.sum(receipts.c.tokens)).where(
            receipts.c.owner == owner, receipts.c.key == key, receipts.c.created >= int(since * 1e6)
        )
        with self._read() as connection:
            return int(connection.execute(chosen).scalar() or 0)

    def forget_receipts(self, before: float) -> int:
        """Delete receipts older than a time that hold no text and belong to no message; how many. They would grow for ever."""
        used = sa.select(messages.c.receipt).where(messages.c.receipt.is_not(None))
        with self._write() as connection:
            done = connection.execute(
                receipts.delete().where(
                    receipts.c.created < int(before * 1e6), sa.not_(receipts.c.kept), receipts.c.id.not_in(used)
                )
            )
        return done.rowcount

    # -- stored responses (/v1/responses) --

    def add_response(
        self, owner: str, *, id: str, previous: str | None, input: Sequence[Any], body: Mapping[str, Any]
    ) -> None:  # fmt: skip
        """Keep a response and the items it was given (without those of the responses before it)."""
        row = {
            "id": id,
            "owner": owner,
            "previous": previous,
            "input": list(input),
            "body": dict(body),
            "created": _now(),
        }
        with self._write() as connection:
            connection.execute(responses.insert().values(row))

    def response(self, owner: str, id: str) -> dict[str, Any] | None:
        """{id, previous, input, body, created}."""
        with self._read() as connection:
            row = _own(connection, responses, owner, id)
        return _plain(row._asdict()) if row else None

    def delete_response(self, owner: str, id: str) -> bool:
        """Delete a response, and the receipt with its text."""
        with self._write() as connection:
            row = _own(connection, responses, owner, id)
            if row is None:
                return False
            connection.execute(responses.delete().where(responses.c.id == id))
            block = row.body.get("criadero") or {}
            made = (block.get("receipt") or {}).get("id")
            if made:
                connection.execute(receipts.delete().where(receipts.c.owner == owner, receipts.c.id == made))
        return True

    # -- everything --

    def export(self, owner: str) -> dict[str, Any]:
        """All that there is of an owner, as plain values; of keys not their hashes."""
        out: dict[str, Any] = {"format": "criadero-export/1", "owner": owner, "exported": time.time()}
        with self._read() as connection:
            out["feedback_consent"] = _consent(connection, owner)
            for table in (*tables.OWNED, keys):
                rows = connection.execute(sa.select(table).where(table.c.owner == owner).order_by(table.c.number))
                hidden = {"number", "owner", "folded", "sha256"}
                out[table.name] = [
                    {name: value for name, value in _plain(row._asdict()).items() if name not in hidden} for row in rows
                ]
        for row in out["receipts"]:
            row["body"] = _without_paths(row["body"])
        return out

    def delete_everything(self, owner: str) -> dict[str, Any]:
        """Delete all that an owner made, so that the files hold no trace of it: counts of rows by table, and ``erased``.

        Keys stay, so that they can be used on. ``erased`` is False when the database is in use elsewhere at this moment: the rows are
        gone and SQLite has overwritten them, but its journal may hold them until the server ends.
        """
        counts: dict[str, Any] = {}
        with self._write() as connection:
            for table in tables.OWNED:
                counts[table.name] = connection.execute(
                    sa.select(sa.func.count()).select_from(table).where(table.c.owner == owner)
                ).scalar()
            for table in (*tables.OWNED, preferences):
                connection.execute(table.delete().where(table.c.owner == owner))
        counts["erased"] = tables.erase(self.engine)
        return counts


# -- rows to plain values ---------------------------------------------------------------------------------------------


def _now() -> int:
    return time.time_ns() // 1000


def _own(connection: Connection, table: sa.Table, owner: str, id: str) -> Row[Any] | None:
    return connection.execute(sa.select(table).where(table.c.owner == owner, table.c.id == id)).first()


def _consent(connection: Connection, owner: str) -> bool:
    chosen = sa.select(preferences.c.feedback_consent).where(preferences.c.owner == owner)
    return bool(connection.execute(chosen).scalar())


def _with_feedback(owner: str) -> sa.Select[Any]:
    """Messages of an owner, with what was said of them."""
    joined = messages.outerjoin(feedback, feedback.c.message == messages.c.id)
    return (
        sa.select(messages, feedback.c.rating, feedback.c.better).select_from(joined).where(messages.c.owner == owner)
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its times in seconds."""
    times = ("created", "updated", "voted", "revoked", "changed")
    return {name: value / 1e6 if name in times and value is not None else value for name, value in row.items()}


def _without_paths(receipt: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in receipt.items() if name != "paths"}


def _chat(row: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain(row)
    return {name: plain[name] for name in ("id", "title", "model", "system", "params", "created", "updated")}


def _message(row: Mapping[str, Any]) -> dict[str, Any]:
    said = row.get("rating") is not None or row.get("better") is not None
    return {
        "id": row["id"], "parent": row["parent"], "role": row["role"], "content": row["content"], "created": row["created"] / 1e6,
        "model": row["model"], "model_hash": row["model_hash"], "params": row["params"], "seed": row["seed"],
        "finish_reason": row["finish_reason"], "usage": row["usage"], "criadero": row["criadero"], "receipt_id": row["receipt"],
        "tokens": row["tokens"], "feedback": {"rating": row["rating"], "better": row["better"]} if said else None,
    }  # fmt: skip


def _key(row: Row[Any]) -> StoredKey:
    revoked = None if row.revoked is None else row.revoked / 1e6
    return StoredKey(row.id, row.owner, row.limits, row.name, row.hint, row.created / 1e6, revoked)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _cursor(text: str) -> tuple[int, int]:
    updated, _, number = text.partition("-")
    if not (updated.isascii() and updated.isdigit() and number.isascii() and number.isdigit() and len(text) < 38):
        raise ValueError("before is not what an earlier answer gave as next")
    return int(updated), int(number)


def _pieces(ids: Sequence[str], size: int = 500) -> Iterator[Sequence[str]]:
    """At most so many at once: databases bound the values of one statement."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def _trouble(error: DBAPIError) -> StoreError:
    """What the database says, as one of a few codes; neither path nor statement in it."""
    cause = error.orig
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    state = getattr(cause, "sqlstate", None) or ""
    if code in (5, 6) or state in ("55P03", "40P01", "40001", "57014"):
        return StoreError("database_busy", "the database is busy with others; try again")
    if code == 13 or state == "53100":
        return StoreError("database_full", "the disk that the database lies on is full")
    return StoreError("database_unreachable", "the database does not answer; nothing was kept")
