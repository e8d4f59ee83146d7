"""The conversion of exceptions to API errors, which never repeats a library's text."""

from __future__ import annotations

import pytest

from qwen2vl.errors import CapacityError, EngineError, InputError
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
    ("kind", "code"), [(InputError, "invalid_value"), (CapacityError, "context_length_exceeded")]
)
def test_our_texts_are_passed_on(kind: type[InputError], code: str) -> None:
    error = kind("messages[0]: the image is empty")
    error.param = "messages[0].content[1]"
    converted = to_api_error(error)
    assert (converted.status, converted.code) == (400, code)
    assert converted.message == "messages[0]: the image is empty"
    assert converted.param == "messages[0].content[1]"


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
