"""The server as an ASGI application: every request goes through `Gate`, which lets nothing by that it does not know to be allowed."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from criadero.errors import UserError
from criadero.serve import (
    anthropic,
    embeddings,
    health,
    openai_chat,
    openai_completions,
    page_answers,
    page_api,
    pages,
    responses,
    tokenize,
    traces,
)
from criadero.serve.admission import Admission
from criadero.serve.errors import ApiError, of_user_error
from criadero.serve.guarding import opener
from criadero.serve.keys import Key, find_key, sent_key
from criadero.serve.metrics import Metrics
from criadero.serve.models import Pool
from criadero.serve.params import of_validation
from criadero.serve.query import check_query, with_ignored
from criadero.serve.run import Service, Store
from criadero.serve.settings import Settings
from criadero.serve.spec import App
from criadero.serve.storing import kept
from criadero.serve.telemetry import CARRIED, Telemetry

log = logging.getLogger("criadero.serve")
LOCAL = Key("local", "local")
# what needs no key: whether the server lives, and the page's own files, which hold no data
PUBLIC = frozenset({"/", "/health", "/ready", "/index.html", "/favicon.ico", "/favicon.svg", "/manifest.webmanifest"})
PUBLIC_FOLDERS = ("/assets/",)
CSP = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SECURITY = {
    "Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin", "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}  # fmt: skip
BODY_SECONDS = 60.0  # in which a body has to arrive


def make_app(
    settings: Settings, *, store: Store | None = None, pool: Pool | None = None, telemetry: Telemetry | None = None
) -> FastAPI:  # fmt: skip
    """The application. UserError: a model that is not there or cannot fit, or an open address without keys."""
    service = Service(settings, pool or make_pool(settings), Admission(settings.limits), Metrics(), store, telemetry)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_warm(service)), asyncio.create_task(service.pool.unload_idle())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await service.pool.close()
            if telemetry is not None:
                await asyncio.to_thread(telemetry.close)

    app = App(
        title="Criadero", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="OpenAI-compatible API of criadero serve",
    )  # fmt: skip
    app.state.service, app.state.settings, app.state.store = service, settings, store
    app.state.models, app.state.metrics = service.pool, service.metrics
    app.include_router(pages.router)
    for api in (
        health, openai_chat, openai_completions, embeddings, tokenize, page_api, page_answers, responses, anthropic, traces,
    ):  # fmt: skip
        app.include_router(api.router, dependencies=[Depends(check_query)])
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Gate, service=service)
    return app


def make_pool(settings: Settings) -> Pool:
    """The models of ``settings``, their passports checked first where that is asked for, and their guards' indexes opened."""
    guard = opener(settings.guard, settings.guard_tokens) if settings.guard else None
    if not (settings.require_passport or settings.pubkey):
        return Pool(settings, guard=guard)
    from criadero.trust.verify import require

    return Pool(settings, lambda ref: require(ref, pubkey=settings.pubkey), guard)


async def _warm(service: Service) -> None:
    """Load the default model, so that the first request does not wait for it."""
    entry = service.pool.entries[service.pool.default]
    try:
        async with service.pool.lease(entry):
            pass
    except ApiError as error:
        log.error("%s", error.message)


# --- errors ---


def error_response(request: Request | Scope, error: ApiError) -> Response:
    """``error`` in the shape of the API that was asked."""
    scope = request.scope if isinstance(request, Request) else request
    service: Service = scope["app"].state.service if "app" in scope else scope["criadero.service"]
    service.metrics.refused.labels(error.code).inc()
    id = scope.get("state", {}).get("request_id", "")
    body = error.body(anthropic=scope["path"].startswith("/v1/messages"), request_id=id)
    return JSONResponse(body, error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request, error)


