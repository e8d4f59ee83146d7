"""Video files: timestamps, rotation, damage, and unusual containers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_reader import PyAVVideoReader
from tests.media import (
    audio_only,
    encoded,
    encoded_video,
    frames_of,
    noise,
    video,
    wiped,
    with_matrix,
)


def open_reader(content: bytes | Path, **limits: Any) -> PyAVVideoReader:
    return PyAVVideoReader(Media(content=content), MediaLimits(**limits), "video 1")


def decoded(reader: PyAVVideoReader, indices: list[int]) -> list[np.ndarray]:
    frames = frames_of(reader, indices)
    assert frames is not None
    return frames


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
    assert video(data).pair_digests == video(str(tmp_path / "a.mp4")).pair_digests


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
        items[0].pair_digests == items[1].pair_digests
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


def two_tracks(defaults: Sequence[bool]) -> bytes:
    """Encode a track of 32 x 24 black pixels and one of 64 x 48 white ones."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        streams = [output.add_stream("libx264", rate=4) for _ in defaults]
        for i, (stream, is_default) in enumerate(zip(streams, defaults, strict=True)):
            stream.width, stream.height, stream.pix_fmt = 32 * (i + 1), 24 * (i + 1), "yuv420p"
            stream.disposition = Disposition.default if is_default else Disposition(0)
        for i, stream in enumerate(streams):
            for _ in range(4):
                pixels = np.full((stream.height, stream.width, 3), 255 * i, np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("defaults", "height", "level"), [((False, True), 48, 255), ((True, False), 24, 0)]
)
def test_the_default_track_is_read(defaults: Sequence[bool], height: int, level: int) -> None:
    """As FFmpeg chooses: a preview may come first."""
    reader = open_reader(two_tracks(defaults))
    assert (reader.metadata.height, reader.metadata.width) == (height, height // 3 * 4)
    assert int(decoded(reader, [3])[0][10, 10, 0]) == pytest.approx(level, abs=3)


def test_change_of_the_frame_size_is_noted() -> None:
    first = encoded_video(8, width=64, height=48, container="mpegts")
    second = encoded_video(8, width=48, height=64, container="mpegts")
    item = video(first + second)
    assert "some frames are 48 x 64; all are resized like the first" in item.notes
    assert item.original_size == (48, 64)
    assert len(video(first).notes) == 1


def test_change_of_the_frame_size_under_exact_timestamps() -> None:
    """Packets alone do not tell it; it is noted once a frame of another size is decoded."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(8):
            jpeg = encoded(noise(48, 64) if i < 4 else noise(64, 48), "JPEG", subsampling=2)
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts = stream, i, i
            packet.time_base, packet.is_keyframe = Fraction(1, 4), True
            output.mux(packet)
    reader = open_reader(buffer.getvalue())
    assert frames_of(reader, [0, 7]) is None
    assert reader.metadata.notes == ("some frames are 48 x 64; all are resized like the first",)
    assert [frame.shape for frame in decoded(reader, [0, 7])] == [(48, 64, 3), (64, 48, 3)]


@pytest.mark.parametrize(
    ("transfer", "notes"),
    [
        (1, ()),
        (16, ("HDR (PQ), not tone-mapped: darker and paler than displayed",)),
        (18, ("HDR (HLG), not tone-mapped: darker and paler than displayed",)),
    ],
)
def test_hdr_is_noted(transfer: int, notes: tuple[str, ...]) -> None:
    assert open_reader(tagged(color_trc=transfer)).metadata.notes == notes


def test_colors_that_cannot_be_converted() -> None:
    reader = open_reader(tagged(colorspace=8))
    with pytest.raises(InputError, match=r"its colors \(yuv420p, matrix 8 of ITU-T H.273\) cannot"):
        decoded(reader, [0])


def tagged(**tags: int) -> bytes:
    """Encode a video with color tags, which do not fit its pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(4):
            output.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


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
