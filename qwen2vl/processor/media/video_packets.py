"""Packets of a video file: container, timestamps, keyframes, and which packets frames depend on.

`open_stream` opens one self-contained file: no playlists, no URLs. `read_packets` demuxes it once,
without decoding. `PacketIndex.plan` chooses the packets to decode for some frames: those from the
last random access point before each frame on, without the disposable ones between, which no other
frame refers to. What follows a random access point decodes to the same pixels from there as from
the start of the file: an IDR picture or an exact recovery point in H.264, an IRAP picture in HEVC,
a keyframe in the other codecs of `_SPARSE_CODECS`.
(ITU-T H.264 7.4.1, D.2.8; H.265 7.4.2.2; FFmpeg: AV_PKT_FLAG_KEY, AVDISCARD_NONREF.)
"""

from __future__ import annotations

import io
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heappop, heappush
from pathlib import Path
from typing import BinaryIO

import av
from av import VideoFrame
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import Media, MediaLimits, read_head
from qwen2vl.processor.media.video_metadata import check_frame_count

__all__ = [
    "DecodingRun",
    "ExpectedFrames",
    "PacketIndex",
    "UnexpectedFramesError",
    "check_frame_size",
    "open_stream",
    "read_packets",
]

# Demuxers of self-contained files. Playlists refer to other files and hosts, so they are excluded.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpeg,mpegts,mpegvideo,asf,ogg,ivf,h264,hevc,"
    "m4v,mxf,nut,wav,mp3,flac,aac"
)
# Codecs whose keyframes reset the decoder; files of others are decoded from their start.
_SPARSE_CODECS = frozenset(
    "h264 hevc vp8 vp9 av1 libdav1d mpeg1video mpeg2video mpeg4 mjpeg prores dnxhd ffv1".split()
)
# Side data that changes the decoder from its packet on, so that no packet may be left out. PyAV
# before 16 does not tell which packets have some.
_DECODER_CHANGES = ("new_extradata", "param_change")
_KNOWS_SIDE_DATA = hasattr(Packet, "has_sidedata")


# The file -----------------------------------------------------------------------------------------


