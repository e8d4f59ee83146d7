"""Video file reader: FFmpeg through PyAV. The only module that imports PyAV.

Timestamps are read from packets, without decoding; then the file is decoded once, and only the
sampled frames are converted to RGB. Where the decoded frames differ from the packets (damage,
hidden frames, unusual containers) the decoded frames determine the metadata. Rotation (display
matrix) is applied. Only one self-contained file is ever opened: no playlists, no URLs.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import Media, MediaLimits, out_of_memory, read_head
from qwen2vl.processor.media.video_metadata import (
    Deadline,
    FrameTransform,
    VideoMetadata,
    check_frame_count,
    frame_rate,
    video_duration,
)

__all__ = ["PyAVVideoReader"]

# Demuxers of self-contained files. Playlists refer to other files and hosts, so they are excluded.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,ivf,h264,hevc,"
    "m4v,mxf,nut,wav,mp3,flac,aac"
)
_DEFAULT_FPS = 25.0  # where a file has neither timestamps nor a frame rate

T = TypeVar("T")
Timestamps = list[Fraction | None]  # one per frame, in display order


class PyAVVideoReader:
    """Reads the frames of one video file. (Implements VideoReader.)"""

    def __init__(self, media: Media, limits: MediaLimits, name: str) -> None:
        self._media, self._limits, self._name = media, limits, name
        self._deadline = Deadline(limits, name)
        self._damaged = False
        self._threading: Literal["AUTO", "NONE"] = "NONE"
        with self._open() as (container, stream):
            self._nominal_fps = float(stream.average_rate) if stream.average_rate else None
            self._time_base = float(stream.time_base or 0)
            self._declared_duration = (container.duration or 0) / av.time_base
        self._rotate = _identity
        self._height, self._width = self._probe_first_frame()
        self._timestamps = self._read_packet_timestamps()
        if self._timestamps:
            self._threading = "AUTO"
        else:
            self._timestamps = self._read_frame_timestamps()
        self.metadata = self._build_metadata()

    def get_frames_at(self, indices: Sequence[int], transform: FrameTransform[T]) -> list[T] | None:
        """Decode up to the last of `indices`, comparing each timestamp with the metadata."""
        wanted = set(indices)
        frames: list[T] = []
        for index, (timestamp, frame) in enumerate(self._decode()):
            if self._timestamps[index : index + 1] != [timestamp]:
                break
            if index in wanted:
                frames.append(transform(self._to_rgb(frame)))
                if len(frames) == len(wanted):
                    return frames
        self._timestamps = self._read_frame_timestamps()
        self.metadata = self._build_metadata()
        return None

    def close(self) -> None:
        """Do nothing: the file is open only while a method reads it."""

    def _probe_first_frame(self) -> tuple[int, int]:
        """Return (height, width) of the first decoded frame: the container's may be wrong."""
        for _, frame in self._decode():
            self._rotate = _rotation_of(frame)
            height, width = self._to_rgb(frame).shape[:2]
            return height, width
        raise InputError(
            f"{self._name}: no frame can be decoded; it is damaged or cut short, so save or "
            "download it again"
        )

    def _read_frame_timestamps(self) -> Timestamps:
        """Decode the whole file and return the timestamps of its frames.

        Single-threaded from here on: in a damaged file, threads drop frames nondeterministically.
        """
        self._threading, self._damaged = "NONE", False
        timestamps = [timestamp for timestamp, _ in self._decode()]
        assert timestamps, "the first frame was decoded before, in the same way"
        return timestamps

    def _read_packet_timestamps(self) -> Timestamps:
        """Return the presentation timestamps of all packets; [] if a packet has none."""
        timestamps: list[Fraction] = []
        with self._open() as (container, stream), suppress(FFmpegError):
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None or packet.time_base is None:
                    return []
                timestamps.append(packet.pts * packet.time_base)
                check_frame_count(len(timestamps), self._limits, self._name)
        return [*sorted(timestamps)]

    def _build_metadata(self) -> VideoMetadata:
        """Convert timestamps to seconds; assume uniform ones where some are missing or decrease."""
        notes = ["damaged; only the frames before the damage were used"] if self._damaged else []
        timestamps = _seconds_from_first(self._timestamps)
        if timestamps:
            fps = frame_rate(timestamps, time_base=self._time_base, nominal_fps=self._nominal_fps)
        else:
            fps = self._nominal_fps or _DEFAULT_FPS
            timestamps = [i / fps for i in range(len(self._timestamps))]
            notes.append(f"timestamps missing or decreasing, {fps:g} fps assumed")
        duration = video_duration(timestamps, fps)
        if duration > self._limits.max_seconds:
            raise MediaTooLargeError(
                f"{self._name} lasts {duration:,.0f} s, limit is "
                f"{self._limits.max_seconds:,.0f} s; cut it first"
            )
        if self._declared_duration > 1.1 * duration + 1:
            notes.append(
                f"{duration:.1f} s found where the file claims {self._declared_duration:.1f} s"
            )
        return VideoMetadata(
            timestamps=tuple(timestamps),
            fps=fps,
            duration=duration,
            height=self._height,
            width=self._width,
            notes=tuple(notes),
        )

    def _decode(self) -> Iterator[tuple[Fraction | None, av.VideoFrame]]:
        """Decode frames in display order, up to the first damaged one; yield (timestamp, frame)."""
        count = 0
        with self._open() as (container, stream):
            for frame in self._decode_until_error(container, stream):
                self._deadline.check()
                if frame.is_corrupt and count:
                    self._damaged = True
                    return
                if frame.is_corrupt:
                    continue  # a recording may begin between key frames: no frame is lost yet
                count += 1
                check_frame_count(count, self._limits, self._name)
                # A stream may change its size in the middle.
                _check_frame_size(frame.width, frame.height, self._limits, self._name)
                yield _timestamp_of(frame), frame

    def _decode_until_error(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator[av.VideoFrame]:
        try:
            for packet in container.demux(stream):
                yield from packet.decode()
        except MemoryError as error:  # PyAV raises a subclass of FFmpegError, too
            raise out_of_memory(self._name) from error
        except FFmpegError:
            self._damaged = True

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        return self._rotate(frame.to_ndarray(format="rgb24"))

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        content = self._media.content
        assert isinstance(content, (Path, bytes)), "pixels are not a file"
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
            self._open_container(file) as container,
        ):
            stream = self._select_stream(container)
            stream.thread_type = self._threading
            yield container, stream

    def _open_container(self, file: BinaryIO) -> InputContainer:
        try:
            return av.open(
                file, "r", metadata_errors="ignore", options={"format_whitelist": _DEMUXERS}
            )
        except FFmpegError as error:
            kind = sniff_type(read_head(self._media))
            what, remedy = (
                (f"{kind}, cut short or damaged", "save or download it again")
                if kind.startswith("video/")
                else ("unknown type", "convert it to MP4")
            )
            raise InputError(
                f"{self._name} has no decodable video stream ({what}); {remedy}"
            ) from error

    def _select_stream(self, container: InputContainer) -> VideoStream:
        """Return the first video stream; attached pictures (album covers) do not count."""
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            found = "only audio" if container.streams.audio else "nothing that can be shown"
            raise InputError(f"{self._name} has no video stream ({found}); name a video file")
        codec = streams[0].codec_context
        if codec is None:
            label = _codec_name(self._media)
            raise InputError(
                f"{self._name}: video codec {label} is not supported; convert it to H.264 in MP4"
            )
        _check_frame_size(codec.width, codec.height, self._limits, self._name)
        return streams[0]


