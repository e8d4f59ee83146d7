"""Segments: the same frames in several items, times before them, subtitles where they are said."""

from __future__ import annotations

import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from qwen2vl.errors import InputError
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.media.source import DEFAULT_LIMITS
from qwen2vl.processor.video.segments import MAX_TRAINED_PAIRS, format_time
from qwen2vl.processor.video.subtitles import EMBEDDED, read_subtitles
from tests.media import encoded_video
from tests.tiny import tiny_processor

SRT = """1
00:00:01,000 --> 00:00:03,500
Hello <i>there</i>
second line

2
00:01:05,250 --> 00:01:07,000
Bye
"""
VTT = """WEBVTT

00:01.000 --> 00:03.500
Hello <c.yellow>there</c>
second line

00:01:05.250 --> 00:01:07.000 align:start
Bye
"""
ASS = r"""[Script Info]
ScriptType: v4.00+
[V4+ Styles]
Format: Name, Fontname
Style: Default,Arial
[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:01:05.25,0:01:07.00,Default,,0,0,0,,Bye
Dialogue: 0,0:00:01.00,0:00:03.50,Default,,0,0,0,,{\i1}Hello{\i0} there\Nsecond line
"""


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)


def prompt(count: int, **options: Any) -> ModelInput:
    """A video at one frame a second."""
    media = {"type": "video", "video": frames(count), "fps": 1.0, "max_frames": 5000} | options
    media["total_pixels"] = 10**9
    content = [media, {"type": "text", "text": "What?"}]
    return tiny_processor()([{"role": "user", "content": content}])


def text(model_input: ModelInput) -> str:
    shown = tiny_processor().tokenizer.decode(model_input.input_ids, keep_special="all")
    while "<|video_pad|><|video_pad|>" in shown:
        shown = shown.replace("<|video_pad|><|video_pad|>", "<|video_pad|>")
    return shown.replace("<|vision_start|><|video_pad|><|vision_end|>", "[V]")


def test_a_video_is_one_item_by_default_and_in_the_paper() -> None:
    assert "user\n[V]What?" in text(prompt(2 * 20))
    assert len(prompt(2 * MAX_TRAINED_PAIRS).items) == 1


def test_segments_have_the_frames_of_the_video_and_times_before_them() -> None:
    whole, divided = prompt(100), prompt(100, segment_frames=40)
    assert "user\n<00:00>[V]<00:40>[V]<01:20>[V]What?" in text(divided)
    assert [item.grid.t for item in divided.items] == [20, 20, 10]
    for name in ("pair_digests", "frame_timestamps", "notes"):
        parts = [getattr(item, name) for item in divided.items]
        assert sum(parts, ()) == getattr(whole.items[0], name)
    assert whole.patches_NP is not None and divided.patches_NP is not None
    assert torch.equal(divided.patches_NP, whole.patches_NP)


def test_a_video_beyond_training_is_divided_by_default() -> None:
    items = prompt(2 * MAX_TRAINED_PAIRS + 2).items
    assert [item.grid.t for item in items] == [32] * 12 + [1]


@pytest.mark.parametrize("content", [SRT, VTT, ASS])
def test_subtitles_follow_the_segment_in_which_they_begin(content: str) -> None:
    shown = text(prompt(100, segment_frames=40, subtitles=content.encode()))
    want = "<00:00>[V]Subtitles: Hello there second line\n<00:40>[V]Subtitles: Bye\n<01:20>[V]What?"
    assert want in shown


def test_subtitles_divide_a_video_by_default(tmp_path: Path) -> None:
    path = tmp_path / "movie.srt"
    path.write_text(SRT)
    shown = text(prompt(70, subtitles=path))
    assert "<00:00>[V]Subtitles: Hello there second line\n<01:04>[V]Subtitles: Bye\nWhat?" in shown


