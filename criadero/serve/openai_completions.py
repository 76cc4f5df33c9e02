"""POST /v1/completions: text and token-id prompts, several at once, echo and the prompt's log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from criadero.engine.llm import Sample
from criadero.engine.request import Output, TokenLogprob
from criadero.serve import sse, tools
from criadero.serve.common import key_of, respond, service_of, usage_of
from criadero.serve.errors import ApiError
from criadero.serve.openai_chat import ResponseFormat, reason_of, schema_of, token_text
from criadero.serve.params import LIMITS, Sampling, TokenId, check_limits, honoured, refused
from criadero.serve.run import Run, begin_text
from criadero.serve.runs import Runs
from criadero.serve.settings import Limits

router = APIRouter()
ENDPOINT = "/v1/completions"
Ids = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(Sampling):
    """The body of a request for a completion."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)] = Field(
        description="a text, token ids, or a list of either (limit prompts); a text gets BOS in front, ids are taken as they are"
    )
    max_tokens: Annotated[int, Field(ge=0, le=LIMITS.max_tokens)] | None = honoured(
        "the longest answer; default 16; 0 with echo gives the prompt alone"
    )
    echo: bool | None = honoured("the prompt stands before the answer, and in its logprobs")
    logprobs: Annotated[int, Field(ge=0, le=LIMITS.top_logprobs)] | None = honoured(
        "log-probabilities of the tokens, the one that ended the answer too, and of so many likeliest ones (limit top_logprobs); with "
        "echo of the prompt's too"
    )
    response_format: ResponseFormat | None = honoured("text, a JSON object, or JSON of a schema: enforced by a grammar")
    best_of: int | None = refused("ask for n answers and choose", 1)
    suffix: str | None = refused("these models do not fill in", "")


@router.post(ENDPOINT)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on from a prompt, or from each of a list, whole or as a stream."""
    service = service_of(request)
    ignored = body.check()
    prompts = prompts_of(body.prompt)
    params = _params(body, service.settings.limits, len(prompts))
    runs = Runs()
    try:
        for number, prompt in enumerate(prompts):
            runs.add(
                await begin_text(
                    service, key_of(request), model=body.model, prompt=prompt, params=params, endpoint=ENDPOINT, ignored=ignored,
                    prompts=0 if number else len(prompts),
                )
            )  # fmt: skip
        answer = _Answer(runs, body, prompts)
    except BaseException:
        runs.close()
        raise
    return await respond(request, runs, answer, body.stream)


def prompts_of(given: str | Sequence[Any]) -> list[str | list[int]]:
    """A list of prompts, each a text or ids."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given if isinstance(given, str) else list(given)]
    return list(given)


def _params(body: CompletionRequest, limits: Limits, prompts: int) -> dict[str, Any]:
    check_limits(
        limits, prompts=prompts, n=body.n or 1, top_logprobs=body.logprobs or 0, max_tokens=body.max_tokens or 0
    )
    params = body.sampling()
    params["max_tokens"] = 16 if body.max_tokens is None else max(1, body.max_tokens)  # what 0 computes is not given
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "invalid_value", "max_tokens 0 needs echo: there would be nothing to answer", "max_tokens")
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
        if body.echo:
            params["prompt_logprobs"] = body.logprobs
    schema = schema_of(body.response_format, limits)
    if schema is not None:
        params |= tools.compact(schema)
    return params


