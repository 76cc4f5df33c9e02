"""Whether the server lives and can answer, its models, and its numbers."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from criadero.serve.common import service_of
from criadero.serve.errors import ApiError
from criadero.serve.models import Entry

router = APIRouter()
Lifecycle = Literal["active", "deprecated", "retired"]


@router.get("/health")
async def health() -> dict[str, str]:
    """200 while the server lives."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 once the default model has been loaded and while the server is not shutting down; else 503 with the reason."""
    service = service_of(request)
    if service.admission.draining:
        return JSONResponse({"status": "draining"}, 503, {"Retry-After": "5"})
    entry = service.pool.entries[service.pool.default]
    if entry.problem:
        return JSONResponse({"status": "failed", "problem": entry.problem}, 503)
    if not entry.was_loaded:
        return JSONResponse({"status": "loading"}, 503, {"Retry-After": "1"})
    return JSONResponse({"status": "ready"})


@router.get("/v1/models")
async def models(
    request: Request,
    limit: Annotated[int | None, Query(ge=1, le=1000, description="so many at most; default: all")] = None,
    after_id: Annotated[str | None, Query(max_length=256, description="those behind this model")] = None,
    before_id: Annotated[str | None, Query(max_length=256, description="those before it")] = None,
    lifecycle: Annotated[
        list[Lifecycle] | None, Query(alias="lifecycle[]", description="models of these stages; all here are active")
    ] = None,
) -> dict[str, Any]:
    """All models and adapters that a request may name, or a page of them."""
    found = [as_dict(entry) for entry in service_of(request).pool.listed()]
    if lifecycle is not None and "active" not in lifecycle:
        found = []
    names = [one["id"] for one in found]
    for name, id in (("after_id", after_id), ("before_id", before_id)):
        if id is not None and id not in names:
            raise ApiError(400, "invalid_value", f"{name} names no model of this list", f"query.{name}")
    begin = 0 if after_id is None else names.index(after_id) + 1
    end = len(found) if before_id is None else names.index(before_id)
    found = found[begin:end]
    backwards = before_id is not None and after_id is None
    page = found[-(limit or len(found)) :] if backwards else found[:limit]
    return {
        "object": "list", "data": page, "has_more": len(page) < len(found),
        "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None,
    }  # fmt: skip


@router.get("/v1/models/{name}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return as_dict(service_of(request).pool.find(name))


def as_dict(entry: Entry) -> dict[str, Any]:
    """OpenAI's shape, then Anthropic's, and what else is known."""
    context = entry.body.context
    return {
        "id": entry.name, "object": "model", "created": entry.created, "owned_by": "criadero",
        "type": "model", "display_name": entry.name, "lifecycle": "active", "max_input_tokens": context, "max_tokens": context,
        "created_at": datetime.datetime.fromtimestamp(entry.created, datetime.UTC).isoformat().replace("+00:00", "Z"),
        "criadero": {
            "kind": "adapter" if entry.adapter else "model", "base": entry.base, "loaded": entry.loaded, "context": context,
            "memory_bytes": entry.body.memory, "has_template": entry.template is not None, "passport": entry.passport_id,
        },
    }  # fmt: skip


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    service = service_of(request)
    names = [entry.name for entry in service.pool.entries.values() if not entry.adapter]
    text = service.metrics.text(service.pool.workers(), names)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
