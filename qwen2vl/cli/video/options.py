"""Options of a video on the command line: which frames are seen, and what is between them.

Times are seconds, with a unit (90s, 2m, 1h) or as clocks show them (12:30, 1:02:03). The options
become keys of the video's content part, by the names of qwen-vl-utils (processor/media_options.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from qwen2vl.errors import InputError

__all__ = ["VIDEO_TIME", "part_options", "video_options"]

F = TypeVar("F", bound=Callable[..., Any])

TOKEN_PIXELS = 28 * 28  # of one vision token of a frame pair
MAX_FRAMES = 100_000  # with --video-tokens, in place of a preset's limit
EMBEDDED = "embedded"
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_FRAME_OPTIONS = ("fps", "frames", "every", "at")


class VideoTime(click.ParamType):
    """A time or duration in seconds."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        text = str(value).strip().lower()
        if found := _CLOCK.fullmatch(text):
            return 3600 * int(found[1] or 0) + 60 * int(found[2]) + float(found[3])
        if found := _NUMBER.fullmatch(text):
            return float(found[1]) * _UNITS[found[2]]
        return self.fail(f"got {value!r}, must be a time such as 90, 2m or 12:30", param, ctx)


VIDEO_TIME = VideoTime()


def video_options(command: F) -> F:
    """Add the options of the videos of a prompt."""
    decorators = (
        click.option(
            "--fps", type=float, callback=_check_fps, help="Frames sampled per second of video."
        ),
        click.option("--frames", type=int, help="Number of frames sampled, evenly."),
        click.option("--every", type=VIDEO_TIME, help="One frame in this time, as 5s."),
        click.option("--at", metavar="TIME,...", help="Frames at these times, as 12:30,14:05."),
        click.option("--start", type=VIDEO_TIME, help="Leave out what is before."),
        click.option("--end", type=VIDEO_TIME, help="Leave out what is after."),
        click.option(
            "--video-tokens", type=int, help="Budget of vision tokens of a video; for long ones."
        ),
        click.option(
            "--segment-frames",
            type=int,
            help="Divide videos into segments of so many frames, with the time before each; "
            "default for those longer than in training: 64.",
        ),
        click.option(
            "--subtitles",
            metavar="FILE",
            help="Subtitles (srt, vtt, ass), shown where they are said; embedded: the video's own.",
        ),
    )
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def part_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a video's content part.

    Raises:
        UsageError: two options choose the frames.
        InputError: the file of subtitles is missing.
    """
    chosen = [name for name in _FRAME_OPTIONS if given[name] is not None]
    if len(chosen) > 1:
        raise click.UsageError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one")
    subtitles = given["subtitles"]
    if subtitles not in (None, EMBEDDED) and not os.path.isfile(os.path.expanduser(subtitles)):
        raise InputError(f"--subtitles {subtitles}: no such file; check the path")
    tokens = given["video_tokens"]
    options = {
        "fps": given["fps"],
        "frame_interval": given["every"],
        "nframes": given["frames"],
        "frame_times": _read_times(given["at"]),
        "video_start": given["start"],
        "video_end": given["end"],
        "total_pixels": None if tokens is None else tokens * TOKEN_PIXELS,
        "max_frames": None if tokens is None or given["frames"] or given["at"] else MAX_FRAMES,
        "segment_frames": given["segment_frames"],
        "subtitles": subtitles,
    }
    return {name: value for name, value in options.items() if value is not None}


def _read_times(text: str | None) -> list[float] | None:
    if text is None:
        return None
    return [VIDEO_TIME.convert(part, None, None) for part in text.split(",") if part.strip()]


def _check_fps(
    _context: click.Context, _option: click.Parameter, value: float | None
) -> float | None:
    if value is not None and not 1e-6 <= value <= 1e6:  # also false for NaN
        raise click.BadParameter(f"got {value:g}, must be from 1e-06 to 1e+06, such as 2")
    return value