async def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return error_response(request, of_user_error(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    route = request.scope.get("route")
    field = getattr(route, "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return error_response(request, of_validation(error.errors(), list(getattr(model, "model_fields", ()))))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}
    text = {404: "there is no such address", 405: "this address does not take that method"}
    message = text.get(error.status_code, str(error.detail))
    headers = {"Allow": ", ".join(allowed(request))} if error.status_code == 405 else error.headers
    one = ApiError(error.status_code, codes.get(error.status_code, "invalid_request"), message, None, headers)
    return error_response(request, one)


def allowed(request: Request) -> list[str]:
    """The methods that the address takes, whichever route has them; where it stands for itself, not as somebody's id."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    routes: list[Any] = list(request.app.routes)
    while routes:
        route = routes.pop()
        if hasattr(route, "original_router"):  # FastAPI keeps a router that was included as one route
            routes += route.original_router.routes
        elif route.matches(request.scope)[0] is not Match.NONE:
            found[route.path == request.scope["path"]] |= set(getattr(route, "methods", None) or ())
    return sorted(found[True] or found[False])


# --- the gate ---


class Gate:
    """Request ids, headers for browsers, allowed hosts and origins, sizes and types of bodies, keys, and the last word on errors.

    An address is served only to who may ask for it: what is not in `PUBLIC` needs a key, unless the server is open to this machine only.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self.app(scope, receive, send)
            return
        scope["criadero.service"] = self.service
        state = scope.setdefault("state", {})
        state["request_id"] = "req-" + secrets.token_hex(12)
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(raw=message["headers"])
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = state["request_id"]
                if said := state.get("ignored_query"):
                    headers["X-Criadero-Ignored"] = with_ignored(headers.get("X-Criadero-Ignored"), said)
                if scope["path"].startswith(("/v1", "/api", "/metrics", "/tokenize", "/detokenize")):
                    headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_source(scope, headers)
            key = await self._key(scope, headers)
            state["key"], state["owner"] = key, key.owner
            if self.service.telemetry is not None:
                names = ("traceparent", "tracestate")
                CARRIED.set({**{n: headers[n] for n in names if n in headers}, "request_id": state["request_id"]})
            body = await self._body(scope, headers, receive)
            await self.app(scope, _replay(body, receive) if body is not None else receive, sending)
        except ApiError as error:
            if not begun:
                await error_response(scope, error)(scope, receive, sending)
        except Exception:
            log.exception("request %s: %s %r", state["request_id"], scope["method"], scope["path"][:200])
            if not begun:
                text = f"something went wrong in the server; its log has more under {state['request_id']}"
                await error_response(scope, ApiError(500, "internal_error", text))(scope, receive, sending)

    def _check_source(self, scope: Scope, headers: Headers) -> None:
        """Against pages elsewhere that have their reader's browser ask this server (DNS rebinding, cross-site requests)."""
        host = headers.get("host", "")
        if not self._host_allowed(host):
            raise ApiError(
                403,
                "host_not_allowed",
                f"this server does not answer for the host {host!r:.80}: start it with --allow-host to allow it",
            )
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and origin.partition("://")[2] != host:
            raise ApiError(403, "origin_not_allowed", "pages of other sites may not write here")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            raise ApiError(403, "origin_not_allowed", "pages of other sites may not write here")

    def _host_allowed(self, host: str) -> bool:
        settings = self.service.settings
        name = host.rsplit(":", 1)[0] if not host.endswith("]") and host.count(":") != host.count("::") else host
        name = name.strip("[]").lower().rstrip(".")
        if name in {
            "localhost",
            "127.0.0.1",
            "::1",
            settings.host.lower(),
            *(one.lower() for one in settings.allowed_hosts),
        }:
            return True
        if settings.loopback:
            return False
        try:  # who connects from elsewhere has a key, which a page that plays with names has not
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())

    async def _key(self, scope: Scope, headers: Headers) -> Key:
        service, path = self.service, scope["path"]
        sent = sent_key(headers)
        if sent is not None and len(sent) <= 512:
            if service.store is not None:
                found = await kept(find_key, sent, service.settings.key_hashes, service.store)
            else:
                found = find_key(sent, service.settings.key_hashes, None)
            if found is not None:
                return found
        if key_required(service.settings) and not is_public(path, scope["method"]):
            why = "this key is not known here" if sent else "send a key: Authorization: Bearer KEY, or x-api-key: KEY"
            raise ApiError(401, "invalid_api_key", why, headers={"WWW-Authenticate": "Bearer"})
        return LOCAL

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body of a write; None for what has none (of a method that no address takes, nobody reads it)."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return None
        most = self.service.settings.limits.body_bytes
        too_large = ApiError(
            413, "body_too_large", f"the body is larger than the {most:,} bytes that may be (limit body_bytes)"
        )
        length = headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length[:20]) > most):
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "client_gone", "the client went away")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the body did not arrive in {BODY_SECONDS:g} seconds") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if (size or scope["method"] != "DELETE") and kind != "application/json":
            raise ApiError(415, "not_json", "writes need the header Content-Type: application/json")
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` for the application: the body that was read, then what comes after it, which is that the client went away."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def key_required(settings: Settings) -> bool:
    """Whether every request needs a key: always, but for a server that only this machine reaches."""
    return settings.require_key or not settings.loopback


def is_public(path: str, method: str) -> bool:
    """Whether ``path`` may be read without a key."""
    return method in ("GET", "HEAD") and (path in PUBLIC or path.startswith(PUBLIC_FOLDERS))
