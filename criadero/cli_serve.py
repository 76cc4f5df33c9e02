"""The verb ``serve``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.serve.models import Pool
    from criadero.serve.settings import Settings

KEY = "CRIADERO_API_KEY"  # environment: one key, beside those in the database
RECEIPTS = 90 * 86_400  # seconds that receipts without text are kept


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="bundled models, folders, adapters or .gguf files; default: cria-chat"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; any but this machine's own needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one", min=0, max=65535)] = 8000,
    database: Annotated[
        str | None, typer.Option(help="a SQLite file or postgresql://USER@HOST/NAME; default: in your data folder")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="open the page in the browser")] = True,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="a folder of adapters: what appears in it can be named at once")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="that loaded models may take together, such as 8GB; who is not used makes room")
    ] = None,
    idle_unload: Annotated[
        float | None, typer.Option("--idle-unload", help="unload a model that nobody used for so many seconds", min=0.1)
    ] = None,
    sequences: Annotated[int, typer.Option(help="answers that a model computes at once", min=1, max=4096)] = 16,
    threads: Annotated[int | None, typer.Option(help="default: the physical cores", min=1, max=1024)] = None,
    queue: Annotated[int, typer.Option(help="answers that may wait for a model; more are refused (429)", min=0)] = 64,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="a name under which browsers may reach it; once for each")
    ] = None,
    require_key: Annotated[bool, typer.Option("--require-key", help="ask for a key on this machine too")] = False,
    keep_prompts: Annotated[
        bool,
        typer.Option("--keep-prompts", help="keep prompts and answers of all requests, so that any can be replayed"),
    ] = False,
    drain: Annotated[float, typer.Option(help="seconds that SIGTERM gives to answers under way", min=0.1)] = 30.0,
    require_passport: Annotated[
        bool, typer.Option("--require-passport", help="open models only when every file is as its passport says")
    ] = False,
    pubkey: Annotated[
        Path | None,
        typer.Option("--pubkey", help="and when they are signed with this key (implies --require-passport)"),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            "--guard",
            metavar="INDEX",
            help="end an answer that copies what may not be copied of this index of a model's data; once for each index",
        ),
    ] = None,
    guard_tokens: Annotated[int, typer.Option(help="the longest run that --guard lets pass, in tokens")] = 50,
    otel: Annotated[
        bool | None,
        typer.Option(
            "--otel/--no-otel",
            help="send OpenTelemetry spans, without texts; default: when OTEL_EXPORTER_OTLP_ENDPOINT is set",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve models: a page to chat in, and an API that OpenAI's and Anthropic's clients use unchanged."""
    from criadero.serve.keys import hash_key
    from criadero.serve.settings import Limits, Settings

    secret = os.environ.get(KEY, "").strip()
    if secret and len(secret) < 16:
        raise UserError(f"{KEY} is shorter than 16 characters: make a real key with criadero keys create NAME")
    settings = Settings(
        models=tuple(models or ("cria-chat",)), host=host, port=port, database=database, adapters=adapters,
        memory=None if memory is None else bytes_of(memory), idle_unload=idle_unload, sequences=sequences, threads=threads,
        limits=Limits(queue=queue), allowed_hosts=tuple(allow_host or ()), require_key=require_key, keep_prompts=keep_prompts,
        drain_seconds=drain, require_passport=require_passport or pubkey is not None, pubkey=pubkey,
        key_hashes=(hash_key(secret),) if secret else (), guard=tuple(guard or ()), guard_tokens=guard_tokens,
    )  # fmt: skip
    if adapters is not None and not adapters.is_dir():
        raise UserError(f"--adapters {adapters}: there is no such folder")
    run(settings, open_page=open_page, otel=otel)


def bytes_of(text: str) -> int:
    """``8GB``, ``500 MB`` or a number of bytes."""
    words = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    plain = text.replace(" ", "").upper()
    unit = plain.lstrip("0123456789.")
    try:
        size = int(float(plain[: len(plain) - len(unit)]) * words[unit])
        if size < 1:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--memory {text}: give a size such as 8GB or 500MB") from None
    return size


def run(settings: Settings, *, open_page: bool, otel: bool | None = None) -> None:
    """Serve until a signal ends it."""
    from criadero.serve.app import key_required, make_app, make_pool
    from criadero.serve.server import Server, listen
    from criadero.serve.store import open_store
    from criadero.serve.telemetry import open_telemetry, wanted

    telemetry = open_telemetry() if wanted(otel) else None
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("criadero.serve").setLevel(logging.INFO)
    socket = listen(settings)
    with contextlib.closing(socket):
        pool = make_pool(settings)
        with contextlib.closing(open_store(settings.database)) as store:
            store.forget_receipts(time.time() - RECEIPTS)
            if key_required(settings) and not settings.key_hashes and not store.has_keys():
                what = (
                    "--require-key asks for keys"
                    if settings.loopback
                    else f"--host {settings.host} lets other machines in"
                )
                raise UserError(f"{what}, and there is none: make one first with criadero keys create NAME")
            port = socket.getsockname()[1]
            settings = pool.settings = dataclasses.replace(settings, port=port)
            host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "localhost") else settings.host
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            app = make_app(settings, store=store, pool=pool, telemetry=telemetry)
            print(*describe(pool), sep="\n", flush=True)
            for index in settings.guard:
                print(
                    f"guard: answers end where they copy more than {settings.guard_tokens} tokens that may not be copied of {index}"
                )

            def started() -> None:
                keyed = "" if not key_required(settings) else "  (with a key)"
                print(f"page  {address}/{keyed}\nAPI   {address}/v1  (Ctrl-C ends it)", flush=True)
                if open_page and sys.stdout.isatty():
                    threading.Thread(target=webbrowser.open, args=(f"{address}/",), daemon=True).start()

            Server(app, started).run(sockets=[socket])


def describe(pool: Pool) -> list[str]:
    """A line for each model: what memory it takes, and how fast it can be on this machine."""
    from criadero.engine.fit import bandwidth, said, shape_of, stored_bytes, token_bytes

    lines = []
    rate = bandwidth(0.5)
    for entry in pool.listed():
        if entry.adapter:
            lines.append(f"{entry.name}: an adapter on {entry.base}")
            continue
        weights = stored_bytes(entry.path)
        chat = "" if entry.template is not None else "; it has no chat template: completions only"
        shape = shape_of(entry.path)
        read = weights + (token_bytes(shape, "float16") * entry.body.context // 2 if shape is not None else 0)
        lines.append(
            f"{entry.name}: about {said(entry.body.memory)} of memory, context {entry.body.context:,} tokens, at most about "
            f"{rate / read:,.0f} tokens/s an answer{chat}"
        )
    return lines


def add(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(serve)
