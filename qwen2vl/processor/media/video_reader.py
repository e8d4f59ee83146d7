"""Video file reader: FFmpeg through PyAV. The only module that imports PyAV.

Timestamps are read from packets, without decoding; then the file is decoded once, and only the
sampled frames are converted to RGB. Where the decoded frames differ from the packets (damage,
hidden frames, unusual containers) the decoded frames determine the metadata. Rotation (display
matrix) and sample aspect ratio are applied, transparency is composited on white (video_frame.py).
Only one self-contained file is ever opened: no playlists, no URLs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import Media, MediaLimits, out_of_memory, read_head
from qwen2vl.processor.media.video_frame import (
    MAX_SAMPLE_ASPECT_RATIO,
    alpha_extrema,
    displayed_size,
    frame_to_rgb,
    has_alpha,
    rotation_of,
)
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
# FFmpeg's own decoders drop the alpha channel of WebM, which is a second stream; libvpx's do not.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Transfer functions of ITU-T H.273 whose values are not those of a standard display.
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_DEFAULT_FPS = 25.0  # where a file has neither timestamps nor a frame rate

T = TypeVar("T")
Timestamps = list[Fraction | None]  # one per frame, in display order


class PyAVVideoReader:
    """Reads the frames of one video file. (Implements VideoReader.)

    The metadata have the displayed size. Frames of non-square pixels are returned as stored, since
    their user resizes them to a size of the displayed aspect ratio anyway.
    """

    def __init__(
        self, media: Media, limits: MediaLimits, name: str, *, as_displayed: bool = True
    ) -> None:
        """Read the timestamps of all frames, and decode the first.

        Args:
            media: the file.
            limits: on size, length and decoding time.
            name: for errors.
            as_displayed: apply the sample aspect ratio and composite transparency on white; else
                the displayed size is the stored one, and alpha is dropped. Rotation is applied in
                both cases.

        Raises:
            InputError: no decodable video, or it exceeds the limits.
        """
        self._media, self._limits, self._name = media, limits, name
        self._as_displayed = as_displayed
        self._has_visible_alpha: bool | None = None  # None until a frame with alpha is decoded
        self._notes: list[str] = []  # on how frames are displayed
        self._deadline = Deadline(limits, name)
        self._damaged = False
        self._threading: Literal["AUTO", "NONE"] = "NONE"
        with self._open() as (container, stream):
            self._nominal_fps = float(stream.average_rate) if stream.average_rate else None
            self._time_base = float(stream.time_base or 0)
            self._declared_duration = (container.duration or 0) / av.time_base
            self._alpha_decoder = self._find_alpha_decoder(stream)
            if transfer := _HDR_TRANSFERS.get(stream.codec_context.color_trc):
                self._notes.append(
                    f"HDR ({transfer}), not tone-mapped: darker and paler than displayed"
                )
        first = self._first_frame()
        self._stored_size, self._changes_size = (first.height, first.width), False
        self._rotate = rotation_of(first)
        self._height, self._width = self._displayed_size(first)
        if as_displayed and has_alpha(first.format):
            self._has_visible_alpha = self._find_visible_alpha()
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
            if self._timestamps[index : index + 1] != [timestamp] or self._is_new_size(frame):
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

    def _first_frame(self) -> av.VideoFrame:
        for _, frame in self._decode():
            return frame
        raise InputError(
            f"{self._name}: no frame can be decoded; it is damaged or cut short, so save or "
            "download it again"
        )

    def _displayed_size(self, first: av.VideoFrame) -> tuple[int, int]:
        """Return the upright (height, width) of the first frame: the container's may be wrong.

        Raises:
            MediaTooLargeError: more pixels than the limit.
        """
        height, width = first.height, first.width
        ratio = self._sample_aspect_ratio if self._as_displayed else Fraction(1)
        if not 1 / MAX_SAMPLE_ASPECT_RATIO <= ratio <= MAX_SAMPLE_ASPECT_RATIO:
            self._notes.append(
                f"sample aspect ratio {_format_ratio(ratio)} ignored: more than "
                f"{MAX_SAMPLE_ASPECT_RATIO} to 1"
            )
        elif (height, width) != (size := displayed_size(height, width, ratio)):
            self._notes.append(
                f"{width} x {height} pixels of aspect ratio {_format_ratio(ratio)}, displayed as "
                f"{size[1]} x {size[0]}"
            )
            height, width = size
            _check_frame_size(width, height, self._limits, self._name)
        is_sideways = self._rotate(np.empty((1, 2))).shape == (2, 1)
        return (width, height) if is_sideways else (height, width)

    def _find_visible_alpha(self) -> bool:
        """Return whether a pixel of any frame is visible: alpha of zeros alone is padding.

        32-bit video without transparency is often stored so. A transparent video is decided by its
        first frames.
        """
        for _, frame in self._decode():
            if not has_alpha(frame.format):
                continue
            low, high = alpha_extrema(frame)
            if high > 0:
                if low < 255:
                    self._notes.append("transparency composited on white")
                return True
        self._damaged = False  # damage is found, and noted, where frames are used
        self._notes.append("alpha channel ignored: it is 0 in all frames")
        return False

    def _read_frame_timestamps(self) -> Timestamps:
        """Decode the whole file and return the timestamps of its frames.

        Single-threaded from here on: in a damaged file, threads drop frames nondeterministically.
        """
        self._threading, self._damaged = "NONE", False
        timestamps: Timestamps = []
        for timestamp, frame in self._decode():
            timestamps.append(timestamp)
            if self._is_new_size(frame):
                self._changes_size = True
                size = f"{frame.width} x {frame.height}"
                self._notes.append(f"some frames are {size}; all are resized like the first")
        assert timestamps, "the first frame was decoded before, in the same way"
        return timestamps

    def _is_new_size(self, frame: av.VideoFrame) -> bool:
        """Return whether a frame is the first one found of another size than the first."""
        return not self._changes_size and (frame.height, frame.width) != self._stored_size

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
        notes += self._notes
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
        decoder: Any = stream.codec_context
        if self._alpha_decoder:
            decoder = av.CodecContext.create(self._alpha_decoder, "r")
        try:
            for packet in container.demux(stream):
                frames = decoder.decode(packet)
                self._sample_aspect_ratio = _sample_aspect_ratio(stream)
                yield from frames
        except MemoryError as error:  # PyAV raises a subclass of FFmpegError, too
            raise out_of_memory(self._name) from error
        except FFmpegError:
            self._damaged = True

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if self._as_displayed and self._has_visible_alpha is None and has_alpha(frame.format):
            self._has_visible_alpha = self._find_visible_alpha()
        try:
            rgb = frame_to_rgb(frame, composite_on_white=bool(self._has_visible_alpha))
        except FFmpegError as error:
            raise InputError(
                f"{self._name}: its colors ({frame.format.name}, matrix {int(frame.colorspace)} of "
                "ITU-T H.273) cannot be converted to RGB; convert it to BT.709"
            ) from error
        return self._rotate(rgb)

    def _find_alpha_decoder(self, stream: VideoStream) -> str | None:
        """Return the decoder of a WebM with an alpha channel; None: FFmpeg's default."""
        name = _ALPHA_DECODERS.get(stream.codec_context.name)
        if not self._as_displayed or name is None or stream.metadata.get("alpha_mode") != "1":
            return None
        if name not in av.codecs_available:
            self._notes.append(f"transparency dropped: this build of FFmpeg lacks {name}")
            return None
        return name

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
        """Return the video stream that FFmpeg takes for the best: the default, then the largest.

        Attached pictures (album covers) do not count. (av_find_best_stream.)
        """
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            found = "only audio" if container.streams.audio else "nothing that can be shown"
            raise InputError(f"{self._name} has no video stream ({found}); name a video file")
        best = container.streams.best("video")
        stream = max(streams, key=lambda candidate: candidate is best)  # else the first
        codec = stream.codec_context
        if codec is None:
            label = _codec_name(self._media)
            raise InputError(
                f"{self._name}: video codec {label} is not supported; convert it to H.264 in MP4"
            )
        _check_frame_size(codec.width, codec.height, self._limits, self._name)
        return stream


def _check_frame_size(width: int, height: int, limits: MediaLimits, name: str) -> None:
    if width * height > limits.max_image_pixels:
        raise MediaTooLargeError(
            f"{name} is {width} x {height}, limit is {limits.max_image_pixels:,} pixels a frame; "
            "resize it first"
        )


def _sample_aspect_ratio(stream: VideoStream) -> Fraction:
    """Return the container's ratio, or else that of the frames decoded so far; 1 if unknown.

    As ffplay. A ratio without a positive numerator and denominator is none.
    """
    for ratio in (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio):
        if ratio is not None and ratio > 0:
            return ratio
    return Fraction(1)


def _format_ratio(ratio: Fraction) -> str:
    return f"{ratio.numerator}:{ratio.denominator}"


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
