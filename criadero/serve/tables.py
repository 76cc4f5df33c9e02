"""The tables of the server's database, how they are opened in SQLite or PostgreSQL, and their numbered migrations.

Times are whole microseconds since 1970, so that they order exactly. Texts and values that came from a person or a model are kept
as JSON text: any Unicode string survives in both databases that way, also one with a NUL, which PostgreSQL refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from criadero.errors import UserError

BUSY = 5000  # ms that a writer waits for another


class Json(sa.types.TypeDecorator[Any]):
    """Any JSON value, as text."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        if value is None:
            return None
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        return text

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


def folded(text: str) -> str:
    """A text as the search sees it: without case and accents (``Ñandú`` -> ``nandu``)."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    return plain.casefold().replace("\0", " ").encode("utf-8", "replace").decode()


metadata = sa.MetaData()


def _table(name: str, *columns: Any, by: str = "created") -> sa.Table:
    """A table whose rows have a number (in the order they came), an id that tells nothing, and an owner, who asks ``by`` a column."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Table(
        name,
        metadata,
        sa.Column("number", number, primary_key=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("owner", sa.Text, nullable=False),
        *columns,
        sa.Column("created", sa.BigInteger, nullable=False),
        sa.Index(f"{name}_of_owner", "owner", by),
        sqlite_autoincrement=True,  # a number is never given twice
    )


def _within(name: str, to: str, **more: Any) -> sa.Column[Any]:
    """A column with the id of a row that this one goes with when it is deleted."""
    return sa.Column(name, sa.Text, sa.ForeignKey(f"{to}.id", ondelete="CASCADE"), index=True, **more)


schema = sa.Table("criadero_schema", metadata, sa.Column("version", sa.Integer, nullable=False))

preferences = sa.Table(
    "preferences", metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("feedback_consent", sa.Boolean, nullable=False),
    sa.Column("changed", sa.BigInteger, nullable=False),
)  # fmt: skip

keys = _table(
    "keys",
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("limits", Json, nullable=False),
    sa.Column("revoked", sa.BigInteger),
)

chats = _table(
    "chats",
    sa.Column("title", Json, nullable=False),
    sa.Column("folded", sa.Text, nullable=False),
    sa.Column("model", Json),
    sa.Column("system", Json),
    sa.Column("params", Json, nullable=False),
    sa.Column("updated", sa.BigInteger, nullable=False),
    by="updated",
)

messages = _table(
    "messages",
    _within("chat", "chats", nullable=False),
    _within("parent", "messages"),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("content", Json, nullable=False),
    sa.Column("folded", sa.Text, nullable=False),
    sa.Column("model", Json),
    sa.Column("model_hash", sa.Text),
    sa.Column("params", Json),
    sa.Column("seed", Json),
    sa.Column("finish_reason", sa.Text),
    sa.Column("usage", Json),
    sa.Column("criadero", Json),
    sa.Column("receipt", sa.Text),
    sa.Column("tokens", Json),
    by="chat",
)

feedback = _table(
    "feedback",
    _within("message", "messages", nullable=False, unique=True),
    sa.Column("rating", sa.Integer),
    sa.Column("better", Json),
    sa.Column("consent", sa.Boolean, nullable=False),
)

comparisons = _table(
    "comparisons",
    _within("chat", "chats", nullable=False),
    _within("parent", "messages", nullable=False),
    sa.Column("left", Json, nullable=False),
    sa.Column("right", Json, nullable=False),
    sa.Column("params", Json, nullable=False),
    sa.Column("seed", Json, nullable=False),
    sa.Column("left_answer", Json),
    sa.Column("right_answer", Json),
    sa.Column("winner", sa.Text),
    sa.Column("left_message", sa.Text),
    sa.Column("right_message", sa.Text),
    sa.Column("consent", sa.Boolean),
    sa.Column("voted", sa.BigInteger),
)

receipts = _table(
    "receipts",
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("kept", sa.Boolean, nullable=False),  # whether prompt and answers stand in it
    sa.Column("body", Json, nullable=False),
    sa.Column("key", sa.Text),  # the id of the key that asked, whose tokens these are
)

responses = _table(
    "responses",
    sa.Column("previous", sa.Text, index=True),
    sa.Column("input", Json, nullable=False),
    sa.Column("body", Json, nullable=False),
)

OWNED = (
    chats,
    messages,
    feedback,
    comparisons,
    receipts,
    responses,
)  # what a person made; deleted in this order or by cascade

# version -> what leads to it from the version before. Statements are for both databases; the tables above are the newest version.
MIGRATIONS: dict[int, tuple[str, ...]] = {2: ('ALTER TABLE receipts ADD COLUMN "key" TEXT',)}
VERSION = 1 + len(MIGRATIONS)


# -- opening ----------------------------------------------------------------------------------------------------------


