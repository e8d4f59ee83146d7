"""API operations: from the body of a request to a handler, and from its result to a response.

An `Operation` names a path, its handler and the pydantic models of both sides; `operation_route`
makes the starlette route. The route refuses what is over a limit, reads and parses the body, admits
the request, runs the handler until its client disconnects, and writes a response, an event stream
or an error. FastAPI would do less of this, so it only writes the description (openapi.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen2vl.errors import EngineError
from qwen2vl.server.errors import SERVER_ERROR, APIError, to_api_error
from qwen2vl.server.middleware.json_parsing import is_costly, parse_json
from qwen2vl.server.middleware.request_body import BodyReader
from qwen2vl.server.middleware.responses import error_response
from qwen2vl.server.middleware.validation_errors import validation_error
from qwen2vl.server.sse import ClientDisconnectedError, EventStream, run_until_disconnect
from qwen2vl.server.state import Caller, ServerState

__all__ = ["CountedRoute", "Handler", "Operation", "operation_route"]

logger = logging.getLogger(__name__)

Handler = Callable[[ServerState, Any, Caller], Awaitable[Any]]
JSON = "application/json"
TIMEOUT_STATUS = 504


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One POST route of the API."""

    path: str
    handler: Handler
    request_model: type[BaseModel]
    response_model: type[BaseModel]
    summary: str
    can_stream: bool = False
    sends_done: bool = True  # whether `data: [DONE]` ends its event stream


class CountedRoute(Route):
    """A route that leaves its path template in the scope, for the metrics."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request of this path."""
        scope["route_template"] = self.path
        await super().handle(scope, receive, send)


def operation_route(operation: Operation, reader: BodyReader) -> CountedRoute:
    """Return the route of an operation; the state is that of the application."""
    endpoint = _OperationEndpoint(operation, reader)
    name = operation.handler.__name__
    return CountedRoute(operation.path, endpoint, methods=["POST"], name=name)


class _OperationEndpoint:
    """ASGI application of one operation; starlette calls it as it is, because it is no function."""

    def __init__(self, operation: Operation, reader: BodyReader) -> None:
        self._operation = operation
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await _Exchange(self._operation, self._reader, Request(scope, receive)).run(send)


class _Exchange:
    """One request and its response."""

    def __init__(self, operation: Operation, reader: BodyReader, request: Request) -> None:
        self._operation = operation
        self._reader = reader
        self._request = request
        self._state: ServerState = request.app.state.server
        self._caller: Caller = request.scope["state"].get("caller", Caller())
        self._deadline = 0.0

    async def run(self, send: Send) -> None:
        """Read the request, run the handler and write the response, a stream or an error."""
        scope, receive = self._request.scope, self._request.receive
        is_started = False

        async def tracked_send(message: Any) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        with ExitStack() as stack:  # memory and slot are returned after the response
            try:
                response = await self._respond(stack)
                await response(scope, receive, tracked_send)
            except ClientDisconnectedError:
                scope["state"]["is_disconnected"] = True
            except Exception as error:
                if is_started:
                    raise
                await error_response(self._to_api_error(error))(scope, receive, send)

    async def _respond(self, stack: ExitStack) -> Response:
        state, key = self._state, self._caller.cache_salt
        with state.admission.receiving(key):
            data = await self._reader.read(self._request)
            stack.callback(self._reader.release, len(data))
            # In a thread, if it would hold up the other requests.
            body = (
                await asyncio.to_thread(self._parse, data) if is_costly(data) else self._parse(data)
            )
            del data
        stack.enter_context(state.admission.enter(key, has_arrived=True))
        self._deadline = asyncio.get_running_loop().time() + state.config.request_timeout
        result = await run_until_disconnect(self._request.receive, self._handle(body))
        return self._to_response(result)

    def _parse(self, data: bytes) -> BaseModel:
        value = parse_json(data, max_depth=self._state.config.max_json_depth)
        try:
            return self._operation.request_model.model_validate(value)
        except ValidationError as error:
            raise validation_error(error, value, self._operation.request_model) from None

    async def _handle(self, body: BaseModel) -> Any:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._operation.handler(self._state, body, self._caller)
        except TimeoutError:
            raise self._timeout_error() from None

    def _to_response(self, result: Any) -> Response:
        if isinstance(result, Response):
            return result
        if isinstance(result, BaseModel):
            return Response(result.model_dump_json(), media_type=JSON)
        assert isinstance(result, AsyncIterator), "a handler returns one of these"
        return EventStream(
            result,
            send_done=self._operation.sends_done,
            on_error=self._to_api_error,
            deadline=self._deadline,
        )

    def _to_api_error(self, error: BaseException) -> APIError:
        if isinstance(error, TimeoutError):
            return self._timeout_error()
        converted = to_api_error(
            error, self._caller.request_id, is_draining=self._state.is_draining
        )
        if converted.status == 500:
            logger.error("request %s failed", self._caller.request_id, exc_info=error)
        elif isinstance(error, EngineError):  # the client does not get its text
            logger.warning("request %s failed: %s", self._caller.request_id, error)
        return converted

    def _timeout_error(self) -> APIError:
        seconds = self._state.config.request_timeout
        return APIError(
            TIMEOUT_STATUS,
            f"the request was not finished after {seconds:g} s (--request-timeout); ask for fewer "
            "tokens, or retry when fewer requests run",
            type=SERVER_ERROR,
            code="request_timeout",
        )
