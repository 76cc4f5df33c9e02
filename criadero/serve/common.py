"""What handlers share: their service, who asks, JSON, usage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from criadero.engine.request import Usage
from criadero.serve.keys import Key
from criadero.serve.run import Service


def service_of(request: Request) -> Service:
    """What the handlers share."""
    found: Service = request.app.state.service
    return found


def key_of(request: Request) -> Key:
    """Who asks."""
    found: Key = request.state.key
    return found


def json_response(body: Any, headers: Mapping[str, str] | None = None) -> Response:
    """As JSON; half characters become U+FFFD."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json", headers=dict(headers or {}))


def usage_of(*usages: Usage) -> dict[str, Any]:
    """OpenAI's usage of one or more requests."""
    prompt, completion = sum(one.prompt for one in usages), sum(one.completion for one in usages)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in usages)},
    }  # fmt: skip
