"""Options for all media of a request, and the schema of messages against what is accepted."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from pydantic import TypeAdapter, ValidationError

from qwen2vl.errors import InputError
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.protocol.content import MediaFields, MessageList

URL = "data:image/png;base64,AAAA"
SCHEMA = jsonschema_rs.validator_for(TypeAdapter(MessageList).json_schema())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, NO_OPTIONS),
        ({"min_pixels": 5, "max_pixels": 9}, MediaOptions(min_pixels=5, max_pixels=9)),
        ({"fps": 2}, MediaOptions(fps=2)),
        ({"num_frames": 4}, MediaOptions(nframes=4)),
        (
            {"mm_processor_kwargs": {"max_pixels": 9, "fps": 1.5}},
            MediaOptions(max_pixels=9, fps=1.5),
        ),
        (
            {"mm_processor_kwargs": {"size": {"shortest_edge": 5, "longest_edge": 9}}},
            MediaOptions(min_pixels=5, max_pixels=9),
        ),
        (
            {"media_io_kwargs": {"image": {}, "video": {"num_frames": 4}}},
            MediaOptions(nframes=4),
        ),
        ({"fps": 2, "media_io_kwargs": {"video": {"fps": 2.0}}}, MediaOptions(fps=2)),
    ],
)
def test_options(body: dict[str, Any], expected: MediaOptions) -> None:
    assert MediaFields.model_validate(body).media_options() == expected


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"min_pixels": 9, "max_pixels": 5}, "min_pixels", "greater than max_pixels"),
        ({"fps": 2, "num_frames": 4}, "fps", "num_frames 4 exclude each other"),
        ({"fps": 2, "mm_processor_kwargs": {"fps": 3}}, "fps", "given twice, as 2.0 and 3.0"),
        (
            {"num_frames": 2, "media_io_kwargs": {"video": {"num_frames": 3}}},
            "num_frames",
            "given twice",
        ),
    ],
)
def test_contradictions(body: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InputError, match=text) as info:
        MediaFields.model_validate(body).media_options()
    assert info.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        {"min_pixels": 0},
        {"max_pixels": "9"},
        {"fps": -1},
        {"num_frames": 1.5},
        {"mm_processor_kwargs": {"max_pixel": 9}},
        {"media_io_kwargs": {"image": {"mode": "L"}}},
        {"media_io_kwargs": {"audio": {}}},
    ],
)
def test_malformed_options(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MediaFields.model_validate(body)


def user(*items: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(items)}]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}],
        [{"role": "developer", "content": "x"}, {"role": "user", "content": "x", "name": "me"}],
        user({"type": "text", "text": "x"}),
        user({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}),
        user({"type": "image_url", "image_url": URL, "min_pixels": 5, "max_pixels": 9}),
        user({"type": "image", "image": URL}),
        user({"type": "video_url", "video_url": {"url": URL}, "fps": 2}),
        user({"type": "video", "video": [URL, URL], "num_frames": 2}),
        [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "a", "content": "x"},
        ],
    ],
)
def test_messages_that_the_schema_and_the_processor_accept(messages: list[Any]) -> None:
    assert SCHEMA.is_valid(messages)
    parse_messages(messages)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "x"}],
        [{"role": "bot", "content": "x"}],
        user({"type": "image_url"}),
        user({"type": "imgae_url", "imgae_url": URL}),
        user({"type": "image_url", "image_url": URL, "max_pixels": 0}),
        user({"type": "image_url", "image_url": {"ur": URL}}),
        user({"type": "video_url", "video_url": URL, "fps": 0}),
    ],
)
def test_messages_that_neither_accepts(messages: list[Any]) -> None:
    assert not SCHEMA.is_valid(messages)
    with pytest.raises(InputError):
        parse_messages(messages)
