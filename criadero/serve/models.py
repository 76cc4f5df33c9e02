"""Which models there are by name, which are loaded, and who uses them: load on demand within a memory budget, unload when idle,
adapters beside their base.

An adapter that cannot stand beside its base (DoRA, new tokens) is a model of its own, folded in, where the command line names it; one in
the watched folder is refused, with the remedy, before anything is loaded: whole weights for each would be a surprise.

A name in a request is looked up among those the server was started with (and the adapters in its watched folder). It is never a path.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import hashlib
import logging
import platform
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from criadero.artifact import read_passport, resolve
from criadero.chat import Template
from criadero.checkpoints import ADAPTER, adapter_base, check_base, template_of
from criadero.checkpoints.adapter_file import alone, beside_a_base
from criadero.engine import fit
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.merkle import sha256_file
from criadero.serve.errors import ApiError, public
from criadero.serve.guarding import Guarding
from criadero.serve.settings import Settings
from criadero.serve.worker import Worker

log = logging.getLogger("criadero.serve")
_FROM = ("finetune_of", "quantised_from", "converted_from", "merged_from", "distilled_from")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass
class Body:
    """Weights that can be loaded, and the worker that computes with them while they are."""

    path: Path
    memory: int  # bytes, estimated before loading
    context: int
    worker: Worker | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    reserved: bool = False  # memory is kept for it: it is being loaded
    weights_sha256: str = ""
    runner: str = ""


@dataclass
class Entry:
    """What a request may name: a model, or an adapter beside its base."""

    name: str
    path: Path
    body: Body
    adapter: bool = False
    base: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    template: Template | None = None
    template_problem: str = ""
    end_ids: tuple[int, ...] = ()  # that end an answer beside the base's own
    passport_id: str | None = None
    adapter_sha256: str | None = None
    adapter_loaded: bool = False
    problem: str = ""  # why it could not be loaded
    guarding: Guarding | None = None

    @property
    def loaded(self) -> bool:
        """Whether it can answer without being loaded first."""
        return self.body.worker is not None and (self.adapter_loaded or not self.adapter)

    @property
    def was_loaded(self) -> bool:
        """Whether it has ever been in memory: it can be had again when it had to make room."""
        return bool(self.adapter_sha256 if self.adapter else self.body.weights_sha256)

    @property
    def template_sha256(self) -> str | None:
        """Of the template's source."""
        return None if self.template is None else hashlib.sha256(self.template.source.encode()).hexdigest()

    @property
    def made_of(self) -> dict[str, Any] | None:
        """From its passport: what kind it is, what it was made from, how much it read of how many sources, under which licence.

        The page says it in the reader's language. None: no passport tells it.
        """
        passport = read_passport(self.path) if self.path.is_dir() else None
        if passport is None:
            return None
        base = [str(one.get("name")) for one in passport.get("inputs") or () if one.get("relation") in _FROM]
        tokens = (passport.get("step") or {}).get("tokens")
        licence = (passport.get("licence") or {}).get("declared")
        return {
            "kind": str(passport.get("kind")),
            "base": base[0] if base else None,
            "tokens": tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None,
            "sources": len((passport.get("data") or {}).get("by_source") or ()),
            "licence": str(licence) if licence else None,
        }


