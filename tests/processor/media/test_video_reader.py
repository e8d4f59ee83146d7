"""Video files: time stamps, rotation, damage, strange containers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_reader import FileClip
from tests.media import audio_only, clip, video, wiped, with_matrix


def opened(content: bytes | Path, **limits: Any) -> FileClip:
    return FileClip(Media(content=content), MediaLimits(**limits), "video 1")


def decoded(film: FileClip, indices: list[int]) -> list[np.ndarray]:
    kept = film.frames(indices, lambda rgb: torch.from_numpy(np.ascontiguousarray(rgb)))
    assert kept is not None
    return [frame.numpy() for frame in kept]


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "mpeg4"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mpegts", "libx264"),
        ("flv", "libx264"),
    ],
)
def test_containers(container: str, codec: str, tmp_path: Path) -> None:
    """Frames lie where they were put, though Matroska and FLV count whole milliseconds."""
    path = tmp_path / "a video.bin"
    path.write_bytes(clip(20, rate=30, container=container, codec=codec))
    film = opened(path)
    assert film.timeline.rate == pytest.approx(30, rel=1e-6)
    assert film.timeline.seconds == pytest.approx(20 / 30, rel=1e-3)
    assert film.timeline.times == pytest.approx([i / 30 for i in range(20)], abs=2e-3)
    assert (film.timeline.height, film.timeline.width) == (48, 64)
    frames = decoded(film, [0, 7, 19])
    assert [int(frame[24, 10, 0]) for frame in frames] == pytest.approx([0, 56, 152], abs=6)


def test_files_and_bytes_are_the_same(tmp_path: Path) -> None:
    data = clip(12)
    (tmp_path / "a.mp4").write_bytes(data)
    assert video(data).digest == video(str(tmp_path / "a.mp4")).digest


def test_every_frame_is_found_in_order() -> None:
    """B-frames are stored out of order; display order counts."""
    film = opened(clip(24, options={"bf": "3"}))
    shades = [int(frame[40, 10, 0]) for frame in decoded(film, list(range(24)))]
    assert shades == pytest.approx([8 * i for i in range(24)], abs=6)


def test_stamps_with_gaps() -> None:
    film = opened(clip(6, stamps=[0, 1, 2, 50, 51, 100]))
    assert film.timeline.rate is None
    assert film.timeline.times == pytest.approx((0, 0.1, 0.2, 5.0, 5.1, 10.0))


def test_files_without_stamps_are_taken_as_even() -> None:
    film = opened(clip(12, container="h264"))
    assert len(film.timeline.times) == 12
    assert "time stamps missing or running backwards" in film.timeline.notes[0]
    assert len(decoded(film, [0, 11])) == 2


# Where the bright top right corner of `clip` comes to lie.
CORNERS = {
    (1, 0, 0, 1): "top right",
    (0, 1, -1, 0): "bottom right",  # a quarter turn clockwise
    (-1, 0, 0, -1): "bottom left",
    (0, -1, 1, 0): "top left",
    (-1, 0, 0, 1): "top left",  # mirrored
    (1, 0, 0, -1): "bottom right",
    (0, 1, 1, 0): "bottom left",  # mirrored along the diagonal
}


@pytest.mark.parametrize("matrix", CORNERS)
def test_frames_stand_upright(matrix: tuple[int, int, int, int]) -> None:
    film = opened(with_matrix(clip(4), matrix))
    sideways = matrix[0] == 0
    assert (film.timeline.height, film.timeline.width) == ((64, 48) if sideways else (48, 64))
    (frame,) = decoded(film, [0])
    height, width = frame.shape[:2]
    corners = {
        f"{row} {column}": int(frame[y, x, 0])
        for row, y in (("top", 5), ("bottom", height - 6))
        for column, x in (("left", 5), ("right", width - 6))
    }
    assert max(corners, key=lambda corner: corners[corner]) == CORNERS[matrix]


def test_odd_angles_are_left_as_stored() -> None:
    film = opened(with_matrix(clip(4), (1, 1, -1, 1)))
    assert (film.timeline.height, film.timeline.width) == (48, 64)


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("mpeg4", "mp4")])
def test_a_damaged_middle_leaves_the_frames_before(codec: str, container: str) -> None:
    broken = wiped(clip(40, width=320, height=240, codec=codec, container=container), 0.5, 340)
    items = [video(broken) for _ in range(2)]
    assert items[0].notes[0] == "damaged; only the frames before the damage were used"
    assert "found where the file claims 4.0 s" in items[0].notes[1]
    assert items[0].frame_times[-1] < 2.5
    assert items[0].digest == items[1].digest  # threads must not make it a lottery


def test_a_clip_that_ends_early_says_so() -> None:
    data = clip(40, width=320, height=240, codec="libvpx-vp9", container="webm")
    item = video(data[: len(data) // 2])
    assert any("found where the file claims 4.0 s" in note for note in item.notes)


def test_the_cover_of_a_song_is_no_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        cover = output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        output.mux(cover.encode(None))
    with pytest.raises(InputError, match="has no video stream"):
        opened(buffer.getvalue())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (audio_only(), r"video 1 has no video stream \(only audio\); name a video file"),
        (
            clip(20)[:1000],
            r"video 1 has no decodable video stream \(video/mp4, cut short or damaged\)",
        ),
        (bytes(range(256)) * 4, r"has no decodable video stream \(unknown type\)"),
        (
            clip(4).replace(b"avc1", b"zzzz"),
            "video 1: video codec 'zzzz' is not supported; convert it to H.264 in MP4",
        ),
    ],
)
def test_what_cannot_be_decoded(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        opened(data)


def test_the_codec_is_named_for_matroska_too() -> None:
    data = clip(4, container="matroska").replace(b"V_MPEG4/ISO/AVC", b"V_ZPEG4/ISO/AVC")
    with pytest.raises(InputError, match="video codec 'V_ZPEG4/ISO/AVC' is not supported"):
        opened(data)


def test_limits(tmp_path: Path) -> None:
    data = clip(30)
    with pytest.raises(InputError, match="video 1 lasts 3 s, limit is 2 s; cut it first"):
        opened(data, max_seconds=2)
    with pytest.raises(InputError, match="video 1 has more than 20 frames"):
        opened(data, max_frames=20)
    with pytest.raises(InputError, match=r"video 1 is 64 x 48, limit is 1,000 pixels a frame"):
        opened(data, max_image_pixels=1000)
    with pytest.raises(InputError, match="video 1 took more than 0 s to decode"):
        opened(data, decode_timeout=0)
