"""Options of a request for all its media, and those of single items."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.content import MediaPart
from qwen2vl.processor.media_options import MediaOptions
from qwen2vl.processor.messages import parse_messages
from qwen2vl.server.media.options import with_media_defaults


def options_of(defaults: MediaOptions, item: dict[str, Any]) -> dict[str, int | float]:
    source = {"image_url": "data:,"} if item["type"] == "image_url" else {"video_url": "data:,"}
    messages = parse_messages([{"role": "user", "content": [{**source, **item}]}])
    (part,) = with_media_defaults(messages, defaults)[0].parts
    assert isinstance(part, MediaPart)
    return part.options.to_dict()


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"type": "image_url"}, {"min_pixels": 50, "max_pixels": 100}),
        ({"type": "image_url", "max_pixels": 70}, {"min_pixels": 50, "max_pixels": 70}),
        ({"type": "image_url", "detail": "low"}, {"min_pixels": 50}),
        ({"type": "image_url", "detail": "high"}, {"min_pixels": 50, "max_pixels": 100}),
        (
            {"type": "image_url", "resized_height": 28, "resized_width": 56},
            {"resized_height": 28, "resized_width": 56},
        ),
        ({"type": "video_url"}, {"min_pixels": 50, "max_pixels": 100, "fps": 3.0}),
        (
            {"type": "video_url", "nframes": 4},
            {"min_pixels": 50, "max_pixels": 100, "nframes": 4},
        ),
    ],
)
def test_an_item_keeps_its_own_options(item: dict[str, Any], expected: dict[str, Any]) -> None:
    defaults = MediaOptions(min_pixels=50, max_pixels=100, fps=3.0)
    assert options_of(defaults, item) == expected


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="greater than max_pixels") as info:
        options_of(MediaOptions(max_pixels=100), {"type": "image_url", "min_pixels": 200})
    assert info.value.param == "messages[0].content[0]"
