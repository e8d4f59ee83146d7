"""Parsing of messages in the three formats; errors name the path of the item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import NO_OPTIONS, MediaOptions
from qwen2vl.processor.messages import (
    GroundingPart,
    MediaPart,
    Message,
    Part,
    TextPart,
    ToolCall,
    parse_media_item,
    parse_messages,
)

PATH = "messages[0].content[0]"


def parse_item(item: Any) -> Part:
    """Parse one content item."""
    (part,) = parse_messages([{"role": "user", "content": [item]}])[0].parts
    return part


def image(source: Any = "a.png", options: MediaOptions = NO_OPTIONS) -> MediaPart:
    return MediaPart("image", source, options, PATH)


def video(source: Any = "a.mp4", options: MediaOptions = NO_OPTIONS) -> MediaPart:
    return MediaPart("video", source, options, PATH)


# Formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ({"type": "text", "text": "hi"}, TextPart("hi")),
        ({"text": "hi"}, TextPart("hi")),
        ({"type": "text", "text": ""}, TextPart("")),
        ({"type": "image", "image": "a.png"}, image()),
        ({"image": "a.png"}, image()),
        ({"type": "image", "url": "a.png"}, image()),
        ({"type": "image", "path": "a.png"}, image()),
        ({"type": "image", "base64": "iVBO"}, image("data:;base64,iVBO")),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, image()),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, image()),
        ({"type": "image_url", "image_url": "a.png"}, image()),
        ({"image_url": "a.png"}, image()),
        ({"type": "image", "image": "a.png", "text": None, "video": None}, image()),
        ({"type": "video", "video": "a.mp4"}, video()),
        ({"type": "video", "video": ["1.png", "2.png"]}, video(["1.png", "2.png"])),
        ({"video": "a.mp4", "fps": 2.0}, video(options=MediaOptions(fps=2.0))),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, video()),
        (
            {"image": "a.png", "min_pixels": 3136, "max_pixels": 50176},
            image(options=MediaOptions(min_pixels=3136, max_pixels=50176)),
        ),
        ({"type": "ref", "ref": "a cat"}, TextPart("<|object_ref_start|>a cat<|object_ref_end|>")),
        ({"type": "box", "box": [1, 2, 3, 4]}, GroundingPart("box", (1, 2, 3, 4), None, PATH)),
        ({"box": [[1, 2], [3, 4]], "picture": 2}, GroundingPart("box", (1, 2, 3, 4), 2, PATH)),
        ({"box": list(np.ones(4, np.float32))}, GroundingPart("box", (1, 1, 1, 1), None, PATH)),
        ({"type": "point", "point": [1.5, 2]}, GroundingPart("point", (1.5, 2), None, PATH)),
        (
            {"type": "quad", "quad": [1, 2, 3, 4, 5, 6, 7, 8]},
            GroundingPart("quad", (1, 2, 3, 4, 5, 6, 7, 8), None, PATH),
        ),
    ],
)
def test_content_items(item: dict[str, Any], part: Part) -> None:
    assert parse_item(item) == part


@pytest.mark.parametrize("source", [b"bytes", Path("a.png"), Image.new("RGB", (4, 4))])
def test_any_source_is_passed_on_unopened(source: Any) -> None:
    part = parse_item({"image": source})
    assert isinstance(part, MediaPart)
    assert part.source is source


def test_an_array_is_a_source() -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    part = parse_item({"type": "image", "image": array})
    assert isinstance(part, MediaPart)
    assert part.source is array


def test_string_content_is_one_text_part_and_an_empty_one_is_none() -> None:
    assert parse_messages([{"role": "user", "content": "hi"}]) == [
        Message("user", (TextPart("hi"),), "messages[0]")
    ]
    assert parse_messages([{"role": "system", "content": ""}])[0].parts == ()


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_every_role_may_hold_media(role: str) -> None:
    (message,) = parse_messages([{"role": role, "content": [{"image": "a.png"}]}])
    assert message.parts == (image(),)


def test_tool_calls_of_an_assistant() -> None:
    (message,) = parse_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"function": {"name": "g", "arguments": {"x": "\u4f60"}}},
                    {"name": "h", "arguments": None},
                ],
                "refusal": None,
            }
        ]
    )
    assert message.parts == ()
    assert message.tool_calls == (
        ToolCall("f", "{}", "c1"),
        ToolCall("g", '{"x": "\u4f60"}'),
        ToolCall("h", "{}"),
    )


def test_tool_results_have_a_tool_call_id() -> None:
    message = {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"}
    assert parse_messages([message])[0].tool_call_id == "c1"


def test_media_item_is_a_bare_source_or_a_mapping() -> None:
    assert parse_media_item("image", "a.png", "media[0]") == MediaPart(
        "image", "a.png", NO_OPTIONS, "media[0]"
    )
    assert parse_media_item("video", {"video": "a.mp4", "fps": 1}, "media[0]") == MediaPart(
        "video", "a.mp4", MediaOptions(fps=1), "media[0]"
    )
    with pytest.raises(InputError, match=r"media\[0\]: expected an image, got type 'video'"):
        parse_media_item("image", {"type": "video", "video": "a.mp4"}, "media[0]")


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "messages is empty; give at least"),
        ("hello", r"messages must be a list of .*, got str"),
        ({"role": "user", "content": "hi"}, r"messages must be a list of .*, got dict"),
        (["hello"], r"messages\[0\] must be .*, got 'hello'"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing or null"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is missing or null"),
        ([{"role": "user", "content": ""}], r"messages\[0\]\.content is empty; a user's turn"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content is empty; a user's turn"),
        ([{"role": "user", "content": 5}], r"content must be a string or a list of items, got int"),
        ([{"role": "user", "content": b"hi"}], r"must be a string or a list of items, got bytes"),
        ([{"role": "user", "content": {"text": "hi"}}], "a list of items, got dict"),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\]\.content\[0\] must be .*'hi'"),
        ([{"content": "hi"}], r"messages\[0\]\.role is None; known roles: system, user, assistant"),
        ([{"role": "robot", "content": "hi"}], r"messages\[0\]\.role is 'robot'; known roles"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\]\.role is \['user'\]"),
        (
            [{"role": "user", "contents": "hi"}],
            r"messages\[0\] has an unknown key 'contents'; did you mean 'content'\?",
        ),
        (
            [{"role": "user", "content": "hi", "tool_calls": []}],
            r"unknown key 'tool_calls'; known: content, role",
        ),
        ([{"role": "assistant", "tool_calls": "f()"}], r"tool_calls must be a list, got str"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\] must be"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
            r"messages\[0\]\.tool_calls\[0\] must be",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "argumnts": "{}"}]}],
            r"tool_calls\[0\] has an unknown key 'argumnts'; did you mean 'arguments'\?",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "why": ""}}]}],
            r"tool_calls\[0\]\.function has an unknown key 'why'; known: arguments, name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}, "name": "g"}]}],
            r"tool_calls\[0\] has an unknown key 'name'; known: function, id, type",
        ),
    ],
)
def test_message_errors_name_the_path(messages: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        parse_messages(messages)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({}, r'has no "type", and its keys \(none\) do not imply one'),
        ({"fps": 2}, r"has no \"type\", and its keys \('fps'\) do not imply one"),
        ({"text": "a", "image": "a.png"}, r"its keys \('text', 'image'\) do not imply"),
        ({"type": "audio", "audio": "a.wav"}, r"\.type is 'audio'; known: box, image"),
        ({"type": "vidoe", "video": "a.mp4"}, r"\.type is 'vidoe'; did you mean 'video'\?"),
        ({"type": 3}, r"\.type is 3; known"),
        ({"type": ["image"]}, r"\.type is \['image'\]"),
        (
            {"type": "image_url", "imgae_url": {"url": "a.png"}},
            r"unknown key 'imgae_url'; did you mean 'image_url'\?",
        ),
        ({"type": "text", "txt": "hi"}, r"unknown key 'txt'; did you mean 'text'\?"),
        ({"type": "text", "text": 3}, r"\.text must be a string, got int"),
        ({"type": "text"}, r"\.text must be a string, got NoneType"),
        ({"type": "ref", "ref": ["a"]}, r"\.ref must be a string, got list"),
        ({"type": "image"}, r"needs one source \(image, image_url, url, path, base64\), got"),
        ({"image": "a.png", "url": "b.png", "type": "image"}, "got image and url"),
        ({"image": "a.png", "fps": 2}, r"unknown key 'fps'; known: base64, image"),
        ({"image": "a.png", "max_pixel": 2}, r"'max_pixel'; did you mean 'max_pixels'\?"),
        ({"image_url": {"uri": "a.png"}}, r"image_url has an unknown key 'uri'; did you mean"),
        ({"image_url": {}}, r"image_url\.url is missing"),
        (
            {"image_url": {"url": "a.png", "detail": "low"}},
            r"image_url\.detail is 'low', only 'auto' is supported; set max_pixels",
        ),
        ({"video": "a.mp4", "fps": 2, "nframes": 8}, r"fps 2 and nframes 8 exclude each other"),
        ({"image": "a.png", "min_pixels": -1}, "min_pixels"),
        ({"box": [1, 2, 3]}, r"\.box must be 4 numbers in pixels, got \[1, 2, 3\]"),
        ({"box": "1,2,3,4"}, r"\.box must be 4 numbers in pixels"),
        ({"box": 3}, r"\.box must be 4 numbers in pixels, got 3"),
        ({"type": "box"}, r"\.box must be 4 numbers in pixels, got None"),
        ({"box": [1, 2, "3", 4]}, r"\.box must be 4 numbers"),
        ({"point": [1, True]}, r"\.point must be 2 numbers"),
        ({"quad": [[1, 2], [3, 4]]}, r"\.quad must be 8 numbers"),
        ({"box": [3, 2, 1, 4]}, r"\.box is \[3, 2, 1, 4\]: x2 and y2 must not be smaller"),
        ({"box": [1, 2, 3, 4], "picture": 0}, r"\.picture is 0; images are numbered from 1"),
        ({"box": [1, 2, 3, float("nan")]}, r"\.box must be 4 numbers"),
        ({"box": [1, 2, 3, 10**400]}, r"\.box must be 4 numbers"),
        ({"image": "a.png", "max_pixels": 10**400}, "must lie between 1 and 1e"),
    ],
)
def test_item_errors_name_the_path(item: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        parse_item(item)
    assert str(caught.value).startswith(PATH)
    assert "\n" not in str(caught.value)


def test_path_indexes_messages_and_items() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": [{"text": "a"}, {"text": 5}]},
    ]
    with pytest.raises(InputError, match=r"^messages\[2\]\.content\[1\]\.text must be"):
        parse_messages(messages)