@contextmanager
def open_stream(
    media: Media, limits: MediaLimits, name: str
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file; yield its container and the video stream that is read.

    Raises:
        InputError: no decodable video stream, or frames of more pixels than the limit.
    """
    content = media.content
    assert isinstance(content, (Path, bytes)), "pixels are not a file"
    with (
        io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file,
        _open_container(file, media, name) as container,
    ):
        yield container, _select_stream(container, media, limits, name)


def check_frame_size(width: int, height: int, limits: MediaLimits, name: str) -> None:
    """Raise InputError if a frame has more pixels than the limit."""
    if width * height > limits.max_image_pixels:
        raise MediaTooLargeError(
            f"{name} is {width} x {height}, limit is {limits.max_image_pixels:,} pixels a frame; "
            "resize it first"
        )


def _open_container(file: BinaryIO, media: Media, name: str) -> InputContainer:
    try:
        return av.open(file, "r", metadata_errors="ignore", options={"format_whitelist": _DEMUXERS})
    except FFmpegError as error:
        kind = sniff_type(read_head(media))
        what, remedy = (
            (f"{kind}, cut short or damaged", "save or download it again")
            if kind.startswith("video/")
            else ("unknown type", "convert it to MP4")
        )
        raise InputError(f"{name} has no decodable video stream ({what}); {remedy}") from error


def _select_stream(
    container: InputContainer, media: Media, limits: MediaLimits, name: str
) -> VideoStream:
    """Return the video stream that FFmpeg takes for the best: the default, then the largest.

    Attached pictures (album covers) do not count. (av_find_best_stream.)
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        found = "only audio" if container.streams.audio else "nothing that can be shown"
        raise InputError(f"{name} has no video stream ({found}); name a video file")
    best = container.streams.best("video")
    stream = max(streams, key=lambda candidate: candidate is best)  # else the first
    codec = stream.codec_context
    if codec is None:
        raise InputError(
            f"{name}: video codec {_codec_name(media)} is not supported; convert it to H.264 in MP4"
        )
    check_frame_size(codec.width, codec.height, limits, name)
    return stream


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


# The index ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class DecodingRun:
    """Packets `start` to `last`, by their positions in the file, and those of the wanted frames."""

    start: int
    last: int
    targets: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """Packets of a stream in the order in which they are stored and decoded (their positions)."""

    pts: Sequence[int]
    is_shown: bytearray  # 0: an edit list discards the frame
    is_disposable: bytearray  # 1: no other frame refers to this one
    starts: Sequence[int]  # positions of random access points
    display: Sequence[int]  # positions in display order, of the shown frames

    def plan(self, indices: Iterable[int]) -> list[DecodingRun] | None:
        """Choose the packets to decode for frames `indices`, which ascend in display order.

        A run ends where the next frame can be decoded from a later random access point. The first
        packet is always decoded: headers that it alone has remain in effect.

        Returns None where frames cannot be decoded in this order.
        """
        runs = [DecodingRun(0, 0)]
        for index in indices:
            target = self.display[index]
            start, run = self._start_of(target), runs[-1]
            if start is None or start < run.start:
                return None
            if start > run.last + 1:
                run = DecodingRun(start, start)
                runs.append(run)
            run.last = max(run.last, target)
            run.targets.add(target)
        return runs

    def is_needed(self, position: int, run: DecodingRun) -> bool:
        """Return whether a packet of a run must be decoded."""
        return position in run.targets or not self.is_disposable[position]

    def _start_of(self, target: int) -> int | None:
        """Return the last random access point that is stored and displayed no later than a frame.

        Frames that follow it in the file and precede it on the screen refer to earlier ones.
        """
        for number in range(bisect_right(self.starts, target) - 1, -1, -1):
            if self.pts[self.starts[number]] <= self.pts[target]:
                return self.starts[number]
        return None


class UnexpectedFramesError(Exception):
    """The decoder returned other frames than those of the packets that it got."""


class ExpectedFrames:
    """Frames of a run that are still to come: one for each packet, in display order, undamaged."""

    def __init__(self, index: PacketIndex, run: DecodingRun, size: tuple[int, int]) -> None:
        """Expect none yet; `size` is the (height, width) of all frames."""
        self._index, self._size = index, size
        self._first = index.pts[run.start]
        self._targets = {index.pts[position] for position in run.targets}
        self._pts: list[int] = []  # a heap

    def add(self, position: int) -> None:
        """Expect the frame of a packet that is decoded."""
        pts = self._index.pts[position]
        if self._index.is_shown[position] and pts >= self._first:
            heappush(self._pts, pts)

    def remove(self, frame: VideoFrame) -> bool:
        """Return whether a decoded frame is a target of the run.

        Frames before the run are not expected, and may be damaged: they refer to earlier ones.

        Raises:
            UnexpectedFramesError: it is damaged, of another size, or not the next one.
        """
        if frame.pts is not None and frame.pts < self._first:
            return False
        if not self._pts or heappop(self._pts) != frame.pts or frame.is_corrupt:
            raise UnexpectedFramesError
        if (frame.height, frame.width) != self._size:
            raise UnexpectedFramesError
        return frame.pts in self._targets

    def check_none(self) -> None:
        """Raise UnexpectedFramesError if a frame is missing at the end of the run."""
        if self._pts:
            raise UnexpectedFramesError


def read_packets(
    container: InputContainer, stream: VideoStream, limits: MediaLimits, name: str
) -> tuple[list[Fraction], PacketIndex | None]:
    """Demux a whole file; return the timestamps of its frames in display order, and an index.

    There are no timestamps where a packet has none. There is no index where a packet may not be
    left out.

    Raises:
        InputError: more frames than the limit.
    """
    pts: list[int] = []
    is_shown = bytearray()
    num_shown, has_empty = 0, False
    inspector = _PacketInspector(stream)
    is_sparse = _KNOWS_SIDE_DATA and stream.codec_context.name in _SPARSE_CODECS
    with suppress(FFmpegError):
        for packet in container.demux(stream):
            if packet.size == 0:
                has_empty = True  # in the middle: a frame that repeats the one before
                continue
            if packet.pts is None:
                if not packet.is_discard:
                    return [], None
                is_sparse = False
                continue
            if is_sparse:
                is_sparse = not has_empty and not (pts and _changes_decoder(packet))
                inspector.add(packet)
            pts.append(packet.pts)
            is_shown.append(not packet.is_discard)
            num_shown += not packet.is_discard
            check_frame_count(num_shown, limits, name)
    display = sorted((p for p in range(len(pts)) if is_shown[p]), key=pts.__getitem__)
    time_base = stream.time_base or Fraction(0)
    timestamps = [pts[position] * time_base for position in display]
    if not is_sparse or len(set(timestamps)) < len(timestamps):
        return timestamps, None
    starts, is_disposable = inspector.result()
    if not starts or starts[0] != 0:
        return timestamps, None
    return timestamps, PacketIndex(pts, is_shown, is_disposable, starts, display)


def _changes_decoder(packet: Packet[VideoStream]) -> bool:
    return any(packet.has_sidedata(kind) for kind in _DECODER_CHANGES)


# Network abstraction layer (NAL) units of H.264 and HEVC ------------------------------------------


class _PacketInspector:
    """Finds the random access points and disposable packets of a stream."""

    def __init__(self, stream: VideoStream) -> None:
        self._codec = stream.codec_context.name
        extradata = stream.codec_context.extradata or b""
        # Bytes of a NAL unit's length; 0: start codes (Annex B).
        self._length_size = 0
        if self._codec == "h264" and len(extradata) > 6 and extradata[0] == 1:
            self._length_size = (extradata[4] & 3) + 1
        elif self._codec == "hevc" and len(extradata) > 22 and any(extradata[:2]):
            self._length_size = (extradata[21] & 3) + 1
        self._starts: list[int] = []
        self._is_nonreference = bytearray()
        self._temporal_ids = bytearray()

    def add(self, packet: Packet[VideoStream]) -> None:
        """Inspect the next packet."""
        is_start, is_nonreference, temporal_id = packet.is_keyframe, False, 0
        if self._codec in ("h264", "hevc"):
            units = list(_nal_units(bytes(packet), self._length_size))
            if self._codec == "h264":
                is_random_access, is_nonreference = _inspect_h264(units)
            else:
                is_random_access, is_nonreference, temporal_id = _inspect_hevc(units)
            is_start = is_start and is_random_access
        if is_start:
            self._starts.append(len(self._is_nonreference))
        self._is_nonreference.append(is_nonreference)
        self._temporal_ids.append(temporal_id)

    def result(self) -> tuple[list[int], bytearray]:
        """Return the positions of random access points, and which packets are disposable."""
        # Pictures of higher temporal sub-layers may refer to non-reference pictures of lower ones.
        highest = max(self._temporal_ids, default=0)
        is_disposable = bytearray(
            is_nonreference and temporal_id == highest
            for is_nonreference, temporal_id in zip(
                self._is_nonreference, self._temporal_ids, strict=True
            )
        )
        return self._starts, is_disposable


def _nal_units(data: bytes, length_size: int) -> Iterator[bytes]:
    if not length_size:
        yield from filter(None, data.split(b"\0\0\1")[1:])
        return
    position = 0
    while position + length_size < len(data):
        first = position + length_size
        position = first + int.from_bytes(data[position:first], "big")
        if position > first:
            yield data[first:position]


def _inspect_h264(units: Iterable[bytes]) -> tuple[bool, bool]:
    """Return whether a packet is a random access point, and whether no frame refers to it."""
    is_random_access, has_slice, is_referenced = False, False, False
    for unit in units:
        kind = unit[0] & 31
        is_random_access |= kind == 5 or (kind == 6 and _has_exact_recovery_point(unit))
        has_slice |= 1 <= kind <= 5
        is_referenced |= bool(unit[0] & 0x60)  # nal_ref_idc, of parameter sets as well
    return is_random_access, has_slice and not is_referenced


def _has_exact_recovery_point(unit: bytes) -> bool:
    """Return whether supplemental information says that output is exact from this picture on."""
    data = unit.replace(b"\0\0\3", b"\0\0")
    position = 1
    with suppress(IndexError):
        while data[position] != 0x80:  # stop bit
            kind = size = 0
            while data[position] == 255:
                kind, position = kind + 255, position + 1
            kind, position = kind + data[position], position + 1
            while data[position] == 255:
                size, position = size + 255, position + 1
            size, position = size + data[position], position + 1
            if kind == 6:  # recovery_frame_cnt is 0, exact_match_flag is 1
                return data[position] >> 6 == 0b11
            position += size
    return False


def _inspect_hevc(units: Iterable[bytes]) -> tuple[bool, bool, int]:
    """Return what `_inspect_h264` does, and the temporal id (0 to 6)."""
    is_random_access, has_slice, is_referenced, temporal_id = False, False, False, 0
    for unit in units:
        kind = unit[0] >> 1 & 63
        if kind < 32 and len(unit) > 1:  # a slice
            has_slice = True
            is_random_access |= 16 <= kind <= 21
            is_referenced |= kind > 14 or kind % 2 == 1
            temporal_id = max(temporal_id, (unit[1] & 7) - 1)
        is_referenced |= 32 <= kind <= 34  # parameter sets
    return is_random_access, has_slice and not is_referenced, temporal_id