@pytest.mark.parametrize(
    ("subtitles", "message"),
    [
        (b"no subtitles", r"subtitles cannot be read .*SubRip \(\.srt\)"),
        ("nowhere.srt", "not found"),
        (EMBEDDED, "is no video file, so it holds no subtitles"),
        (b"x" * (17 * 2**20), "bytes, limit is"),
    ],
)
def test_subtitles_that_cannot_be_read(subtitles: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        prompt(10, subtitles=subtitles)
    assert raised.value.param == "messages[0].content[0]"


def test_a_server_reads_no_subtitles() -> None:
    processor = tiny_processor()
    other = processor.with_media(_OtherDecoder(processor.decoder), DEFAULT_LIMITS)
    media = {"type": "video", "video": frames(4), "subtitles": SRT.encode()}
    with pytest.raises(InputError, match="a server reads no subtitles"):
        other([{"role": "user", "content": [media]}])


class _OtherDecoder:
    def __init__(self, decoder: Any) -> None:
        self.open_image, self.open_video = decoder.open_image, decoder.open_video


def test_times_are_written_as_people_write_them() -> None:
    assert [format_time(t) for t in (0, 59.9, 750, 3600, 36_610)] == [
        "00:00",
        "00:59",
        "12:30",
        "1:00:00",
        "10:10:10",
    ]


def test_embedded_subtitles(tmp_path: Path) -> None:
    path = tmp_path / "movie.mkv"
    write_video_with_subtitles(path)
    cues = read_subtitles(EMBEDDED, path, DEFAULT_LIMITS, "movie.mkv")
    assert [(cue.start, cue.text) for cue in cues] == [
        (1.0, "Hello there second line"),
        (5.0, "Bye"),
    ]
    plain = tmp_path / "plain.mkv"
    write_video_with_subtitles(plain, subtitles=False)
    with pytest.raises(InputError, match=r"there are none; give a file"):
        read_subtitles(EMBEDDED, plain, DEFAULT_LIMITS, "plain.mkv")


@pytest.mark.parametrize(
    ("times", "want"),
    [([3, 1.2], (1.0, 1.0, 3.0, 3.0)), ([0], (0.0, 0.0)), ([1.6], (2.0, 2.0))],
)
def test_frames_at_given_times_are_pairs_of_their_own(
    times: list[float], want: tuple[float, ...]
) -> None:
    # A list of frames has two a second: its times are half of those of one a second.
    media = {"type": "video", "video": frames(10), "frame_times": [time / 2 for time in times]}
    (item,) = tiny_processor()([{"role": "user", "content": [media]}]).items
    assert item.frame_timestamps == tuple(time / 2 for time in want)
    assert item.grid.t == len(times)


def test_frames_at_an_interval_are_those_of_a_longer_video() -> None:
    """Also of one whose frames are not uniform."""
    short, long = (
        prompt(count, fps=None, frame_interval=1.4, nframes=None).items[0] for count in (50, 61)
    )
    times = short.frame_timestamps
    assert times == (*(round(1.4 * n * 2) / 2 for n in range(18)),)
    assert long.frame_timestamps[: len(times)] == times
    pairs = len(times) // 2
    assert long.pair_digests[:pairs] == short.pair_digests[:pairs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_times": [99]}, "no frame at 99 s; it lasts"),
        ({"frame_times": []}, "must be a list of 1 to"),
        ({"frame_times": ["12:30"]}, "frame_times is '12:30', must be a number"),
        ({"frame_times": [1], "nframes": 4}, "exclude each other"),
        ({"frame_interval": 0.001, "video_end": 0.5, "max_frames": 3}, "would be 501, limit is 3"),
        ({"frame_interval": 1, "fps": 1}, "exclude each other"),
        ({"segment_frames": 1}, "must lie between 2 and"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    media = {"type": "video", "video": frames(10), **options}
    with pytest.raises(InputError, match=message):
        tiny_processor()([{"role": "user", "content": [media]}])


def write_video_with_subtitles(path: Path, *, subtitles: bool = True) -> None:
    srt = SRT.replace("00:01:05,250 --> 00:01:07,000", "00:00:05,000 --> 00:00:06,000")
    inputs = [encoded_video(60, container="matroska")] + [srt.encode()] * subtitles
    with ExitStack() as stack:
        output = stack.enter_context(av.open(str(path), "w"))
        sources = [stack.enter_context(av.open(io.BytesIO(content))) for content in inputs]
        streams = [output.add_stream_from_template(source.streams[0]) for source in sources]
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = stream
                    output.mux(packet)