class _Logprobs:
    """The four lists of a choice, as they grow."""

    def __init__(self, run: Run) -> None:
        self.tokenizer, self._offset = run.worker.llm.tokenizer, 0

    def back(self, letters: int) -> None:
        """What comes next stands so much earlier."""
        self._offset -= letters

    def of(self, tokens: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        """Those of more tokens; the first of a prompt has none."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for id, one in tokens:
            text = token_text(self.tokenizer, id)[0]
            found["tokens"].append(text)
            found["text_offset"].append(self._offset)
            self._offset += len(text)
            if one is None:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(_finite(one.logprob))
            top = {token_text(self.tokenizer, id)[0]: _finite(value) for id, value in one.top}
            found["top_logprobs"].append({text: _finite(one.logprob), **top} if one.top else {})
        return found


def _end(one: Sample | Output) -> list[TokenLogprob]:
    """Of the token that ended the answer, which is no part of the text: it closes the lists, as with OpenAI. Who scores a prompt by echo
    (lm-eval) takes it that one token follows the prompt, whatever that was."""
    return [one.end_logprob] if one.end_logprob is not None else []


def _finite(value: float) -> float:
    return max(value, -9999.0)


class _Answer:
    """One response in the making."""

    def __init__(self, runs: Runs, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> None:
        self.runs, self.body, self.prompts = runs, body, prompts
        first = runs.all[0]
        self.head = {
            "id": "cmpl-" + uuid.uuid4().hex, "object": "text_completion", "created": int(time.time()), "model": first.entry.name,
            "system_fingerprint": "fp_" + (first.entry.body.weights_sha256 or "0")[:12],
        }  # fmt: skip
        self.n = body.n or 1
        self._logprobs = {
            (at, index): _Logprobs(run) for at, run in enumerate(runs.all) for index in range(self.n)
        } if body.logprobs is not None else {}  # fmt: skip

    def _prompt_text(self, at: int) -> str:
        prompt = self.prompts[at]
        return (
            prompt
            if isinstance(prompt, str)
            else self.runs.all[at].worker.llm.tokenizer.decode(prompt, skip_special=False)
        )

    def _prompt_logprobs(self, at: int, index: int, found: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        ids = self.runs.all[at].request.prompt
        told = self._logprobs[at, index].of(list(zip(ids, found, strict=True)))
        if isinstance(self.prompts[at], str) and len(ids) and ids[0] == self._logprobs[at, index].tokenizer.bos_id:
            self._logprobs[at, index].back(
                len(told["tokens"][0])
            )  # BOS was put in front of the text: it has no place in it
            told["text_offset"] = [0, *(offset - len(told["tokens"][0]) for offset in told["text_offset"][1:])]
        return told

    def _choice(self, at: int, sample: Sample) -> dict[str, Any]:
        nothing = self.body.max_tokens == 0
        text = "" if nothing else sample.text
        logprobs: dict[str, Any] | None = None
        if self.body.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            if self.body.echo:
                logprobs = self._prompt_logprobs(at, sample.index, self.runs.all[at].result.prompt_logprobs or [])
            more = [] if nothing else [(one.id, one) for one in [*(sample.logprobs or ()), *_end(sample)]]
            for name, values in self._logprobs[at, sample.index].of(more).items():
                logprobs[name] += values
        return {
            "index": at * self.n + sample.index, "text": self._prompt_text(at) + text if self.body.echo else text,
            "logprobs": logprobs, "finish_reason": "length" if nothing else reason_of(sample.finish_reason, False),
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(*(run.result.usage for run in self.runs.all))
        if self.body.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        await self.runs.wait()
        choices = [self._choice(at, sample) for at, run in enumerate(self.runs.all) for sample in run.result.samples]
        return {**self.head, "choices": choices, "usage": self._usage(), "criadero": await self.runs.finish()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Piece by piece."""
        left = len(self.runs.all)
        said: set[tuple[int, int]] = set()
        async for at, event in self.runs.events():
            run = self.runs.all[at]
            if event is None:
                yield sse.PING
            elif isinstance(event, Output):
                if (failed := run.failed or run.cancelled_error(event)) is not None:
                    yield sse.event(failed.body())
                    return
                left -= event.done
                choice = self._piece(at, event, said)
                if choice is not None:
                    last = event.done and not left
                    yield self._chunk([choice], **({"criadero": await self.runs.finish()} if last else {}))
            elif run.waiting is not None:
                yield sse.queued(run.waiting)
        if self._with_usage:
            yield self._chunk([], usage=self._usage())
        yield sse.DONE

    def _piece(self, at: int, output: Output, said: set[tuple[int, int]]) -> dict[str, Any] | None:
        """What one output adds to its choice; None for nothing."""
        place = (at, output.index)
        nothing = self.body.max_tokens == 0
        text = "" if nothing else output.text
        logprobs = None
        if self.body.echo and place not in said:
            text = self._prompt_text(at) + text
            found = self.runs.all[at].result.prompt_logprobs or output.prompt_logprobs
            if self.body.logprobs is not None and found is not None:
                logprobs = self._prompt_logprobs(at, output.index, found)
        said.add(place)
        new = [*(output.logprobs or ()), *_end(output)]
        if self.body.logprobs is not None and new and not nothing:
            more = self._logprobs[place].of([(one.id, one) for one in new])
            logprobs = {name: logprobs[name] + values for name, values in more.items()} if logprobs else more
        if not text and logprobs is None and output.finish_reason is None:
            return None
        reason = reason_of(output.finish_reason, False)
        reason = "length" if nothing and reason is not None else reason
        return {"index": at * self.n + output.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    @property
    def _with_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        if self._with_usage:
            more.setdefault("usage", None)
        return sse.event({**self.head, "choices": choices, **more})
