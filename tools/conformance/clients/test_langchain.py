"""langchain's standard tests of a chat model and of embeddings, with langchain-openai against a running server."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

WHERE = {"base_url": os.environ["CRIADERO_URL"] + "/v1", "api_key": "none", "model": "cria-chat"}


def quotes() -> dict[str, float]:
    """A bias to what ends a string: a model of ten million parameters would hardly come to an end of its own."""
    found = {}
    for text in ('x"', 'x",', 'x"}'):
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        request = urllib.request.Request(
            os.environ["CRIADERO_URL"] + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found[str(json.load(answer)["tokens"][1])] = 4.0
    return found


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**WHERE, "temperature": 1, "seed": 3, "max_tokens": 200, "stream_usage": True, "logit_bias": quotes()}

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "model"


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> Any:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {**WHERE, "check_embedding_ctx_length": False}  # it would count tokens with OpenAI's own tokeniser
