"""Fields that requests share: strictness, bounds, neutral values, and SamplingParams of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qwen2vl.engine import Grammar
from qwen2vl.errors import InputError
from qwen2vl.server.protocol.sampling import SamplingFields, build_sampling_params, invalid_field


def loc_of(info: pytest.ExceptionInfo[ValidationError]) -> tuple[Any, ...]:
    return info.value.errors()[0]["loc"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e9),
        ("temperature", 10**400),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -5),
        ("top_k", 0.01),
        ("top_k", 10**12),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "1"}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("logit_bias", [1]),
        ("n", 0),
        ("n", 9),
        ("n", 1.0),
        ("n", 10**6),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "x" * 257),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", ["1"]),
        ("ignore_eos", 1),
        ("cache_salt", "x" * 1025),
        ("cache_salt", ""),
        ("min_tokens", 1),
        ("prompt_logprobs", 0),
        ("use_beam_search", True),
        ("length_penalty", 2),
        ("bad_words", ["x"]),
        ("truncate_prompt_tokens", 5),
        ("temprature", 1),
    ],
)
def test_bad_values_are_refused_at_their_place(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as info:
        SamplingFields.model_validate({field: value})
    assert loc_of(info)[0] == field


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0, 1, 0.5, None]),
        ("stop", ["x", ["x", "y"], [], None]),
        ("logit_bias", [{}, {"0": -100, "151643": 1.5}, None]),
        ("seed", [0, -1, 2**64 - 1]),
        ("top_k", [-1, 0, 5]),
        ("min_tokens", [0, None]),
        ("use_beam_search", [False]),
        ("length_penalty", [1, 1.0]),
        ("bad_words", [[], None]),
        ("priority", [0]),
        ("user", ["me"]),
        ("metadata", [{"a": "b"}, None]),
    ],
)
def test_good_values_are_accepted(field: str, values: list[Any]) -> None:
    for value in values:
        SamplingFields.model_validate({field: value})


def test_a_zero_is_no_false() -> None:
    with pytest.raises(ValidationError, match="not supported"):
        SamplingFields.model_validate({"min_tokens": False})


def test_the_schema_shows_the_bounds() -> None:
    schema = json.dumps(SamplingFields.model_json_schema())
    properties = SamplingFields.model_json_schema()["properties"]
    assert properties["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 8}
    assert properties["stop"]["anyOf"][1]["maxItems"] == 16
    assert properties["min_tokens"]["enum"] == [0, None]
    assert "Infinity" not in schema and "NaN" not in schema


def build(body: dict[str, Any], **options: Any) -> Any:
    fields = SamplingFields.model_validate(body)
    return build_sampling_params(fields, **{"max_tokens": 5, "max_model_len": 100, **options})


def test_defaults_are_those_of_the_model() -> None:
    params = build({}, max_tokens=None)
    assert params.temperature is params.top_p is params.top_k is params.seed is None
    assert params.max_tokens == 100 and params.n == 1 and params.logprobs is None
    assert params.skip_special_tokens and params.skip_grounding_tokens


def test_values_are_passed_on() -> None:
    grammar = Grammar.regex("a")
    params = build(
        {
            "temperature": 0.5,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "logit_bias": {"7": 5, "3": -5},
            "n": 2,
            "seed": -1,
            "stop": "x",
            "stop_token_ids": [4],
            "skip_special_tokens": False,
        },
        logprobs=3,
        grammar=grammar,
        adapter="a",
        stop=("y",),
    )
    assert (params.temperature, params.top_k, params.min_p) == (0.5, 0, 0.1)
    assert (params.repetition_penalty, params.presence_penalty) == (1.1, 1)
    assert params.frequency_penalty == -1 and params.logit_bias == ((3, -5), (7, 5))
    assert (params.n, params.seed, params.stop) == (2, 2**64 - 1, ("x", "y"))
    assert params.stop_token_ids == (4,) and params.max_tokens == 5
    assert not params.skip_special_tokens and not params.skip_grounding_tokens
    assert (params.logprobs, params.grammar, params.adapter) == (3, grammar, "a")


def test_errors_name_the_field() -> None:
    with pytest.raises(InputError) as info:
        build({"temperature": 0.0001})
    assert info.value.param == "temperature"
    assert str(invalid_field("a", "b")) == "a: b" and invalid_field("a", "b").param == "a"
