"""The anthropic package against a running server, as programs use it; run by tools/conformance/run.py in an environment of its own."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import anthropic
import pytest

URL = os.environ["CRIADERO_URL"]
MODEL = "cria-chat"
HELLO: list[Any] = [{"role": "user", "content": "Hola, ¿quién eres?"}]
WEATHER: list[Any] = [
    {
        "name": "weather", "description": "The weather of a city",
        "input_schema": {
            "type": "object", "properties": {"city": {"enum": ["Madrid", "Lima"]}}, "required": ["city"],
            "additionalProperties": False,
        },
    }
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Any:
    with anthropic.Anthropic(base_url=URL, api_key="none", _strict_response_validation=True) as made:
        yield made


def test_message(client: Any) -> None:
    answer = client.messages.create(
        model=MODEL, messages=HELLO, max_tokens=12, system="Be brief.", stop_sequences=["###"], metadata={"user_id": "ana"},
        service_tier="auto", extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 1, "user_profile_id": "ana",
                    "workspace_id": "w", "inference_geo": "eu"},
    )  # fmt: skip
    assert answer.content[0].text
    assert answer.usage.output_tokens <= 12
    assert answer.stop_reason in ("end_turn", "max_tokens", "stop_sequence")


def test_stream_is_the_same_text(client: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "extra_body": {"temperature": 0}}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_raw_stream(client: Any) -> None:
    kinds = [one.type for one in client.messages.create(model=MODEL, messages=HELLO, max_tokens=6, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=["any", "tool"])
def test_tools_round_trip(client: Any, choice: Any) -> None:
    first = client.messages.create(
        model=MODEL, messages=HELLO, tools=WEATHER, tool_choice={**choice, "disable_parallel_tool_use": True}, max_tokens=60
    )  # fmt: skip
    [use] = [one for one in first.content if one.type == "tool_use"]
    assert first.stop_reason == "tool_use"
    assert use.input["city"] in ("Madrid", "Lima")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    second = client.messages.create(
        model=MODEL, messages=[*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}],
        tools=WEATHER, tool_choice={"type": "none"}, max_tokens=12,
    )  # fmt: skip
    assert second.content


def test_tools_streamed(client: Any) -> None:
    with client.messages.stream(
        model=MODEL, messages=HELLO, tools=WEATHER, tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=60
    ) as stream:  # fmt: skip
        final = stream.get_final_message()
    [use] = [one for one in final.content if one.type == "tool_use"]
    assert use.input["city"] in ("Madrid", "Lima")


def test_count_tokens(client: Any) -> None:
    count = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    assert count == client.messages.create(model=MODEL, messages=HELLO, max_tokens=1).usage.input_tokens


def test_models(client: Any) -> None:
    assert MODEL in [one.id for one in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_async() -> None:
    async def ask() -> Any:
        async with anthropic.AsyncAnthropic(base_url=URL, api_key="none", _strict_response_validation=True) as client:
            return await client.messages.create(model=MODEL, messages=HELLO, max_tokens=4)

    assert asyncio.run(ask()).content


@pytest.mark.parametrize(
    ("error", "kind", "body"),
    [
        (anthropic.NotFoundError, "not_found_error", {"model": "nobody"}),
        (anthropic.BadRequestError, "invalid_request_error", {"max_tokens": -1}),
        (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"temperature": 3}}),
        (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"temprature": 1}}),
        (anthropic.BadRequestError, "invalid_request_error", {"extra_body": {"mcp_servers": [{"type": "url", "url": "x", "name": "x"}]}}),
        (anthropic.BadRequestError, "invalid_request_error", {"messages": [{"role": "user", "content": "Hola " * 5000}]}),
    ],
)  # fmt: skip
def test_errors(client: Any, error: Any, kind: str, body: Any) -> None:
    with pytest.raises(error) as raised:
        client.messages.create(**{"model": MODEL, "messages": HELLO, "max_tokens": 2, **body})
    assert raised.value.body["error"]["type"] == kind
