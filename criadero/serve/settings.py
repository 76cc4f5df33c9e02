"""What a server is started with. Every limit has one name here, and that name is what an error says."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from criadero.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """What one request, one key, or all together may ask for. Counts, bytes, characters or seconds, as the names say."""

    body_bytes: int = 4 * MIB
    messages: int = 1000
    parts: int = 256  # of one message's content
    prompts: int = 128  # of one request for completions or embeddings
    n: int = 16
    max_tokens: int = 2**20
    top_logprobs: int = 20
    stop: int = 16
    stop_characters: int = 500
    logit_bias: int = 1024
    tools: int = 64
    tool_bytes: int = 32_768  # all tools of a request, as JSON
    schema_bytes: int = 65_536
    schema_depth: int = 32
    queue: int = 64  # requests of a model that wait for a slot
    # of one key; None: no limit. A key's own limits, in the database, go before these.
    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True)
class Settings:
    """How `make_app` serves. ``models`` are bundled names, folders, adapters or GGUF files; the first is the default one.

    ``adapters`` is a folder that is looked through again when a model is not known: an adapter that appears there can be named at
    once. ``memory`` bytes at most hold loaded models (None: no bound but the machine's); one that nobody used for
    ``idle_unload`` seconds is unloaded. ``key_hashes`` are SHA-256 hashes of keys beside those in the database.
    """

    models: tuple[str, ...] = ("cria-chat",)
    host: str = "127.0.0.1"
    port: int = 8000
    database: str | None = None
    adapters: Path | None = None
    require_passport: bool = False
    pubkey: Path | None = None
    memory: int | None = None
    idle_unload: float | None = None
    guard: tuple[str, ...] = ()  # indexes of training data: an answer ends where it copies what may not be copied
    guard_tokens: int = 50
    sequences: int = 16
    chunk: int = 512
    threads: int | None = None
    runner: str = "auto"
    key_hashes: tuple[str, ...] = ()
    require_key: bool = False
    allowed_hosts: tuple[str, ...] = ()
    keep_prompts: bool = False  # receipts hold the ids of prompt and answer, so that any answer can be replayed
    limits: Limits = field(default_factory=Limits)
    ping_seconds: float = 10.0
    drain_seconds: float = 30.0
    write_seconds: float = 60.0  # a client that reads nothing for so long is cut off

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("serve: name at least one model")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: ports are 0 (any free one) to 65535")
        for name in ("ping_seconds", "drain_seconds", "write_seconds"):
            if not 0 < getattr(self, name) <= 86_400:
                raise UserError(f"{name} must lie between 0 and 86,400, not {getattr(self, name)}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether ``host`` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