class Pool:
    """All entries of a server. Its coroutines belong to one event loop."""

    def __init__(
        self, settings: Settings, require: Callable[[str], object] | None = None, guard: Callable[[Path], Guarding] | None = None
    ) -> None:  # fmt: skip
        """Looks at every model, loads none. UserError: a name that is no model, or that two have, or that cannot fit or be guarded."""
        self.settings, self._guard = settings, guard
        self._require = require  # checks a passport before a model is opened
        self.entries: dict[str, Entry] = {}
        self._bodies: dict[Path, Body] = {}
        self._refused: dict[str, str] = {}  # what in the watched folder is not served, and why
        self._room = asyncio.Lock()
        self.default, *_ = [self.add(ref).name for ref in settings.models]
        self._scan()

    # --- names ---

    def add(self, ref: str, name: str | None = None, *, watched: bool = False) -> Entry:
        """Make ``ref`` one that requests can name. For the command line and the watched folder: never with a client's words."""
        if self._require is not None:
            self._require(ref)
        path = resolve(ref)
        name = name or _name_of(path)
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{ref}: a model is served by the name of its folder or file, and {name!r:.80} will not do: use letters, digits "
                "and . _ -"
            )
        known = self.entries.get(name)
        if known is not None:
            if known.path.resolve() == path.resolve():
                return known
            raise UserError(f"{ref} and {known.path} would both be served as {name!r}: rename one of the folders")
        adapter = path.is_dir() and (path / ADAPTER).is_file()
        more = beside_a_base(path) if adapter else None
        if more and watched:
            raise UserError(alone(path, more))
        if more:
            log.info(
                "%s: this adapter %s: it is a model of its own here, with memory for all of its weights", ref, more
            )
        if adapter:  # now, not in the first request
            check_base(path, adapter_base(path))
        if adapter and not more:
            base = self.add(str(adapter_base(path)))
            entry = Entry(name, path, base.body, adapter=True, base=base.name, end_ids=_end_ids(path))
        else:
            entry = Entry(name, path, self._body(path, str(ref)))
        self._describe(entry)
        entry.guarding = None if self._guard is None else self._guard(path)
        self.entries[name] = entry
        return entry

    def find(self, name: str | None) -> Entry:
        """The entry of a request's ``model``; an empty name is the default one. 404 with the nearest name."""
        if not name:
            return self.entries[self.default]
        entry = self.entries.get(name)
        if entry is None:
            self._scan()
            entry = self.entries.get(name)
        if entry is None and name in self._refused:
            raise ApiError(404, "model_not_found", f"{name} is not served: {self._refused[name]}", "model")
        if entry is None:
            near = difflib.get_close_matches(name, self.entries, n=1)
            advice = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(sorted(self.entries))
            raise ApiError(404, "model_not_found", f"there is no model {name!r:.80}: {advice}", "model")
        return entry

    def listed(self) -> list[Entry]:
        """All entries, the default one first, those new in the watched folder too."""
        self._scan()
        return sorted(self.entries.values(), key=lambda entry: entry.name != self.default)

    def _scan(self) -> None:
        folder = self.settings.adapters
        if folder is None or not folder.is_dir():
            return
        before, self._refused = self._refused, {}
        for path in sorted(folder.iterdir()):
            known = self.entries.get(path.name)
            if known is None and not path.is_symlink() and (path / ADAPTER).is_file() and _NAME.fullmatch(path.name):
                try:
                    self.add(str(path), path.name, watched=True)
                except UserError as error:
                    self._refused[path.name] = str(error)
                    if before.get(path.name) != str(error):
                        log.warning("the adapter %s is not served: %s", path.name, error)

    def _body(self, path: Path, ref: str) -> Body:
        key = path.resolve()
        if key not in self._bodies:
            shape = fit.shape_of(path)
            if shape is None:
                from criadero.checkpoints import load_config  # says what is wrong with it

                shape = load_config(path)
            page = 32
            pages = fit.cache_pages(
                shape, page=page, pages=None, memory=None, sequences=self.settings.sequences, kv="auto", device="cpu"
            )
            memory = fit.stored_bytes(path) + pages * page * fit.token_bytes(shape, "auto") + fit.OVERHEAD
            free = fit.free_memory()
            for limit, what in ((free, "is free"), (self.settings.memory, "is what --memory allows")):
                if limit is not None and memory > limit:
                    raise UserError(
                        f"{ref} is too big: it needs about {fit.said(memory)} and {fit.said(limit)} {what}: use a smaller or a "
                        "quantised model"
                    )
            self._bodies[key] = Body(path, memory, shape.max_position_embeddings)
        return self._bodies[key]

    def _describe(self, entry: Entry) -> None:
        try:
            entry.template = template_of(entry.path)
        except UserError as error:
            entry.template_problem = str(error)
        passport = read_passport(entry.path) if entry.path.is_dir() else None
        entry.passport_id = passport["id"] if passport else None

    # --- use ---

    @contextlib.asynccontextmanager
    async def lease(self, entry: Entry) -> AsyncIterator[Worker]:
        """The worker of ``entry``, loaded if need be, and kept until the block is left."""
        worker = await self.acquire(entry)
        try:
            yield worker
        finally:
            self.release(entry)

    async def acquire(self, entry: Entry) -> Worker:
        """As `lease`; whoever calls this calls `release` once."""
        body = entry.body
        body.users += 1
        try:
            async with body.loading:
                if body.worker is None:
                    await self._make_room(body)
                    try:
                        await asyncio.to_thread(self._load, body, entry.base or entry.name)
                    finally:
                        body.reserved = False
                worker = body.worker
                assert worker is not None
                if entry.adapter and not entry.adapter_loaded:
                    await asyncio.to_thread(worker.llm.load_adapter, entry.name, entry.path)
                    entry.adapter_sha256 = await asyncio.to_thread(weights_sha256, entry.path)
                    entry.adapter_loaded = True
                entry.problem = ""
                return worker
        except UserError as error:
            self.release(entry)
            entry.problem = public(str(error))
            log.warning("%s cannot be loaded: %s", entry.name, error)
            raise ApiError(503, "model_not_loadable", f"{entry.name}: {public(str(error))}", "model") from None
        except BaseException:
            self.release(entry)
            raise

    def release(self, entry: Entry) -> None:
        """One user less."""
        entry.body.users -= 1
        entry.body.last_used = time.monotonic()

    def _load(self, body: Body, name: str) -> None:
        began = time.monotonic()
        settings = self.settings
        if self._require is not None:  # once more: it may be long since it was looked at
            self._require(str(body.path))
        options: dict[str, Any] = {"runner": settings.runner, "threads": settings.threads}
        llm = LLM(body.path, sequences=settings.sequences, chunk=settings.chunk, **options)
        body.weights_sha256 = weights_sha256(body.path)
        body.runner = llm.runner.name
        body.worker = Worker(llm, name)
        body.last_used = time.monotonic()
        log.info("%s is loaded (%s, %.1f s)", name, llm.runner.name, time.monotonic() - began)

    async def _make_room(self, body: Body) -> None:
        """Unload models that nobody uses, the longest unused first, until ``body`` fits the budget; 503 when it cannot."""
        async with self._room:
            while self.settings.memory is not None and self.loaded_bytes() + body.memory > self.settings.memory:
                idle = [one for one in self._bodies.values() if one.worker is not None and one.users == 0]
                if not idle:
                    raise ApiError(
                        503, "models_busy", "the other models are in use and memory allows no more: try again later", "model",
                        {"Retry-After": "5"},
                    )  # fmt: skip
                await self._unload(min(idle, key=lambda one: one.last_used))
            body.reserved = True

    def loaded_bytes(self) -> int:
        """Memory of what is loaded, as estimated."""
        return sum(one.memory for one in self._bodies.values() if one.worker is not None or one.reserved)

    async def _unload(self, body: Body) -> None:
        worker, body.worker = body.worker, None
        for entry in self.entries.values():
            if entry.body is body:
                entry.adapter_loaded = False
        if worker is not None:
            await asyncio.to_thread(worker.stop)
            log.info("%s is unloaded", _name_of(body.path))

    async def unload_idle(self) -> None:
        """Forever: unload what nobody used for `Settings.idle_unload` seconds."""
        seconds = self.settings.idle_unload
        if seconds is None:
            return
        while True:
            await asyncio.sleep(max(0.05, min(seconds / 4, 30.0)))
            for body in list(self._bodies.values()):
                if body.worker is not None and body.users == 0 and time.monotonic() - body.last_used > seconds:
                    async with body.loading:
                        if body.users == 0:
                            await self._unload(body)

    def workers(self) -> dict[str, Worker]:
        """Those loaded, by the name of their model."""
        return {
            entry.name: entry.body.worker
            for entry in self.entries.values()
            if not entry.adapter and entry.body.worker is not None
        }

    def cancel_all(self) -> None:
        """End every request."""
        for worker in self.workers().values():
            worker.cancel_all()

    async def close(self) -> None:
        """Unload everything."""
        for body in list(self._bodies.values()):
            await self._unload(body)

    def build(self, entry: Entry) -> dict[str, str]:
        """What computed an answer: it is the same bytes only with the same."""
        from criadero import __version__

        return {"criadero": __version__, "runner": entry.body.runner, "machine": platform.machine()}


def weights_sha256(path: Path) -> str:
    """Hash of the weights as they lie there: of a file, or of the sorted (name, sha256) of a folder's."""
    if path.is_file():
        return _hex(path)
    files = sorted(one for kind in ("*.safetensors", "*.gguf", "*.pth") for one in path.glob(kind))
    if len(files) == 1:
        return _hex(files[0])
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {_hex(file)}\n".encode())
    return whole.hexdigest()


def _hex(file: Path) -> str:
    return sha256_file(file).removeprefix("sha256:")


def _name_of(path: Path) -> str:
    """The name of a folder or file, without .gguf; of a link, the link's own."""
    if path.name in ("", ".", ".."):
        path = path.resolve()
    return path.stem if path.is_file() else path.name


def _end_ids(adapter: Path) -> tuple[int, ...]:
    """The ids that end an answer of a tuned adapter, where its folder names them."""
    from criadero.checkpoints import load_config

    return tuple(load_config(adapter).eos_ids)
