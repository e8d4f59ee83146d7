"""The conversion of exceptions to API errors, which never repeats a library's text."""

from __future__ import annotations

import pytest

from qwen2vl.errors import (
    CapacityError,
    EngineDeadError,
    EngineError,
    InputError,
    MediaTooLargeError,
    MediaWorkerError,
    MediaWorkersBusyError,
    UnknownKeyError,
    copy_error,
)
from qwen2vl.server.errors import APIError, to_api_error


def test_the_body_has_openais_form() -> None:
    error = APIError(404, "no such model", param="model", code="model_not_found")
    assert error.to_body() == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert to_api_error(error) is error


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (InputError, "invalid_value"),
        (MediaTooLargeError, "media_too_large"),
        (UnknownKeyError, "unknown_parameter"),
        (CapacityError, "context_length_exceeded"),
    ],
)
def test_our_texts_are_passed_on(kind: type[InputError], code: str) -> None:
    error = kind("messages[0]: the image is empty")
    error.param = "messages[0].content[1]"
    converted = to_api_error(error)
    assert (converted.status, converted.code) == (400, code)
    assert converted.message == "messages[0]: the image is empty"
    assert converted.param == "messages[0].content[1]"
    assert to_api_error(copy_error(error, "again: ")).code == code


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (EngineError("the engine died: at 0x7f12345678"), 503),
        (RuntimeError("/srv/secret.py: 0x7f12345678"), 500),
        (OSError(2, "No such file", "/etc/passwd"), 500),
        (KeyError("iVBORw0KGgo="), 500),
        (MemoryError(), 500),
    ],
)
def test_other_texts_are_not(error: Exception, status: int) -> None:
    converted = to_api_error(error, "req-1")
    assert converted.status == status
    assert converted.type == "server_error"
    assert "0x" not in converted.message and "/" not in converted.message
    assert (status == 503) == (converted.retry_after is not None)
    assert ("req-1" in converted.message) == (status == 500)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (EngineDeadError, "the engine stopped before the request was finished"),
        (MediaWorkerError, "a process that decodes images and videos has stopped"),
        (MediaWorkersBusyError, "all processes that decode images and videos are busy"),
        (EngineError, "the engine cannot run the request now"),
    ],
)
def test_causes_of_503_have_their_own_texts(kind: type[EngineError], text: str) -> None:
    converted = to_api_error(kind("a secret text"))
    assert converted.message == f"{text}; send the request again"
    assert converted.code == "engine_error"
    drained = to_api_error(kind("a secret text"), is_draining=True)
    assert (drained.status, drained.code) == (503, "shutting_down")
    assert "the server shut down before the request was finished" in drained.message


def test_draining_hides_no_other_error() -> None:
    assert to_api_error(InputError("wrong"), is_draining=True).code == "invalid_value"
    assert to_api_error(RuntimeError("bug"), is_draining=True).code == "internal_error"
