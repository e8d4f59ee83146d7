"""Sparse decoding: frames equal those of a plain sequential pass, and few packets are decoded."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media import video_packets
from qwen2vl.processor.media.source import Media, MediaLimits
from qwen2vl.processor.media.video_frame import frame_to_rgb, rotation_of
from qwen2vl.processor.media.video_metadata import FramesDifferError
from qwen2vl.processor.media.video_packets import DecodingRun, PacketIndex
from qwen2vl.processor.media.video_reader import PyAVVideoReader
from tests.media import frames_of, with_matrix

pytestmark = pytest.mark.skipif(
    not video_packets._KNOWS_SIDE_DATA, reason="PyAV before 16: files are decoded from their start"
)

GOP, COUNT = 12, 90
X264 = {"g": str(GOP), "bf": "2", "sc_threshold": "0", "preset": "veryfast"}
X265 = f"log-level=error:keyint={GOP}:min-keyint={GOP}:scenecut=0:bframes=3:"
VP9 = {"g": str(GOP), "cpu-used": "8", "deadline": "realtime"}
B_FRAMES = {"g": str(GOP), "bf": "2", "sc_threshold": "1000000000"}

# name: container, codec, encoder options; whether packets are disposable
CLIPS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "H.264 MP4": ("mp4", "libx264", X264, True),
    "H.264 MP4 open GOP": ("mp4", "libx264", X264 | {"x264-params": "open-gop=1"}, True),
    "H.264 MP4 intra refresh": ("mp4", "libx264", X264 | {"intra-refresh": "1"}, True),
    "H.264 MKV": ("matroska", "libx264", X264 | {"bf": "3"}, True),
    "H.264 TS": ("mpegts", "libx264", X264, True),
    "H.264 FLV": ("flv", "libx264", X264, True),
    "HEVC MP4": ("mp4", "libx265", {"x265-params": X265 + "open-gop=0"}, True),
    "HEVC MP4 open GOP": ("mp4", "libx265", {"x265-params": X265 + "open-gop=1"}, True),
    "HEVC MKV sub-layers": (
        "matroska",
        "libx265",
        {"x265-params": X265 + "temporal-layers=2"},
        True,
    ),
    "HEVC TS": ("mpegts", "libx265", {"x265-params": X265 + "open-gop=1"}, True),
    "VP8 WebM": ("webm", "libvpx", VP9, False),
    "VP9 WebM": ("webm", "libvpx-vp9", VP9, False),
    "AV1 MP4": ("mp4", "libsvtav1", {"g": str(GOP), "preset": "12"}, False),
    "AV1 MKV": ("matroska", "libsvtav1", {"g": str(GOP), "preset": "12"}, False),
    "MPEG-4 AVI": ("avi", "mpeg4", {"g": str(GOP), "sc_threshold": "1000000000"}, False),
    "MPEG-4 MP4": ("mp4", "mpeg4", B_FRAMES, False),
    "MPEG-2 TS": ("mpegts", "mpeg2video", B_FRAMES, False),
    "Motion JPEG MOV": ("mov", "mjpeg", {}, False),
    "FFV1 MKV": ("matroska", "ffv1", {"g": str(GOP)}, False),
}


@cache
def clip(name: str, *, count: int = COUNT, live: bool = False, vfr: bool = False) -> bytes:
    """Encode a moving picture, of which no two frames are equal; skip without the encoder."""
    container, codec, options, _ = CLIPS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no encoder {codec}")
    random = np.random.default_rng(1)
    picture = random.integers(0, 200, (8, 14, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    stamps = np.cumsum(random.integers(1, 9, count)) if vfr else np.arange(count)
    buffer = io.BytesIO()
    muxer_options = {"live": "1"} if live else {}
    with av.open(buffer, "w", format=container, options=muxer_options) as output:
        stream = output.add_stream(codec, rate=30, options=options)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            pixels = picture[i % 80 : i % 80 + 48, 2 * i % 160 : 2 * i % 160 + 64] // 2 + i
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = int(stamps[i]), Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def sequential(data: bytes) -> list[bytes]:
    """Decode all frames by a plain pass with one thread."""
    frames: list[bytes] = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            rgb = frame_to_rgb(frame, composite_on_white=False)
            frames.append(rotation_of(frame)(rgb).tobytes())
    return frames


def target_sets(count: int) -> Iterator[list[int]]:
    """Yield sets of indices: first and last, all, one each, a run, and random ones."""
    yield from ([0, count - 1], list(range(count)), [0], [count - 1], [count // 2])
    yield list(range(count // 2, count // 2 + 5))
    for seed in range(8):
        random = np.random.default_rng(seed)
        chosen = random.choice(count, random.integers(1, 10), replace=False)
        yield sorted(set(chosen.tolist()))


def open_reader(content: bytes | Path, **limits: Any) -> PyAVVideoReader:
    return PyAVVideoReader(Media(content=content), MediaLimits(**limits), "video 1")


def check_exactness(data: bytes) -> PacketIndex:
    """Compare all target sets with the plain pass; check that nothing fell back to it."""
    wanted = sequential(data)
    reader = open_reader(data)
    assert len(reader.metadata.timestamps) == len(wanted)
    for indices in target_sets(len(wanted)):
        got = frames_of(reader, indices, lambda rgb: rgb.tobytes())
        assert got == [wanted[i] for i in indices], indices
    assert reader._packets is not None
    return reader._packets


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_those_of_a_sequential_pass(name: str) -> None:
    index = check_exactness(clip(name))
    assert any(index.is_disposable) == CLIPS[name][3]
    if "refresh" not in name:  # of which only the first keyframe is a picture without references
        assert len(index.starts) >= COUNT // GOP


@pytest.mark.parametrize("name", ["H.264 MP4", "HEVC MP4 open GOP", "VP9 WebM"])
def test_variable_frame_rate(name: str) -> None:
    assert open_reader(clip(name, vfr=True)).metadata.fps is None
    check_exactness(clip(name, vfr=True))


def test_rotated_frames() -> None:
    check_exactness(with_matrix(clip("H.264 MP4"), (0, 1, -1, 0)))


@pytest.mark.parametrize("name", ["H.264 MKV", "MPEG-4 AVI"])
def test_files_without_an_index(name: str) -> None:
    """Matroska without cues, AVI without idx1: packets are skipped by reading, not by seeking."""
    data = clip(name, live=True) if "MKV" in name else clip(name).replace(b"idx1", b"JUNK")
    assert b"\x1c\x53\xbb\x6b" not in data and b"idx1" not in data
    check_exactness(data)


@pytest.mark.parametrize("name", ["H.264 MP4", "H.264 MP4 open GOP", "HEVC MP4 open GOP"])
@pytest.mark.parametrize("first", [5, GOP + 3])
def test_edit_lists(name: str, first: int) -> None:
    """A cut without encoding: packets from the keyframe on, of which the first are not shown."""
    data = cut(clip(name), first)
    index = check_exactness(data)
    assert 0 < sum(index.is_shown) < len(index.is_shown)


def cut(data: bytes, first: int) -> bytes:
    """Copy the packets of an MP4 into another that begins in the middle of a GOP."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        shown = sorted(packet.pts for packet in packets if packet.pts is not None)
        begin = max(p.pts for p in packets if p.is_keyframe and p.pts <= shown[first])  # pyright: ignore
        at = next(i for i, packet in enumerate(packets) if packet.pts == begin)
        for packet in packets[at:]:
            assert packet.pts is not None and packet.dts is not None
            packet.pts, packet.dts = packet.pts - shown[first], packet.dts - shown[first]
            packet.stream = stream
            output.mux(packet)
    return buffer.getvalue()


