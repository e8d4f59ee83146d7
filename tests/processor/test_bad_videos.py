"""Unusual and damaged videos. Test ids are the cases of the project's list of bad inputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.image import unpatchify
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.media.source import MediaLimits
from tests.media import (
    VISION,
    animation,
    audio_only,
    encoded,
    encoded_video,
    smooth,
    video,
    wiped,
    with_matrix,
)

LIBRARY_INTERNALS = re.compile(r"avcodec|Errno|Traceback|BytesIO|PIL|tuple index|<none>", re.I)
FRAME = smooth(56, 56)


def error_text(source: Any, **options: Any) -> str:
    """Return the text of the InputError; check that it is one line without library internals."""
    with pytest.raises(InputError) as caught:
        video(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert not LIBRARY_INTERNALS.search(text), text
    return text


@functools.cache
def hour_long_video() -> bytes:
    return encoded_video(3600, rate=1, width=32, height=32, codec="mpeg4")


REJECTED: list[tuple[str, Callable[[], Any], dict[str, Any], str]] = [
    (
        "MP4 cut in half (no moov)",
        lambda: (data := encoded_video())[: len(data) // 2],
        {},
        r"video 1 has no decodable video stream \(video/mp4, cut short or damaged\)",
    ),
    ("zero-frame video / empty bytes / text as video", lambda: b"", {}, r"is empty \(0 bytes\)"),
    (
        "zero-frame video / empty bytes / text as video",
        lambda: b"not a video",
        {},
        "is text/plain, not a supported video; supported are MP4, MOV",
    ),
    (
        "zero-frame video / empty bytes / text as video",
        lambda: (data := encoded_video(4, container="matroska"))[: data.index(b"\x1fC\xb6u")],
        {},
        r"has no decodable video stream \(video/x-matroska, cut short or damaged\)",
    ),
    (
        "broken frames from the first on",
        lambda: wiped(
            data := encoded_video(), (data.index(b"mdat") + 4) / len(data), len(data) // 2
        ),
        {},
        "video 1: no frame can be decoded; it is damaged or cut short",
    ),
    (
        "PNG sent as video",
        lambda: encoded(FRAME),
        {},
        r"video 1 is an image \(image/png\); give it as image, not video",
    ),
    ("audio-only MP4", audio_only, {}, r"has no video stream \(only audio\)"),
    (
        "nframes larger than video, nframes=0, negative, float",
        encoded_video,
        {"nframes": 0},
        "nframes is 0, must lie between 1",
    ),
    (
        "nframes larger than video, nframes=0, negative, float",
        encoded_video,
        {"nframes": -4},
        "nframes is -4, must lie between 1",
    ),
    (
        "nframes larger than video, nframes=0, negative, float",
        encoded_video,
        {"nframes": 4.0},
        "nframes is 4.0, must be a whole number",
    ),
    ("fps and nframes both given", encoded_video, {"fps": 2.0, "nframes": 4}, "use either one"),
    (
        "unsupported codec / 8k H.264",
        lambda: encoded_video().replace(b"avc1", b"zzzz"),
        {},
        "video codec 'zzzz' is not supported; convert it to H.264 in MP4",
    ),
    (
        "unsupported codec / 8k H.264",
        lambda: encoded_video(1, width=7680, height=4320, options={"preset": "ultrafast"}),
        {"limits": MediaLimits(max_image_pixels=8_847_360)},
        "is 7680 x 4320, limit is 8,847,360 pixels a frame; resize it first",
    ),
    (
        "hour-long or 4K video",
        hour_long_video,
        {"limits": MediaLimits(max_seconds=1800)},
        "lasts 3,600 s, limit is 1,800 s; cut it first",
    ),
    (
        "hour-long or 4K video",
        hour_long_video,
        {"limits": MediaLimits(max_frames=1000)},
        "has more than 1,000 frames, which is the limit",
    ),
    (
        "hour-long or 4K video",
        hour_long_video,
        {"limits": MediaLimits(max_bytes=1000)},
        "bytes, limit is 1,000; send a smaller file",
    ),
    (
        "hour-long or 4K video",
        hour_long_video,
        {"limits": MediaLimits(decode_timeout=0.01)},
        "took more than 0.01 s to decode",
    ),
    (
        "list-of-frames video with different sizes or a bad frame",
        lambda: [FRAME, FRAME, smooth(56, 84)],
        {},
        r"frames\[2\] is 84 x 56, but frames\[0\] is 56 x 56",
    ),
    (
        "list-of-frames video with different sizes or a bad frame",
        lambda: [FRAME, encoded(FRAME, "JPEG")[:300], FRAME],
        {},
        r"frames\[1\] is (a )?damaged",
    ),
]


@pytest.mark.parametrize(
    ("make", "options", "text"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED]
)
def test_rejected(make: Callable[[], Any], options: dict[str, Any], text: str) -> None:
    assert re.search(text, error_text(make(), **options))


def num_frames(item: Item) -> int:
    return len(item.frame_timestamps)


def is_rotated(item: Item) -> bool:
    """Return whether the bright corner is at the bottom right: a quarter turn clockwise."""
    frame = unpatchify(item.patches_NP, item.grid, VISION)[0]
    rows, columns = frame.shape[1] // 2, frame.shape[2] // 2
    quarters = frame.float().mean(0).unflatten(0, (2, rows)).unflatten(2, (2, columns)).mean((1, 3))
    return item.original_size == (64, 48) and int(quarters.argmax()) == 3


def has_nearest_timestamps(item: Item) -> bool:
    """Of frames at 0, 0.1, 0.2, 5, 5.1 and 10 s, the nearest to each half second is sampled."""
    targets = np.linspace(0, 10, num_frames(item))
    timestamps = np.array([0, 0.1, 0.2, 5, 5.1, 10])
    nearest = timestamps[np.abs(timestamps[:, None] - targets).argmin(0)]
    return bool(np.allclose(item.frame_timestamps, nearest)) and num_frames(item) == 20


ACCEPTED: list[tuple[str, Callable[[], Any], dict[str, Any], Callable[[Item], bool]]] = [
    (
        "broken frames in the middle",
        lambda: wiped(encoded_video(40, width=320, height=240), 0.5, 340),
        {},
        lambda item: 0 < item.frame_timestamps[-1] < 2.5 and "damaged" in item.notes[0],
    ),
    *(
        (
            "1, 2, 3 frame video (odd count)",
            lambda count=count: encoded_video(count),
            {},
            lambda item, count=count: num_frames(item) == count and item.grid.t == (count + 1) // 2,
        )
        for count in (1, 2, 3)
    ),
    (
        "nframes larger than video, nframes=0, negative, float",
        lambda: encoded_video(6),
        {"nframes": 100},
        lambda item: num_frames(item) == 6 and "100 lowered to the 6 frames" in item.notes[-1],
    ),
    (
        "huge source fps 1000 / requested fps 1000",
        lambda: encoded_video(3000, rate=1000, width=32, height=32, codec="mpeg4"),
        {},
        lambda item: num_frames(item) == 6 and item.frame_timestamps[-1] == pytest.approx(2.999),
    ),
    (
        "huge source fps 1000 / requested fps 1000",
        encoded_video,
        {"fps": 1000.0},
        lambda item: num_frames(item) == 30,
    ),
    (
        "variable frame rate with gaps",
        lambda: encoded_video(6, stamps=[0, 1, 2, 50, 51, 100]),
        {},
        has_nearest_timestamps,
    ),
    (
        "container without frame count/duration (MKV)",
        lambda: encoded_video(container="matroska"),
        {},
        lambda item: num_frames(item) == 6,
    ),
    (
        "rotated video (displaymatrix)",
        lambda: with_matrix(encoded_video(4), (0, 1, -1, 0)),
        {},
        is_rotated,
    ),
    (
        "odd dimensions 65x49, 1-pixel-high video",
        lambda: encoded_video(4, width=65, height=49, pixel_format="yuv444p"),
        {},
        lambda item: item.original_size == (49, 65),
    ),
    (
        "odd dimensions 65x49, 1-pixel-high video",
        lambda: encoded_video(4, width=64, height=1, codec="ffv1", container="matroska"),
        {},
        lambda item: item.original_size == (1, 64) and item.resized_size == (28, 448),
    ),
    (
        "hour-long or 4K video",
        hour_long_video,
        {},
        lambda item: num_frames(item) <= 768 and item.num_tokens <= 16384,
    ),
    (
        "animated GIF / WebP / APNG / multi-page TIFF as video",
        lambda: animation("GIF", duration=100),
        {},
        lambda item: num_frames(item) == 4,
    ),
]


@pytest.mark.parametrize(
    ("make", "options", "holds"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED]
)
def test_accepted(
    make: Callable[[], Any], options: dict[str, Any], holds: Callable[[Item], bool]
) -> None:
    item = video(make(), **options)
    assert holds(item)
    assert len(item.patches_NP) == item.grid.t * item.grid.h * item.grid.w > 0
