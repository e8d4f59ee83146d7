"""Refusals of bodies that do not match a model: paths, texts and suggestions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qwen2vl.errors import InputError
from qwen2vl.server.errors import APIError
from qwen2vl.server.middleware.validation_errors import format_path, validation_error
from qwen2vl.server.protocol.chat import ChatCompletionRequest
from qwen2vl.server.protocol.completions import CompletionRequest
from qwen2vl.server.protocol.embeddings import EmbeddingRequest
from qwen2vl.server.protocol.responses import ResponsesRequest
from qwen2vl.server.protocol.sampling import Unsupported
from qwen2vl.server.protocol.tokenization import DetokenizeRequest, TokenizeRequest


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
            "got 7 characters, at most 5 are allowed",
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


# The requests of the API ------------------------------------------------------------------------

HI = [{"role": "user", "content": "Hi"}]
REQUIRED: dict[type[BaseModel], dict[str, Any]] = {
    ChatCompletionRequest: {"messages": HI},
    CompletionRequest: {"prompt": "Hi"},
    ResponsesRequest: {"input": "Hi"},
    EmbeddingRequest: {"input": "Hi"},
    TokenizeRequest: {"prompt": "Hi"},
}


def refusal(model: type[BaseModel], body: Any) -> APIError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return validation_error(caught.value, body, model)


@pytest.mark.parametrize(
    ("model", "field", "other"),
    [
        (ResponsesRequest, "max_tokens", "max_output_tokens"),
        (ResponsesRequest, "max_completion_tokens", "max_output_tokens"),
        (ResponsesRequest, "response_format", "text.format"),
        (ResponsesRequest, "guided_json", "text.format"),
        (ResponsesRequest, "messages", "input"),
        (ChatCompletionRequest, "max_output_tokens", "max_completion_tokens"),
        (ChatCompletionRequest, "input", "messages"),
        (ChatCompletionRequest, "prompt", "messages"),
        (ChatCompletionRequest, "text", "response_format"),
        (CompletionRequest, "messages", "prompt"),
        (CompletionRequest, "input", "prompt"),
        (CompletionRequest, "max_completion_tokens", "max_tokens"),
        (EmbeddingRequest, "prompt", "input"),
        (TokenizeRequest, "input", "prompt"),
        (DetokenizeRequest, "prompt", "tokens"),
    ],
)
def test_fields_of_another_api(model: type[BaseModel], field: str, other: str) -> None:
    """Also where the right field is missing because of it."""
    for body in ({field: "x"}, {**REQUIRED.get(model, {"tokens": [1]}), field: "x"}):
        error = refusal(model, body)
        assert (error.param, error.code) == (field, "unknown_parameter")
        assert error.message.endswith(f"did you mean {other}?")


@pytest.mark.parametrize("model", REQUIRED)
@pytest.mark.parametrize("name", ["xyzzy", "min_token", "echoo", "conversatio", "beam"])
def test_fields_that_are_refused_are_never_suggested(model: type[BaseModel], name: str) -> None:
    error = refusal(model, {**REQUIRED[model], name: 1})
    words = set(re.findall(r"\w+", error.message))
    fields = model.model_fields.items()
    refused = {name for name, f in fields if any(isinstance(m, Unsupported) for m in f.metadata)}
    assert refused and not words & refused, error.message


@pytest.mark.parametrize(
    ("model", "body", "text"),
    [
        (ChatCompletionRequest, {"tools": [{}] * 129}, "tools: got 129, at most 128 are allowed"),
        (ChatCompletionRequest, {"messages": HI * 513}, "messages: got 513, at most 512 are"),
        (ChatCompletionRequest, {"messages": []}, "messages: got 0, at least 1 must be given"),
        (ChatCompletionRequest, {"stop": ["a"] * 17}, "stop: got 17, at most 16 are allowed"),
        (ChatCompletionRequest, {"stop": "a" * 257}, "stop: got 257 characters, at most 256 are"),
        (
            ChatCompletionRequest,
            {"logit_bias": {str(i): 1 for i in range(1025)}},
            "logit_bias: got 1,025, at most 1,024 are allowed",
        ),
        (CompletionRequest, {"prompt": ["a"] * 65}, "prompt: got 65, at most 64 are allowed"),
        (EmbeddingRequest, {"input": ["a"] * 2049}, "input: got 2,049, at most 2,048 are allowed"),
        (
            TokenizeRequest,
            {"prompt": "a" * 1_000_001},
            "prompt: got 1,000,001 characters, at most 1,000,000 are allowed",
        ),
        (ChatCompletionRequest, {"cache_salt": ""}, "got 0 characters, must be at least 1"),
    ],
)
def test_lengths(model: type[BaseModel], body: dict[str, Any], text: str) -> None:
    error = refusal(model, {**REQUIRED[model], **body})
    assert text in error.message
    assert error.code == "invalid_value" and len(error.message) < 100


@pytest.mark.parametrize(
    ("model", "body", "param", "text", "code"),
    [
        (
            ChatCompletionRequest,
            {"response_format": {}},
            "response_format.type",
            "is missing; give one of 'json_object', 'json_schema', 'text'",
            "missing_required_parameter",
        ),
        (
            ResponsesRequest,
            {"text": {"format": {"name": "a"}}},
            "text.format.type",
            "is missing; give one of 'json_object', 'json_schema', 'text'",
            "missing_required_parameter",
        ),
        (ChatCompletionRequest, {"stop": 5}, "stop", "a string or a list of str", "invalid_type"),
        (CompletionRequest, {"prompt": 5}, "prompt", "a text, token ids, or a", "invalid_type"),
        (EmbeddingRequest, {"input": {}}, "input", "a text, token ids, or a list", "invalid_type"),
    ],
)
def test_forms(
    model: type[BaseModel], body: dict[str, Any], param: str, text: str, code: str
) -> None:
    error = refusal(model, {**REQUIRED[model], **body})
    assert (error.param, error.code) == (param, code)
    assert text in error.message