# Cost -------------------------------------------------------------------------------------------


class CountingDecoder:
    """Counts the packets that a decoder gets."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self.num_packets = decoder, 0
        self.sample_aspect_ratio = decoder.sample_aspect_ratio

    def decode(self, packet: Any) -> Any:
        self.num_packets += packet is not None and packet.size > 0
        return self._decoder.decode(packet)

    def flush_buffers(self) -> None:
        self._decoder.flush_buffers()


class Counted:
    """Stands for a container and its stream, with a decoder that counts."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream
        self.codec_context = CountingDecoder(stream.codec_context)
        self.sample_aspect_ratio = stream.sample_aspect_ratio

    def demux(self, _: Any) -> Iterator[Any]:
        return self._container.demux(self._stream)


def count_packets(
    reader: PyAVVideoReader, monkeypatch: pytest.MonkeyPatch
) -> list[CountingDecoder]:
    """Return a list to which each opening of the file adds the decoder."""
    decoders: list[CountingDecoder] = []
    open_file = reader._open

    @contextmanager
    def counting() -> Iterator[tuple[Any, Any]]:
        with open_file() as (container, stream):
            both = Counted(container, stream)
            decoders.append(both.codec_context)
            yield both, both

    monkeypatch.setattr(reader, "_open", counting)
    return decoders


