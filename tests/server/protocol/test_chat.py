"""Fields of chat requests: all of OpenAI's and vLLM's are known, accepted or refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types.chat import completion_create_params
from pydantic import ValidationError

from qwen2vl.errors import InputError
from qwen2vl.server.protocol.chat import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatDelta,
    ChunkChoice,
)

HELLO = [{"role": "user", "content": "Hello"}]


def parse(**body: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": HELLO, **body})


def test_every_field_of_the_client_is_known() -> None:
    params = completion_create_params.CompletionCreateParamsStreaming
    names = {n for base in params.__orig_bases__ for n in get_type_hints(base)}  # type: ignore[attr-defined]
    names |= set(params.__annotations__)
    assert {"messages", "logprobs", "store", "stream"} <= names
    assert names <= set(ChatCompletionRequest.model_fields), "new fields of OpenAI's API"


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"safety_identifier": "x", "prompt_cache_key": "y", "reasoning_effort": "none"},
        {"verbosity": "low", "modalities": ["text"], "prediction": None, "audio": None},
        {"function_call": "none", "functions": [], "documents": [], "chat_template_kwargs": {}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"request_id": "x", "include_reasoning": True, "return_tokens_as_token_ids": False},
        {"vllm_xargs": {}, "kv_transfer_params": None, "thinking_token_budget": None},
        {"chat_template_kwargs": {"enable_thinking": False, "thinking": None}},
        {"media_io_kwargs": {"video": {"num_frames": -1, "fps": 2}}},
        {"media_io_kwargs": {"video": {"num_frames": None}}},
        {name: None for name in ChatCompletionRequest.model_fields if name != "messages"},
    ],
)
def test_fields_that_change_nothing_are_accepted(body: dict[str, Any]) -> None:
    parse(**body).check_combinations()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("web_search_options", {}),
        ("moderation", {"model": "x"}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("documents", [{"text": "x"}]),
        ("echo", True),
        ("prompt_logprobs", 1),
        ("return_tokens_as_token_ids", True),
        ("vllm_xargs", {"a": 1}),
        ("kv_transfer_params", {}),
        ("thinking_token_budget", 10),
        ("repetition_detection", {}),
        ("guided_whitespace_pattern", " "),
        ("structured_outputs", {"json": {}, "whitespace_pattern": " "}),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("chat_template_kwargs", {"enable_thinking": 0}),
        ("chat_template_kwargs", {"enable_thinking": False, "tokenize": False}),
        ("chat_template_kwargs", []),
        ("media_io_kwargs", {"video": {"num_frames": -2}}),
        ("media_io_kwargs", {"video": {"num_frames": 0}}),
        ("media_io_kwargs", {"image": {"num_frames": -1}}),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1e12),
        ("max_completion_tokens", 10**12),
        ("top_logprobs", 21),
        ("logprobs", 3),
        ("logprobs", "true"),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hi"),
        ("messages", [None] * 513),
        ("tools", [None] * 129),
        ("min_pixels", 0),
        ("max_pixels", 10**9),
        ("fps", 0),
        ("fps", float("inf")),
        ("num_frames", -1),
        ("num_frames", 2.0),
        ("mm_processor_kwargs", {"device": "cuda"}),
        ("media_io_kwargs", {"video": {"backend": "opencv"}}),
        ("stream_options", {"include_usag": True}),
    ],
)
def test_others_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as info:
        parse(**{field: value})
    assert info.value.errors()[0]["loc"][0] == field


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_combinations(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as info:
        parse(**body).check_combinations()
    assert info.value.param == param


def test_number_of_logprobs() -> None:
    assert parse().num_logprobs is None
    assert parse(logprobs=True).num_logprobs == 0
    assert parse(logprobs=True, top_logprobs=4).num_logprobs == 4


def test_the_schema_describes_messages() -> None:
    schema = ChatCompletionRequest.model_json_schema()
    messages = schema["properties"]["messages"]
    assert messages["maxItems"] == 512 and messages["minItems"] == 1
    text = json.dumps(messages)
    for name in ("image_url", "video_url", "tool_calls", "max_pixels", "num_frames"):
        assert f'"{name}"' in text
    assert schema["additionalProperties"] is False
    for model in (ChatCompletionResponse, ChatCompletionChunk):
        assert "choices" in model.model_json_schema(mode="serialization")["properties"]


def test_fields_without_a_value_are_left_out_of_chunks() -> None:
    choice = ChunkChoice(index=0, delta=ChatDelta(content="x"))
    chunk = ChatCompletionChunk(id="i", created=1, model="m", choices=[choice])
    assert json.loads(chunk.model_dump_json()) == {
        "id": "i",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"content": "x"},
                "logprobs": None,
                "finish_reason": None,
                "stop_reason": None,
            }
        ],
    }
