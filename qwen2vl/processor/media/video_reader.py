"""Video files, decoded by FFmpeg through PyAV: the one module that imports it.

Time stamps are read from packets, which costs no decoding; then the file is decoded once, and only
the chosen frames become RGB. Where the decoded frames are not those that the packets promised
(damage, hidden frames, odd containers) the decoded ones count. Rotation is applied. Nothing but
one self-contained file is ever opened: no playlists, no URLs. Its Clip goes to video.py.
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
from typing import BinaryIO, Literal

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import Media, MediaLimits, read_head, sniff_type
from qwen2vl.processor.media.timeline import (
    Deadline,
    Shrink,
    Timeline,
    check_count,
    clip_seconds,
    frame_rate,
)

__all__ = ["FileClip"]

# Demuxers of one self-contained file. Playlists name other files and hosts, so they stay out.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,ivf,h264,hevc,"
    "m4v,mxf,nut,wav,mp3,flac,aac"
)
_DEFAULT_RATE = 25.0  # frames a second, where a file has neither time stamps nor a rate

Stamps = list[Fraction | None]  # one a frame, in display order


class FileClip:
    """The frames of one video file."""

    def __init__(self, media: Media, limits: MediaLimits, name: str) -> None:
        self._media, self._limits, self._name = media, limits, name
        self._deadline = Deadline(limits, name)
        self._damaged = False
        self._threading: Literal["AUTO", "NONE"] = "NONE"
        with self._opened() as (container, stream):
            self._hint = float(stream.average_rate) if stream.average_rate else None
            self._tick = float(stream.time_base or 0)
            self._claimed = (container.duration or 0) / av.time_base
        self._stand = _as_stored
        self._height, self._width = self._probe()
        self._stamps = self._packet_stamps()
        if self._stamps:
            self._threading = "AUTO"
        else:
            self._stamps = self._decoded_stamps()
        self.timeline = self._measure()

    def frames(self, indices: Sequence[int], shrink: Shrink) -> list[Tensor] | None:
        """Decode up to the last of `indices`, checking each time stamp against the promise."""
        wanted = set(indices)
        kept: list[Tensor] = []
        for index, (stamp, frame) in enumerate(self._decoded()):
            if self._stamps[index : index + 1] != [stamp]:
                break
            if index in wanted:
                kept.append(shrink(self._pixels(frame)))
                if len(kept) == len(wanted):
                    return kept
        self._stamps = self._decoded_stamps()
        self.timeline = self._measure()
        return None

    def _probe(self) -> tuple[int, int]:
        """Decode the first frame: its size and rotation are facts, the container's are claims."""
        for _, frame in self._decoded():
            self._stand = _turn_of(frame)
            height, width = self._pixels(frame).shape[:2]
            return height, width
        raise InputError(f"{self._name}: no frame can be decoded; it is damaged or cut short")

    def _decoded_stamps(self) -> Stamps:
        """Decode the whole file, for the truth about its frames.

        On one thread from here on: where a file is damaged, threads lose frames by chance.
        """
        self._threading, self._damaged = "NONE", False
        stamps = [stamp for stamp, _ in self._decoded()]
        assert stamps, "the first frame was decoded before, in the same way"
        return stamps

    def _packet_stamps(self) -> Stamps:
        """List when frames are due, by packets; empty where a packet does not say."""
        stamps: list[Fraction] = []
        with self._opened() as (container, stream), suppress(FFmpegError):
            for packet in container.demux(stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None or packet.time_base is None:
                    return []
                stamps.append(packet.pts * packet.time_base)
                check_count(len(stamps), self._limits, self._name)
        return [*sorted(stamps)]

    def _measure(self) -> Timeline:
        """Turn stamps into seconds; where they are missing or run backwards, into even steps."""
        notes = ["damaged; only the frames before the damage were used"] if self._damaged else []
        times = _seconds_from_first(self._stamps)
        if times:
            rate = frame_rate(times, tick=self._tick, hint=self._hint)
        else:
            rate = self._hint or _DEFAULT_RATE
            times = [i / rate for i in range(len(self._stamps))]
            notes.append(f"time stamps missing or running backwards, {rate:g} fps assumed")
        seconds = clip_seconds(times, rate)
        if seconds > self._limits.max_seconds:
            raise InputError(
                f"{self._name} lasts {seconds:,.0f} s, limit is {self._limits.max_seconds:,.0f} s; "
                "cut it first"
            )
        if self._claimed > 1.1 * seconds + 1:
            notes.append(f"{seconds:.1f} s found where the file claims {self._claimed:.1f} s")
        return Timeline(
            times=tuple(times),
            rate=rate,
            seconds=seconds,
            height=self._height,
            width=self._width,
            notes=tuple(notes),
        )

    def _decoded(self) -> Iterator[tuple[Fraction | None, av.VideoFrame]]:
        """Decode in display order, up to the first damage."""
        count = 0
        with self._opened() as (container, stream):
            for frame in self._until_error(container, stream):
                self._deadline.check()
                if frame.is_corrupt and count:
                    self._damaged = True
                    return
                if frame.is_corrupt:
                    continue  # a recording that begins between key frames has lost nothing yet
                count += 1
                check_count(count, self._limits, self._name)
                yield _stamp(frame), frame

    def _until_error(
        self, container: InputContainer, stream: VideoStream
    ) -> Iterator[av.VideoFrame]:
        try:
            for packet in container.demux(stream):
                yield from packet.decode()
        except FFmpegError:
            self._damaged = True

    def _pixels(self, frame: av.VideoFrame) -> np.ndarray:
        return self._stand(frame.to_ndarray(format="rgb24"))

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        content = self._media.content
        assert isinstance(content, (Path, bytes)), "pixels are not a file"
        with (
            io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
            self._container(file) as container,
        ):
            stream = self._stream(container)
            stream.thread_type = self._threading
            yield container, stream

    def _container(self, file: BinaryIO) -> InputContainer:
        try:
            return av.open(
                file, "r", metadata_errors="ignore", options={"format_whitelist": _DEMUXERS}
            )
        except FFmpegError as error:
            kind = sniff_type(read_head(self._media))
            what = f"{kind}, cut short or damaged" if kind.startswith("video/") else "unknown type"
            raise InputError(
                f"{self._name} has no decodable video stream ({what}); convert it to MP4"
            ) from error

    def _stream(self, container: InputContainer) -> VideoStream:
        """Pick the first stream of moving pictures; the cover of a song is none."""
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            found = "only audio" if container.streams.audio else "nothing that can be shown"
            raise InputError(f"{self._name} has no video stream ({found}); name a video file")
        codec = streams[0].codec_context
        if codec is None:
            label = _codec_label(self._media)
            raise InputError(
                f"{self._name}: video codec {label} is not supported; convert it to H.264 in MP4"
            )
        if codec.width * codec.height > self._limits.max_image_pixels:
            raise InputError(
                f"{self._name} is {codec.width} x {codec.height}, limit is "
                f"{self._limits.max_image_pixels:,} pixels a frame; resize it first"
            )
        return streams[0]


def _stamp(frame: av.VideoFrame) -> Fraction | None:
    if frame.pts is None or frame.time_base is None:
        return None
    return frame.pts * frame.time_base


def _seconds_from_first(stamps: Stamps) -> list[float]:
    """Seconds since the first stamp; empty where one is missing or smaller than the one before."""
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps) or any(b < a for a, b in pairwise(known)):
        return []
    return [float(stamp - known[0]) for stamp in known]