def test_only_what_frames_depend_on_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(clip("H.264 MP4"))
    decoders = count_packets(reader, monkeypatch)
    index = reader._packets
    assert index is not None
    assert frames_of(reader, [0, 2 * GOP, 5 * GOP]) is not None  # keyframes
    assert decoders.pop().num_packets == 3
    assert frames_of(reader, [GOP - 1, 4 * GOP - 1]) is not None
    assert 4 <= decoders.pop().num_packets <= 1 + 2 * GOP - sum(index.is_disposable[:GOP])
    assert frames_of(reader, range(COUNT)) is not None
    assert decoders.pop().num_packets == COUNT
    reader._packets = None
    assert frames_of(reader, [0, 5 * GOP]) is not None
    assert decoders.pop().num_packets > 5 * GOP


def test_frames_are_decoded_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(clip("H.264 MP4"))
    decoders = count_packets(reader, monkeypatch)
    with closing(reader.frames_at([0, 3 * GOP, 6 * GOP], np.array)) as frames:
        assert not decoders
        for number in (1, 2, 3):
            next(frames)
            assert decoders[0].num_packets == number
        assert len(decoders) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("has_index", [True, False])
def test_the_file_is_open_while_the_generator_is(has_index: bool, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip("H.264 MP4"))
    reader = open_reader(path)
    if not has_index:
        reader._packets = None

    def is_open() -> bool:
        files = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(file) == str(path.resolve()) for file in files)

    frames = reader.frames_at([1, 50], np.array)
    assert not is_open()
    next(frames)
    assert is_open()
    frames.close()
    assert not is_open()
    assert frames_of(reader, [1, 50]) is not None and not is_open()


def test_time_limit_counts_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_reader(clip("H.264 MP4"), decode_timeout=30)
    clock, later = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + later[0])
    seen = 0
    for _ in reader.frames_at(range(0, COUNT, 10), np.array):
        seen, later[0] = seen + 1, later[0] + 1000
    assert seen == 9

    def slow(rgb: np.ndarray) -> None:
        later[0] += 20

    with pytest.raises(InputError, match="video 1 took more than 30 s to decode"):
        frames_of(reader, [0, 20, 40], slow)


# Files whose decoded frames are not those of the packets ------------------------------------------


def without_index(data: bytes) -> PyAVVideoReader:
    reader = open_reader(data)
    reader._packets = None
    return reader


def drained(frames: Generator[bytes, None, None]) -> tuple[list[bytes], bool]:
    """Return the frames, and whether they differed from the metadata at the end."""
    seen: list[bytes] = []
    try:
        for frame in frames:
            seen.append(frame)
    except FramesDifferError:
        return seen, True
    return seen, False


def damaged(data: bytes) -> bytes:
    """Overwrite most of the packet of a frame in the middle that others refer to."""
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    at = next(i for i in range(3 * GOP, COUNT) if packets[i].is_keyframe)
    packet = next(packet for packet in packets[at + 1 :] if packet.pts > packets[at].pts)  # pyright: ignore
    assert packet.pos is not None
    start, end = packet.pos + 8, packet.pos + packet.size
    if data[:1] == b"G":  # MPEG-TS: 188 bytes, of which the frame is the last
        start, end = packet.pos, packet.pos + 188
    return data[:start] + bytes(end - start) + data[end:]


