"""`qwen2vl ask --window`: the answer in each window of a long video, then the joined one.

[00:00-02:00] a man enters
[02:00-04:00] nothing
The man enters at 00:40.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.media_arguments import MediaFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import SamplingParams

__all__ = ["ask_in_windows", "window_of_training"]


def window_of_training(
    loaded: LoadedModel, messages: list[dict[str, Any]], options: Mapping[str, Any]
) -> float | None:
    """Return the length of windows for a video of more frames than in training, with a note.

    None: it has no more, or the user has said how to divide it.
    """
    from qwen2vl.processor.video.segments import MAX_TRAINED_PAIRS

    if "segment_frames" in options or "subtitles" in options:
        return None
    videos = loaded.llm.processor(messages).items
    pairs = sum(item.grid.t for item in videos)
    if pairs <= MAX_TRAINED_PAIRS:
        return None
    seconds = videos[-1].frame_timestamps[-1] - videos[0].frame_timestamps[0]
    window = seconds * MAX_TRAINED_PAIRS / pairs
    terminal.note(
        f"more frames than in training: asked in windows of {window:.0f} s; --segment-frames 64 "
        "asks once about all of them"
    )
    return window


def ask_in_windows(
    loaded: LoadedModel,
    files: Sequence[MediaFile],
    question: str,
    params: SamplingParams,
    options: Mapping[str, Any],
    *,
    seconds: float,
    as_json: bool,
) -> None:
    """Print the answer in each window, and, unless the model is nano, the joined answer.

    nano answers questions about pictures only, not about notes.

    Raises:
        UsageError: the prompt is not one video and a question.
    """
    from qwen2vl.video import answer_windows, join_windows

    if len(files) != 1 or files[0].kind != "video":
        raise click.UsageError("--window divides one video; give one, and no image")
    windows = []
    for window in answer_windows(
        loaded.llm, files[0].source, question, seconds=seconds, params=params, options=options
    ):
        windows.append(window)
        if not as_json:
            terminal.echo(f"[{window.times}] {window.completion.text.strip()}")
    joined = None
    if len(windows) > 1 and not loaded.is_default:
        joined = join_windows(loaded.llm, question, windows, params).text
    if not as_json:
        if joined is not None:
            terminal.echo(joined)
        return
    terminal.echo_json(
        {
            "windows": [
                {"start": w.start, "end": w.end, "text": w.completion.text} for w in windows
            ],
            "text": joined,
        }
    )
