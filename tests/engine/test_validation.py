"""Validation against the model: consistency of prompts, and parameters without effect."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.engine.validation import check_model_input, ineffective_parameters
from qwen2vl.errors import InputError
from qwen2vl.weights import GenerationDefaults
from tests.engine.test_llm import random_image, user
from tests.tiny import tiny_config, tiny_model, tiny_processor

SOURCE = "the checkpoint's generation_config.json"
TOP_K_1 = GenerationDefaults(do_sample=True, top_k=1, temperature=0.01)
GREEDY_FILE = GenerationDefaults(do_sample=False)


def test_prompts_of_the_processor_are_accepted() -> None:
    check_model_input(tiny_processor()([user("Hi", random_image())]), tiny_config())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"input_ids": []}, "the prompt has no tokens"),
        ({"input_ids": [1, "2"]}, "input_ids holds more than token ids"),
        ({"input_ids": [1, 2**70]}, "input_ids holds more than token ids"),
        ({"input_ids": [-1, 2]}, "-1 is not a token of this model, whose ids are 0 to"),
        ({"input_ids": [1, 2, 10**6]}, "1000000 is not a token of this model"),
        ({"input_ids": [1, 2]}, r"position_ids_3T does not have the shape \(3, 2\)"),
        (
            {"placeholder_index_M": torch.arange(3)},
            "_M has 3 entries for images and videos of 6",
        ),
        ({"cache_salt": "key"}, "cache_salt: got 'key', must be bytes"),
        ({"items": ()}, "placeholder_index_M has 6 entries for images and videos of 0"),
    ],
)
def test_inconsistent_prompts_are_refused(changes: dict[str, Any], text: str) -> None:
    prompt = tiny_processor()([user("Hi", random_image())])
    with pytest.raises(InputError, match=text):
        check_model_input(replace(prompt, **changes), tiny_config())


@pytest.mark.parametrize(
    ("defaults", "given", "texts"),
    [
        (
            TOP_K_1,
            {"temperature": 1.0},
            [f"temperature=1.0 has no effect: {SOURCE} sets top_k=1 (greedy); give top_k=0 to sa"],
        ),
        (TOP_K_1, {"n": 3}, [f"n=3 gives equal completions: {SOURCE} sets top_k=1 (greedy)"]),
        (TOP_K_1, {"temperature": 1.0, "seed": 7}, ["temperature=1.0", "seed=7 has no effect"]),
        (TOP_K_1, {"temperature": 1.0, "top_k": 0}, []),
        (TOP_K_1, {"temperature": 1.0, "top_k": 1}, []),  # the caller's own choice
        (TOP_K_1, {"temperature": 0, "seed": 7}, []),
        (TOP_K_1, {}, []),
        (GREEDY_FILE, {"seed": 7}, [f"seed=7 has no effect: {SOURCE} sets no do_sample=true"]),
        (GREEDY_FILE, {"top_p": 0.5}, ["give temperature=1 to sample"]),
        (GREEDY_FILE, {"temperature": 1.0, "seed": 7}, []),
        (
            GenerationDefaults(do_sample=True, top_k=1, temperature=0),
            {"seed": 7},
            ["sets temperature=0 and sets top_k=1 (greedy); give temperature=1 and top_k=0 to"],
        ),
    ],
)
def test_parameters_without_effect(
    defaults: GenerationDefaults, given: dict[str, Any], texts: list[str]
) -> None:
    found = [text for _, text in ineffective_parameters(SamplingParams(**given), defaults, SOURCE)]
    assert len(found) == len(texts)
    for text, expected in zip(found, texts, strict=True):
        assert expected in text


def test_each_parameter_without_effect_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(tiny_model(), tiny_processor(), generation_defaults=TOP_K_1)
    with caplog.at_level(logging.WARNING, "qwen2vl"):
        for _ in range(2):
            llm.chat("Hi", temperature=1.0, max_tokens=1)
        llm.generate("Hi", seed=1, max_tokens=1)
        llm.stream("Hi", n=2, max_tokens=1)
        llm.prepare("Hi", SamplingParams(temperature=0.5))
    names = [record.getMessage().partition("=")[0] for record in caplog.records]
    assert names == ["temperature", "seed", "n"]
    assert "generation_defaults sets top_k=1" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "<|box_start|>(1,2)<|box_end|>"),
        ({"skip_grounding_tokens": True}, "(1,2)"),
        ({"skip_special_tokens": False}, "<|vision_start|><|box_start|>(1,2)<|box_end|>"),
    ],
)
def test_which_special_tokens_the_text_of_a_request_keeps(given: dict[str, Any], text: str) -> None:
    llm = LLM(tiny_model(), tiny_processor())
    (request,) = llm.create_requests(llm.processor([user("Hi")]), SamplingParams(**given))
    answer = "<|vision_start|><|box_start|>(1,2)<|box_end|>"
    tokenizer = llm.processor.tokenizer
    token_ids = tokenizer.encode_text(answer, allowed_special="all")
    assert "".join(map(request.append, token_ids)) == request.text == text
    assert tokenizer.decode(request.output_token_ids) == "<|box_start|>(1,2)<|box_end|>"
