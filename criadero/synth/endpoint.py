"""One HTTP request to an OpenAI-compatible endpoint, and what its failures mean. Nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

from criadero.errors import UserError

MOST_BYTES = 16 << 20  # of a reply
LONGEST_WAIT = 120.0  # seconds that a Retry-After is obeyed for
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_OURS = (401, 402, 403, 404, 405)  # no request will fare better


class Failed(Exception):
    """A request without an answer. `reason` is a word for the counts.

    `again`: it is worth trying again, after `wait` seconds if the endpoint said so. `fatal`: no request will fare better.
    `charged`: it may have been answered, and charged, all the same.
    """

    def __init__(
        self, text: str, reason: str = "failed", *, again: bool = False, wait: float | None = None, fatal: bool = False,
        charged: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(text)
        self.reason, self.again, self.wait, self.fatal, self.charged = reason, again, wait, fatal, charged


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def is_local(url: str, *, with_key: bool) -> bool:
    """Whether the endpoint is on this machine. UserError for a URL that we do not send to."""
    parts = urllib.parse.urlsplit(url)
    try:
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"{url}: is not the URL of an endpoint: give one like http://localhost:11434/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            f"{parts.scheme}://{host}: a URL with a name, a key or a query in it is not used: put the key into the environment"
        )
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if parts.scheme == "http" and not local and with_key:
        raise UserError(f"{url}: a key is not sent without encryption: use https")
    return local


def redact(text: str, key: str) -> str:
    """The text without the key, should an endpoint send it back."""
    return text.replace(key, "***") if key else text


def post(url: str, body: dict[str, Any], *, key: str, timeout: float) -> Any:
    """The reply's JSON. Failed for whatever else comes back, or for nothing within `timeout` seconds in all."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    handlers: list[Any] = [_NoRedirect()]
    if is_local(url, with_key=False):
        handlers.append(urllib.request.ProxyHandler({}))
    ends = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as reply:
            raw = _read(reply, ends)
    except urllib.error.HTTPError as error:
        raise _of_status(error, key) from None
    except TimeoutError:
        raise Failed(f"no answer within {timeout:g} s", "timeout", again=True, charged=True) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise Failed(f"no answer within {timeout:g} s", "timeout", again=True, charged=True) from None
        gone = isinstance(reason, ConnectionRefusedError | socket.gaierror)
        text = redact(f"cannot be reached ({reason or type(error).__name__})", key)
        raise Failed(text, "unreachable", again=True, charged=not gone) from None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise Failed("the reply is not JSON", "malformed", charged=True) from None


def _read(reply: Any, ends: float) -> bytes:
    """All of a reply; a timeout of the socket starts again with each byte, this one does not."""
    parts, size = [], 0
    while part := reply.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise Failed(f"the reply is longer than {MOST_BYTES >> 20} MiB", "malformed", charged=True)
        if time.monotonic() > ends:
            raise TimeoutError
    return b"".join(parts)


def _of_status(error: urllib.error.HTTPError, key: str) -> Failed:
    try:
        words = error.read(2000).decode("utf-8", "replace")
    except OSError:
        words = ""
    try:
        said = json.loads(words)
        said = said.get("error", said) if isinstance(said, dict) else said
        words = str(said.get("message", said) if isinstance(said, dict) else said)
    except ValueError:
        pass
    text = redact(" ".join(f"HTTP {error.code}: {words}".split())[:300], key)
    if error.code in _OURS:
        hint = "; check the key in the environment" if error.code in (401, 403) else ""
        return Failed(text + hint, "refused", fatal=True)
    if 300 <= error.code < 400:
        return Failed(
            f"HTTP {error.code}: it sends us elsewhere, where the key does not go; give the URL itself", fatal=True
        )
    if error.code in _AGAIN:
        wait = _retry_after(error.headers.get("Retry-After"))
        if wait is not None and wait > LONGEST_WAIT:
            return Failed(f"{text}; it asks to wait {wait:.0f} s: run the same again then", "busy", fatal=True)
        return Failed(text, "busy" if error.code == 429 else "server_error", again=True, wait=wait)
    return Failed(text, "refused")


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
