"""API keys: 256 random bits each; only their SHA-256 is kept, and hashes are compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

PREFIX = "ck-"


@dataclass(frozen=True)
class Key:
    """Who asks: ``id`` and ``owner`` of what is kept for it, and its own limits (names as in `Limits`)."""

    id: str
    owner: str
    limits: Mapping[str, int | None] = field(default_factory=dict)


class KeyStore(Protocol):
    """Where keys are kept."""

    def key_by_hash(self, sha256: str) -> Key | None:
        """The key of this hash, unless it has been taken back."""
        ...


def new_key() -> str:
    """A key to give to somebody: show it once."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """What is kept of it: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def sent_key(headers: Mapping[str, str]) -> str | None:
    """The one place where a key is read from a request: ``Authorization: Bearer`` (OpenAI) or ``x-api-key`` (Anthropic)."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip() or None


def find_key(key: str, hashes: Iterable[str], store: KeyStore | None) -> Key | None:
    """Who has ``key``; None when nobody has."""
    digest = hash_key(key)
    found = None
    for known in hashes:  # all of them, so that the time tells nothing
        if hmac.compare_digest(digest, known):
            found = Key(known[:12], known[:12])
    return found or (store.key_by_hash(digest) if store is not None else None)
