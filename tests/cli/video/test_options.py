"""Options of videos: times as people write them, what excludes each other, keys of the part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwen2vl.cli.video.options import VIDEO_TIME, part_options, video_options
from qwen2vl.errors import InputError


def parse(*arguments: str) -> dict[str, Any]:
    @click.command()
    @video_options
    def command(**given: Any) -> None:
        found.append(part_options(given))

    found: list[dict[str, Any]] = []
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("5s", 5), ("1.5 m", 90), ("2h", 7200), ("12:30", 750), ("1:02:03.5", 3723.5)],
)
def test_times(text: str, seconds: float) -> None:
    assert VIDEO_TIME.convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "12:", "1:2:3:4", "5 days"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter, match="must be a time such as 90, 2m or 12:30"):
        VIDEO_TIME.convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((), {}),
        (("--fps", "1"), {"fps": 1.0}),
        (("--every", "5s"), {"frame_interval": 5.0}),
        (("--at", "12:30, 14:05"), {"frame_times": [750.0, 845.0]}),
        (("--frames", "8", "--start", "1m"), {"nframes": 8, "video_start": 60.0}),
        (("--video-tokens", "1000"), {"total_pixels": 784_000, "max_frames": 100_000}),
        (
            ("--segment-frames", "64", "--subtitles", "embedded"),
            {"segment_frames": 64, "subtitles": "embedded"},
        ),
    ],
)
def test_keys_of_the_part(arguments: tuple[str, ...], want: dict[str, Any]) -> None:
    assert parse(*arguments) == want


def test_two_choices_of_frames() -> None:
    with pytest.raises(click.UsageError, match="--fps and --at exclude each other; give one"):
        parse("--at", "5", "--fps", "1")


def test_missing_subtitles(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"movie\.srt: no such file"):
        parse("--subtitles", str(tmp_path / "movie.srt"))