def _check_frame_size(width: int, height: int, limits: MediaLimits, name: str) -> None:
    if width * height > limits.max_image_pixels:
        raise MediaTooLargeError(
            f"{name} is {width} x {height}, limit is {limits.max_image_pixels:,} pixels a frame; "
            "resize it first"
        )


def _timestamp_of(frame: av.VideoFrame) -> Fraction | None:
    if frame.pts is None or frame.time_base is None:
        return None
    return frame.pts * frame.time_base


def _seconds_from_first(timestamps: Timestamps) -> list[float]:
    """Return seconds since the first timestamp; [] where one is missing or they decrease."""
    known = [timestamp for timestamp in timestamps if timestamp is not None]
    if len(known) < len(timestamps) or any(b < a for a, b in pairwise(known)):
        return []
    return [float(timestamp - known[0]) for timestamp in known]


def _identity(pixels_HWC: np.ndarray) -> np.ndarray:
    return pixels_HWC


def _rotation_of(frame: av.VideoFrame) -> Callable[[np.ndarray], np.ndarray]:
    """Return the rotation of the display matrix, which maps stored to displayed pixels.

    Nine 32-bit integers, row by row: (x, y) is mapped to (a x + c y, b x + d y). Quarter turns and
    reflections have either a and d or b and c; other angles are not applied.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _identity
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if a and d and not b and not c:
        return lambda pixels_HWC: pixels_HWC[:: _sign(d), :: _sign(a)]
    if b and c and not a and not d:
        return lambda pixels_HWC: pixels_HWC.swapaxes(0, 1)[:: _sign(b), :: _sign(c)]
    return _identity


def _sign(value: int) -> int:
    return 1 if value > 0 else -1


def _codec_name(media: Media) -> str:
    """Return the codec's FourCC (MP4) or codec id (Matroska), which PyAV does not expose."""
    head = read_head(media, 1 << 22)
    tail = b""
    if isinstance(media.content, Path):
        with media.content.open("rb") as file:
            file.seek(max(0, media.content.stat().st_size - (1 << 22)))
            tail = file.read()
    found = re.search(rb"stsd.{12}([ -~]{4})|\x86.(V_[A-Z0-9/_]{2,30})", head + tail, re.DOTALL)
    return repr((found[1] or found[2]).decode()) if found else "of this file"
