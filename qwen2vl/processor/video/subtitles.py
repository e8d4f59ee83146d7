"""Subtitles of a video: from a file (SubRip, WebVTT, ASS), or those that the video file holds.

FFmpeg reads all of them; markup is removed. Times are seconds from the beginning of the file. Text
that a video shows as pictures (DVD, Blu-ray) cannot be read.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.errors import InputError, MediaTooLargeError
from qwen2vl.processor.media.source import MediaLimits, read_source

if TYPE_CHECKING:
    from av.container import InputContainer

__all__ = ["EMBEDDED", "Cue", "read_subtitles"]

EMBEDDED = "embedded"  # in place of a file: those of the video

MAX_BYTES = 16 * 2**20  # of a file of subtitles; those of a movie have 100 kB
_DEMUXERS = "srt,webvtt,ass"
_MARKUP = re.compile(r"\{\\[^}]*\}|<[^>]{1,40}>")


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle: when it appears, in seconds, and its text in one line."""

    start: float
    text: str


def read_subtitles(
    subtitles: str | PathLike[str] | bytes, video: Any, limits: MediaLimits, name: str
) -> list[Cue]:
    """Return the subtitles of a video, in order of time.

    Args:
        subtitles: a file, its content, or EMBEDDED.
        video: the source of the video; a file where they are embedded.
        limits: on what may be opened.
        name: of the video, for errors.

    Raises:
        InputError: there are none, or they cannot be read.
    """
    if subtitles == EMBEDDED:
        if not isinstance(video, str | bytes | PathLike):
            raise InputError(f"{name} is no video file, so it holds no subtitles; give their file")
        content = read_source(video, limits, name).content
        cues = _read(content, {}, f"{name}: its subtitles")
    else:
        where = f"{name}: subtitles"
        content = read_source(subtitles, limits, where).content
        assert isinstance(content, bytes | Path), "a path or bytes were given"
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if size > MAX_BYTES:
            raise MediaTooLargeError(
                f"{where} have {size:,} bytes, limit is {MAX_BYTES:,}; give a file of text"
            )
        cues = _read(content, {"format_whitelist": _DEMUXERS}, where)
    return sorted(cues, key=lambda cue: cue.start)


def _read(content: Any, options: dict[str, str], where: str) -> list[Cue]:
    import av  # imported here: most videos have no subtitles, and most prompts no video
    from av.error import FFmpegError

    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
        with file, closing(av.open(file, "r", options=options)) as container:
            return list(_cues(container, where))
    except (FFmpegError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where} cannot be read ({error}); give a file of SubRip (.srt), WebVTT (.vtt) or "
            "ASS, in UTF-8"
        ) from error


def _cues(container: InputContainer, where: str) -> Iterator[Cue]:
    streams = container.streams.subtitles
    if not streams:
        raise InputError(f"{where}: there are none; give a file of them, such as movie.srt")
    for packet in container.demux(streams[0]):
        if packet.pts is None or packet.time_base is None:
            continue
        for subtitle in packet.decode():
            dialogue: Any = getattr(subtitle, "dialogue", None)
            if dialogue is None:
                raise InputError(f"{where} are pictures, not text; give a file of them as text")
            text = " ".join(_MARKUP.sub("", dialogue.decode()).split())
            if text:
                yield Cue(float(packet.pts * packet.time_base), text)
