"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.serve import sse
from criadero.serve.common import json_response, key_of, service_of, usage_of
from criadero.serve.errors import ApiError
from criadero.serve.openai_completions import Ids, prompts_of
from criadero.serve.params import Body, check_limits, honoured, reported
from criadero.serve.run import begin_text
from criadero.serve.runs import Runs

router = APIRouter()
ENDPOINT = "/v1/embeddings"


class EmbeddingRequest(Body):
    """The body of a request for embeddings."""

    input: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)] = Field(
        description="a text, token ids, or a list of either (limit prompts)"
    )
    model: str | None = honoured("the name of a model or an adapter; empty: the default one", "", max_length=256)
    encoding_format: Literal["float", "base64"] | None = honoured(
        "numbers, or little-endian float32 in base64; default float"
    )
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = honoured(
        "the model's own size; another is a 400: these vectors were not trained to be cut"
    )
    pooling: Literal["mean", "last"] | None = honoured(
        "of the final hidden states: their mean (default), or the last; of length 1"
    )
    user: str | None = reported("requests are told apart by their keys")


@router.post(ENDPOINT)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """A vector of length 1 for each input."""
    service = service_of(request)
    ignored = body.check()
    inputs = prompts_of(body.input)
    check_limits(service.settings.limits, prompts=len(inputs))
    if "" in inputs:
        raise ApiError(400, "invalid_value", "input: an empty text has no meaning to embed", "input")
    runs = Runs()
    try:
        for number, text in enumerate(inputs):
            run = await begin_text(
                service, key_of(request), model=body.model, prompt=text, params={"temperature": 0.0, "max_tokens": 1},
                endpoint=ENDPOINT, ignored=ignored, pooling=body.pooling or "mean", prompts=0 if number else len(inputs),
            )  # fmt: skip
            runs.add(run)
            size = run.worker.llm.config.hidden_size
            if body.dimensions not in (None, size):
                raise ApiError(
                    400,
                    "invalid_value",
                    f"dimensions: this model's vectors have {size}, and cannot be cut",
                    "dimensions",
                )
        async with sse.watched(request, runs.gone):
            await runs.wait()
        data: list[dict[str, Any]] = []
        for index, run in enumerate(runs.all):
            vector = run.result.embedding
            assert vector is not None
            value: Any = vector.tolist()
            if body.encoding_format == "base64":
                value = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        usage = usage_of(*(run.result.usage for run in runs.all))
        usage = {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["prompt_tokens"]}
        name = runs.all[0].entry.name
        whole = {"object": "list", "data": data, "model": name, "usage": usage, "criadero": await runs.finish()}
        return json_response(whole, runs.headers)
    finally:
        runs.close()
