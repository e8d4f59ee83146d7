"""Video files: timestamps, rotation, damage, and unusual containers."""

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
from qwen2vl.processor.media.video_reader import PyAVVideoReader
from tests.media import audio_only, encoded_video, video, wiped, with_matrix


def open_reader(content: bytes | Path, **limits: Any) -> PyAVVideoReader:
    return PyAVVideoReader(Media(content=content), MediaLimits(**limits), "video 1")


def decoded(reader: PyAVVideoReader, indices: list[int]) -> list[np.ndarray]:
    frames = reader.get_frames_at(indices, lambda rgb: torch.from_numpy(np.ascontiguousarray(rgb)))
    assert frames is not None
    return [frame.numpy() for frame in frames]


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
    """Timestamps are those that were encoded, though Matroska and FLV store whole milliseconds."""
    path = tmp_path / "a video.bin"
    path.write_bytes(encoded_video(20, rate=30, container=container, codec=codec))
    reader = open_reader(path)
    assert reader.metadata.fps == pytest.approx(30, rel=1e-6)
    assert reader.metadata.duration == pytest.approx(20 / 30, rel=1e-3)
    assert reader.metadata.timestamps == pytest.approx([i / 30 for i in range(20)], abs=2e-3)
    assert (reader.metadata.height, reader.metadata.width) == (48, 64)
    frames = decoded(reader, [0, 7, 19])
    assert [int(frame[24, 10, 0]) for frame in frames] == pytest.approx([0, 56, 152], abs=6)


def test_files_and_bytes_give_equal_items(tmp_path: Path) -> None:
    data = encoded_video(12)
    (tmp_path / "a.mp4").write_bytes(data)
    assert video(data).digest == video(str(tmp_path / "a.mp4")).digest


def test_frames_are_in_display_order() -> None:
    """B-frames are stored out of order."""
    reader = open_reader(encoded_video(24, options={"bf": "3"}))
    shades = [int(frame[40, 10, 0]) for frame in decoded(reader, list(range(24)))]
    assert shades == pytest.approx([8 * i for i in range(24)], abs=6)


def test_timestamps_with_gaps() -> None:
    reader = open_reader(encoded_video(6, stamps=[0, 1, 2, 50, 51, 100]))
    assert reader.metadata.fps is None
    assert reader.metadata.timestamps == pytest.approx((0, 0.1, 0.2, 5.0, 5.1, 10.0))


def test_files_without_timestamps_are_assumed_uniform() -> None:
    reader = open_reader(encoded_video(12, container="h264"))
    assert len(reader.metadata.timestamps) == 12
    assert "timestamps missing or decreasing" in reader.metadata.notes[0]
    assert len(decoded(reader, [0, 11])) == 2


# Position of the bright top right corner of `encoded_video` after the display matrix.
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
def test_display_matrix_is_applied(matrix: tuple[int, int, int, int]) -> None:
    reader = open_reader(with_matrix(encoded_video(4), matrix))
    sideways = matrix[0] == 0
    assert (reader.metadata.height, reader.metadata.width) == ((64, 48) if sideways else (48, 64))
    (frame,) = decoded(reader, [0])
    height, width = frame.shape[:2]
    corners = {
        f"{row} {column}": int(frame[y, x, 0])
        for row, y in (("top", 5), ("bottom", height - 6))
        for column, x in (("left", 5), ("right", width - 6))
    }
    assert max(corners, key=lambda corner: corners[corner]) == CORNERS[matrix]


def test_other_angles_are_not_applied() -> None:
    reader = open_reader(with_matrix(encoded_video(4), (1, 1, -1, 1)))
    assert (reader.metadata.height, reader.metadata.width) == (48, 64)


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("mpeg4", "mp4")])
def test_frames_before_the_damage_are_used(codec: str, container: str) -> None:
    broken = wiped(
        encoded_video(40, width=320, height=240, codec=codec, container=container), 0.5, 340
    )
    items = [video(broken) for _ in range(2)]
    assert items[0].notes[0] == "damaged; only the frames before the damage were used"
    assert "found where the file claims 4.0 s" in items[0].notes[1]
    assert items[0].frame_timestamps[-1] < 2.5
    assert (
        items[0].digest == items[1].digest
    )  # multithreaded decoding must not make it nondeterministic


def test_truncated_video_is_noted() -> None:
    data = encoded_video(40, width=320, height=240, codec="libvpx-vp9", container="webm")
    item = video(data[: len(data) // 2])
    assert any("found where the file claims 4.0 s" in note for note in item.notes)


def test_album_cover_is_no_video_stream() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        cover = output.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        output.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
        output.mux(cover.encode(None))
    with pytest.raises(InputError, match="has no video stream"):
        open_reader(buffer.getvalue())


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (audio_only(), r"video 1 has no video stream \(only audio\); name a video file"),
        (
            encoded_video(20)[:1000],
            r"video 1 has no decodable video stream \(video/mp4, cut short or damaged\)",
        ),
        (bytes(range(256)) * 4, r"has no decodable video stream \(unknown type\)"),
        (
            encoded_video(4).replace(b"avc1", b"zzzz"),
            "video 1: video codec 'zzzz' is not supported; convert it to H.264 in MP4",
        ),
    ],
)
def test_undecodable_files_are_rejected(data: bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_reader(data)


def test_codec_of_matroska_is_in_the_error() -> None:
    data = encoded_video(4, container="matroska").replace(b"V_MPEG4/ISO/AVC", b"V_ZPEG4/ISO/AVC")
    with pytest.raises(InputError, match="video codec 'V_ZPEG4/ISO/AVC' is not supported"):
        open_reader(data)


def test_limits(tmp_path: Path) -> None:
    data = encoded_video(30)
    with pytest.raises(InputError, match="video 1 lasts 3 s, limit is 2 s; cut it first"):
        open_reader(data, max_seconds=2)
    with pytest.raises(InputError, match="video 1 has more than 20 frames"):
        open_reader(data, max_frames=20)
    with pytest.raises(InputError, match=r"video 1 is 64 x 48, limit is 1,000 pixels a frame"):
        open_reader(data, max_image_pixels=1000)
    with pytest.raises(InputError, match="video 1 took more than 0 s to decode"):
        open_reader(data, decode_timeout=0)
