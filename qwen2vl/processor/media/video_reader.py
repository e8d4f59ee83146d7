"""Video file reader: FFmpeg through PyAV.

Timestamps and keyframes are read from packets, without decoding (video_packets.py). Of the packets
those are decoded which the selected frames depend on, and only the selected frames are converted
to RGB. The decoder has to return exactly the frames of the packets that it got; where it does not
(damage, hidden frames, unusual containers), the file is decoded from its start, and where that
differs from the packets too, the decoded frames determine the metadata. Rotation (display matrix)
and sample aspect ratio are applied, transparency is composited on white (video_frame.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.media.source import Media, MediaLimits, out_of_memory
from qwen2vl.processor.media.video_frame import (
    find_visible_alpha,
    frame_to_rgb,
    has_alpha,
    rotation_of,
    sample_aspect_ratio,
    upright_size,
)
from qwen2vl.processor.media.video_metadata import (
    Deadline,
    FramesDifferError,
    FrameTransform,
    VideoMetadata,
    check_frame_count,
    frame_rate,
    video_duration,
)
from qwen2vl.processor.media.video_packets import (
    DecodingRun,
    ExpectedFrames,
    PacketIndex,
    UnexpectedFramesError,
    check_frame_size,
    open_stream,
    read_packets,
)

__all__ = ["PyAVVideoReader"]

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
        self._damaged = False
        self._threading: Literal["AUTO", "NONE"] = "NONE"
        self._packets: PacketIndex | None = None  # None: files are decoded from their start
        self._deadline = Deadline(limits, name)
        with self._deadline.running():
            self._read_declarations()
            first_timestamp = self._read_first_frame()
            self._read_timestamps(first_timestamp)
            self.metadata = self._build_metadata()

    def frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        """Decode what the frames depend on, comparing all decoded timestamps with the metadata.

        Raises:
            FramesDifferError: they differ, and the metadata have been replaced.
            InputError: a frame cannot be decoded, or the time limit is exceeded.
        """
        return self._deadline.counted(self._frames_at(indices, transform))

    def close(self) -> None:
        """Do nothing: the file is open only while a method or a generator reads it."""

    def _frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        remaining = deque(indices)
        runs = self._packets.plan(indices) if self._packets else None
        if runs is not None:
            with suppress(UnexpectedFramesError), closing(self._decode_runs(runs)) as frames:
                for frame in frames:
                    remaining.popleft()
                    yield transform(self._to_rgb(frame))
        if not remaining:
            return
        self._packets = None
        with closing(self._decode()) as decoded:
            for index, (timestamp, frame) in enumerate(decoded):
                if self._timestamps[index : index + 1] != [timestamp] or self._is_new_size(frame):
                    break
                if index == remaining[0]:
                    remaining.popleft()
                    yield transform(self._to_rgb(frame))
                    if not remaining:
                        return
        self._timestamps = self._read_frame_timestamps()
        self.metadata = self._build_metadata()
        raise FramesDifferError(f"{self._name}: decoded frames differ from the packets")

    # Metadata -------------------------------------------------------------------------------------

    def _read_declarations(self) -> None:
        with self._open() as (container, stream):
            self._nominal_fps = float(stream.average_rate) if stream.average_rate else None
            self._time_base = float(stream.time_base or 0)
            self._declared_duration = (container.duration or 0) / av.time_base
            self._alpha_decoder = self._find_alpha_decoder(stream)
            if transfer := _HDR_TRANSFERS.get(stream.codec_context.color_trc):
                self._notes.append(
                    f"HDR ({transfer}), not tone-mapped: darker and paler than displayed"
                )

    def _find_alpha_decoder(self, stream: VideoStream) -> str | None:
        """Return the decoder of a WebM with an alpha channel; None: FFmpeg's default."""
        name = _ALPHA_DECODERS.get(stream.codec_context.name)
        if not self._as_displayed or name is None or stream.metadata.get("alpha_mode") != "1":
            return None
        if name not in av.codecs_available:
            self._notes.append(f"transparency dropped: this build of FFmpeg lacks {name}")
            return None
        return name

    def _read_first_frame(self) -> Fraction | None:
        """Learn how frames are displayed from the first; return its timestamp.

        Raises:
            InputError: no frame can be decoded.
            MediaTooLargeError: more pixels than the limit.
        """
        with closing(self._decode()) as decoded:
            timestamp, first = next(decoded, (None, None))
        if first is None:
            raise InputError(
                f"{self._name}: no frame can be decoded; it is damaged or cut short, so save or "
                "download it again"
            )
        self._stored_size, self._changes_size = (first.height, first.width), False
        self._rotate = rotation_of(first)
        ratio = self._sample_aspect_ratio if self._as_displayed else Fraction(1)
        self._height, self._width, notes = upright_size(first, ratio)
        self._notes += notes
        check_frame_size(self._width, self._height, self._limits, self._name)
        if self._as_displayed and has_alpha(first.format):
            self._has_visible_alpha = self._find_visible_alpha()
        return timestamp

    def _find_visible_alpha(self) -> bool:
        with closing(self._decode()) as decoded:
            is_visible, notes = find_visible_alpha(frame for _, frame in decoded)
        self._damaged = False  # damage is found, and noted, where frames are used
        self._notes += notes
        return is_visible

    def _read_timestamps(self, first_timestamp: Fraction | None) -> None:
        """Read the timestamps of packets; decode all frames where those are not the frames'.

        A packet may have no timestamp, and a recording may begin between keyframes.
        """
        with self._open() as (container, stream):
            timestamps, packets = read_packets(container, stream, self._limits, self._name)
        if timestamps[:1] != [first_timestamp]:
            self._timestamps = self._read_frame_timestamps()
            return
        self._timestamps: Timestamps = [*timestamps]
        self._threading = "AUTO"
        if self._alpha_decoder is None:
            self._packets = packets

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

    # Decoding -------------------------------------------------------------------------------------

    def _decode_runs(self, runs: Sequence[DecodingRun]) -> Generator[av.VideoFrame, None, None]:
        """Decode the packets of runs; yield the frames of their targets.

        Raises:
            UnexpectedFramesError: a decoded frame is damaged, missing, or none of these packets.
        """
        with self._open() as (container, stream):
            packets = (packet for packet in container.demux(stream) if packet.size)
            position = 0
            try:
                for run in runs:
                    for _ in range(position, run.start):
                        next(packets, None)
                    stream.codec_context.flush_buffers()
                    yield from self._decode_run(run, packets, stream.codec_context)
                    position = run.last + 1
            except MemoryError as error:  # PyAV raises a subclass of FFmpegError, too
                raise out_of_memory(self._name) from error
            except FFmpegError as error:
                raise UnexpectedFramesError from error

    def _decode_run(
        self, run: DecodingRun, packets: Iterator[Packet], decoder: av.VideoCodecContext
    ) -> Iterator[av.VideoFrame]:
        index = self._packets
        assert index is not None, "runs are planned by the index"
        expected = ExpectedFrames(index, run, self._stored_size)
        for position in range(run.start, run.last + 1):
            self._deadline.check()
            packet = next(packets, None)
            if packet is None or packet.pts != index.pts[position]:
                raise UnexpectedFramesError
            frames: list[av.VideoFrame] = []
            if index.is_needed(position, run):
                expected.add(position)
                frames += decoder.decode(packet)
            if position == run.last:
                frames += decoder.decode(None)
            for frame in frames:
                check_frame_size(frame.width, frame.height, self._limits, self._name)
                if expected.remove(frame):
                    yield frame
        expected.check_none()

    def _decode(self) -> Generator[tuple[Fraction | None, av.VideoFrame], None, None]:
        """Decode frames in display order, up to the first damaged one; yield (timestamp, frame)."""
        count = 0
        with self._open() as (container, stream):
            for frame in self._decode_until_error(container, stream):
                self._deadline.check()
                if frame.is_corrupt and count:
                    self._damaged = True
                    return
                if frame.is_corrupt:
                    continue  # a recording may begin between keyframes: no frame is lost yet
                count += 1
                check_frame_count(count, self._limits, self._name)
                # A stream may change its size in the middle.
                check_frame_size(frame.width, frame.height, self._limits, self._name)
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
                self._sample_aspect_ratio = sample_aspect_ratio(stream)
                yield from frames
        except MemoryError as error:
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

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with open_stream(self._media, self._limits, self._name) as (container, stream):
            stream.thread_type = self._threading
            yield container, stream


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
