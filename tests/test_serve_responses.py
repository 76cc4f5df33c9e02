"""/v1/responses, with OpenAI's own client: whole and streamed, kept and gone on from, functions, JSON, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import serving

from criadero.serve.keys import hash_key, new_key
from criadero.serve.settings import Settings
from criadero.serve.store import Store, open_store

WEATHER = {
    "type": "function", "name": "weather", "description": "The weather in a town.", "strict": True,
    "parameters": {
        "type": "object", "properties": {"town": {"enum": ["Lugo", "Soria"]}}, "required": ["town"], "additionalProperties": False,
    },
}  # fmt: skip
SHORT = {"model": "cria-chat", "max_output_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = open_store(tmp_path_factory.mktemp("responses") / "criadero.db")
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(store: Store) -> Iterator[serving.Live]:
    with serving.serving(Settings(require_key=True), store=store) as made:
        yield made


def client(live: serving.Live, store: Store, owner: str) -> openai.OpenAI:
    secret = new_key()
    store.add_key(hash_key(secret), name=owner, hint=secret[-4:], owner=owner)
    return openai.OpenAI(
        base_url=f"{live.url}/v1", api_key=secret, max_retries=0, timeout=60, _strict_response_validation=True
    )


@pytest.fixture(scope="module")
def ana(live: serving.Live, store: Store) -> openai.OpenAI:
    return client(live, store, "ana")


@pytest.fixture(scope="module")
def eva(live: serving.Live, store: Store) -> openai.OpenAI:
    return client(live, store, "eva")


def post(live: serving.Live, ana: openai.OpenAI, body: dict[str, Any], path: str = "/v1/responses") -> httpx.Response:
    return live.post(path, body, headers={"Authorization": f"Bearer {ana.api_key}"})


def test_a_response_is_the_chats_answer(live: serving.Live, ana: openai.OpenAI) -> None:
    made = ana.responses.create(input="Hola, ¿quién eres?", instructions="Sé breve.", **SHORT)
    messages = [{"role": "system", "content": "Sé breve."}, {"role": "user", "content": "Hola, ¿quién eres?"}]
    chat: Any = ana.chat.completions.create(model="cria-chat", messages=messages, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    assert made.output_text == chat.choices[0].message.content
    assert made.usage
    assert (made.usage.input_tokens, made.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    if chat.choices[0].finish_reason == "length":
        assert (made.status, made.incomplete_details and made.incomplete_details.reason) == (
            "incomplete",
            "max_output_tokens",
        )
    else:
        assert (made.status, made.incomplete_details) == ("completed", None)
    assert made.id.startswith("resp_")
    assert made.output[0].id.startswith("msg_")  # type: ignore[union-attr]
    block = made.to_dict()["criadero"]
    assert isinstance(block, dict)
    assert block["context"]["limit"] > 0


def test_all_that_is_said_of_a_response_is_there(live: serving.Live, ana: openai.OpenAI) -> None:
    body = {
        **SHORT, "input": "Hola", "metadata": {"a": "b"}, "top_p": 0.5, "truncation": "auto", "seed": 4, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "user": "u", "reasoning": {"effort": "low"}, "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"], "top_logprobs": 2, "temperature": 0.5,
    }  # fmt: skip
    found = post(live, ana, body).json()
    # what the Open Responses specification wants to be there and not null
    for name in (
        "temperature", "top_p", "tool_choice", "truncation", "background", "presence_penalty", "frequency_penalty", "top_logprobs",
        "tools", "parallel_tool_calls", "store", "service_tier", "text", "metadata", "reasoning", "usage", "output", "created_at",
    ):  # fmt: skip
        assert found[name] is not None, name
    assert {name: found[name] for name in ("metadata", "top_p", "truncation", "presence_penalty", "store", "user")} == {
        "metadata": {"a": "b"}, "top_p": 0.5, "truncation": "auto", "presence_penalty": 0.5, "store": True, "user": "u"
    }  # fmt: skip
    assert set(found["criadero"]["ignored"]) == {
        "user",
        "reasoning",
        "text.verbosity",
        "include.reasoning.encrypted_content",
    }
    assert found["criadero"]["seed"] == 4
    part = found["output"][0]["content"][0]
    assert len(part["logprobs"]) >= 1
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])


ORDER = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done", "response.output_item.done",
]  # fmt: skip


def test_a_stream_has_openais_order_and_ends_as_the_whole(ana: openai.OpenAI) -> None:
    whole = ana.responses.create(input="Hola", include=["message.output_text.logprobs"], **SHORT)
    with ana.responses.create(input="Hola", include=["message.output_text.logprobs"], stream=True, **SHORT) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]] == [*ORDER, f"response.{whole.status}"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    done: Any = events[-1]
    assert done.response.output_text == text
    assert done.response.output[0].content[0].logprobs == whole.output[0].content[0].logprobs  # type: ignore[union-attr]
    told: list[Any] = []
    for event in events:
        if event.type == "response.output_text.delta":
            told += event.logprobs
    assert [one.token for one in told] == [one.token for one in done.response.output[0].content[0].logprobs][
        : len(told)
    ]
    assert ana.responses.retrieve(done.response.id).to_dict() == done.response.to_dict()


def test_the_clients_own_stream_helper_follows(ana: openai.OpenAI) -> None:
    with ana.responses.stream(input="Hola", **SHORT) as stream:  # it rebuilds the response from the events, strictly
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == ana.responses.create(input="Hola", **SHORT).output_text


def test_a_kept_response_is_gone_on_from(ana: openai.OpenAI) -> None:
    one = ana.responses.create(input="Hola", instructions="Sé breve.", **SHORT)
    two = ana.responses.create(input="¿Y tú?", previous_response_id=one.id, **SHORT)
    three = ana.responses.create(input="¿Por qué?", previous_response_id=two.id, **SHORT)
    by_hand: Any = [
        {"role": "user", "content": "Hola"}, {"role": "assistant", "content": one.output_text}, {"role": "user", "content": "¿Y tú?"},
        {"role": "assistant", "content": two.output_text}, {"role": "user", "content": "¿Por qué?"},
    ]  # fmt: skip
    again = ana.responses.create(input=by_hand, store=False, **SHORT)
    assert again.output_text == three.output_text
    items = list(ana.responses.input_items.list(three.id, order="asc", limit=2))  # the client fetches page after page
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts == ["Hola", one.output_text, "¿Y tú?", two.output_text, "¿Por qué?"]
    assert [item.id for item in ana.responses.input_items.list(three.id)] == [item.id for item in items][::-1]


def test_what_is_not_to_be_kept_is_not(ana: openai.OpenAI, store: Store) -> None:
    made = ana.responses.create(input="Berenjena", store=False, **SHORT)
    assert made.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError) as caught:
        ana.responses.retrieve(made.id)
    assert caught.value.code == "response_not_found"
    assert "Berenjena" not in str(store.export("ana"))
    with pytest.raises(openai.BadRequestError) as refused:
        ana.responses.create(input="x", previous_response_id=made.id, **SHORT)
    assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_deleted_response_is_gone_with_its_receipt(ana: openai.OpenAI, store: Store) -> None:
    made = ana.responses.create(input="Zanahoria-5512", **SHORT)
    block: Any = made.to_dict()["criadero"]
    receipt = store.receipt("ana", block["receipt"]["id"])
    assert receipt
    assert receipt["prompt_ids"]
    assert "Zanahoria-5512" in str(store.export("ana")["responses"])
    ana.responses.delete(made.id)
    assert "Zanahoria-5512" not in str(store.export("ana"))
    assert store.receipt("ana", receipt["id"]) is None


def test_nothing_of_ana_is_evas(ana: openai.OpenAI, eva: openai.OpenAI) -> None:
    """S12: responses of others."""
    made = ana.responses.create(input="Hola", **SHORT)
    for call in (eva.responses.retrieve, eva.responses.delete, eva.responses.cancel, eva.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    with pytest.raises(openai.BadRequestError):
        eva.responses.create(input="x", previous_response_id=made.id, **SHORT)
    assert ana.responses.retrieve(made.id).id == made.id


def test_a_function_is_called_and_its_result_is_taken(ana: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "cria-chat", "tools": [WEATHER], "temperature": 0, "max_output_tokens": 60}
    made = ana.responses.create(input="Llueve en Lugo?", tool_choice="required", parallel_tool_calls=False, **ask)
    (call,) = made.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["town"] in ("Lugo", "Soria")
    assert (made.status, call.status) == ("completed", "completed")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    after = ana.responses.create(input=[result], previous_response_id=made.id, tool_choice="none", **ask)
    assert after.output[0].type == "message"
    by_hand: Any = [{"role": "user", "content": "Llueve en Lugo?"}, call.to_dict(), result]
    assert ana.responses.create(input=by_hand, tool_choice="none", **ask).output_text == after.output_text
    with ana.responses.create(
        input="Llueve en Lugo?", tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False, stream=True, **ask
    ) as stream:  # fmt: skip
        events = list(stream)
    kinds = [event.type for event in events]
    assert [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert arguments == call.arguments
    with ana.responses.stream(
        input="Llueve en Lugo?", tool_choice="required", parallel_tool_calls=False, **ask
    ) as helper:
        assert helper.until_done().get_final_response().output[0].arguments == arguments  # type: ignore[union-attr]


def test_json_of_a_schema(ana: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form: Any = {"format": {"type": "json_schema", "name": "verdict", "schema": schema, "strict": True}}
    made = ana.responses.create(input="¿Sí?", text=form, model="cria-chat", temperature=0, max_output_tokens=40)
    assert set(json.loads(made.output_text)) == {"ok"}
    assert made.to_dict()["text"] == form


def test_input_tokens_are_counted(ana: openai.OpenAI) -> None:
    made = ana.responses.create(input="Hola", instructions="Sé breve.", **SHORT)
    counted = ana.responses.input_tokens.count(model="cria-chat", input="Hola", instructions="Sé breve.")
    assert made.usage
    assert counted.input_tokens == made.usage.input_tokens


def test_who_leaves_frees_the_slot_and_keeps_nothing(live: serving.Live, ana: openai.OpenAI, store: Store) -> None:
    before = len(store.export("ana")["responses"])
    with serving.slow_steps(live.worker, 0.02):
        body = {"model": "cria-chat", "input": "Hola", "max_output_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{live.url}/v1/responses", json=body, headers={"Authorization": f"Bearer {ana.api_key}"}
        ) as response:
            for name, _ in serving.streamed(response):
                if name == "response.output_text.delta":
                    break
        serving.wait_for(lambda: live.worker.active == 0)
    assert len(store.export("ana")["responses"]) == before


def test_a_database_that_is_full_costs_the_answer_nothing(
    live: serving.Live, ana: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from criadero.serve.store import StoreError

    def full(*_: Any, **__: Any) -> None:
        raise StoreError("database_full", "the disk that the database lies on is full")

    monkeypatch.setattr(Store, "add_response", full)
    made: Any = ana.responses.create(input="Hola", **SHORT).to_dict()
    assert made["output"][0]["content"][0]["text"]
    assert made["store"] is False
    assert made["criadero"]["not_kept"]["code"] == "database_full"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "input"),
        ({"input": []}, "out_of_range", "input"),
        ({"input": [{"role": "user"}]}, "missing_parameter", "input[0].content"),
        ({"input": [{"content": "x"}]}, "missing_parameter", "input[0].role"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content", "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
            "unsupported_content", "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "invalid_value", "input[0].call_id"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "missing_parameter", "input[0].call_id"),
        ({"input": "x", "background": True}, "unsupported_parameter", "background"),
        ({"input": "x", "conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "unsupported_parameter", "prompt"),
        ({"input": "x", "n": 2}, "out_of_range", "n"),
        ({"input": "x", "max_tokens": 5}, "unknown_parameter", "max_tokens"),
        ({"input": "x", "max_output_tokens": 0}, "out_of_range", "max_output_tokens"),
        ({"input": "x", "top_logprobs": 21}, "out_of_range", "top_logprobs"),
        ({"input": "x", "include": ["everything"]}, "invalid_value", "include[0]"),
        ({"input": "x", "metadata": {str(n): "x" for n in range(17)}}, "out_of_range", "metadata"),
        ({"input": "x", "metadata": {"k": 1}}, "invalid_type", "metadata.k"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "unsupported_tool", "tools[0]"),
        ({"input": "x", "tools": [{"type": "function", "name": "a b"}]}, "invalid_value", "tools[0].name"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "missing_parameter", "text.format.schema"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}},
            "invalid_grammar", "json_schema",
        ),
        ({"input": "palabra " * 3000, "truncation": "disabled"}, "context_length_exceeded", "messages"),
        ({"input": "x", "previous_response_id": "resp_0"}, "previous_response_not_found", "previous_response_id"),
        ({"input": "x", "previous_response_id": "../\0"}, "previous_response_not_found", "previous_response_id"),
        ({"input": "x", "model": "gpt-4o"}, "model_not_found", "model"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_parameter(
    live: serving.Live, ana: openai.OpenAI, body: dict[str, Any], code: str, param: str
) -> None:
    response = post(live, ana, {"model": "cria-chat", **body})
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    assert (error["code"], error["param"]) == (code, param)


def test_without_a_database_nothing_is_kept_and_nothing_is_lost() -> None:
    with serving.serving() as live:
        body = {"model": "cria-chat", "input": "Hola", "max_output_tokens": 4}
        found = live.post("/v1/responses", body).json()
        assert found["store"] is False
        assert found["output"]
        for refused in (
            live.post("/v1/responses", {**body, "store": True}),
            live.get(f"/v1/responses/{found['id']}"),
            live.post("/v1/responses", {**body, "previous_response_id": found["id"]}),
            live.get("/api/chats"),
        ):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "no_database"


def test_the_receipt_can_be_replayed(live: serving.Live, ana: openai.OpenAI, store: Store, tmp_path: Path) -> None:
    from criadero.serve.replay import replay

    made = ana.responses.create(input="Hola", model="cria-chat", max_output_tokens=12, temperature=1.0)
    block: Any = made.to_dict()["criadero"]
    receipt = store.any_receipt(block["receipt"]["id"])
    assert receipt
    again = replay(receipt)
    assert again.same
    assert again.texts == [made.output_text]
    assert again.differs == []
