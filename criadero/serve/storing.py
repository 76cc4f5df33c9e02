"""The store for handlers: its calls in a thread, its troubles and what is not there as errors of the API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from starlette.requests import Request

from criadero.serve.errors import ApiError
from criadero.serve.store import Store, StoreError

P = ParamSpec("P")
T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")


def store_of(request: Request) -> Store:
    """The database; 503 when the server was started without one."""
    found: Any = request.app.state.store
    if not isinstance(found, Store):
        raise ApiError(503, "no_database", "this server keeps nothing: it was started without a database")
    return found


async def kept(call: Callable[P, T], *args: P.args, **more: P.kwargs) -> T:
    """A method of the store, off the event loop. 503 when the database cannot do it now."""
    try:
        return await asyncio.to_thread(call, *args, **more)
    except StoreError as error:
        again = {"Retry-After": "5" if error.code == "database_busy" else "60"}
        raise ApiError(503, error.code, str(error), headers=again) from None


def is_id(text: str) -> bool:
    """Whether it can be an id at all."""
    return _ID.fullmatch(text) is not None


def checked_id(text: str, what: str) -> str:
    """An id from an address, or 404 when it cannot be one."""
    if not is_id(text):
        raise missing(what)
    return text


def missing(what: str) -> ApiError:
    """There is none, or it is somebody else's: nobody can tell which."""
    return ApiError(404, f"{what.replace(' ', '_')}_not_found", f"there is no such {what}", "id")
