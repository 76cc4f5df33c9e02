"""The verbs over the server's database: replay, keys, and ``data feedback``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.serve.store import Store

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Database = Annotated[
    str | None,
    typer.Option(
        "--database", help="a SQLite file or postgresql://USER@HOST/NAME; default: the one criadero serve uses"
    ),
]
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")

keys_app = typer.Typer(help="Make, list and revoke the keys that criadero serve asks for.", no_args_is_help=True)


def _open(database: str | None, *, make: bool = False) -> Store:
    """The database; one that is not there is made only where that makes sense."""
    from criadero.serve.store import open_store
    from criadero.serve.tables import default_file

    if not make and (database is None or "://" not in database):
        file = Path(database) if database else default_file()
        if not file.is_file():
            raise UserError(f"there is no database {file}: criadero serve makes it, or name another with --database")
    return open_store(database)


# -- keys -------------------------------------------------------------------------------------------------------------


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="whose key, or what for: shown in the list")],
    owner: Annotated[
        str | None,
        typer.Option(help="whose chats it opens: another key's owner, or local (what was done here without a key); default: its own"),
    ] = None,
    concurrent: Annotated[int | None, typer.Option(help="requests at once at most", min=1)] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="at most", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="of prompts and answers, at most", min=1)] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="of prompts and answers, at most", min=1)] = None,
    database: Database = None,
) -> None:  # fmt: skip
    """Make a key, and print it: it is shown only this once, and kept as its SHA-256."""
    from criadero.serve.keys import hash_key, new_key

    shown = " ".join(name.split())
    if not shown or len(shown) > 100 or not shown.isprintable():
        raise UserError("NAME must be a name of 1 to 100 characters: whose key it is")
    if owner is not None and not _OWNER.fullmatch(owner):
        raise UserError(f"--owner {owner!r:.60}: an owner is letters, digits and . _ @ -, 100 at most")
    given = {
        "concurrent": concurrent, "requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
    }  # fmt: skip
    store = _open(database, make=True)
    try:
        secret = new_key()
        limits = {limit: value for limit, value in given.items() if value is not None}
        made = store.add_key(hash_key(secret), name=shown, hint=secret[-4:], owner=owner, limits=limits)
    finally:
        store.close()
    print(f"{made.id} ({made.name}): this is the key; it is shown only now, so keep it", file=sys.stderr)
    print(secret)


@keys_app.command("list")
def keys_list(database: Database = None, as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    import dataclasses
    import datetime

    store = _open(database)
    try:
        found = store.list_keys()
    finally:
        store.close()
    if as_json:
        print(json.dumps([dataclasses.asdict(key) for key in found], ensure_ascii=False, indent=2))
        return
    for key in found:
        made = datetime.datetime.fromtimestamp(key.created, datetime.UTC).date().isoformat()
        limits = ", ".join(f"{value} {limit.replace('_', ' ')}" for limit, value in key.limits.items()) or "no limits"
        state = "revoked" if key.revoked else "valid"
        print(f"{key.id}  ...{key.hint}  {made}  {state:<7}  {key.name}  owner {key.owner}  {limits}")
    if not found:
        print("there are no keys: criadero keys create NAME", file=sys.stderr)


@keys_app.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="as the list says it: key_...")], database: Database = None
) -> None:
    """Let a key open nothing any more, from the next request on."""
    store = _open(database)
    try:
        if not store.revoke_key(id):
            raise UserError(f"there is no key {id!r:.60} that is valid: criadero keys list shows them")
    finally:
        store.close()
    print(f"{id} opens nothing any more")


# -- feedback ---------------------------------------------------------------------------------------------------------


def feedback(
    out: Annotated[Path, typer.Option("--out", help="a new file for the preference pairs, one JSON object a line")],
    corrections: Annotated[
        Path | None, typer.Option(help="a new file for the corrections; default: NAME.corrections.jsonl beside --out")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace files that are there")] = False,
    database: Database = None,
) -> None:  # fmt: skip
    """Write what people said of answers, with their consent, as training data: preference pairs, and corrections for tune."""
    from criadero.serve.feedback import write_feedback

    store = _open(database)
    try:
        found, second = write_feedback(store, out, corrections, overwrite=overwrite)
    finally:
        store.close()
    print(f"{out}: {len(found.pairs)} preference pairs")
    print(f"{second}: {len(found.corrections)} corrections")
    for why, count in sorted(found.left_out.items()):
        print(f"left out: {count} ({why})")
    if found.corrections:
        print(f"learn from them: criadero tune MODEL {second} --train_on last")


# -- replay -----------------------------------------------------------------------------------------------------------


def replay(
    id: Annotated[str, typer.Argument(metavar="ID", help="of a receipt: criadero.receipt.id of an answer")],
    model: Annotated[str | None, typer.Option(help="where the model lies now")] = None,
    adapter: Annotated[str | None, typer.Option(help="where the adapter lies now")] = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Compute an answer again: exit 0 when it is the same to the byte, 3 when not (and what differs), 2 bad input."""
    store = _open(database)
    try:
        receipt = store.any_receipt(id)
    finally:
        store.close()
    if receipt is None:
        raise UserError(
            f"there is no receipt {id!r:.60} in {store.name}: an answer names its own in criadero.receipt.id"
        )
    from criadero.serve import replay as replaying

    done = replaying.replay(receipt, model=model, adapter=adapter)
    if as_json:
        print(json.dumps(done.as_dict(), ensure_ascii=False, indent=2))
    else:
        for text in done.texts:
            print(text)
        print(_verdict(done), file=sys.stderr)
        for one in done.differs:
            print(f"differs: {one}", file=sys.stderr)
    raise typer.Exit(0 if done.same else 3)


def _verdict(done: Any) -> str:
    count = f"{sum(done.tokens)} tokens"
    if done.same:
        return f"the same answer, to the byte ({count})"
    where = "" if done.first is None else f", from token {done.first + 1} on"
    return f"not the same answer ({count}{where})"


def add(app: typer.Typer, data_app: typer.Typer) -> None:
    """Register the verbs."""
    app.command()(replay)
    app.add_typer(keys_app, name="keys")
    data_app.command()(feedback)
