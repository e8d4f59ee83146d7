"""Sampling parameters: valid values, and the cases of the bad-input list about parameters."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from qwen2vl.engine.outputs import Completion, ItemReport, TokenLogprob
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.errors import InputError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "got -1, must be a number from 0 to 10 (0 is greedy)"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("temperature", "warm", "got 'warm', must be a number"),
        ("temperature", True, "got True"),
        ("temperature", 1e9, "got 1000000000.0"),
        ("temperature", 1e-5, "must be 0 (greedy) or from 0.001 to 10"),
        ("top_p", -0.1, "got -0.1, must be a number from 0 to 1 (1 turns it off, 0 is greedy)"),
        ("top_p", 1.1, "got 1.1"),
        ("top_p", math.nan, "got nan"),
        ("top_k", -5, "got -5, must be a whole number at least 0 (0 turns it off)"),
        ("top_k", 0.01, "got 0.01"),
        ("top_k", "many", "got 'many'"),
        ("repetition_penalty", 0, "got 0, must be a number from 0.001"),
        ("repetition_penalty", 5e-324, "got 5e-324, must be a number from 0.001"),
        ("repetition_penalty", -1.0, "got -1.0"),
        ("min_p", 1.1, "got 1.1, must be a number from 0 to 1 (0 turns it off)"),
        ("min_p", None, "got None"),
        ("presence_penalty", -2.5, "got -2.5, must be a number from -2 to 2 (0 turns it off)"),
        ("frequency_penalty", 3, "got 3, must be a number from -2 to 2"),
        ("frequency_penalty", math.nan, "got nan"),
        ("n", 0, "got 0, must be a whole number from 1 to 128"),
        ("n", 129, "got 129"),
        ("n", True, "got True"),
        ("logit_bias", {-1: 2}, "got -1, must be token ids"),
        ("logit_bias", {"5": 2}, "got '5', must be token ids"),
        ("logit_bias", {5: 101}, "token 5: got 101, must be a number from -100 to 100"),
        ("logit_bias", {5: None}, "token 5: got None"),
        ("logit_bias", [5], "got [5], must be token ids with their biases"),
        ("logit_bias", (5,), "got 5, must be a token id with its bias"),
        ("logit_bias", dict.fromkeys(range(1025), 1.0), "got 1025 tokens, at most 1024"),
        ("max_tokens", 0, "got 0, must be a whole number from 1"),
        ("max_tokens", -1, "got -1"),
        ("max_tokens", 1e12, "got 1000000000000.0"),
        ("max_tokens", 10**12, "got 1000000000000"),
        ("max_tokens", None, "got None"),
        ("logprobs", 25, "got 25, must be a whole number from 0 to 20"),
        ("logprobs", -1, "got -1"),
        ("ignore_eos", "no", "got 'no', must be True or False"),
        ("skip_special_tokens", None, "got None, must be True or False"),
        ("skip_grounding_tokens", 1, "got 1, must be True or False"),
        ("seed", 2**64, "got 18446744073709551616, must be a whole number from 0 to"),
        ("seed", -1, "got -1"),
        ("seed", 1.5, "got 1.5"),
        ("stop", "", "text 1 is empty and would end every answer"),
        ("stop", ["a", ""], "text 2 is empty"),
        ("stop", ["x"] * 1000, "got 1000 texts, at most 32"),
        ("stop", ["x" * 257], "has 257 characters, at most 256"),
        ("stop", [3], "text 1 is 3, must be a string"),
        ("stop", 3, "got 3, must be a text or a list of texts"),
        ("stop", None, "got None"),
        ("stop_token_ids", [-1], "got -1, must be token ids"),
        ("stop_token_ids", ["x"], "got 'x'"),
        ("stop_token_ids", 3, "got 3, must be a list of token ids"),
        ("stop_token_ids", "12", "got '12', must be a list of token ids"),
    ],
)
def test_invalid_values_are_rejected_with_the_field_name(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{field: value})
    text = str(caught.value)
    assert text.startswith(f"{field}: ")
    assert message in text
    assert "\n" not in text


def test_grounding_tokens_are_skipped_with_the_other_special_tokens_only() -> None:
    with pytest.raises(InputError, match="skip_grounding_tokens: got True with skip_special_tok"):
        SamplingParams(skip_grounding_tokens=True, skip_special_tokens=False)


def test_a_huge_invalid_value_is_abbreviated_in_the_message() -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(temperature="9" * 1_000_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 10, "top_p": 0, "top_k": 10**9, "repetition_penalty": 10},
        {"seed": 2**64 - 1, "max_tokens": 1, "logprobs": 0},
        {"seed": 0, "max_tokens": 1_000_000, "logprobs": 20},
        {"stop": ["x" * 256] * 16, "stop_token_ids": [0]},
        {"min_p": 1, "presence_penalty": -2, "frequency_penalty": 2, "n": 128},
        {"logit_bias": {0: -100, 7: 100}},
    ],
)
def test_boundary_values_are_allowed(params: dict[str, Any]) -> None:
    SamplingParams(**params)


def test_a_single_stop_string_becomes_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_logit_bias_becomes_sorted_pairs() -> None:
    params = SamplingParams(logit_bias={7: 1.5, 3: -2})
    assert params.logit_bias == ((3, -2), (7, 1.5))
    assert replace(params, max_tokens=3).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias={3: -2, 7: 1.5}))


def test_params_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().max_tokens = 3  # type: ignore[misc]


def test_a_completion_is_json_serializable() -> None:
    item = ItemReport(
        kind="image", name="a.png", original_size=(30, 40), resized_size=(28, 28), tokens=1
    )
    logprob = TokenLogprob(token_id=5, logprob=-0.5, top=((5, -0.5), (6, -1.0)))
    completion = Completion(
        text="Hi",
        token_ids=(5,),
        finish_reason="stop",
        prompt_tokens=9,
        image_tokens=1,
        video_tokens=0,
        items=(item,),
        logprobs=(logprob,),
    )
    as_dict = json.loads(json.dumps(completion.to_dict()))
    assert as_dict["items"][0]["original_size"] == [30, 40]
    assert as_dict["logprobs"][0]["top"][1] == [6, -1.0]
    assert set(as_dict["seconds"]) == {"process", "queue", "vision", "prefill", "decode"}


@pytest.mark.parametrize(
    ("name", "text"),
    [("temprature", "did you mean temperature?"), ("stops", "did you mean stop?")],
)
def test_a_misspelled_parameter_is_refused_with_a_suggestion(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**{name: 1})
    assert str(caught.value) == f"{name}: there is no such parameter; {text}"