def _as_stored(pixels_HWC: np.ndarray) -> np.ndarray:
    return pixels_HWC


def _turn_of(frame: av.VideoFrame) -> Callable[[np.ndarray], np.ndarray]:
    """Read the display matrix, which says where a stored pixel is to be shown.

    Nine 32-bit integers, row by row: (x, y) goes to (a x + c y, b x + d y). Quarter turns and
    mirrors have either a and d or b and c; other angles are left as stored.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _as_stored
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if a and d and not b and not c:
        return lambda pixels_HWC: pixels_HWC[:: _sign(d), :: _sign(a)]
    if b and c and not a and not d:
        return lambda pixels_HWC: pixels_HWC.swapaxes(0, 1)[:: _sign(b), :: _sign(c)]
    return _as_stored


def _sign(value: int) -> int:
    return 1 if value > 0 else -1


def _codec_label(media: Media) -> str:
    """Find the codec's four letters (MP4) or name (Matroska), which PyAV does not tell."""
    head = read_head(media, 1 << 22)
    tail = b""
    if isinstance(media.content, Path):
        with media.content.open("rb") as file:
            file.seek(max(0, media.content.stat().st_size - (1 << 22)))
            tail = file.read()
    found = re.search(rb"stsd.{12}([ -~]{4})|\x86.(V_[A-Z0-9/_]{2,30})", head + tail, re.DOTALL)
    return repr((found[1] or found[2]).decode()) if found else "of this file"
