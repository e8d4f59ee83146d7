"""The ASGI application: middleware around the routes of the API.

    RequestContextMiddleware    request id, access log, HTTP metrics
    AccessControlMiddleware     Host, Origin, API key
    routes                      operations (POST, routing.py), models, health, metrics, description,
                                page (page/)

Unknown paths get 404 and wrong methods 405, in OpenAI's form, behind the same access control.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import qwen2vl
from qwen2vl.errors import abbreviate
from qwen2vl.server.errors import APIError
from qwen2vl.server.health import health, ready, restart_dead_engine
from qwen2vl.server.metrics import CONTENT_TYPE
from qwen2vl.server.middleware.access_control import (
    PUBLIC_PATHS,
    AccessControlMiddleware,
    ApiKeys,
)
from qwen2vl.server.middleware.request_body import BodyReader
from qwen2vl.server.middleware.request_context import RequestContextMiddleware
from qwen2vl.server.middleware.responses import error_response
from qwen2vl.server.page.routes import PAGE_PATHS, page_routes
from qwen2vl.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from qwen2vl.server.protocol.completions import CompletionRequest, CompletionResponse
from qwen2vl.server.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from qwen2vl.server.protocol.responses import ResponsesRequest, ResponsesResponse
from qwen2vl.server.protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from qwen2vl.server.routing import CountedRoute, Operation, operation_route
from qwen2vl.server.serving import chat, completions, embeddings, models, responses, tokenization
from qwen2vl.server.state import ServerState

__all__ = ["create_app", "create_metrics_app", "load_operations"]


def load_operations() -> list[Operation]:
    """Return the POST routes of the API."""
    return [
        Operation(
            path="/v1/chat/completions",
            handler=chat.create_chat_completion,
            request_model=ChatCompletionRequest,
            response_model=ChatCompletionResponse,
            summary="Generate the next message of a conversation with images and videos",
            can_stream=True,
        ),
        Operation(
            path="/v1/completions",
            handler=completions.create_completion,
            request_model=CompletionRequest,
            response_model=CompletionResponse,
            summary="Continue a text",
            can_stream=True,
        ),
        Operation(
            path="/v1/responses",
            handler=responses.create_response,
            request_model=ResponsesRequest,
            response_model=ResponsesResponse,
            summary="Generate the next output items of a conversation; nothing is stored",
            can_stream=True,
            sends_done=False,
        ),
        Operation(
            path="/v1/embeddings",
            handler=embeddings.create_embedding,
            request_model=EmbeddingRequest,
            response_model=EmbeddingResponse,
            summary="Embed texts, or a conversation with images and videos",
        ),
        Operation(
            path="/tokenize",
            handler=tokenization.tokenize,
            request_model=TokenizeRequest,
            response_model=TokenizeResponse,
            summary="Return the token ids of a text or of a conversation",
        ),
        Operation(
            path="/detokenize",
            handler=tokenization.detokenize,
            request_model=DetokenizeRequest,
            response_model=DetokenizeResponse,
            summary="Return the text of token ids",
        ),
    ]


def create_app(state: ServerState) -> Starlette:
    """Return the application of a server; `state` is kept as `app.state.server`."""
    config = state.config
    reader = BodyReader(
        max_bytes=config.max_body_bytes,
        timeout=config.body_timeout,
        max_total_bytes=config.max_held_body_bytes,
        on_reject=state.metrics.reject,
    )
    operations = load_operations()
    routes = [
        *(operation_route(operation, reader) for operation in operations),
        *_model_routes(),
        CountedRoute("/openapi.json", _Description(operations), methods=["GET"]),
        CountedRoute("/version", version),
        CountedRoute("/health", health),
        CountedRoute("/ping", health, methods=["GET", "POST"]),
        CountedRoute("/ready", ready),
    ]
    if config.metrics_port is None:
        routes.append(CountedRoute("/metrics", metrics))
    if config.page:
        routes += page_routes()
    app = Starlette(
        routes=routes,
        middleware=_middleware(state, PAGE_PATHS if config.page else ()),
        exception_handlers={HTTPException: _http_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False  # the target would be built from the Host header
    app.state.server = state
    return app


class _Description:
    """Endpoint of /openapi.json; the description is written once, when it is first asked for."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._body: bytes | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the description."""
        if self._body is None:
            self._body = await asyncio.to_thread(self._write, scope["app"].state.server)
        await Response(self._body, media_type="application/json")(scope, receive, send)

    def _write(self, state: ServerState) -> bytes:
        from qwen2vl.server.openapi import describe
        from qwen2vl.server.protocol.models import ModelCard, ModelList

        description = describe(
            self._operations,
            model_list=ModelList,
            model_card=ModelCard,
            has_keys=bool(state.config.api_keys),
            has_metrics=state.config.metrics_port is None,
        )
        return json.dumps(description).encode()


