"""The prompt of a completion request: text or token ids, one or several."""

from __future__ import annotations

from typing import Any, get_type_hints

import jsonschema_rs
import pytest
from openai.types import completion_create_params
from pydantic import ValidationError

from qwen2vl.errors import InputError
from qwen2vl.server.protocol.completions import CompletionRequest

SCHEMA = jsonschema_rs.validator_for(CompletionRequest.model_json_schema())


def test_every_field_of_the_client_is_known() -> None:
    base = completion_create_params.CompletionCreateParamsBase
    assert set(get_type_hints(base)) <= set(CompletionRequest.model_fields)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).prompt == expected
    assert SCHEMA.is_valid({"prompt": prompt})


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [1, "a"], [1, -1], [1.5], [True], [["a"]], [[-1]], {"a": 1}]
)
def test_malformed_prompts(prompt: Any) -> None:
    with pytest.raises(ValidationError) as info:
        CompletionRequest.model_validate({"prompt": prompt})
    assert info.value.errors()[0]["loc"][0] == "prompt"
    assert not SCHEMA.is_valid({"prompt": prompt})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"stream_options": {}}, "stream_options"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
    ],
)
def test_combinations(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as info:
        CompletionRequest.model_validate({"prompt": "x", **body}).check_combinations()
    assert info.value.param == param


def test_defaults() -> None:
    body = CompletionRequest.model_validate({"prompt": "x", "suffix": "", "best_of": 2, "n": 2})
    body.check_combinations()
    assert body.max_tokens == 16
    for field, value in (("suffix", "y"), ("logprobs", 21), ("max_tokens", 0)):
        with pytest.raises(ValidationError):
            CompletionRequest.model_validate({"prompt": "x", field: value})
