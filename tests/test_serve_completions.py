"""Completions, embeddings and tokenize: against the engine, and with the openai package as a client."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from serving import MODEL, Live, events, serving

from criadero.engine.llm import LLM
from criadero.serve.settings import Settings

TEXT = "Había una vez una llama"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(Settings(models=(MODEL,))) as made:
        yield made


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL)


def complete(live: Live, **more: Any) -> Any:
    answer = live.post("/v1/completions", {"model": MODEL, "temperature": 0, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_completion_is_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(model=MODEL, prompt=TEXT, temperature=0)
    alone = llm.complete(TEXT, max_tokens=16)
    assert answer.choices[0].text == alone.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(alone.ids)


def test_prompts_of_four_shapes(live: Live, llm: LLM) -> None:
    ids = llm.ids(TEXT)
    one = complete(live, prompt=TEXT)["choices"][0]["text"]
    assert complete(live, prompt=ids)["choices"][0]["text"] == one
    assert complete(live, prompt=[TEXT, "Hola"])["choices"][0]["text"] == one
    many = complete(live, prompt=[ids, llm.ids("Hola")], n=2, temperature=1, seed=3)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert len(many["criadero"]["each"]) == 2
    texts = ["", "", "", ""]
    stream = live.post(
        "/v1/completions", {"prompt": [ids, llm.ids("Hola")], "n": 2, "temperature": 1, "seed": 3, "stream": True}
    ).text
    found = events(stream)
    assert found[-1] == "[DONE]"
    for event in found[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in many["choices"]]
    assert sum("criadero" in event for event in found[:-1]) == 1


def test_a_batch_is_one_request(live: Live) -> None:
    """128 prompts may come at once (limit prompts), although 64 answers may wait (limit queue): they are one request in the line."""
    answer = complete(live, prompt=[[5, 6, 7]] * 128, max_tokens=2)
    assert len(answer["choices"]) == 128
    assert len({choice["text"] for choice in answer["choices"]}) == 1


def test_logprobs_of_prompt_and_answer(live: Live, llm: LLM) -> None:
    answer = complete(live, prompt=TEXT, echo=True, logprobs=2, max_tokens=4)
    choice, ids = answer["choices"][0], llm.ids(TEXT)
    known = llm.logprobs([TEXT], top=2)[0]
    more = llm.complete(TEXT, max_tokens=4, logprobs=2).samples[0].logprobs or []
    lists = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert lists["token_logprobs"] == [None, *(one.logprob for one in [*known[1:], *more] if one)]
    assert len(lists["tokens"]) == len(lists["text_offset"]) == len(lists["top_logprobs"]) == len(ids) + 4
    # every token stands where it says, BOS nowhere
    for token, start in list(zip(lists["tokens"], lists["text_offset"], strict=True))[1:]:
        assert choice["text"].startswith(token, start)
    streamed: dict[str, list[Any]] = {name: [] for name in lists}
    text = live.post(
        "/v1/completions",
        {"prompt": TEXT, "temperature": 0, "echo": True, "logprobs": 2, "max_tokens": 4, "stream": True},
    ).text
    for event in events(text)[:-1]:
        for part in event["choices"]:
            for name, values in (part["logprobs"] or {}).items():
                streamed[name] += values
    assert streamed == lists


def test_the_token_that_ends_an_answer_closes_its_logprobs(live: Live, llm: LLM) -> None:
    """lm-eval scores a prompt by echo, asks for one token more, and leaves the last one out: there has to be one."""
    ids = llm.ids(TEXT)
    asked = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 4, "temperature": 0}
    [first, *_] = llm.complete(TEXT, max_tokens=4, logprobs=1).samples[0].logprobs or []
    ended = complete(live, **asked, stop_token_ids=[first.id])
    lists = ended["choices"][0]["logprobs"]
    assert ended["usage"]["completion_tokens"] == 0
    assert lists["token_logprobs"][len(ids) :] == [first.logprob]
    assert {len(values) for values in lists.values()} == {len(ids) + 1}
    streamed: dict[str, list[Any]] = {name: [] for name in lists}
    stream = live.post("/v1/completions", {**asked, "stop_token_ids": [first.id], "stream": True}).text
    for event in events(stream)[:-1]:
        for part in event["choices"]:
            for name, values in (part["logprobs"] or {}).items():
                streamed[name] += values
    assert streamed == lists


def test_a_prompt_scored_alone(live: Live, llm: LLM) -> None:
    """What lm-eval asks for: token ids in, log-probabilities of the prompt out, nothing generated."""
    ids = llm.ids(TEXT)
    answer = complete(live, prompt=[ids], echo=True, logprobs=1, max_tokens=0)
    lists = answer["choices"][0]["logprobs"]
    assert lists["token_logprobs"][1:] == [one.logprob for one in llm.logprobs([ids], top=1)[0][1:] if one]
    assert len(lists["tokens"]) == len(ids)
    assert answer["usage"]["completion_tokens"] == 0
    assert live.post("/v1/completions", {"prompt": TEXT, "max_tokens": 0}).json()["error"]["param"] == "max_tokens"


def test_half_characters_have_names_of_their_own(live: Live, llm: LLM) -> None:
    ids = llm.ids("🦙")
    tokens = complete(live, prompt=[ids], echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]["tokens"]
    assert [token for token in tokens if token.startswith("bytes:")]
    assert len(set(tokens[1:])) == len(ids) - 1


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt[0]"), ({"prompt": 3}, "prompt"), ({}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"), ({"prompt": ["a", 1]}, "prompt[1]"), ({"prompt": [10**12]}, "prompt[0]"),
        ({"prompt": [9_999_999]}, None), ({"prompt": ["a"] * 129}, "prompts"), ({"prompt": "a", "best_of": 4}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"), ({"prompt": "a", "logprobs": 99}, "logprobs"), ({"prompt": "hola " * 600}, "prompt"),
    ],
)  # fmt: skip
def test_completions_that_are_refused(live: Live, given: dict[str, Any], param: str | None) -> None:
    answer = live.post("/v1/completions", given)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert live.worker.active == 0


def test_embeddings(client: openai.OpenAI, live: Live, llm: LLM) -> None:
    texts = ["Hola, llama", "The wool of a llama is soft."]
    known = llm.embed(texts)
    found = client.embeddings.create(model=MODEL, input=texts)  # base64 on the way
    assert np.array_equal(np.array([one.embedding for one in found.data], np.float32), known)
    assert np.allclose(np.linalg.norm(known, axis=1), 1, atol=1e-6)
    plain = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float")
    assert np.allclose(plain.data[0].embedding, known[0], atol=1e-7)
    ids = client.embeddings.create(model=MODEL, input=[llm.ids(texts[0])], encoding_format="float", dimensions=320)
    assert np.allclose(ids.data[0].embedding, known[0], atol=1e-7)
    raw = live.post("/v1/embeddings", {"input": texts[1], "encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert np.array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), known[1])
    last = live.post("/v1/embeddings", {"input": texts[1], "pooling": "last"}).json()["data"][0]["embedding"]
    assert np.allclose(last, llm.embed(texts[1:], pooling="last")[0], atol=1e-6)
    for given, param in (
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
    ):
        answer = live.post("/v1/embeddings", given)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_tokenize_and_back(live: Live, llm: LLM) -> None:
    found = live.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    assert found["tokens"] == llm.ids(TEXT)
    assert found["count"] == len(found["token_strs"]) == len(found["tokens"])
    assert found["max_model_len"] == 512
    bare = live.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False}).json()["tokens"]
    assert live.post("/detokenize", {"tokens": bare}).json()["prompt"] == TEXT
    chat = live.post("/tokenize", {"messages": [{"role": "user", "content": "Hola"}]}).json()
    whole = live.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hola"}], "max_tokens": 1}
    ).json()
    assert chat["count"] == whole["usage"]["prompt_tokens"]
    assert live.post("/detokenize", {"tokens": [8192]}).status_code == 400
    assert live.post("/tokenize", {}).json()["error"]["code"] == "missing_parameter"


def test_models_and_health(client: openai.OpenAI, live: Live) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "criadero"
    with pytest.raises(openai.NotFoundError, match="did you mean 'cria-chat'"):
        client.models.retrieve("cria-chatt")
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready"}


def test_metrics_count_what_was_done(live: Live) -> None:
    def read() -> dict[str, float]:
        lines = live.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    name = f'{{model_name="{MODEL}"}}'
    before = read()
    usage = complete(live, prompt=TEXT, max_tokens=7)["usage"]
    live.post("/v1/completions", {"prompt": []})
    after = read()
    for metric, more in (
        ("vllm:prompt_tokens_total", usage["prompt_tokens"]), ("vllm:generation_tokens_total", usage["completion_tokens"]),
        ("vllm:time_to_first_token_seconds_count", 1), ("vllm:e2e_request_latency_seconds_count", 1),
    ):  # fmt: skip
        assert after[metric + name] - before.get(metric + name, 0) == more
    assert after["vllm:num_requests_running" + name] == 0
    assert after["criadero:model_loaded" + name] == 1
    assert any(line.startswith("criadero:requests_refused_total{") for line in after)