@pytest.mark.parametrize("spacing", [1, 3, COUNT - 1])
@pytest.mark.parametrize("name", ["H.264 MP4", "H.264 TS", "HEVC MP4", "MPEG-4 MP4", "MPEG-2 TS"])
def test_damage_in_the_middle(name: str, spacing: int) -> None:
    """Where it is seen, frames and metadata are those of the sequential pass."""
    data = damaged(clip(name))
    reader, reference = open_reader(data), without_index(data)
    before = reader.metadata
    indices = range(0, len(before.timestamps), spacing)
    got, differs = drained(reader.frames_at(indices, lambda rgb: rgb.tobytes()))
    wanted, reference_differs = drained(reference.frames_at(indices, lambda rgb: rgb.tobytes()))
    assert got[: len(wanted)] == wanted
    assert reference_differs or "TS" in name  # of which a lost packet is no packet
    assert differs == (reference_differs and spacing < COUNT - 1)
    if not differs:
        if reference_differs:  # no frame depends on what is damaged
            intact = sequential(clip(name))
            assert got == [intact[0], intact[-1]]
        return
    assert reader.metadata != before
    assert reader.metadata == reference.metadata
    last = len(reader.metadata.timestamps) - 1
    frames = frames_of(reader, [0, last], lambda rgb: rgb.tobytes())
    assert frames is not None
    assert frames == frames_of(reference, [0, last], lambda rgb: rgb.tobytes())


@pytest.mark.parametrize("name", ["H.264 TS", "HEVC TS", "MPEG-2 TS"])
def test_recordings_that_begin_between_keyframes(name: str) -> None:
    """The first packets are no frames: the metadata are those of the decoded frames at once."""
    data = clip(name)
    data = data[len(data) // 3 // 188 * 188 :]
    reader = open_reader(data)
    wanted = sequential(data)[-len(reader.metadata.timestamps) :]
    assert 0.4 * COUNT < len(wanted) < 0.8 * COUNT and reader._packets is None
    frames = frames_of(reader, range(len(wanted)), lambda rgb: rgb.tobytes())
    assert frames == wanted


@pytest.mark.parametrize("first", [0, 1])
def test_wrong_random_access_points(first: int) -> None:
    """Frames come from the sequential pass then, none of them twice; later ones as well."""
    data = clip("H.264 MP4")
    wanted, reader = sequential(data), open_reader(data)
    assert reader._packets is not None
    starts = [0, GOP, *range(2 * GOP + 5, COUNT, 9)]
    reader._packets = dataclasses.replace(reader._packets, starts=starts)
    indices = list(range(first, COUNT, 7))
    assert frames_of(reader, indices, lambda rgb: rgb.tobytes()) == [wanted[i] for i in indices]
    assert reader._packets is None
    assert frames_of(reader, [3], lambda rgb: rgb.tobytes()) == [wanted[3]]


def test_changed_parameters_forbid_leaving_packets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip("H.264 MP4")
    monkeypatch.setattr(video_packets, "_DECODER_CHANGES", ("no such kind",))
    monkeypatch.setattr(video_packets, "_changes_decoder", lambda packet: packet.pts > 20_000)
    reader = open_reader(data)
    assert reader._packets is None
    assert frames_of(reader, [9], lambda rgb: rgb.tobytes()) == [sequential(data)[9]]


def test_versions_of_pyav_that_do_not_tell_side_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_packets, "_KNOWS_SIDE_DATA", False)
    assert open_reader(clip("H.264 MP4"))._packets is None


# The index ----------------------------------------------------------------------------------------


def index_of(
    pts: Sequence[int], starts: Sequence[int], disposable: Sequence[int] = ()
) -> PacketIndex:
    positions = range(len(pts))
    return PacketIndex(
        pts=pts,
        is_shown=bytearray([1] * len(pts)),
        is_disposable=bytearray(position in disposable for position in positions),
        starts=starts,
        display=sorted(positions, key=pts.__getitem__),
    )


def test_runs() -> None:
    """Two GOPs of I P B B P B B; the first is decoded up to the last frame that is wanted."""
    index = index_of([0, 3, 1, 2, 6, 4, 5, 7, 10, 8, 9, 13, 11, 12], [0, 7])
    assert index.plan([0]) == [DecodingRun(0, 0, {0})]
    assert index.plan([1, 2]) == [DecodingRun(0, 3, {2, 3})]
    assert index.plan([8]) == [DecodingRun(0, 0), DecodingRun(7, 9, {9})]
    assert index.plan([3, 9]) == [DecodingRun(0, 1, {1}), DecodingRun(7, 10, {10})]
    # Nothing would be saved by a second run.
    assert index.plan([5, 7]) == [DecodingRun(0, 7, {6, 7})]


