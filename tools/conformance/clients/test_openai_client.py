"""The openai package against a running server, as programs use it; run by tools/conformance/run.py in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

URL = os.environ["CRIADERO_URL"] + "/v1"
MODEL = "cria-chat"
HELLO: list[Any] = [{"role": "user", "content": "Hola, ¿quién eres?"}]
WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "The weather of a city", "strict": True,
            "parameters": {
                "type": "object", "properties": {"city": {"enum": ["Madrid", "Lima"]}}, "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Any:
    with openai.OpenAI(base_url=URL, api_key="none", _strict_response_validation=True) as made:
        yield made


@pytest.fixture(scope="module")
def loose() -> Any:
    """Where OpenAI's own answers are not what its package's types say: null for the first token of an echoed prompt and within a
    stream's pieces, vectors as base64."""
    with openai.OpenAI(base_url=URL, api_key="none") as made:
        yield made


class Verdict(BaseModel):
    good: bool
    stars: int = Field(ge=1, le=5)


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=16, temperature=0, seed=1
    )
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 16
    assert answer._request_id.startswith("req-")


def test_chat_stream_is_the_same_text(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 0.8, "seed": 7}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({one.id for one in chunks}) == 1


def test_stream_helper(client: Any) -> None:
    short: Any = {"regex": "[a-z]{3,5}"}  # the helper raises when an answer is cut off
    with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=12, extra_body=short) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


def test_sampling_parameters(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=6, n=3, temperature=1, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=0.5, logit_bias={"5": -100}, seed=3, stop=["###"], user="ana", store=False,
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
                    "stop_token_ids": [4], "skip_special_tokens": True, "truncate": "oldest"},
    )  # fmt: skip
    assert [one.index for one in answer.choices] == [0, 1, 2]


def test_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    for token in answer.choices[0].logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the likeliest


def test_tools_round_trip(client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Lima?"}]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=WEATHER, tool_choice="required", parallel_tool_calls=False, max_tokens=60
    )
    [call] = first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Madrid", "Lima")
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, tools=WEATHER, tool_choice="none", max_tokens=12
    )
    assert second.choices[0].message.content


def test_tools_streamed(client: Any) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=WEATHER, tool_choice=named, parallel_tool_calls=False, max_tokens=60
    ) as stream:
        final = stream.get_final_completion()
    [call] = final.choices[0].message.tool_calls
    assert call.function.parsed_arguments["city"] in ("Madrid", "Lima")


def test_structured_output(client: Any) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Verdict, max_tokens=60, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_json_object(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format={"type": "json_object"}, max_tokens=200, seed=2
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("form", [{"regex": "[ab]{3}"}, {"grammar": 'start: "yes" | "no"'}], ids=["regex", "grammar"])
def test_form_of_the_answer(client: Any, form: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, extra_body=form)
    text = answer.choices[0].message.content
    assert text in ("yes", "no") or (len(text) == 3 and set(text) <= {"a", "b"})


def test_completions(loose: Any) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": ["Hola", "Good morning"], "max_tokens": 4, "temperature": 0, "n": 1, "echo": True, "logprobs": 2,
    }  # fmt: skip
    answer = loose.completions.create(**asked)
    assert [one.index for one in answer.choices] == [0, 1]
    for choice, prompt in zip(answer.choices, asked["prompt"], strict=True):
        assert choice.text.startswith(prompt)
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)
    ids = loose.completions.create(
        model=MODEL, prompt=[5, 6, 7], max_tokens=3, temperature=0.5, top_p=0.9, seed=1, stop="#", presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={"9": 1}, best_of=1, user="ana",
    )  # fmt: skip
    assert ids.usage.prompt_tokens == 3


def test_completions_beyond_openai(client: Any) -> None:
    more = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 3, "ignore_eos": True}
    answer = client.completions.create(model=MODEL, prompt="Hola", max_tokens=6, seed=1, extra_body=more)
    assert answer.usage.completion_tokens == 6
    for form in (
        {"regex": "[ab]{3}"},
        {"grammar": 'start: "yes" | "no"'},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}},
    ):
        text = client.completions.create(model=MODEL, prompt="Hola", max_tokens=8, extra_body=form).choices[0].text
        assert text.strip('"') in ("yes", "no") or set(text) <= {"a", "b"}


def test_completions_stream(loose: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Hola", "max_tokens": 12, "temperature": 0}
    whole = loose.completions.create(**asked)
    parts = loose.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(one.choices[0].text for one in parts if one.choices) == whole.choices[0].text


def test_embeddings(loose: Any) -> None:
    packed = loose.embeddings.create(model=MODEL, input=["Hola", "Good morning"])  # asks for base64
    plain = loose.embeddings.create(model=MODEL, input=["Hola", "Good morning"], encoding_format="float", user="ana")
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6, abs=1e-9)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-4)
    same = loose.embeddings.create(model=MODEL, input="Hola", dimensions=len(plain.data[0].embedding))
    assert len(same.data) == 1
    last = loose.embeddings.create(model=MODEL, input="Hola", extra_body={"pooling": "last"})
    assert last.data[0].embedding != same.data[0].embedding


