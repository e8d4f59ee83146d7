"""Request context: request id, access log and HTTP metrics; the outermost middleware.

The id is the client's X-Request-Id if that is a safe token, else a new one; the response repeats
it, errors and the log name it. The access log holds method, path, status, duration and tokens, and
never a query string, a header or a body. What no one else has caught becomes a 500 here.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl.errors import abbreviate
from qwen2vl.server.errors import to_api_error
from qwen2vl.server.metrics import REQUEST_TOKENS, ServerMetrics
from qwen2vl.server.middleware.responses import error_response
from qwen2vl.server.state import Caller

__all__ = ["ACCESS_LOGGER", "RequestContextMiddleware"]

logger = logging.getLogger(__name__)

ACCESS_LOGGER = "qwen2vl.server.access"
SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
REQUEST_ID = b"x-request-id"
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left before the response
MAX_PATH = 100  # characters in the log
MAX_METHOD = 20
UNKNOWN_ROUTE = "other"  # label of the metrics, so that paths that strangers try add no series

SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff")]


class RequestContextMiddleware:
    """Gives each request its id, and logs and counts it when it has ended."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: ServerMetrics,
        access_log: bool = True,
        log_format: str = "plain",
    ) -> None:
        self.app = app
        self._metrics = metrics
        self._access_log = access_log
        self._log_format = log_format
        self._logger = logging.getLogger(ACCESS_LOGGER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _request_id(scope)
        state = scope.setdefault("state", {})
        state["caller"] = Caller(request_id)
        tokens: dict[str, int] = {}
        REQUEST_TOKENS.set(tokens)
        extra = [(REQUEST_ID, request_id.encode()), *SECURITY_HEADERS]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # half a response was sent; the connection is closed
                raise
            logger.exception("request %s failed", request_id)
            response = error_response(to_api_error(error, request_id))
            await response(scope, receive, send_with_id)
        finally:
            if state.get("is_disconnected"):
                status = CLIENT_CLOSED_REQUEST
            self._finish(scope, status, time.perf_counter() - began, tokens)

    def _finish(self, scope: Scope, status: int, seconds: float, tokens: dict[str, int]) -> None:
        route = scope.get("route_template", UNKNOWN_ROUTE)
        self._metrics.observe_http(scope["method"], route, status, seconds)
        if not self._access_log or not self._logger.isEnabledFor(logging.INFO):
            return
        fields: dict[str, Any] = {
            "method": scope["method"][:MAX_METHOD],
            "path": scope["path"],
            "status": status,
            "ms": round(seconds * 1e3, 1),
            **tokens,
            "request_id": scope["state"]["caller"].request_id,
        }
        if self._log_format == "json":
            self._logger.info("%s", json.dumps({"time": round(time.time(), 3), **fields}))
        else:
            self._logger.info("%s", _plain(fields))


def _plain(fields: dict[str, Any]) -> str:
    """Return a line; the path is escaped, because it may hold terminal control sequences."""
    path = abbreviate(fields["path"], MAX_PATH)
    named = [f"{name}={fields[name]}" for name in fields if name.endswith(("_tokens", "_id"))]
    return f"{fields['method']} {path} {fields['status']} {fields['ms']} ms {' '.join(named)}"


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == REQUEST_ID and SAFE_ID.fullmatch(value):
            return value.decode()
    return f"req-{secrets.token_hex(12)}"
