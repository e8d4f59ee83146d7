"""Bad and unusual videos: refused by name, or answered with consistent frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.media import (
    animation,
    audio_only,
    encoded,
    encoded_video,
    smooth,
    wiped,
    with_matrix,
)
from tests.server.bad_inputs.suite import FIRST, Suite, covers, data_url, text_item, video_item

QUESTION = text_item("What happens?")
FRAME = smooth(56, 56)


REFUSED: list[tuple[str, str, Callable[[], bytes], str]] = [
    (
        "half",
        "MP4 cut in half (no moov)",
        lambda: (data := encoded_video())[: len(data) // 2],
        "no decodable video stream",
    ),
    ("empty", "zero-frame video / empty bytes / text as video", lambda: b"", r"empty \(0 bytes\)"),
    (
        "text",
        "zero-frame video / empty bytes / text as video",
        lambda: b"not a video",
        "text/plain, not a supported video",
    ),
    (
        "no-frames",
        "zero-frame video / empty bytes / text as video",
        lambda: (data := encoded_video(4, container="matroska"))[: data.index(b"\x1fC\xb6u")],
        "no decodable video stream",
    ),
    ("audio", "audio-only MP4", audio_only, r"no video stream \(only audio\)"),
    ("png", "PNG sent as video", lambda: encoded(FRAME), "is an image .*give it as image"),
    (
        "codec",
        "unsupported codec / 8k H.264",
        lambda: encoded_video().replace(b"avc1", b"zzzz"),
        "codec 'zzzz' is not supported",
    ),
    (
        "hours",
        "hour-long or 4K video",
        lambda: encoded_video(3, stamps=[0, 10, 50_000], codec="mpeg4"),
        r"limit is 3,600 s",
    ),
]


@covers(*(row[1] for row in REFUSED))
@pytest.mark.parametrize(
    ("make", "text"), [row[2:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(suite: Suite, make: Callable[[], bytes], text: str) -> None:
    items = [QUESTION, video_item(make())]
    error = suite.refused(items, text=text, param="messages[0].content[1]")
    assert error["code"] == ("media_too_large" if "limit" in text else "invalid_value")


@covers("hour-long or 4K video")
def test_large_frames(suite: Suite) -> None:
    """4K is below the limit of 50 megapixels a frame, and is resized."""
    data = encoded_video(1, width=3840, height=2160, codec="mpeg4")
    sent = suite.accepted([video_item(data), QUESTION])
    assert sent.media[0]["original_size"] == {"width": 3840, "height": 2160}
    assert sent.media[0]["tokens"] < 4096


@covers("broken frames in the middle")
def test_broken_frames(suite: Suite) -> None:
    data = wiped(encoded_video(40, width=320, height=240), 0.5, 340)
    sent = suite.accepted([video_item(data), QUESTION])
    (media,) = sent.media
    assert "damaged" in str(media["notes"])
    assert media["frames"] == len(media["frame_timestamps"]) < 8


@covers("expected N frames, got N-1")
def test_container_that_declares_more_frames_than_it_has(suite: Suite) -> None:
    whole = encoded_video(20)
    start = whole.index(b"mdat") + 4
    sent = suite.accepted([video_item(whole[: start - 8] + whole[start - 8 :]), QUESTION])
    assert sent.media[0]["frames"] == 4
    data = wiped(whole, 0.0, 0)
    end = whole.index(b"moov") - 4
    damaged = data[: end - 200] + bytes(200) + data[end:]
    sent = suite.ask([video_item(damaged), QUESTION])
    assert sent.status == 200, sent.body
    assert sent.media[0]["frames"] == len(sent.media[0]["frame_timestamps"])


@covers("1, 2, 3 frame video (odd count)")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_frames(suite: Suite, count: int) -> None:
    assert suite.accepted([video_item(encoded_video(count)), QUESTION]).media[0]["frames"] == count


@covers("nframes larger than video, nframes=0, negative, float")
def test_number_of_frames(suite: Suite) -> None:
    data = encoded_video(6)
    sent = suite.accepted([video_item(data, num_frames=100), QUESTION])
    assert sent.media[0]["frames"] == 6
    assert "lowered" in str(sent.media[0]["notes"])
    for value in (0, -4, 4.5, "4", True, 10**9):
        for name in ("nframes", "num_frames"):
            error = suite.refused([video_item(data, **{name: value})])
            assert "frames" in error["message"]
        sent = suite.ask([video_item(data)], num_frames=value)
        assert (sent.status, sent.error["param"]) == (400, "num_frames"), sent.body


@covers("fps and nframes both given")
def test_rate_and_number_of_frames(suite: Suite) -> None:
    data = encoded_video(6)
    suite.refused([video_item(data, fps=2.0, nframes=4)], text="use either")
    suite.refused([video_item(data)], text="either", param="fps", fps=2.0, num_frames=4)


@covers("huge source fps 1000 / requested fps 1000")
def test_high_rates(suite: Suite) -> None:
    data = encoded_video(1000, rate=1000, width=16, height=16, codec="mpeg4")
    assert suite.accepted([video_item(data), QUESTION]).media[0]["frames"] == 4
    data = encoded_video(30)
    assert suite.accepted([video_item(data, fps=1000), QUESTION]).media[0]["frames"] == 30


UNUSUAL: list[tuple[str, str, Callable[[], bytes], int, tuple[int, int]]] = [
    (
        "gaps",
        "variable frame rate with gaps",
        lambda: encoded_video(6, stamps=[0, 1, 2, 50, 51, 100]),
        20,
        (64, 48),
    ),
    (
        "mkv",
        "container without frame count/duration (MKV)",
        lambda: encoded_video(container="matroska"),
        6,
        (64, 48),
    ),
    (
        "rotated",
        "rotated video (displaymatrix)",
        lambda: with_matrix(encoded_video(4), (0, 1, -1, 0)),
        4,
        (48, 64),
    ),
    (
        "odd",
        "odd dimensions 65x49, 1-pixel-high video",
        lambda: encoded_video(4, width=65, height=49, pixel_format="yuv444p"),
        4,
        (65, 49),
    ),
    (
        "flat",
        "odd dimensions 65x49, 1-pixel-high video",
        lambda: encoded_video(4, width=64, height=1, codec="ffv1", container="matroska"),
        4,
        (64, 1),
    ),
    (
        "gif",
        "animated GIF / WebP / APNG / multi-page TIFF as image",
        lambda: animation("GIF", duration=100),
        4,
        (60, 40),
    ),
]


@covers(*(row[1] for row in UNUSUAL))
@pytest.mark.parametrize(
    ("make", "frames", "size"), [row[2:] for row in UNUSUAL], ids=[row[0] for row in UNUSUAL]
)
def test_unusual(
    suite: Suite, make: Callable[[], bytes], frames: int, size: tuple[int, int]
) -> None:
    (media,) = suite.accepted([video_item(make()), QUESTION]).media
    assert media["frames"] == frames == len(media["frame_timestamps"])
    assert media["original_size"] == {"width": size[0], "height": size[1]}


@covers("list-of-frames video with different sizes or a bad frame")
def test_list_of_frames(suite: Suite) -> None:
    good = data_url(encoded(FRAME))
    assert suite.accepted([video_item([good, good, good]), QUESTION]).media[0]["frames"] == 3
    other, cut = data_url(encoded(smooth(56, 84))), data_url(encoded(FRAME, "JPEG")[:300])
    suite.refused([video_item([good, good, other])], text=r"frames\[2\] is 84 x 56")
    suite.refused([video_item([good, cut, good])], text=r"frames\[1\].*damaged")
    suite.refused([video_item([])], text="empty")
    sent = suite.ask([video_item([good, "data:image/png;base64,@@"])])
    assert sent.status == 400 and "frames[1]" in sent.error["message"], sent.body


@covers("video/jpeg data URL with thousands of frames")
def test_frames_in_one_data_url(suite: Suite) -> None:
    frame = data_url(encoded(FRAME, "JPEG")).partition(",")[2]
    url = "data:video/jpeg;base64," + ",".join([frame] * 3)
    assert suite.accepted([video_item(url), QUESTION]).media[0]["frames"] == 3
    many = "data:video/jpeg;base64," + ",".join([frame] * 2000)
    error = suite.refused([video_item(many)], text="2,000 frames|limit")
    assert error["param"] == FIRST


@covers("request picks decoder backend / device")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"media_io_kwargs": {"video": {"backend": "pynvvideocodec"}}},
            "media_io_kwargs.video.backend",
        ),
        ({"media_io_kwargs": {"video": {"device": "cuda:0"}}}, "media_io_kwargs.video.device"),
        ({"mm_processor_kwargs": {"device": "cuda"}}, "mm_processor_kwargs.device"),
        ({"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio"),
    ],
)
def test_decoder_is_not_the_clients_choice(
    suite: Suite, fields: dict[str, Any], param: str
) -> None:
    suite.refused([video_item(encoded_video(2))], text="not a known field", param=param, **fields)
    suite.refused([video_item(encoded_video(2), backend="x")], text="unknown key 'backend'")
