"""Chat completions: with the openai package as a client, and what is refused or reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from serving import HELLO, MODEL, Live, events, serving, slow_steps

from criadero.engine.llm import LLM
from criadero.serve.settings import Limits, Settings
from criadero.serve.tools import CallReader, answer_grammar, closed, read_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Lima", "Quito"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 3},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(Settings(models=(MODEL,), ping_seconds=0.05)) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0, **more}
    )


def test_an_answer_is_the_engines(live: Live, client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=20)
    alone = LLM(MODEL).answer(HELLO, max_tokens=20)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.completion_tokens == len(alone.ids)
    assert answer.usage.prompt_tokens == alone.usage.prompt
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.criadero["context"]["limit"] == 512
    assert answer.criadero["context"]["used"] == answer.usage.total_tokens
    receipt = answer.criadero["receipt"]
    assert len(receipt["weights_sha256"]) == len(receipt["template_sha256"]) == 64
    assert receipt["build"]["runner"] == live.worker.llm.runner.name


def test_a_stream_gives_the_same(client: openai.OpenAI) -> None:
    whole = ask(client, n=2, temperature=1, seed=5)
    texts = ["", ""]
    reasons: dict[int, str] = {}
    ids = set()
    usage = None
    block = None
    for chunk in ask(client, n=2, temperature=1, seed=5, stream=True, stream_options={"include_usage": True}):
        ids.add(chunk.id)
        block = chunk.model_extra.get("criadero") or block
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(ids) == 1
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert block["seed"] == 5


def test_the_seed_that_was_drawn_gives_the_answer_again(client: openai.OpenAI) -> None:
    first = ask(client, temperature=1.0, max_tokens=30)
    again = ask(client, temperature=1.0, max_tokens=30, seed=first.criadero["seed"])
    assert again.choices[0].message.content == first.choices[0].message.content
    assert 0 <= first.criadero["seed"] < 2**53


def test_neighbours_change_nothing(live: Live, client: openai.OpenAI) -> None:
    def one(seed: int) -> str:
        return ask(client, temperature=1.0, max_tokens=24, seed=seed).choices[0].message.content

    alone = [one(seed) for seed in range(8)]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: one(seed)})) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(8)] == alone


def test_logprobs(live: Live, client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob for token in tokens)
    alone = LLM(MODEL).answer(HELLO, max_tokens=12, logprobs=3).samples[0].logprobs
    assert [token.logprob for token in tokens] == [one.logprob for one in alone]
    streamed = [
        token
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert streamed == tokens


def test_stop_ends_the_answer(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=30).choices[0].message.content
    stop = text.split()[2]
    cut = ask(client, max_tokens=30, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logit_bias_and_stop_ids(live: Live, client: openai.OpenAI) -> None:
    tokenizer = live.worker.llm.tokenizer
    (word,) = tokenizer.encode(" que")
    only = ask(client, logit_bias={str(word): 100}, max_tokens=3)
    assert only.choices[0].message.content == " que" * 3
    ended = ask(client, logit_bias={str(word): 100}, max_tokens=3, extra_body={"stop_token_ids": [word]})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].message.content == ""


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = ask(client, response_format=form, max_tokens=60, temperature=1, seed=1)
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=400, temperature=1, seed=3)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert answer.choices[0].message.content.startswith("{")


def test_parse_of_a_pydantic_class(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Animal(BaseModel):
        legs: int
        wool: bool

    form = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Animal, max_tokens=60, seed=2)
    assert isinstance(form.choices[0].message.parsed, Animal)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_has_to_be_made(client: openai.OpenAI, choice: Any) -> None:
    asked = {
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 1,
        "seed": 4,
    }
    answer = ask(client, **asked, max_tokens=120)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    names = {"weather": WEATHER["function"]["parameters"], "clock": {"type": "object", "maxProperties": 0}}
    jsonschema.validate(json.loads(call.function.arguments), names[call.function.name])
    if choice != "required":
        assert call.function.name == "weather"
    # the same, streamed
    parts: dict[int, dict[str, str]] = {}
    for chunk in ask(client, **asked, max_tokens=120, stream=True):
        for part in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            one = parts.setdefault(part.index, {"name": "", "arguments": "", "id": ""})
            one["name"] += part.function.name or ""
            one["arguments"] += part.function.arguments or ""
            one["id"] += part.id or ""
    assert parts[0]["name"] == call.function.name
    assert parts[0]["arguments"] == call.function.arguments
    assert parts[0]["id"].startswith("call_")


def test_a_round_trip_of_a_tool(client: openai.OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Lima", "days": 1}'},
    }
    messages = [
        {"role": "system", "content": "Eres breve."},
        {"role": "user", "content": "¿Llueve en Lima?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sol"},
    ]
    answer = ask(client, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.role == "assistant"
    assert not answer.criadero["ignored"]
    with pytest.raises(openai.BadRequestError, match="names no call") as caught:
        ask(client, messages=[*messages[:3], {"role": "tool", "tool_call_id": "other", "content": "sol"}])
    assert caught.value.param == "messages[3].tool_call_id"


def test_no_call_where_none_may_be_made(client: openai.OpenAI) -> None:
    with_none = ask(client, tools=[WEATHER], tool_choice="none")
    assert with_none.choices[0].message.content == ask(client).choices[0].message.content


def test_the_context_is_told_of(client: openai.OpenAI) -> None:
    long = [
        {"role": "system", "content": "Eres breve."},
        *[{"role": role, "content": f"{turn} " + "hola " * 40} for turn in range(8) for role in ("user", "assistant")],
        {"role": "user", "content": "¿Y ahora?"},
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message
    answer = ask(client, messages=long, extra_body={"truncate": "oldest"})
    context = answer.criadero["context"]
    assert context["policy"] == "oldest"
    assert context["dropped"] == list(range(1, 1 + context["dropped_messages"]))
    assert context["dropped_messages"] % 2 == 0
    assert 0 < context["dropped_messages"] < 16
    assert context["used"] <= context["limit"]
    kept = [long[0], *long[1 + context["dropped_messages"] :]]
    assert ask(client, messages=kept).choices[0].message.content == answer.choices[0].message.content
    # one turn less left out would not have had room for the answer
    one_more = [long[0], *long[context["dropped_messages"] - 1 :]]
    with pytest.raises(openai.BadRequestError):
        ask(client, messages=[*one_more[:-1], {"role": "user", "content": "hola " * 80}])
    full = ask(client, max_tokens=5000, extra_body={"ignore_eos": True})
    assert full.choices[0].finish_reason == "length"
    assert full.criadero["context"]["filled"]
    assert full.usage.total_tokens == 512


def test_what_has_no_effect_is_reported(live: Live) -> None:
    answer = live.chat(user="ana", service_tier="auto", messages=[{**HELLO[0], "name": "ana"}])
    assert answer.json()["criadero"]["ignored"] == ["user", "service_tier", "messages[0].name"]
    assert answer.headers["x-criadero-ignored"] == "user, service_tier, messages[0].name"
    assert "x-criadero-ignored" not in live.chat().headers


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}
ELSEWHERE = {"type": "function", "function": {"name": "x", "parameters": {"$ref": "file:///etc/passwd"}}}
REFUSED = [
    ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
    ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ({"functions": []}, "unsupported_parameter", "functions"),
    ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"chat_template": "{{ 1 }}"}, "unknown_parameter", "chat_template"),
    ({"temperature": "1"}, "invalid_type", "temperature"),
    ({"temperature": 3}, "out_of_range", "temperature"),
    ({"top_p": 0}, "out_of_range", "top_p"),
    ({"n": 0}, "out_of_range", "n"),
    ({"n": 10**9}, "out_of_range", "n"),
    ({"n": True}, "invalid_type", "n"),
    ({"max_tokens": 0}, "out_of_range", "max_tokens"),
    ({"max_tokens": -(2**63)}, "out_of_range", "max_tokens"),
    ({"max_tokens": 10**30}, "out_of_range", "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens"),
    ({"top_logprobs": 5}, "invalid_value", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "out_of_range", "top_logprobs"),
    ({"stop": ["a"] * 17}, "out_of_range", "stop"),
    ({"stop": "a" * 501}, "out_of_range", "stop"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "invalid_request", None),
    ({"logit_bias": {str(id): 1 for id in range(1025)}}, "out_of_range", "logit_bias"),
    ({"seed": 2**64}, "out_of_range", "seed"),
    ({"messages": []}, "out_of_range", "messages"),
    ({"messages": [{"role": "user"}]}, "missing_parameter", "messages[0].content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "unsupported_content", "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_request", None),
    ({"messages": [*HELLO, {"role": "system", "content": "late"}, *HELLO]}, "template_refused", "messages"),
    ({"messages": HELLO * 1001}, "out_of_range", "messages"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_tool", "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [CLOCK, CLOCK]}, "invalid_value", "tools[1].function.name"),
    ({"tools": [CLOCK], "tool_choice": "clock"}, "invalid_value", "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "invalid_value", "tool_choice"),
    ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    ({"tools": [CLOCK] * 65}, "out_of_range", "tools"),
    ({"tools": [ELSEWHERE], "tool_choice": "required"}, "invalid_grammar", "grammar"),
    ({"response_format": {"type": "json_schema"}}, "missing_parameter", "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "invalid_grammar", "json_schema"),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"regex": "("}, "invalid_grammar", "regex"),
    ({"regex": "a", "grammar": "start: \"a\""}, "invalid_request", None),
    ({"stream_options": {"include_usag": True}}, "unknown_parameter", "stream_options.include_usag"),
    ({"model": "cria-chta"}, "model_not_found", "model"),
    ({"model": "../../etc/passwd"}, "model_not_found", "model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "code", "param"), REFUSED, ids=[f"{i}-{code}" for i, (_, code, _) in enumerate(REFUSED)]
)
def test_what_is_refused(live: Live, given: dict[str, Any], code: str, param: str | None) -> None:
    for stream in (False, True):
        answer = live.chat(**{"stream": stream, **given})
        assert answer.status_code == (404 if code == "model_not_found" else 400), answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == (code, param), error
        assert "\n" not in error["message"]
        assert 5 < len(error["message"]) <= 1000
    assert live.worker.active == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{", "invalid_json"), ("", "invalid_type"), ("[]", "invalid_type"), ("3", "invalid_type"), ("null", "invalid_type"),
        ('{"messages": NaN}', "invalid_type"), ('{"temperature": 1e999, "messages": []}', None), ("[" * 100_000, None),
        ('{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}', None), ("\x00", "invalid_json"),
        ('{"seed": ' + "9" * 5000 + "}", None),
    ],
)  # fmt: skip
def test_bodies_that_are_none(live: Live, text: str, code: str | None) -> None:
    import httpx

    head = {"Content-Type": "application/json"}
    answer = httpx.post(live.url + "/v1/chat/completions", content=text.encode(), headers=head, timeout=30)
    assert answer.status_code in ((400,) if code else (200, 400)), answer.text
    if code and answer.json()["error"]["code"] != "missing_parameter":
        assert answer.json()["error"]["code"] == code


def test_pings_and_places_in_a_long_prefill(live: Live) -> None:
    with slow_steps(live.worker, 0.3):
        text = live.chat(stream=True, max_tokens=2).text
    assert text.startswith(": ping\n\n")
    assert events(text)[-1] == "[DONE]"


def test_an_error_in_the_middle_of_a_stream(live: Live, client: openai.OpenAI) -> None:
    runner = live.worker.llm.runner
    fast, count = runner.step, 0

    def step(batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("/etc/secret broke")
        return fast(batch)

    runner.step = step  # type: ignore[method-assign]
    try:
        with pytest.raises(openai.APIError, match="could not go on") as caught:
            list(ask(client, stream=True))
        assert "secret" not in str(caught.value)
        count = 0
        answer = live.chat()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "generation_failed"
    finally:
        runner.step = fast  # type: ignore[method-assign]
    assert ask(client).choices[0].message.content  # the engine lives
    assert live.worker.active == 0


def test_calls_are_read_from_any_pieces() -> None:
    first = '{"x": "}</tool_call>\\"", "y": [1, {"z": "{"}]}'
    text = f'<tool_call>{{"name": "a", "arguments": {first}}}</tool_call><tool_call>{{"name": "b", "arguments": {{}}}}</tool_call>'
    for size in (1, 2, 3, 7, 50, 1000):
        reader = CallReader()
        pieces = [
            piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])
        ] + reader.flush()
        assert not any(piece.text for piece in pieces)
        assert [call.name for call in reader.calls] == ["a", "b"]
        assert json.loads(reader.calls[0].arguments) == {"x": '}</tool_call>"', "y": [1, {"z": "{"}]}
        assert (
            "".join(piece.arguments for piece in pieces if piece.call is reader.calls[0]) == reader.calls[0].arguments
        )
    reader = CallReader()
    words = "".join(piece.text for letter in "<tool is a word" for piece in reader.push(letter))
    assert words + "".join(piece.text for piece in reader.flush()) == "<tool is a word"


def test_references_inside_a_tools_schema(live: Live) -> None:
    schema = {
        "type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "required": ["tree"], "additionalProperties": False,
        "$defs": {"node": {"enum": ["leaf", "root"]}},
    }  # fmt: skip
    tools = read_tools(
        [{"type": "function", "function": {"name": "grow", "parameters": schema}}], "required", False, Limits()
    )
    assert tools is not None
    result = live.post(
        "/v1/chat/completions",
        {"messages": HELLO, "grammar": answer_grammar(tools), "max_tokens": 80, "temperature": 1, "seed": 0},
    ).json()
    reader = CallReader()
    reader.push(result["choices"][0]["message"]["content"])
    assert json.loads(reader.calls[0].arguments)["tree"] in ("leaf", "root")


def test_null_is_no_model(live: Live) -> None:
    assert live.chat(model=None).json()["model"] == live.chat(model="").json()["model"] == MODEL


def test_system_messages_after_each_other_are_one(live: Live) -> None:
    two = [{"role": "system", "content": "Sé breve."}, {"role": "developer", "content": "Y amable."}]
    one = [{"role": "system", "content": "Sé breve.\n\nY amable."}]
    first, second = (live.chat(messages=[*head, *HELLO]).json() for head in (two, one))
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_an_object_with_listed_properties_has_no_others(live: Live) -> None:
    """Nor goes a small model on inventing them; what says that it may have others, or is put together, is left as it is."""
    pair = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a"]}
    inner = {"anyOf": [pair, {"type": "null"}], "items": pair, "$defs": {"x": pair}, "properties": {"y": pair}}
    assert closed(pair) == {**pair, "additionalProperties": False}
    found = closed(inner)
    assert found["anyOf"][0] == found["items"] == found["$defs"]["x"] == found["properties"]["y"] == closed(pair)
    for more in (
        {"additionalProperties": True},
        {"patternProperties": {"z": {}}},
        {"required": ["c"]},
        {"required": [[1]]},
    ):
        assert closed({**pair, **more}) == {**pair, **more}
    assert closed({"allOf": [pair, {"properties": {"c": pair}}]})["allOf"][0] == pair
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": {**pair, "required": ["a", "b"]}}}
    for seed in range(5):
        text = live.chat(response_format=form, max_tokens=40, temperature=1, seed=seed).json()
        assert json.loads(text["choices"][0]["message"]["content"]).keys() == {"a", "b"}
