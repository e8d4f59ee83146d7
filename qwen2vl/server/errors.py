"""Errors of the HTTP API: APIError, and the conversion of other exceptions to it.

The body is OpenAI's: {"error": {"message", "type", "param", "code"}}. Texts of this library's
InputError and CapacityError are written for clients and are passed on; the text of any other
exception never leaves the process, because it may hold addresses, paths or data.
"""

from __future__ import annotations

from typing import Any

from qwen2vl.errors import (
    CapacityError,
    EngineDeadError,
    EngineError,
    InputError,
    MediaWorkerError,
    MediaWorkersBusyError,
)

__all__ = ["SERVER_ERROR", "APIError", "to_api_error"]

SERVER_ERROR = "server_error"

MAX_MESSAGE = 2000  # characters; messages hold names of fields, which clients choose
MAX_PARAM = 200


class APIError(Exception):
    """A refusal or failure with an HTTP status; its message is sent to the client.

    Args:
        status: HTTP status.
        message: what is wrong, where, the value, the limit and the remedy.
        type: OpenAI's class of error: "invalid_request_error", "server_error", ...
        param: path of what is wrong in the request body: "messages[2].content[1]".
        code: short machine-readable reason: "model_not_found", ...
        retry_after: seconds after which a retry may succeed; sent as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _one_line(message, MAX_MESSAGE)
        self.type = type
        self.param = None if param is None else _one_line(param, MAX_PARAM)
        self.code = code
        self.retry_after = retry_after

    def to_body(self) -> dict[str, Any]:
        """Return the response body: {"error": {"message", "type", "param", "code"}}."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


def to_api_error(
    error: BaseException, request_id: str = "", *, is_draining: bool = False
) -> APIError:
    """Convert any exception to the APIError that the client receives.

    Args:
        error: what a handler raised.
        request_id: named in the text of an internal error, so that the log can be searched.
        is_draining: whether the server shuts down, which ends the requests that still run.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, CapacityError):
        return APIError(400, str(error), param=error.param, code="context_length_exceeded")
    if isinstance(error, InputError):
        return APIError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineError) and is_draining:
        return APIError(
            503,
            "the server shut down before the request was finished; send it to another one, or "
            "again after the restart",
            type=SERVER_ERROR,
            code="shutting_down",
        )
    if isinstance(error, EngineError):
        return APIError(
            503,
            f"{_describe(error)}; send the request again",
            type=SERVER_ERROR,
            code="engine_error",
            retry_after=1,
        )
    where = f"; the log has it under request id {request_id}" if request_id else ""
    return APIError(500, f"internal error{where}", type=SERVER_ERROR, code="internal_error")


def _describe(error: EngineError) -> str:
    if isinstance(error, MediaWorkersBusyError):
        return "all processes that decode images and videos are busy"
    if isinstance(error, MediaWorkerError):
        return "a process that decodes images and videos has stopped"
    if isinstance(error, EngineDeadError):
        return "the engine stopped before the request was finished"
    return "the engine cannot run the request now"


def _one_line(text: str, limit: int) -> str:
    """Escape what is not printable, such as line breaks, and shorten a text."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
