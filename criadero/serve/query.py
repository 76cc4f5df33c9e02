"""Query parameters: a name that an address does not know is a 400, as in a body, and so is one that is given twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from fastapi import Request

from criadero.serve.errors import ApiError

# sent by clients to every address, whatever it is: taken, without effect, and reported
IGNORED = {
    "api-version": "Azure's clients name a version of the API; there is one",
    "beta": "Anthropic's older clients send it with their beta functions",
}


async def check_query(request: Request) -> None:
    """A dependency of all API routes. ApiError naming the parameter and those that the address knows."""
    known, lists = parameters(request.scope.get("route"))
    for name in dict.fromkeys(request.query_params):
        if name in IGNORED and name not in known:
            report(request, name)
        elif name not in known:
            raise ApiError(400, "unknown_parameter", _unknown(name, known), f"query.{name}"[:200])
        elif len(request.query_params.getlist(name)) > 1 and name not in lists:
            raise ApiError(400, "invalid_value", f"{name} stands twice in the query: give it once", f"query.{name}")


def report(request: Request, *names: str) -> None:
    """Name query parameters that have no effect in the response's header ``X-Criadero-Ignored``."""
    said: list[str] = request.scope["state"].setdefault("ignored_query", [])
    said += [f"query.{name}" for name in names]


def with_ignored(header: str | None, said: Iterable[str]) -> str:
    """``X-Criadero-Ignored`` with these too."""
    return ", ".join([*([header] if header else []), *said])


def parameters(route: Any) -> tuple[dict[str, Any], set[str]]:
    """Of a route: its query parameters by name, and which of them are lists."""
    found = {field.alias: field.field_info for field in getattr(getattr(route, "dependant", None), "query_params", ())}
    return found, {name for name, info in found.items() if _is_list(info.annotation)}


def _is_list(annotation: Any) -> bool:
    return any(get_origin(one) is list for one in (annotation, *get_args(annotation)))


def _unknown(name: str, known: Iterable[str]) -> str:
    listed = list(known)
    near = difflib.get_close_matches(name, listed, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    takes = "this address takes " + (", ".join(listed) if listed else "none")
    return f"unknown parameter {name!r:.80} in the query: {advice}{takes}"