def test_responses(client: Any) -> None:
    first = client.responses.create(
        model=MODEL, input="My name is Eva.", instructions="Be brief.", max_output_tokens=12, temperature=0, top_p=1, metadata={"a": "b"},
        include=["message.output_text.logprobs"], top_logprobs=2, truncation="auto", user="ana", store=True,
    )  # fmt: skip
    assert first.output_text
    assert first.metadata == {"a": "b"}
    second = client.responses.create(
        model=MODEL, input="And mine?", previous_response_id=first.id, max_output_tokens=12, temperature=0
    )
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(first.id).data
    assert client.responses.input_tokens.count(model=MODEL, input="Hola").input_tokens > 0
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_responses_stream(client: Any) -> None:
    with client.responses.stream(model=MODEL, input="Hola", max_output_tokens=12, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert final.output_text


def test_responses_reported_and_beyond_openai(client: Any) -> None:
    raw = client.responses.with_raw_response.create(
        model=MODEL, input="Hola", max_output_tokens=4, reasoning={"effort": "low"}, service_tier="auto", prompt_cache_key="a",
        safety_identifier="b", extra_body={"stop": ["###"], "ignore_eos": True, "prompt_cache_retention": "24h", "access_programs": []},
    )  # fmt: skip
    for name in ("reasoning", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"):
        assert name in raw.headers["X-Criadero-Ignored"]
    assert raw.parse().output_text
    form = {"grammar": 'start: "yes" | "no"'}
    assert client.responses.create(model=MODEL, input="Hola", extra_body=form).output_text in ("yes", "no")
    options = {"include_obfuscation": False}
    assert list(
        client.responses.create(model=MODEL, input="Hola", max_output_tokens=2, stream=True, stream_options=options)
    )


def test_responses_structured_and_tools(client: Any) -> None:
    parsed = client.responses.parse(model=MODEL, input="Hola", text_format=Verdict, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Verdict)
    tool = {"type": "function", **WEATHER[0]["function"]}
    called = client.responses.create(
        model=MODEL, input="The weather in Lima?", tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=60
    )  # fmt: skip
    [call] = [item for item in called.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Madrid", "Lima")


def test_models(client: Any) -> None:
    assert MODEL in [one.id for one in client.models.list()]
    assert client.models.retrieve(MODEL).object == "model"


def test_async_and_many_at_once() -> None:
    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=URL, api_key="none", _strict_response_validation=True) as client:
            asked = [
                client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0.9, seed=5)
                for _ in range(12)
            ]
            answers = await asyncio.gather(*asked)
            stream = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True)
            assert [one async for one in stream]
            return answers

    answers = asyncio.run(all_of_them())
    assert len({one.choices[0].message.content for one in answers}) == 1  # whatever else is computed


def test_a_stream_that_is_left(client: Any) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)


@pytest.mark.parametrize(
    ("error", "code", "body"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "nobody"}),
        (openai.BadRequestError, "out_of_range", {"temperature": 3}),
        (openai.BadRequestError, "unknown_parameter", {"extra_body": {"temprature": 1}}),
        (openai.BadRequestError, "unsupported_parameter", {"audio": {"format": "wav", "voice": "alloy"}}),
        (openai.BadRequestError, "unsupported_parameter", {"functions": [{"name": "f"}]}),
        (openai.BadRequestError, "unsupported_parameter", {"function_call": "none", "functions": []}),
        (openai.BadRequestError, "unsupported_parameter", {"modalities": ["audio"]}),
        (openai.BadRequestError, "unsupported_parameter", {"web_search_options": {}}),
        (openai.BadRequestError, "unsupported_parameter", {"prediction": {"type": "content", "content": "a"}}),
        (
            openai.BadRequestError,
            "context_length_exceeded",
            {"messages": [{"role": "user", "content": "Hola " * 5000}]},
        ),
    ],
)
def test_errors(client: Any, error: Any, code: str, body: Any) -> None:
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 2, **body})
    assert raised.value.code == code
    assert raised.value.request_id


def test_refused_completion_parameters(client: Any) -> None:
    for body in ({"suffix": "x"}, {"best_of": 3}):
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model=MODEL, prompt="Hola", max_tokens=2, **body)
        assert raised.value.code == "unsupported_parameter"


def test_reported_parameters(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=HELLO, max_tokens=2, service_tier="auto", reasoning_effort="low", verbosity="low",
        prompt_cache_key="a", safety_identifier="b", metadata={"a": "b"}, modalities=["text"],
    )  # fmt: skip
    named = raw.headers["X-Criadero-Ignored"]
    for name in ("service_tier", "reasoning_effort", "verbosity", "prompt_cache_key", "safety_identifier", "metadata"):
        assert name in named
    assert raw.parse().choices


# --- a server that asks for a key, and lets it make 30 requests a minute ---

KEY = "a-key-of-this-test-alone"


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    words = ["--log", os.devnull, "--key", KEY, "--requests-per-minute", "30"]
    server = Path(__file__).resolve().parents[1] / "server.py"
    process = subprocess.Popen([os.environ["CRIADERO_PYTHON"], server, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip() + "/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_wrong_key(guarded: str) -> None:
    with (
        openai.OpenAI(base_url=guarded, api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError) as raised,
    ):
        client.models.list()
    assert raised.value.code == "invalid_api_key"


def test_too_many_requests_are_tried_again_when_the_server_says(guarded: str) -> None:
    body: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 2}
    with openai.OpenAI(base_url=guarded, api_key=KEY, max_retries=0) as client:
        for _ in range(30):
            client.chat.completions.create(**body)
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(**{**body, "max_tokens": 1})
        wait = float(raised.value.response.headers["retry-after"])
        assert raised.value.code == "rate_limit_exceeded"
        assert 1 <= wait <= 5
    with openai.OpenAI(base_url=guarded, api_key=KEY, max_retries=3) as client:
        began = time.monotonic()
        assert client.chat.completions.create(**body).choices
        assert time.monotonic() - began >= wait / 2
