"""Query parameters: those that clients send are known, and what nobody knows is a 400 that says which there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
import serving

from criadero.serve.settings import Settings
from criadero.serve.store import open_store


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Live]:
    store = open_store(str(tmp_path_factory.mktemp("query") / "chats.sqlite"))
    with serving.serving(Settings(models=("cria-chat", "cria")), store=store) as made:
        yield made
    store.close()


def client(live: serving.Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=60)


@pytest.mark.parametrize(
    ("method", "path", "param", "words"),
    [
        ("GET", "/v1/models?limt=1", "limt", "did you mean 'limit'? this address takes limit, after_id, before_id, lifecycle[]"),
        ("GET", "/v1/models/cria-chat?limit=1", "limit", "this address takes none"),
        ("GET", "/health?verbose", "verbose", "takes none"),
        ("GET", "/ready?x=1", "x", "takes none"),
        ("GET", "/metrics?name[]=x", "name[]", "takes none"),
        ("GET", "/v1/responses/resp_0?includes=x", "includes", "did you mean 'include'?"),
        ("DELETE", "/v1/responses/resp_0?force=1", "force", "takes none"),
        ("GET", "/api/chats?q=x", "q", "takes query, before, limit"),
        ("DELETE", "/api/chats/chat_0?x=", "x", "takes none"),
        ("POST", "/v1/chat/completions?stream=true", "stream", "takes none"),
        ("POST", "/v1/messages?x=1", "x", "takes none"),
    ],
)  # fmt: skip
def test_an_unknown_one_is_said(live: serving.Live, method: str, path: str, param: str, words: str) -> None:
    body = {"messages": serving.HELLO, "max_tokens": 4, "model": "cria-chat"} if method == "POST" else None
    answer = httpx.request(method, live.url + path, json=body, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_parameter", f"query.{param}")
    assert repr(param) in error["message"]
    assert words in error["message"]
    assert ("request_id" in answer.json()) == path.startswith("/v1/messages")  # in the shape of the API that was asked


def test_one_that_stands_twice_is_said(live: serving.Live) -> None:
    error = live.get("/v1/models?limit=1&limit=2").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "query.limit")
    assert live.get("/v1/models?lifecycle[]=active&lifecycle[]=retired").status_code == 200


def test_what_has_no_effect_is_reported(live: serving.Live) -> None:
    """What clients send to every address."""
    azure = openai.OpenAI(  # as Azure's variant of it asks
        base_url=live.url + "/v1", api_key="none", max_retries=0, default_query={"api-version": "2024-10-21"}
    )
    raw = azure.chat.completions.with_raw_response.create(
        model="cria-chat", messages=[{"role": "user", "content": "Hola"}], max_tokens=4, user="ana"
    )
    assert raw.headers["x-criadero-ignored"] == "user, query.api-version"
    assert live.get("/v1/models?beta=true").headers["x-criadero-ignored"] == "query.beta"
    assert "x-criadero-ignored" not in live.get("/v1/models").headers
    raw_message = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0).messages.with_raw_response.create(
        model="cria-chat", max_tokens=4, messages=[{"role": "user", "content": "Hola"}], extra_query={"beta": "true"}
    )  # fmt: skip
    assert raw_message.headers["x-criadero-ignored"] == "query.beta"
    assert live.get("/?utm_source=x").status_code == 200  # the page's own files are no API


def test_models_come_in_pages(live: serving.Live) -> None:
    both = ["cria-chat", "cria"]
    claude = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    assert [one.id for one in claude.models.list(limit=1)] == both  # the client fetches page after page
    assert [one.id for one in claude.beta.models.list()] == both
    page = claude.models.list(limit=1, before_id="cria")
    assert ([one.id for one in page.data], page.has_more) == (["cria-chat"], False)
    assert claude.models.list(lifecycle=["retired"]).data == []
    assert [one.id for one in claude.models.list(lifecycle=["active"])] == both
    assert live.get("/v1/models?after_id=cria").json() == {
        "object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None
    }  # fmt: skip
    assert live.get("/v1/models?after_id=gpt").json()["error"]["param"] == "query.after_id"
    assert live.get("/v1/models?limit=0").json()["error"]["param"] == "query.limit"
    assert [one.id for one in client(live).models.list()] == both


def test_what_openais_client_sends_for_a_response(live: serving.Live) -> None:
    ours = client(live)
    made = ours.responses.create(model="cria-chat", input="Hola", max_output_tokens=4, temperature=0)
    raw = ours.responses.with_raw_response.retrieve(
        made.id, include=["message.output_text.logprobs"], include_obfuscation=False
    )
    assert raw.headers["x-criadero-ignored"] == "query.include[], query.include_obfuscation"
    assert raw.parse().to_dict() == made.to_dict()
    items = ours.responses.input_items.with_raw_response.list(
        made.id, limit=1, order="asc", include=["reasoning.encrypted_content"]
    )
    assert items.headers["x-criadero-ignored"] == "query.include[]"
    for given, param in (({"starting_after": 3}, "starting_after"), ({"extra_query": {"stream": "true"}}, "stream")):
        with pytest.raises(openai.BadRequestError, match="the response is whole") as refused:
            ours.responses.retrieve(made.id, **given)  # type: ignore[call-overload]
        assert refused.value.param == param


def test_the_reference_lists_them() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    for line in (
        "| `GET /v1/models` | `after_id` |",
        "| `GET /v1/responses/{id}` | `include[]` |",
        "| every address | `api-version` |",
    ):
        assert line in text