def create_metrics_app(state: ServerState) -> Starlette:
    """Return the application of the listener of --metrics-port: /metrics, /health and /ready."""
    routes = [
        CountedRoute("/metrics", metrics),
        CountedRoute("/health", health),
        CountedRoute("/ready", ready),
    ]
    app = Starlette(
        routes=routes,
        middleware=_middleware(state),
        exception_handlers={HTTPException: _http_error},
    )
    app.state.server = state
    return app


def _middleware(state: ServerState, page_paths: Iterable[str] = ()) -> list[Middleware]:
    config = state.config
    return [
        Middleware(
            RequestContextMiddleware,
            metrics=state.metrics,
            access_log=config.access_log,
            log_format=config.log_format,
        ),
        Middleware(
            AccessControlMiddleware,
            keys=ApiKeys(config.api_keys),
            bound_host=config.host,
            allowed_hosts=config.allowed_hosts,
            allowed_origins=config.allowed_origins,
            public_paths={*PUBLIC_PATHS, *page_paths},
            max_header_bytes=config.max_header_bytes,
        ),
    ]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    watcher = asyncio.create_task(restart_dead_engine(app.state.server))
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        await app.state.server.connector.close()


async def metrics(request: Request) -> Response:
    """Return the metrics in the text format of Prometheus."""
    return Response(request.app.state.server.metrics.expose(), media_type=CONTENT_TYPE)


async def version(request: Request) -> Response:
    """Return the version of this package, as vLLM does; like other routes it needs the key."""
    body = json.dumps({"version": qwen2vl.__version__})
    return Response(body, media_type="application/json")


def _model_routes() -> list[CountedRoute]:
    async def list_models(request: Request) -> Response:
        result = models.list_models(request.app.state.server)
        return Response(result.model_dump_json(), media_type="application/json")

    async def get_model(request: Request) -> Response:
        state = request.app.state.server
        try:
            result = models.get_model(state, request.path_params["model"])
        except APIError as error:
            return error_response(error)
        return Response(result.model_dump_json(), media_type="application/json")

    # The name of a model may have a slash: Qwen/Qwen2-VL-2B-Instruct.
    return [
        CountedRoute("/v1/models", list_models),
        CountedRoute("/v1/models/{model:path}", get_model),
    ]


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method[:20]} {abbreviate(request.url.path)}"
    if error.status_code == 404:
        similar = _similar_path(request)
        remedy = f"; did you mean {similar}?" if similar else ""
        converted = APIError(404, f"{where}: there is no such route{remedy}", code="not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        converted = APIError(
            405, f"{where}: the methods of this route are {allowed}", code="method_not_allowed"
        )
    else:
        converted = APIError(error.status_code, "the request is not valid")
    response = error_response(converted)
    response.headers.update(error.headers or {})
    return response


def _similar_path(request: Request) -> str | None:
    """Return the route of a path with a missing or doubled /v1, or a slash at the end."""
    path = request.url.path.rstrip("/")
    known = {getattr(route, "path", "") for route in request.app.routes}
    candidates = (path, f"/v1{path}", path.removeprefix("/v1"))
    return next((one for one in candidates if one in known), None)
