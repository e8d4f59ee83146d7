"""The OpenAPI description of the server, /openapi.json, written by FastAPI from pydantic's models.

FastAPI is imported when the description is first asked for, because that takes long. Its pages
/docs and /redoc are not served, because they load scripts from other sites.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, Field

import qwen2vl
from qwen2vl.server.routing import Operation

__all__ = ["ErrorBody", "ErrorResponse", "Version", "describe"]

# Status -> when; all have the body of ErrorResponse.
_REFUSALS = {
    400: "The body is not JSON, a field is invalid, or a medium cannot be used.",
    401: "The API key is missing or not valid.",
    403: "The Host or Origin header is not allowed.",
    404: "The model does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is not application/json.",
    422: "A server that a medium's URL names refused it.",
    429: "Too many requests run or wait; Retry-After says when to retry.",
    500: "Internal error.",
    502: "A server that a medium's URL names has failed.",
    503: "The server is shutting down, or the engine has stopped.",
    504: "The request took longer than the limit.",
}
_PUBLIC_REFUSALS = (400, 403)
_GET_REFUSALS = (400, 401, 403, 404)
# Routes without a body, which need no key.
_PROBES = {
    "/health": "Whether the engine works",
    "/ping": "Whether the engine works; POST is allowed, too",
    "/ready": "Whether new requests are taken",
}


class Version(BaseModel):
    """The body of /version."""

    version: str


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str = Field(description="What, where, the value, the limit and the remedy.")
    type: str
    param: str | None = Field(description="Path of the field: messages[2].content[1].")
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every refusal, in OpenAI's form."""

    error: ErrorBody


def describe(
    operations: Sequence[Operation],
    *,
    model_list: type[BaseModel],
    model_card: type[BaseModel],
    has_keys: bool,
    has_metrics: bool,
) -> dict[str, Any]:
    """Return the OpenAPI description.

    Args:
        operations: POST routes.
        model_list: body of /v1/models.
        model_card: body of /v1/models/{model}.
        has_keys: whether an API key is needed.
        has_metrics: whether /metrics is on the port of the API.
    """
    from fastapi import FastAPI

    app = FastAPI(
        title="qwen2vl",
        version=qwen2vl.__version__,
        description="Qwen2-VL by the OpenAI API, with vLLM's extensions.",
        license_info={"name": "Apache-2.0"},
    )
    for operation in operations:
        app.add_api_route(
            operation.path,
            _endpoint(operation.request_model, operation.response_model),
            methods=["POST"],
            summary=operation.summary.rstrip("."),
            operation_id=operation.handler.__name__,
            responses=_responses(_REFUSALS, operation.can_stream),
        )
    for path, body, summary in (
        ("/v1/models", model_list, "List the models that requests may name"),
        ("/v1/models/{model}", model_card, "Return one model"),
    ):
        app.add_api_route(
            path,
            _endpoint(None, body, "model" if "{" in path else None),
            summary=summary,
            operation_id="get_model" if "{" in path else "list_models",
            responses=_responses(_GET_REFUSALS),
        )
    app.add_api_route(
        "/version",
        _endpoint(None, Version),
        summary="Return the version of the server",
        operation_id="version",
        responses=_responses(_GET_REFUSALS[:-1]),
    )
    for path, summary in _PROBES.items():
        app.add_api_route(path, _endpoint(None, None), summary=summary, operation_id=path[1:])
    if has_metrics:
        app.add_api_route("/metrics", _endpoint(None, None), operation_id="metrics")
    return _corrected(app.openapi(), has_keys)


def _endpoint(
    request_model: Any, response_model: Any, path_parameter: str | None = None
) -> Callable[..., Any]:
    """Return a function with the signature that FastAPI reads; it is never called."""

    def endpoint(*_: Any) -> None:
        raise AssertionError("only the signature is used")

    parameters: list[inspect.Parameter] = []
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if request_model is not None:
        parameters.append(inspect.Parameter("body", kind, annotation=request_model))
    if path_parameter is not None:
        parameters.append(inspect.Parameter(path_parameter, kind, annotation=str))
    signature = inspect.Signature(parameters, return_annotation=response_model)
    endpoint.__signature__ = signature
    return endpoint


def _responses(statuses: Any, can_stream: bool = False) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _REFUSALS[status]} for status in statuses
    }
    if can_stream:
        events = {"schema": {"type": "string"}}
        responses[200] = {
            "description": "The response; with `stream`, its events.",
            "content": {"text/event-stream": events},
        }
    return responses


def _corrected(description: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    """Remove what FastAPI assumes of its own routes, and describe what it does not know."""
    schemas = description.get("components", {}).get("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path, methods in description["paths"].items():
        for operation in methods.values():
            responses = operation["responses"]
            responses.pop("422", None)
            if path in _PROBES:
                responses["200"] = {"description": "Yes; the body is empty."}
                responses["503"] = {"description": "No; the body is empty."}
            if path == "/metrics":
                text = {"text/plain": {"schema": {"type": "string"}}}
                responses["200"] = {"description": "Metrics of Prometheus.", "content": text}
            for status in _PUBLIC_REFUSALS:
                shown = {"description": _REFUSALS[status], "content": error}
                responses.setdefault(str(status), shown)
            if has_keys and path not in _PROBES:
                operation["security"] = [{"bearer": []}]
                shown = {"description": _REFUSALS[401], "content": error}
                responses.setdefault("401", shown)
    if has_keys:
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
        description["components"]["securitySchemes"] = schemes
    return description
