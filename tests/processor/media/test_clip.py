"""Lists, arrays and animations as clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.clip import open_clip
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from qwen2vl.processor.media.timeline import Clip
from tests.media import animation, encoded, smooth


def opened(source: Any, **limits: Any) -> Clip:
    return open_clip(source, MediaLimits(**limits), "video 1", rate=2.0, turn=True)


def grays(clip: Clip, indices: list[int]) -> list[int]:
    """Decode frames and tell the gray at the middle of each."""
    kept = clip.frames(indices, torch.from_numpy)
    assert kept is not None
    return [int(frame[frame.shape[0] // 2, frame.shape[1] // 2, 0]) for frame in kept]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_clips(kind: str) -> None:
    options = {} if kind == "TIFF" else {"duration": 100}
    clip = opened(animation(kind, **options))
    line = clip.timeline
    assert line.times == pytest.approx((0, 0.1, 0.2, 0.3))
    assert line.rate == pytest.approx(10)
    assert line.seconds == pytest.approx(0.4)
    assert (line.height, line.width, line.listed) == (40, 60, False)
    assert grays(clip, [0, 2, 3]) == pytest.approx([0, 100, 150], abs=3)
    assert grays(clip, [1]) == pytest.approx([50], abs=3)


def test_uneven_delays_are_kept() -> None:
    line = opened(animation("WEBP", duration=[100, 100, 900, 200])).timeline
    assert line.rate is None
    assert line.times == pytest.approx((0, 0.1, 0.2, 1.1))
    assert line.seconds == pytest.approx(1.3)


def test_one_picture_is_a_clip_of_one() -> None:
    for source in (encoded(smooth(30, 40)), Image.fromarray(smooth(30, 40))):
        line = opened(source).timeline
        assert line.times == (0.0,)
        assert (line.height, line.width) == (30, 40)


def test_a_cut_animation_is_used_up_to_the_cut() -> None:
    data = animation("GIF", 5, duration=100)
    clip = opened(data[: len(data) * 4 // 5])
    kept = len(clip.timeline.times)
    assert 1 <= kept < 5
    assert "the first ones were used" in clip.timeline.notes[0]
    assert grays(clip, [kept - 1]) == [50 * (kept - 1)]


def test_lists_mix_every_kind_of_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (60, 40), (10, 0, 0))))
    clip = opened(
        [
            tmp_path / "a.png",
            np.full((40, 60, 3), 20, np.uint8),
            Image.new("L", (60, 40), 30),
            encoded(Image.new("RGB", (60, 40), (40, 0, 0)), "BMP"),
        ]
    )
    assert clip.timeline.times == (0, 0.5, 1, 1.5)
    assert clip.timeline.listed
    assert grays(clip, [0, 1, 2, 3]) == [10, 20, 30, 40]


def test_arrays_are_lists_of_frames() -> None:
    clip = opened(np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 8, 9, 3), "u1"))
    assert (clip.timeline.height, clip.timeline.width) == (8, 9)
    assert grays(clip, [0, 4]) == [0, 4]


def test_an_array_has_one_scale_for_all_its_frames() -> None:
    clip = opened(np.array([1, 0.5, 200], np.float32)[:, None, None, None] + np.zeros((1, 8, 9, 3)))
    assert grays(clip, [0, 1, 2]) == [1, 0, 200]
    assert clip.timeline.notes == ("float values scaled from [0, 255]",)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ([], "video 1: the list of frames is empty"),
        ([np.zeros((9, 9, 3), np.uint8), b"xx"], r"video 1, frames\[1\] is text/plain, not a supp"),
        (
            [np.zeros((9, 9, 3), np.uint8), "no.png"],
            r"video 1, frames\[1\]: file 'no.png' not found",
        ),
        (
            [np.zeros((9, 9, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)],
            r"video 1, frames\[1\] is 9 x 8, but frames\[0\] is 9 x 9; give frames of one size",
        ),
        (np.zeros((5, 9, 9), np.uint8), r"array of shape \(5, 9, 9\) is not a clip"),
        (np.zeros((5, 3, 9, 9), np.uint8), r"video 1, frames\[0\]: array of shape \(3, 9, 9\)"),
        (np.zeros((0, 9, 9, 3), np.uint8), "the list of frames is empty"),
        (b"", r"video 1 is empty \(0 bytes\)"),
        (b"not a video", "video 1 is text/plain, not a supported video; supported are MP4, MOV"),
        (b"<!doctype html>", "video 1 is text/html"),
        (None, "video 1: cannot read a NoneType"),
    ],
)
def test_what_is_no_clip(source: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        _every_frame(source)


def _every_frame(source: Any) -> None:
    clip = opened(source)
    clip.frames(range(len(clip.timeline.times)), torch.from_numpy)


def test_playlists_lead_nowhere(tmp_path: Path) -> None:
    """A text that names other files is refused before FFmpeg sees it."""
    (tmp_path / "secret").write_bytes(b"x")
    for text in (
        f"#EXTM3U\n#EXTINF:9,\n{tmp_path}/secret\n",
        f"ffconcat version 1.0\nfile {tmp_path}/a\n",
    ):
        with pytest.raises(InputError, match="is text/plain, not a supported video"):
            opened(text.encode())


def test_limits() -> None:
    with pytest.raises(InputError, match="video 1 has more than 3 frames"):
        opened(animation("GIF"), max_frames=3)
    with pytest.raises(InputError, match="video 1 has more than 3 frames"):
        opened([smooth(9, 9)] * 4, max_frames=3)
    with pytest.raises(InputError, match="took more than 0 s"):
        opened(animation("GIF"), decode_timeout=0)
    with pytest.raises(InputError, match="limit is 100"):
        opened(animation("GIF"), max_image_pixels=100)
    with pytest.raises(InputError, match="limit is 100"):
        opened(Image.new("RGB", (60, 40)), max_image_pixels=100)


def test_default_limits_are_meant_for_people() -> None:
    assert opened(animation("GIF")).timeline.times
    assert DEFAULT_LIMITS.allow_files
    assert DEFAULT_LIMITS.allow_urls