def default_file() -> Path:
    """Where the database lies when none is named: under ``$XDG_DATA_HOME``, ``~/.local/share`` by default."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "criadero" / "criadero.db"


def _url(given: str | os.PathLike[str] | None) -> URL:
    """A URL for SQLAlchemy from ``--database``: nothing, a file, or ``sqlite:`` or ``postgresql:`` with an address."""
    if given is None:
        return URL.create("sqlite", database=str(default_file()))
    text = os.fspath(given)
    if "://" not in text:
        if not text or "\0" in text:
            raise UserError("the database's name is empty: give a file, or postgresql://USER@HOST/NAME")
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except ArgumentError:
        raise UserError("the database's address cannot be read: give a file, or postgresql://USER@HOST/NAME") from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database and url.database != ":memory:":
        return URL.create("sqlite", database=url.database)
    raise UserError(
        f"the database {url.render_as_string(hide_password=True)} is neither a SQLite file nor PostgreSQL: give a file, or "
        "postgresql://USER@HOST/NAME"
    )


def shown(url: URL) -> str:
    """A database's name for people: the file, or the address without the password."""
    if url.drivername == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql").render_as_string(hide_password=True)


def open_engine(given: str | os.PathLike[str] | None) -> Engine:
    """Open the database, making or migrating its tables.

    UserError: it cannot be reached or written, it is not Criadero's, it is of a newer version.
    """
    url = _url(given)
    if url.drivername == "sqlite":
        _make_file(Path(str(url.database)))
        engine = sa.create_engine(url, hide_parameters=True)  # what people wrote stays out of the log
        event.listen(engine, "connect", _sqlite_settings)
        event.listen(engine, "begin", _sqlite_begin)
    else:
        options = f"-c lock_timeout={BUSY} -c statement_timeout=60000"
        try:
            engine = sa.create_engine(
                url, pool_pre_ping=True, hide_parameters=True,
                connect_args={"connect_timeout": 5, "options": options, "application_name": "criadero"},
            )  # fmt: skip
        except (ImportError, NoSuchModuleError):
            raise UserError(
                "PostgreSQL needs the package psycopg: pip install 'criadero[postgres]', or give a SQLite file"
            ) from None
    try:
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            _migrate(connection, shown(url))
    except DBAPIError as error:
        engine.dispose()
        raise UserError(f"the database {shown(url)} cannot be opened: {_reason(error)}") from None
    except BaseException:
        engine.dispose()
        raise
    return engine


def _reason(error: DBAPIError) -> str:
    lines = [line.strip() for line in str(error.orig).splitlines() if line.strip()]
    return (lines[0] if lines else type(error.orig).__name__)[:300]


def _make_file(file: Path) -> None:
    """The file and its folder, for this user's eyes only."""
    try:
        if not file.parent.exists():
            file.parent.mkdir(parents=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(
            f"the database {file} cannot be opened: {error.strerror}; name another with --database"
        ) from None


def _sqlite_settings(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_sqlite_begin` says
    for setting in (
        f"busy_timeout={BUSY}",
        "journal_mode=WAL",  # readers do not wait for a writer
        "synchronous=NORMAL",
        "foreign_keys=ON",
        "secure_delete=ON",  # deleted rows are written over
        "temp_store=MEMORY",  # VACUUM leaves no copy beside the file
    ):
        connection.execute(f"PRAGMA {setting}")


def _sqlite_begin(connection: Connection) -> None:
    # a transaction that writes takes the lock first: it waits for others, rather than fail half way through
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")


def _migrate(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":  # one server at a time; SQLite's lock is taken
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7213450012)")
    have = set(sa.inspect(connection).get_table_names())
    if schema.name not in have:
        if have & set(metadata.tables) or (have and connection.dialect.name == "sqlite"):
            raise UserError(
                f"the database {name} holds other tables and is not Criadero's: give another with --database"
            )
        metadata.create_all(connection)
        connection.execute(schema.insert().values(version=VERSION))
        return
    version = connection.execute(sa.select(schema.c.version)).scalar()
    if not isinstance(version, int) or version < 1:
        raise UserError(f"the database {name} does not say its version: it is damaged; give another with --database")
    if version > VERSION:
        raise UserError(
            f"the database {name} is of a newer Criadero (its version is {version}, this one knows {VERSION}): update Criadero, "
            "or give another with --database"
        )
    for number in range(version + 1, VERSION + 1):
        for statement in MIGRATIONS[number]:
            connection.exec_driver_sql(statement)
    if version < VERSION:
        connection.execute(schema.update().values(version=VERSION))


def erase(engine: Engine) -> bool:
    """Leave nothing of deleted rows in the database's files; whether that could be done now (others may hold them open)."""
    raw = engine.raw_connection()
    try:
        if engine.dialect.name == "sqlite":
            cursor = raw.cursor()
            cursor.execute("VACUUM")
            busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return not busy
        driver: Any = raw.driver_connection
        driver.autocommit = True
        try:
            for table in OWNED:
                driver.execute(f'VACUUM FULL "{table.name}"')
        finally:
            driver.autocommit = False
        return True
    except Exception as error:
        with contextlib.suppress(Exception):
            raw.rollback()
        if not isinstance(error, engine.dialect.loaded_dbapi.Error):
            raise
        return False
    finally:
        raw.close()
