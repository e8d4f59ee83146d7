"""Refusals of bodies that do not match a model: paths, texts and suggestions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qwen2vl.errors import InputError
from qwen2vl.server.middleware.validation_errors import format_path, validation_error


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Image(Strict):
    type: Literal["image"]
    url: str


class Text(Strict):
    type: Literal["text"]
    text: str = Field(max_length=5)


class Body(Strict):
    temperature: float | None = Field(None, ge=0, le=2)
    n: int = Field(1, ge=1, le=8)
    stop: str | list[str] | None = None
    parts: list[Annotated[Image | Text, Field(discriminator="type")]] = []
    loose: list[Image | Text] = []
    model: str
    choice: Literal["auto", "none"] = "auto"
    checked: str = ""

    @field_validator("checked")
    @classmethod
    def check(cls, value: str) -> str:
        if value == "input":
            raise InputError("checked: must not be 'input'; give another")
        if value == "bug":
            raise AssertionError("a secret text")
        return value


@pytest.mark.parametrize(
    ("body", "param", "text", "code"),
    [
        ({}, "model", "is missing", "missing_required_parameter"),
        ({"models": "a"}, "model", "is missing", "missing_required_parameter"),
        ({"model": "a", "temprature": 1}, "temprature", "did you mean temperature?", "unknown_p"),
        ({"model": "a", "n": "2"}, "n", "got '2', must be a whole number", "invalid_type"),
        ({"model": "a", "n": 9}, "n", "got 9, must be 8 or less", "invalid_value"),
        ({"model": "a", "n": True}, "n", "got True, must be a whole number", "invalid_type"),
        ({"model": "a", "temperature": -1}, "temperature", "must be 0.0 or more", "invalid_value"),
        ({"model": 5}, "model", "got 5, must be a string", "invalid_type"),
        ({"model": "a", "choice": "x"}, "choice", "must be 'auto' or 'none'", "invalid_value"),
        ({"model": "a", "stop": ["a", 5]}, "stop[1]", "got 5, must be a string", "invalid_type"),
        ({"model": "a", "parts": [{"type": "image"}]}, "parts[0].url", "is missing", "missing_re"),
        (
            {"model": "a", "parts": [{"type": "text", "text": "toolong"}]},
            "parts[0].text",
            "must be a string of at most 5 characters",
            "invalid_value",
        ),
        ({"model": "a", "parts": [{"type": "video"}]}, "parts[0]", "'image', 'text'", "invalid"),
        ({"model": "a", "parts": "x"}, "parts", "got 'x', must be a list", "invalid_type"),
        (
            {"model": "a", "parts": [{"type": "image", "url": "u", "urll": 1}]},
            "parts[0].urll",
            "did you mean url?",
            "unknown_parameter",
        ),
        (
            {"model": "a", "loose": [{"type": "image", "url": 5}]},
            "loose[0].url",
            "got 5, must be a string",
            "invalid_type",
        ),
        ({"model": "a", "checked": "input"}, "checked", "must not be 'input'", "invalid_value"),
        ([], None, "must be an object", "invalid_type"),
        ("x" * 1000, None, "must be an object", "invalid_type"),
        (None, None, "got None, must be an object", "invalid_type"),
    ],
)
def test_a_refusal(body: Any, param: str | None, text: str, code: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate(body)
    error = validation_error(caught.value, body, Body)
    assert error.status == 400
    assert error.param == param
    assert text in error.message
    assert error.code is not None and error.code.startswith(code)
    assert len(error.message) < 300


def test_the_text_of_a_failed_assertion_is_not_told() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"model": "a", "checked": "bug"})
    error = validation_error(caught.value, {"model": "a", "checked": "bug"}, Body)
    assert "secret" not in error.message


def test_paths() -> None:
    assert format_path(["messages", 2, "content", 1, "text"]) == "messages[2].content[1].text"
    assert format_path([]) == "the request body"
