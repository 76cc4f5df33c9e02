"""/v1/messages, with Anthropic's own client: whole and streamed, tools, counting, and what is refused in its shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
import serving

from criadero.serve.keys import hash_key, new_key
from criadero.serve.settings import Settings

KEY = new_key()
WEATHER: Any = {
    "name": "weather", "description": "The weather in a town.",
    "input_schema": {
        "type": "object", "properties": {"town": {"enum": ["Lugo", "Soria"]}}, "required": ["town"], "additionalProperties": False,
    },
}  # fmt: skip
BODY: dict[str, Any] = {"model": "cria-chat", "max_tokens": 8, "temperature": 0}
# newer clients know no temperature: those who want one put it into the body themselves
SHORT: dict[str, Any] = {"model": "cria-chat", "max_tokens": 8, "extra_body": {"temperature": 0}}
HOLA: Any = [{"role": "user", "content": "Hola, ¿quién eres?"}]


@pytest.fixture(scope="module")
def live() -> Iterator[serving.Live]:
    with serving.serving(Settings(require_key=True, key_hashes=(hash_key(KEY),))) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: serving.Live) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=live.url, api_key=KEY, max_retries=0, timeout=60, _strict_response_validation=True
    )


def chat(live: serving.Live, messages: Any, **more: Any) -> dict[str, Any]:
    """What the other API says to the same."""
    body = {"model": "cria-chat", "messages": messages, "max_tokens": 8, "temperature": 0, **more}
    found: dict[str, Any] = live.post("/v1/chat/completions", body, headers={"x-api-key": KEY}).json()
    return found


def test_a_message_is_the_chats_answer(live: serving.Live, client: anthropic.Anthropic) -> None:
    made = client.messages.create(system="Sé breve.", messages=HOLA, **SHORT)
    other = chat(live, [{"role": "system", "content": "Sé breve."}, *HOLA])
    assert made.content[0].type == "text"
    assert made.content[0].text == other["choices"][0]["message"]["content"]
    assert made.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[other["choices"][0]["finish_reason"]]
    assert made.usage.cache_read_input_tokens is not None
    assert made.usage.input_tokens + made.usage.cache_read_input_tokens == other["usage"]["prompt_tokens"]
    assert made.usage.output_tokens == other["usage"]["completion_tokens"]
    block: Any = made.to_dict()["criadero"]
    assert block["context"]["limit"] > 0
    counted = client.messages.count_tokens(model="cria-chat", system="Sé breve.", messages=HOLA)
    assert counted.input_tokens == other["usage"]["prompt_tokens"]


def test_blocks_are_read_as_their_text(live: serving.Live, client: anthropic.Anthropic) -> None:
    plain = client.messages.create(system="Sé breve.", messages=HOLA, **SHORT)
    blocks: Any = [{"type": "text", "text": "Hola, "}, {"type": "text", "text": "¿quién eres?"}]
    system: Any = [{"type": "text", "text": "Sé breve.", "cache_control": {"type": "ephemeral"}}]
    made = client.messages.create(system=system, messages=[{"role": "user", "content": blocks}], **SHORT)
    assert made.content == plain.content
    block: Any = made.to_dict()["criadero"]
    assert block["ignored"] == ["system[0].cache_control"]


def test_turns_of_one_role_are_one(live: serving.Live, client: anthropic.Anthropic) -> None:
    two: Any = [{"role": "user", "content": "Hola."}, {"role": "user", "content": "¿Quién eres?"}]
    one: Any = [{"role": "user", "content": "Hola.\n\n¿Quién eres?"}]
    assert (
        client.messages.create(messages=two, **SHORT).content == client.messages.create(messages=one, **SHORT).content
    )


def test_a_stream_has_anthropics_order_and_ends_as_the_whole(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(messages=HOLA, **SHORT)
    events = list(client.messages.create(messages=HOLA, stream=True, **SHORT))
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]] == [
        "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert kinds.count("message_stop") == kinds.count("content_block_start") == 1
    with client.messages.stream(messages=HOLA, **SHORT) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.content[0].type == "text"
    assert final.content[0].text == text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_stop_sequences_are_named(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(messages=HOLA, **(SHORT | {"max_tokens": 40}))
    assert whole.content[0].type == "text"
    stop = whole.content[0].text[4:8]
    made = client.messages.create(messages=HOLA, stop_sequences=[stop], **(SHORT | {"max_tokens": 40}))
    assert made.content[0].type == "text"
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", stop)
    assert made.content[0].text == whole.content[0].text.split(stop)[0]
    with client.messages.stream(messages=HOLA, stop_sequences=[stop], **(SHORT | {"max_tokens": 40})) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)


def test_a_seed_and_the_samplers(client: anthropic.Anthropic) -> None:
    more: dict[str, Any] = {"extra_body": {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 7}}
    one, two = (client.messages.create(messages=HOLA, **(SHORT | more)).content for _ in range(2))
    assert one == two


def test_a_tool_is_called_and_its_result_is_taken(live: serving.Live, client: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {**SHORT, "max_tokens": 60, "tools": [WEATHER]}
    question: Any = [{"role": "user", "content": "¿Llueve en Lugo?"}]
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    made = client.messages.create(messages=question, tool_choice=choice, **ask)
    assert made.stop_reason == "tool_use"
    (call,) = made.content
    assert call.type == "tool_use"
    assert call.name == "weather"
    assert call.id.startswith("toolu_")
    assert call.input["town"] in ("Lugo", "Soria")
    named: Any = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    with client.messages.stream(messages=question, tool_choice=named, **ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds  # the helper's own event of a piece of the arguments
    assert final.stop_reason == "tool_use"
    assert final.content[0].type == "tool_use"
    assert final.content[0].input == call.input
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It rains."}]}
    messages: Any = [
        *question, {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [result, {"type": "text", "text": "Thanks."}]},
    ]  # fmt: skip
    after = client.messages.create(messages=messages, tool_choice={"type": "none"}, **ask)
    other = chat(
        live,
        [
            *question,
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "weather", "arguments": json.dumps(call.input)}}
            ]},
            {"role": "tool", "tool_call_id": "x", "content": "It rains."}, {"role": "user", "content": "Thanks."},
        ],
        max_tokens=60,
    )  # fmt: skip
    assert after.content[0].type == "text"
    assert after.content[0].text == other["choices"][0]["message"]["content"]
    with_tools = client.messages.count_tokens(model="cria-chat", messages=question, tools=[WEATHER])
    assert with_tools.input_tokens > client.messages.count_tokens(model="cria-chat", messages=question).input_tokens


def test_models_are_listed_in_anthropics_words(client: anthropic.Anthropic) -> None:
    [listed] = client.models.list()
    assert (listed.id, listed.type, listed.lifecycle) == ("cria-chat", "model", "active")
    assert client.models.retrieve("cria-chat") == listed
    assert listed.max_input_tokens == 512


def test_json_of_a_schema(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    made = client.messages.create(messages=HOLA, output_config=config, **(SHORT | {"max_tokens": 40}))
    assert made.content[0].type == "text"
    assert set(json.loads(made.content[0].text)) == {"ok"}


def test_a_call_that_is_cut_off_says_so(client: anthropic.Anthropic) -> None:
    long: Any = {
        "name": "note",
        "input_schema": {"type": "object", "properties": {"text": {"type": "string", "minLength": 500}}, "required": ["text"]},
    }  # fmt: skip
    made = client.messages.create(
        messages=HOLA, tools=[long], tool_choice={"type": "any"}, **(SHORT | {"max_tokens": 40})
    )
    assert made.stop_reason == "max_tokens"


def test_who_leaves_frees_the_slot(live: serving.Live, client: anthropic.Anthropic) -> None:
    with serving.slow_steps(live.worker, 0.02):
        with client.messages.stream(
            messages=HOLA, **(SHORT | {"max_tokens": 300, "extra_body": {"temperature": 1.0}})
        ) as stream:
            next(iter(stream.text_stream))
        serving.wait_for(lambda: live.worker.active == 0)


def test_a_failure_in_the_middle_is_an_error_event(live: serving.Live, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = live.worker.llm.runner
    step, count = runner.step, [0]

    def fails(batch: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise RuntimeError("/secret/path broke")
        return step(batch)

    monkeypatch.setattr(runner, "step", fails)
    body = {**BODY, "messages": HOLA, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=60) as response:
        found = list(serving.streamed(response))
    assert found[0][0] == "message_start"
    name, data = found[-1]
    assert name == "error"
    assert (data["type"], data["error"]["type"]) == ("error", "api_error")
    assert "/secret" not in json.dumps(data)
    monkeypatch.undo()
    assert live.post("/v1/messages", {**BODY, "messages": HOLA}, headers={"x-api-key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"max_tokens": None}, "invalid_type", "max_tokens"),
        ({"messages": []}, "out_of_range", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [*HOLA, {"role": "assistant", "content": "I"}]}, "unsupported_content", "messages[1].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
            "unsupported_content", "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]},
            "invalid_value", "messages[0].content[0].tool_use_id",
        ),
        ({"temperature": 3}, "out_of_range", "temperature"),
        ({"stop_sequences": [""]}, "out_of_range", "stop_sequences[0]"),
        ({"n": 2}, "unknown_parameter", "n"),
        ({"mcp_servers": [{"type": "url"}]}, "unsupported_parameter", "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "unsupported_tool", "tools[0]"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "invalid_value", "tools[0].name"),
        ({"tools": [{"name": "a", "input_schema": 1}]}, "invalid_type", "tools[0].input_schema"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}}, "invalid_value", "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "maybe"}}, "invalid_value", "tool_choice.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "missing_parameter", "output_config.format.schema"),
        ({"messages": [{"role": "user", "content": "palabra " * 3000}]}, "context_length_exceeded", "messages"),
        ({"model": "claude"}, "model_not_found", "model"),
    ],
)  # fmt: skip
def test_what_is_refused_has_anthropics_shape(live: serving.Live, body: dict[str, Any], code: str, param: str) -> None:
    given = {**BODY, "messages": HOLA, **body}
    response = live.post("/v1/messages", given, headers={"x-api-key": KEY, "anthropic-version": "2023-06-01"})
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    found = response.json()
    assert found["type"] == "error"
    assert found["request_id"] == response.headers["x-request-id"]
    assert (found["error"]["code"], found["error"]["param"]) == (code, param)
    assert found["error"]["type"] == ("not_found_error" if code == "model_not_found" else "invalid_request_error")


def test_without_a_key_it_is_refused_in_its_shape(live: serving.Live) -> None:
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0).messages.create(messages=HOLA, **SHORT)
    assert live.post("/v1/messages/count_tokens", {}).json()["error"]["type"] == "authentication_error"
