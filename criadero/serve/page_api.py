"""/api: what the page keeps and reads. Answers and comparisons, which stream, are in `page_answers`; everything is its owner's alone."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import Response

from criadero import __version__
from criadero.chat import Message
from criadero.errors import UserError
from criadero.serve.common import json_response, service_of
from criadero.serve.errors import ApiError, of_user_error
from criadero.serve.feedback import tally
from criadero.serve.params import LIMITS, Body
from criadero.serve.run import fit_messages
from criadero.serve.storing import checked_id, kept, missing, store_of

router = APIRouter(prefix="/api")
TITLE = 200  # characters
ANSWER = 512  # tokens of an answer, unless the request says


class PageParams(Body):
    """How answers are drawn in the page; what is not given has a default that suits small models."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=LIMITS.max_tokens)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=LIMITS.stop_characters)]], Field(max_length=LIMITS.stop)
    ] | None = None  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Those that are not null."""
        return self.model_dump(exclude_none=True)


class Me(Body):
    """What a person decides of what is theirs."""

    feedback_consent: bool


class NewChat(Body):
    """A chat to begin."""

    title: Annotated[str, Field(max_length=TITLE)] = ""
    model: Annotated[str, Field(max_length=256)] | None = None
    system: str | None = None
    params: PageParams = Field(default_factory=PageParams)


class ChangedChat(Body):
    """What to change of a chat."""

    title: Annotated[str, Field(max_length=TITLE)] = ""
    model: Annotated[str, Field(max_length=256)] | None = None
    system: str | None = None
    params: PageParams = Field(default_factory=PageParams)


class Said(Body):
    """What the user says."""

    parent: str | None
    content: Annotated[str, Field(min_length=1)]


class Feedback(Body):
    """What the user thinks of an answer."""

    rating: Literal[1, -1] | None = None
    better: Annotated[str, Field(min_length=1)] | None = None


class Deletion(Body):
    """Said in full, so that nothing is deleted by mistake."""

    confirm: Literal["delete everything"]


def owner_of(request: Request) -> str:
    """Whose rows a request may see."""
    found: str = request.state.owner
    return found


# -- who and what -----------------------------------------------------------------------------------------------------


@router.get("/me")
async def me(request: Request) -> Response:
    """Who asks, and what they decided."""
    from criadero.serve.app import key_required  # which imports this module

    consent = await kept(store_of(request).consent, owner_of(request))
    settings = service_of(request).settings
    return json_response(
        {"owner": owner_of(request), "key_required": key_required(settings), "version": __version__, "feedback_consent": consent}
    )  # fmt: skip


@router.put("/me")
async def change_me(body: Me, request: Request) -> Response:
    """Give or withdraw the consent that feedback becomes training data."""
    await kept(store_of(request).set_consent, owner_of(request), body.feedback_consent)
    return await me(request)


@router.get("/models")
async def models(request: Request) -> Response:
    """The models that can answer, the default one first."""
    service = service_of(request)
    found = [
        {
            "id": entry.name, "kind": "adapter" if entry.adapter else "model", "base": entry.base, "loaded": entry.loaded,
            "context": entry.body.context, "memory_bytes": entry.body.memory, "has_template": entry.template is not None,
            "tokens_per_s": service.metrics.speed_of(entry.name), "made_of": entry.made_of,
        }
        for entry in await asyncio.to_thread(service.pool.listed)
    ]  # fmt: skip
    return json_response({"models": found, "default": service.pool.default})


# -- chats ------------------------------------------------------------------------------------------------------------


@router.get("/chats")
async def chats(
    request: Request,
    query: Annotated[str, Query(max_length=1000, description="words to look for")] = "",
    before: Annotated[str | None, Query(max_length=64, description="what `next` said")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="so many at most")] = 50,
) -> Response:
    """The latest chats, or those that hold the words of ``query``."""
    try:
        found, more = await kept(store_of(request).chats, owner_of(request), query=query, before=before, limit=limit)
    except ValueError as error:
        raise ApiError(400, "invalid_value", str(error), "before") from None
    return json_response(
        {"chats": [{name: one[name] for name in ("id", "title", "model", "updated")} for one in found], "next": more}
    )


@router.post("/chats")
async def new_chat(body: NewChat, request: Request) -> Response:
    """Begin a chat."""
    made = await kept(
        store_of(request).add_chat, owner_of(request), title=_one_line(body.title), model=body.model, system=body.system,
        params=body.params.given(),
    )  # fmt: skip
    return json_response(made | {"messages": []})


@router.get("/chats/{id}")
async def chat(id: str, request: Request) -> Response:
    """A chat with all its messages."""
    store, owner = store_of(request), owner_of(request)
    found = await kept(store.chat, owner, checked_id(id, "chat"))
    if found is None:
        raise missing("chat")
    return json_response(found | {"messages": await kept(store.messages, owner, id)})


@router.patch("/chats/{id}")
async def change_chat(id: str, body: ChangedChat, request: Request) -> Response:
    """Change title, model, system message or params; what is not named stays."""
    changes: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set}
    if "title" in changes:
        changes["title"] = _one_line(body.title)
    if "params" in changes:
        changes["params"] = body.params.given()
    found = await kept(store_of(request).change_chat, owner_of(request), checked_id(id, "chat"), changes)
    if found is None:
        raise missing("chat")
    return json_response(found)


@router.delete("/chats/{id}")
async def delete_chat(id: str, request: Request) -> Response:
    """Delete a chat and all that belongs to it."""
    if not await kept(store_of(request).delete_chat, owner_of(request), checked_id(id, "chat")):
        raise missing("chat")
    return json_response({"id": id, "deleted": True})


@router.post("/chats/{id}/messages")
async def new_message(id: str, body: Said, request: Request) -> Response:
    """Say something, after an answer or first; a chat without a title gets one from it."""
    store, owner = store_of(request), owner_of(request)
    found = await kept(store.chat, owner, checked_id(id, "chat"))
    if found is None:
        raise missing("chat")
    if body.parent is not None:
        above = await kept(store.path, owner, id, checked_id(body.parent, "message"))
        if not above:
            raise missing("message")
        if above[-1]["role"] != "assistant":
            raise ApiError(400, "invalid_value", "parent must be an answer, or null for the first message", "parent")
    made = await kept(store.add_message, owner, id, {"parent": body.parent, "role": "user", "content": body.content})
    if made is None:
        raise missing("chat")
    if not found["title"]:
        await kept(store.change_chat, owner, id, {"title": _one_line(body.content)})
    return json_response(made)


def _one_line(text: str) -> str:
    """A title: one line of what can be shown, 80 characters of it."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text[: 4 * TITLE]).split())
    return line if len(line) <= 80 else line[:79].rstrip() + "…"


