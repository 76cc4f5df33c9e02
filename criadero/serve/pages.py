"""The page's files, as they were built: read when the server starts, so that a name in a request is looked up and never opened."""

from __future__ import annotations

import gzip
import mimetypes
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from criadero.serve.errors import ApiError

FOLDER = Path(__file__).parent / "static"
FOREVER, ASK = "public, max-age=31536000, immutable", "no-cache"  # names of assets hold a hash
_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".woff2": "font/woff2",
    ".svg": "image/svg+xml",
    ".html": "text/html",
}

router = APIRouter(include_in_schema=False)


@cache
def files() -> dict[str, tuple[bytes, bytes | None, str]]:
    """Name -> content, the same gzipped where that is shorter, type."""
    found: dict[str, tuple[bytes, bytes | None, str]] = {}
    for file in sorted(FOLDER.rglob("*")) if FOLDER.is_dir() else ():
        if not file.is_file() or file.is_symlink():
            continue
        data = file.read_bytes()
        kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        packed = gzip.compress(data, mtime=0) if kind.startswith(("text/", "image/svg")) else None
        if kind.startswith("text/"):
            kind += "; charset=utf-8"
        found[file.relative_to(FOLDER).as_posix()] = (data, packed, kind)
    return found


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _file("index.html", request, ASK)


@router.get("/favicon.svg")
async def icon(request: Request) -> Response:
    """Its icon."""
    return _file("favicon.svg", request, ASK)


@router.get("/assets/{name}")
async def asset(name: str, request: Request) -> Response:
    """Scripts, styles and fonts."""
    return _file(f"assets/{name}", request, FOREVER)


def _file(name: str, request: Request, caching: str) -> Response:
    found = files().get(name)
    if found is None:
        raise ApiError(404, "not_found", "there is no such address")
    data, packed, kind = found
    headers = {"Cache-Control": caching, "Vary": "Accept-Encoding"}
    if packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        data, headers["Content-Encoding"] = packed, "gzip"
    return Response(data, media_type=kind, headers=headers)
