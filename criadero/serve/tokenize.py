"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.chat import render
from criadero.errors import UserError
from criadero.serve.common import json_response, service_of
from criadero.serve.errors import ApiError
from criadero.serve.openai_chat import ChatMessage, messages_of, token_text
from criadero.serve.params import LIMITS, Body, TokenId, honoured

router = APIRouter()


class TokenizeRequest(Body):
    """A text, or a chat."""

    model: str | None = honoured("the name of a model or an adapter; empty: the default one", "", max_length=256)
    prompt: str | None = honoured("a text; it gets BOS in front as for a completion")
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=LIMITS.messages)] | None = honoured(
        "a chat, which goes through the model's template"
    )
    add_special_tokens: bool | None = honoured("false: no BOS in front of a prompt")
    add_generation_prompt: bool | None = honoured("a chat ends with what precedes an answer; default true")
    return_token_strs: bool | None = honoured("the tokens as texts too")


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = honoured("the name of a model or an adapter; empty: the default one", "", max_length=256)
    tokens: Annotated[list[TokenId], Field(max_length=LIMITS.max_tokens)] = Field(description="token ids")


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The ids of a text or a chat, their count, and the model's context."""
    service = service_of(request)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "missing_parameter", "give either prompt or messages", "prompt")
    entry = service.pool.find(body.model)
    ignored: list[str] = []
    async with service.pool.lease(entry) as worker:
        tokenizer = worker.llm.tokenizer
        if body.prompt is not None:
            bos = tokenizer.bos_id is not None and body.add_special_tokens is not False
            ids = await asyncio.to_thread(tokenizer.encode, body.prompt, bos=bos)
        else:
            if entry.template is None:
                raise UserError(entry.template_problem)
            messages = messages_of(body.messages or (), service.settings.limits, ignored)
            prompt = body.add_generation_prompt is not False
            ids = (
                await asyncio.to_thread(render, messages, tokenizer, entry.template, add_generation_prompt=prompt)
            ).ids
        whole: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": worker.llm.context,
            "tokens": ids,
            "token_strs": None,
        }
        if body.return_token_strs:
            whole["token_strs"] = [token_text(tokenizer, id)[0] for id in ids]
    return json_response({**whole, "criadero": {"ignored": ignored}})


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of ids."""
    service = service_of(request)
    async with service.pool.lease(service.pool.find(body.model)) as worker:
        tokenizer, size = worker.llm.tokenizer, worker.llm.config.vocab_size
        if body.tokens and max(body.tokens) >= size:
            raise ApiError(400, "out_of_range", f"tokens: the vocabulary's ids are 0 to {size - 1}", "tokens")
        return json_response({"prompt": tokenizer.decode(body.tokens, skip_special=False)})