@router.get("/chats/{id}/context")
async def context(
    id: str,
    request: Request,
    leaf: Annotated[str | None, Query(max_length=80, description="the last message")] = None,
    model: Annotated[str, Query(max_length=256, description="empty: the default one")] = "",
    max_tokens: Annotated[int, Query(ge=1, le=LIMITS.max_tokens, description="room for the answer")] = ANSWER,
) -> Response:
    """How full a model's context is with the messages up to ``leaf``, and which of them it would no longer see.

    After an answer, the next question is counted as if it were empty. ``fits`` is false when the last message alone is too long.
    """
    store, owner, service = store_of(request), owner_of(request), service_of(request)
    found = await kept(store.chat, owner, checked_id(id, "chat"))
    path = await kept(store.path, owner, id, checked_id(leaf, "message") if leaf else None)
    if found is None or path is None:
        raise missing("chat" if found is None else "message")
    entry = service.pool.find(model or found["model"] or "")
    if entry.template is None:
        raise of_user_error(UserError(entry.template_problem))
    template = entry.template
    messages = messages_for(found["system"], path)
    if not path or path[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": ""})

    async with service.pool.lease(entry) as worker:
        llm = worker.llm
        try:
            whole = await asyncio.to_thread(
                fit_messages, messages, llm.tokenizer, template, llm.context, max_tokens, "error"
            )
            fits, fitted = True, whole
            try:
                fitted = await asyncio.to_thread(
                    fit_messages, messages, llm.tokenizer, template, llm.context, max_tokens, "oldest"
                )
            except UserError:
                fits = False
        except UserError as error:
            raise of_user_error(error) from None
    return json_response(
        {
            "limit": llm.context, "used": len(fitted.ids), "all": len(whole.ids), "fits": fits, "policy": "oldest",
            "dropped": dropped_ids(fitted.dropped, path, found["system"]),
        }
    )  # fmt: skip


def messages_for(system: str | None, path: list[dict[str, Any]]) -> list[Message]:
    """What a model is shown."""
    found: list[Message] = [{"role": "system", "content": system}] if system else []
    for one in path:
        found.append({"role": one["role"], "content": one["content"]})
    return found


def dropped_ids(dropped: tuple[int, ...], path: list[dict[str, Any]], system: str | None) -> list[str]:
    """The ids of the messages that were left out; ``dropped`` counts the system message."""
    return [path[number - bool(system)]["id"] for number in dropped]


# -- what people think of answers ---------------------------------------------------------------------------------------


@router.put("/messages/{id}/feedback")
async def feedback(id: str, body: Feedback, request: Request) -> Response:
    """Thumbs, and a better answer; both null take it back."""
    found = await kept(
        store_of(request).set_feedback, owner_of(request), checked_id(id, "message"), rating=body.rating, better=body.better
    )  # fmt: skip
    if found is None:
        raise missing("message")
    return json_response(found)


@router.get("/comparisons/tally")
async def comparisons_tally(request: Request) -> Response:
    """Who won how often, with Wilson's interval."""
    return json_response(tally(await kept(store_of(request).votes, owner_of(request))))


# -- everything -------------------------------------------------------------------------------------------------------


@router.get("/export")
async def export(request: Request) -> Response:
    """A file with everything the owner has here."""
    found = await kept(store_of(request).export, owner_of(request))
    text = await asyncio.to_thread(json.dumps, found, ensure_ascii=False, indent=1)
    return Response(
        text.encode("utf-8", "replace"), media_type="application/json",
        headers={"Content-Disposition": 'attachment; filename="criadero-export.json"'},
    )  # fmt: skip


@router.post("/delete-everything")
async def delete_everything(body: Deletion, request: Request) -> Response:
    """Delete all of it, from the files too."""
    return json_response(await kept(store_of(request).delete_everything, owner_of(request)))
