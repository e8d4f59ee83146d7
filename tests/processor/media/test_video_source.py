"""Opening of videos: frame lists, arrays and animations."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import is_animation
from qwen2vl.processor.media.source import DEFAULT_LIMITS, Media, MediaLimits
from qwen2vl.processor.media.video_metadata import VideoReader
from qwen2vl.processor.media.video_source import open_video
from tests.media import animation, encoded, encoded_video, frames_of, png_header, smooth


def open_reader(source: Any, **limits: Any) -> VideoReader:
    return open_video(
        source, MediaLimits(**limits), "video 1", fps=2.0, apply_exif_orientation=True
    )


def gray_levels(reader: VideoReader, indices: list[int]) -> list[int]:
    """Decode frames and return the gray level at the center of each."""
    frames = frames_of(reader, indices)
    assert frames is not None
    return [int(frame[frame.shape[0] // 2, frame.shape[1] // 2, 0]) for frame in frames]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_videos(kind: str) -> None:
    options = {} if kind == "TIFF" else {"duration": 100}
    reader = open_reader(animation(kind, **options))
    metadata = reader.metadata
    assert metadata.timestamps == pytest.approx((0, 0.1, 0.2, 0.3))
    assert metadata.fps == pytest.approx(10)
    assert metadata.duration == pytest.approx(0.4)
    assert (metadata.height, metadata.width, metadata.is_frame_list) == (40, 60, False)
    assert gray_levels(reader, [0, 2, 3]) == pytest.approx([0, 100, 150], abs=3)
    assert gray_levels(reader, [1]) == pytest.approx([50], abs=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(("milliseconds", "seconds"), [(0, 0.1), (10, 0.1), (20, 0.02)])
def test_very_short_delays_are_those_of_browsers(
    kind: str, milliseconds: int, seconds: float
) -> None:
    metadata = open_reader(animation(kind, duration=milliseconds)).metadata
    assert metadata.timestamps == pytest.approx([i * seconds for i in range(4)])
    assert metadata.duration == pytest.approx(4 * seconds)


def test_the_default_image_of_an_apng_is_no_frame() -> None:
    """Viewers that do not animate show it; it may be a poster of other content."""
    frames = [Image.new("RGB", (60, 40), (level,) * 3) for level in (50, 100, 150)]
    poster = Image.new("RGB", (60, 40), (255,) * 3)
    options: dict[str, Any] = {"save_all": True, "default_image": True, "duration": 500}
    data = encoded(poster, append_images=frames, **options)
    for source in (data, Image.open(io.BytesIO(data))):
        reader = open_reader(source)
        assert reader.metadata.timestamps == pytest.approx((0, 0.5, 1))
        assert reader.metadata.duration == pytest.approx(1.5)
        assert gray_levels(reader, [0, 1, 2]) == [50, 100, 150]
    with pytest.raises(InputError, match="give it as image, not video"):
        open_reader(encoded(poster, append_images=frames[:1], **options))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_animated_avif() -> None:
    data = animation("AVIF", duration=200)
    reader = open_reader(data)
    assert reader.metadata.timestamps == pytest.approx((0, 0.2, 0.4, 0.6))
    assert gray_levels(reader, [0, 1, 2, 3]) == pytest.approx([0, 50, 100, 150], abs=3)
    assert is_animation(Media(content=data), "image 1")
    with pytest.raises(InputError, match=r"an image \(image/avif\); give it as image, not video"):
        open_reader(encoded(smooth(30, 40), "AVIF"))


def test_uneven_delays() -> None:
    metadata = open_reader(animation("WEBP", duration=[100, 100, 900, 200])).metadata
    assert metadata.fps is None
    assert metadata.timestamps == pytest.approx((0, 0.1, 0.2, 1.1))
    assert metadata.duration == pytest.approx(1.3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_still_images_are_no_videos_but_a_list_of_one_is(kind: str) -> None:
    data = encoded(smooth(30, 40), kind)
    text = rf"video 1 is an image \(image/{kind.lower()}\); give it as image, not video"
    for source in (data, io.BytesIO(data)):
        with pytest.raises(InputError, match=text):
            open_reader(source)
    with pytest.raises(InputError, match="video 1 is an image; give it as image, not video"):
        open_reader(Image.open(io.BytesIO(data)))
    metadata = open_reader([data]).metadata
    assert metadata.timestamps == (0.0,)
    assert (metadata.height, metadata.width) == (30, 40)


def test_damaged_still_images_are_recognized_by_their_header() -> None:
    with pytest.raises(InputError, match="give it as image, not video"):
        open_reader(png_header(3000, 2000))  # its pixels cannot be decoded


def test_truncated_animation_is_used_up_to_the_damage() -> None:
    data = animation("GIF", 5, duration=100)
    reader = open_reader(data[: len(data) * 4 // 5])
    num_frames = len(reader.metadata.timestamps)
    assert 1 <= num_frames < 5
    assert "the first ones were used" in reader.metadata.notes[0]
    assert gray_levels(reader, [num_frames - 1]) == [50 * (num_frames - 1)]


def test_frame_lists_may_mix_all_kinds_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (60, 40), (10, 0, 0))))
    reader = open_reader(
        [
            tmp_path / "a.png",
            np.full((40, 60, 3), 20, np.uint8),
            Image.new("L", (60, 40), 30),
            encoded(Image.new("RGB", (60, 40), (40, 0, 0)), "BMP"),
            io.BytesIO(encoded(Image.new("RGB", (60, 40), (50, 0, 0)))),
            torch.full((3, 40, 60), 60 / 255),
        ]
    )
    assert reader.metadata.timestamps == (0, 0.5, 1, 1.5, 2, 2.5)
    assert reader.metadata.is_frame_list
    assert gray_levels(reader, [0, 1, 2, 3, 4, 5]) == [10, 20, 30, 40, 50, 60]


def test_arrays_are_frame_lists() -> None:
    reader = open_reader(
        np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 8, 9, 3), "u1")
    )
    assert (reader.metadata.height, reader.metadata.width) == (8, 9)
    assert gray_levels(reader, [0, 4]) == [0, 4]


def test_all_frames_of_an_array_or_list_have_one_scale() -> None:
    frames = np.array([1, 0.5, 200], np.float32)[:, None, None, None] + np.zeros((1, 8, 9, 3))
    tensor_FCHW = torch.tensor(frames).permute(0, 3, 1, 2)
    for source in (frames, list(frames), tensor_FCHW, list(tensor_FCHW)):
        reader = open_reader(source)
        assert gray_levels(reader, [0, 1, 2]) == [1, 0, 200]
        assert reader.metadata.notes == ("float values scaled from [0, 255]",)


def test_a_dark_first_frame_is_read_on_the_scale_of_all() -> None:
    frames = np.array([2, 200], np.float32)[:, None, None, None] + np.zeros((1, 8, 9, 3))
    for source in (frames, list(frames)):
        assert gray_levels(open_reader(source), [0, 1]) == [2, 200]


def test_frames_of_tensors_have_channels_in_either_place() -> None:
    frames = smooth(30, 5)[None].repeat(4, 0)
    for source in (torch.tensor(frames), torch.tensor(frames).permute(0, 3, 1, 2) / 255):
        reader = open_reader(source)
        assert (reader.metadata.height, reader.metadata.width) == (30, 5)
        tensors = frames_of(reader, [3], torch.from_numpy)
        assert tensors is not None and torch.equal(tensors[0], torch.tensor(frames[3]))


def test_frames_of_a_list_are_opened_when_they_are_asked_for() -> None:
    """The second one is damaged, which is found when it is reached."""
    good, bad = encoded(smooth(30, 40)), encoded(smooth(30, 40))[:99]
    frames = open_reader([good, good, bad, good]).frames_at([0, 1, 2, 3], np.array)
    for _ in range(2):
        assert np.array_equal(next(frames), smooth(30, 40))
    with pytest.raises(InputError, match=r"frames\[2\] is damaged"):
        next(frames)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_animation_is_open_while_its_frames_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(animation("GIF", duration=100))

    def is_open() -> bool:
        files = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(file) == str(path.resolve()) for file in files)

    frames = open_reader(path).frames_at([0, 3], np.array)
    assert not is_open()
    next(frames)
    assert is_open()
    frames.close()
    assert not is_open()


def test_time_limits_of_lists_and_animations_count_decoding_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, later = time.monotonic, [0.0]
    for source in ([smooth(30, 40)] * 4, animation("GIF", duration=100)):
        reader = open_reader(source, decode_timeout=60)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
        count = 0
        for _ in reader.frames_at(range(4), np.array):
            count, later[0] = count + 1, later[0] + 1000
        assert count == 4


def test_video_files_as_file_objects() -> None:
    file = io.BytesIO(encoded_video(4))
    assert len(open_reader(file).metadata.timestamps) == 4
    assert len(open_reader(file).metadata.timestamps) == 4


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ([], "video 1: the list of frames is empty"),
        (
            [[np.zeros((9, 9, 3), np.uint8)]],
            r"video 1, frames\[0\]: a list is not an image",
        ),
        ([np.zeros((9, 9, 3), np.uint8), b"xx"], r"video 1, frames\[1\] is text/plain, not a supp"),
        (
            [np.zeros((9, 9, 3), np.uint8), "no.png"],
            r"video 1, frames\[1\]: file 'no.png' not found; check the path",
        ),
        (
            [np.zeros((9, 9, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)],
            r"video 1, frames\[1\] is 9 x 8, but frames\[0\] is 9 x 9; give frames of one size",
        ),
        (np.zeros((5, 9, 9), np.uint8), r"array of shape \(5, 9, 9\) is not a video"),
        (
            np.zeros((9, 9, 3), np.uint8),
            r"shape \(9, 9, 3\) is an image; give it as image, not",
        ),
        (
            np.zeros((5, 3, 9, 3), np.uint8),
            r"video 1: array of shape \(3, 9, 3\) could have its",
        ),
        (np.zeros((5, 9, 9, 2), np.uint8), r"video 1: array of shape \(9, 9, 2\) is not an image"),
        (np.zeros((0, 9, 9, 3), np.uint8), r"shape \(0, 9, 9, 3\) has no frames; give at least on"),
        (torch.zeros(2, 3, 9, 9, device="meta"), "video 1: a tensor on device meta"),
        (b"", r"video 1 is empty \(0 bytes\)"),
        (b"not a video", "video 1 is text/plain, not a supported video; supported are MP4, MOV"),
        (b"<!doctype html>", "video 1 is text/html"),
        (None, "video 1: cannot read a NoneType"),
    ],
)
def test_sources_that_are_not_videos(source: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        _decode_all_frames(source)


def _decode_all_frames(source: Any) -> None:
    reader = open_reader(source)
    frames_of(reader, range(len(reader.metadata.timestamps)))


def test_playlists_are_rejected(tmp_path: Path) -> None:
    """Text that refers to other files is rejected before FFmpeg opens it."""
    (tmp_path / "secret").write_bytes(b"x")
    for text in (
        f"#EXTM3U\n#EXTINF:9,\n{tmp_path}/secret\n",
        f"ffconcat version 1.0\nfile {tmp_path}/a\n",
    ):
        with pytest.raises(InputError, match="is text/plain, not a supported video"):
            open_reader(text.encode())


def test_limits() -> None:
    with pytest.raises(InputError, match="video 1 has more than 3 frames"):
        open_reader(animation("GIF"), max_frames=3)
    with pytest.raises(InputError, match="video 1 has more than 3 frames"):
        open_reader([smooth(9, 9)] * 4, max_frames=3)
    with pytest.raises(InputError, match="took more than 0 s"):
        open_reader(animation("GIF"), decode_timeout=0)
    with pytest.raises(InputError, match="limit is 100"):
        open_reader(animation("GIF"), max_image_pixels=100)
    with pytest.raises(InputError, match="limit is 100"):
        open_reader(Image.new("RGB", (60, 40)), max_image_pixels=100)


def test_default_limits_are_for_local_use() -> None:
    assert open_reader(animation("GIF")).metadata.timestamps
    assert DEFAULT_LIMITS.allow_files
    assert DEFAULT_LIMITS.allow_urls
