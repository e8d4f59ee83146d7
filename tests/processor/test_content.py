"""Content items in the three formats; errors name the path of the item."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.errors import InputError, UnknownKeyError
from qwen2vl.processor.content import GroundingPart, MediaPart, Part, TextPart, parse_media_item
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.messages import parse_messages

PATH = "messages[0].content[0]"
URL = "data:image/png;base64,iVBO"
NESTED: list[Any] = []
for _ in range(20_000):  # deeper than the stack of repr and str
    NESTED = [NESTED]


class Dumped:
    """An object of a client library: its fields are read by `model_dump`, as of pydantic."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def model_dump(self) -> dict[str, Any]:
        return self._fields


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


@pytest.mark.parametrize(
    "source",
    [b"bytes", Path("a.png"), Image.new("RGB", (4, 4)), BytesIO(b"bytes"), torch.zeros(3, 9, 9)],
)
def test_any_source_is_passed_on_unopened(source: Any) -> None:
    part = parse_item({"image": source})
    assert isinstance(part, MediaPart)
    assert part.source is source


def test_an_array_is_a_source() -> None:
    array = np.zeros((4, 4, 3), np.uint8)
    part = parse_item({"type": "image", "image": array})
    assert isinstance(part, MediaPart)
    assert part.source is array


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ({"type": "input_text", "text": "hi"}, TextPart("hi")),
        (
            {"type": "output_text", "text": "hi", "annotations": [], "logprobs": None},
            TextPart("hi"),
        ),
        ({"type": "refusal", "refusal": "I cannot."}, TextPart("I cannot.")),
        ({"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}, TextPart("hi")),
        ({"type": "output_text", "text": "hi", "parsed": {"a": 1}}, TextPart("hi")),
        (
            {"type": "image", "image": "a.png", "uuid": "x", "cache_control": {}},
            image(),
        ),
        ({"type": "video", "video": "a.mp4", "uuid": "x", "cache_control": {}}, video()),
        (
            {"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None},
            image(URL, MediaOptions(detail="auto")),
        ),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            image(URL, MediaOptions(detail="low")),
        ),
        (
            {
                "type": "image_url",
                "image_url": {"url": URL},
                "prompt_cache_breakpoint": {"mode": "explicit"},
            },
            image(URL),
        ),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "high"}, "max_pixels": 9999},
            image(URL, MediaOptions(detail="high", max_pixels=9999)),
        ),
        (Dumped(type="image_url", image_url={"url": URL, "detail": None}), image(URL)),
        ({"type": "image_url", "image_url": Dumped(url=URL)}, image(URL)),
        (Dumped(type="text", text="hi", prompt_cache_breakpoint=None), TextPart("hi")),
    ],
)
def test_items_of_openai(item: Any, part: Part) -> None:
    assert parse_item(item) == part


def test_media_item_is_a_bare_source_or_a_mapping() -> None:
    assert parse_media_item("image", "a.png", "media[0]") == MediaPart(
        "image", "a.png", NO_OPTIONS, "media[0]"
    )
    assert parse_media_item("video", {"video": "a.mp4", "fps": 1}, "media[0]") == MediaPart(
        "video", "a.mp4", MediaOptions(fps=1), "media[0]"
    )
    with pytest.raises(InputError, match=r"media\[0\]: expected an image, got type 'video'"):
        parse_media_item("image", {"type": "video", "video": "a.mp4"}, "media[0]")


# Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({}, r'has no "type", and its keys \(none\) do not imply one'),
        ({"fps": 2}, r"has no \"type\", and its keys \('fps'\) do not imply one"),
        ({"text": "a", "image": "a.png"}, r"its keys \('text', 'image'\) do not imply"),
        ({"type": "sound", "sound": "a.wav"}, r"\.type is 'sound'; known: box, image"),
        ({"type": "vidoe", "video": "a.mp4"}, r"\.type is 'vidoe'; did you mean video\?"),
        ({"type": 3}, r"\.type is 3; known"),
        ({"type": ["image"]}, r"\.type is \['image'\]; known: box, image"),
        ({"type": NESTED}, r"\.type is .{1,60}; known: box, image"),
        ({"text": "a", 10**5000: 1}, "unknown key <int>; known: text, type"),
        (
            {"type": "image_url", "imgae_url": {"url": "a.png"}},
            r"unknown key 'imgae_url'; did you mean image_url\?",
        ),
        ({"type": "text", "txt": "hi"}, r"unknown key 'txt'; did you mean text\?"),
        ({"type": "text", "text": 3}, r"\.text must be a string, got int"),
        ({"type": "text"}, r"\.text must be a string, got NoneType"),
        ({"type": "ref", "ref": ["a"]}, r"\.ref must be a string, got list"),
        ({"type": "image"}, r"needs one source \(image, image_url, url, base64\), got"),
        ({"image": "a.png", "url": "b.png", "type": "image"}, "got image and url"),
        ({"image": "a.png", "fps": 2}, r"unknown key 'fps'; known: base64, detail"),
        ({"image": "a.png", "max_pixel": 2}, r"'max_pixel'; did you mean max_pixels\?"),
        ({"image_url": {"uri": "a.png"}}, r"image_url has an unknown key 'uri'; did you mean"),
        ({"image_url": {}}, r"image_url\.url is missing"),
        (
            {"image_url": {"url": "a.png", "detail": "medium"}},
            "detail is 'medium', must be one of low",
        ),
        (
            {"image_url": {"url": "a.png", "detail": "low"}, "detail": "low"},
            "image_url.detail and the item's own detail are both given; give one",
        ),
        (
            {"image": "a.png", "detail": "low", "max_pixels": 784},
            "max_pixels 784 and detail 'low', which is max_pixels 262144, exclude each other",
        ),
        ({"type": "input_image", "file_id": "f1"}, r"\.file_id cannot be used: files uploaded to"),
        ({"type": "input_audio", "input_audio": {}}, "'input_audio': audio is not supported"),
        ({"type": "file", "file": {}}, "'file': documents are not read; give their text"),
        ({"image": "a.png", "annotations": []}, "unknown key 'annotations'"),
        ({"type": "image", "base64": b"iVBO"}, r"\.base64 must be a string, got bytes"),
        ({"text": "a", "x" * 200: 1}, r"unknown key 'x{56}\.\.\.; known: text, type"),
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


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"video": "a", "fps": 2, "num_frames": 4}, "fps 2 and num_frames 4 exclude each other"),
        ({"video": "a", "fps": 2, "nframes": 4}, "fps 2 and nframes 4 exclude each other"),
        ({"video": "a", "num_frames": 0}, "num_frames is 0, must lie between"),
    ],
)
def test_errors_name_the_key_that_was_written(item: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_item(item)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "text", "text": "hi", "txet": 1},
        {"type": "image", "image": "a.png", "pth": 1},
        {"type": "image_url", "image_url": {"url": "a.png", "sizes": "low"}},
        {"type": "text", "text": "hi", "uuid": "x"},
        {"type": "box", "box": [1, 2, 3, 4], "pictur": 1},
    ],
)
def test_unknown_keys_have_their_own_class(item: dict[str, Any]) -> None:
    """A server sends another code for them; local paths are not suggested to its clients."""
    with pytest.raises(UnknownKeyError) as caught:
        parse_item(item)
    assert caught.value.code == "unknown_parameter"
    assert "path" not in str(caught.value)
