"""/v1/trace: which parts of an answer stand word for word in the model's training data (`criadero.trust.trace`), and in which documents."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.artifact import open_artifact
from criadero.errors import UserError
from criadero.serve.common import json_response, service_of
from criadero.serve.errors import ApiError, of_user_error
from criadero.serve.params import Body, honoured
from criadero.serve.storing import checked_id, kept, missing, store_of
from criadero.trust.search import Index
from criadero.trust.trace import absent_from, data_of, index_for, trace

router = APIRouter()
# of a model: its index (mapped files: what is not read costs nothing), and how many of the sources it learned from are in none
_indexes: dict[Path, tuple[Index, dict[str, int]]] = {}
_opening = threading.Lock()


class TraceRequest(Body):
    """The text of a trace, or the message of a chat that holds it."""

    model: str | None = honoured(
        "the model that wrote it; empty: the default one, or the message's", "", max_length=256
    )
    text: Annotated[str, Field(min_length=1, max_length=200_000)] | None = honoured("the text")
    message_id: Annotated[str, Field(max_length=80)] | None = honoured("or an answer of a chat")
    min_tokens: Annotated[int, Field(ge=2, le=1000)] = honoured("the shortest run that counts", 8)


@router.post("/v1/trace")
async def create(body: TraceRequest, request: Request) -> Response:
    """The spans of a text that stand in the training data, with their documents. 404 when the model's index is not here."""
    if (body.text is None) == (body.message_id is None):
        raise ApiError(400, "invalid_value", "give either text or message_id", "text")
    name, text = body.model, body.text
    if body.message_id is not None:
        message = await kept(store_of(request).message, request.state.owner, checked_id(body.message_id, "message"))
        if message is None:
            raise missing("message")
        name, text = name or message["model"] or "", message["content"]
    assert text is not None
    entry = service_of(request).pool.find(name)
    found = await asyncio.to_thread(_trace, entry.path, text, body.min_tokens)
    return json_response({"model": entry.name, **found})


def _trace(model: Path, text: str, min_tokens: int) -> dict[str, Any]:
    with _opening:
        if model not in _indexes:
            try:
                index, (_, learned) = index_for(model), data_of(model)
                absent = len(absent_from(open_artifact(index.path), learned))
                _indexes[model] = index, {"sources": sum(map(bool, learned.values())), "not_in_the_index": absent}
            except UserError as error:
                why = str(error).replace("and give it with --index DIR", "and put it beside the model's folder")
                raise ApiError(404, "no_index", why, "model") from None
    index, learned_from = _indexes[model]
    try:
        return {
            "index": index.path.name,
            "learned_from": learned_from,
            **trace(index, text, min_tokens=min_tokens).as_dict(),
        }
    except UserError as error:
        raise of_user_error(error, "text") from None