def test_leading_frames_belong_to_the_run_before() -> None:
    """Of an open GOP: stored after its keyframe, displayed before it."""
    index = index_of([0, 1, 2, 5, 3, 4, 6, 9, 7, 8], [0, 3, 7])
    assert index.plan([4]) == [DecodingRun(0, 5, {5})]
    assert index.plan([5]) == [DecodingRun(0, 0), DecodingRun(3, 3, {3})]
    assert index.plan([8]) == [DecodingRun(0, 0), DecodingRun(3, 9, {9})]


def test_order_that_cannot_be_decoded() -> None:
    """Keyframes that are displayed in another order than they are stored in."""
    index = index_of([0, 10, 11, 5, 6], [0, 1, 3])
    assert index.plan([1, 2]) == [DecodingRun(0, 0), DecodingRun(3, 4, {3, 4})]
    assert index.plan([1, 3]) is None


@pytest.mark.parametrize("length_size", [0, 2, 4])
def test_nal_units(length_size: int) -> None:
    units = [b"\x67abc", b"\x06", b"\x65" + bytes(range(1, 250))]
    if length_size:
        data = b"".join(len(unit).to_bytes(length_size, "big") + unit for unit in units)
    else:
        data = b"".join(b"\0\0\1" + unit for unit in units)
    assert list(video_packets._nal_units(data, length_size)) == units
    assert list(video_packets._nal_units(data[:-9], length_size))[:2] == units[:2]
    assert not list(video_packets._nal_units(b"", length_size))
    assert not list(video_packets._nal_units(bytes(9), length_size))


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([b"\x09\xf0", b"\x67a", b"\x68a", b"\x65a"], (True, False)),
        ([b"\x41a"], (False, False)),
        ([b"\x01a", b"\x01a"], (False, True)),
        ([b"\x01a", b"\x21a"], (False, False)),
        ([b"\x68a", b"\x01a"], (False, False)),  # a parameter set may be needed later
        ([b"\x09\xf0"], (False, False)),
        ([b"\x06\x06\x01\xc4\x80", b"\x41a"], (True, False)),
        ([b"\x06\x06\x01\x84\x80", b"\x41a"], (False, False)),  # not exact
        ([b"\x06\x06\x01\x24\x80", b"\x41a"], (False, False)),  # after several frames
        ([b"\x06\x01\x02\x06\x01\x06\x01\xc4\x80", b"\x41a"], (True, False)),
        ([b"\x06\xff\x00\xff\x01" + b"\x06" * 256 + b"\x06\x01\xc4\x80", b"\x41a"], (True, False)),
        ([b"\x06\x06", b"\x06\xff\xff", b"\x06\x01\x09", b"\x41a"], (False, False)),
    ],
)
def test_h264(units: list[bytes], expected: tuple[bool, bool]) -> None:
    assert video_packets._inspect_h264(units) == expected


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([b"\x26\x01a"], (True, False, 0)),  # IDR_W_RADL
        ([b"\x2a\x01a"], (True, False, 0)),  # CRA
        ([b"\x02\x01a"], (False, False, 0)),  # TRAIL_R
        ([b"\x00\x01a"], (False, True, 0)),  # TRAIL_N
        ([b"\x04\x02a"], (False, True, 1)),  # TSA_N
        ([b"\x10\x01a"], (False, True, 0)),  # RASL_N
        ([b"\x44\x01a", b"\x00\x01a"], (False, False, 0)),  # with a parameter set
        ([b"\x46\x01"], (False, False, 0)),
    ],
)
def test_hevc(units: list[bytes], expected: tuple[bool, bool, int]) -> None:
    assert video_packets._inspect_hevc(units) == expected


def test_pictures_of_lower_sub_layers_are_not_disposable() -> None:
    """Those of higher ones may refer to them, although their type says that they are not used."""

    class Stream:
        class codec_context:  # noqa: N801
            name, extradata = "hevc", None

    class Packet(bytes):
        is_keyframe = False

    inspector = video_packets._PacketInspector(Stream())  # pyright: ignore
    for unit in (b"\x26\x01a", b"\x00\x01a", b"\x00\x02a"):
        inspector.add(Packet(b"\0\0\1" + unit))  # pyright: ignore
    assert inspector.result() == ([], bytearray([0, 0, 1]))
