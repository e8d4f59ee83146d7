"""Windows: one prompt for each part of a video, in order; joined by one more prompt of text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.errors import InputError
from qwen2vl.processor.media.video_metadata import VideoMetadata
from qwen2vl.video import answer_windows, join_windows, windows
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_processor

GREEDY = SamplingParams(temperature=0, max_tokens=4)
MODEL = random_model(tiny_config())


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)


def chat(llm: LLM, **part: Any) -> Any:
    content = [{"type": "video", **part}, {"type": "text", "text": "What?"}]
    return llm.chat([{"role": "user", "content": content}], GREEDY)[0]


def test_each_window_is_a_prompt_of_its_own() -> None:
    llm, video = LLM(MODEL, tiny_processor()), frames(50)  # of two a second
    found = list(answer_windows(llm, video, "What?", seconds=10, params=GREEDY))
    assert [(window.start, window.end) for window in found] == [(0, 10), (10, 20), (20, 25)]
    assert [window.times for window in found] == ["00:00-00:10", "00:10-00:20", "00:20-00:25"]
    for window in found:
        want = chat(llm, video=video, video_start=window.start, video_end=window.end)
        assert window.completion.token_ids == want.token_ids


def test_windows_without_frames_are_left_out() -> None:
    """Frames at 0 to 3 s and at 20 s; the last lasts as long as the others."""
    timestamps = (0.0, 1.0, 2.0, 3.0, 20.0)
    metadata = VideoMetadata(timestamps=timestamps, fps=None, duration=21.0, height=9, width=9)
    assert windows._divide(metadata, {}, 5.0) == [(0, 5), (20, 21)]
    assert windows._divide(metadata, {}, 20.5) == [(0, 20.5)]
    assert windows._divide(metadata, {"video_start": 2.0, "video_end": 4.0}, 1.5) == [(2, 3.5)]


def test_options_limit_the_whole_and_hold_in_each_window() -> None:
    llm = LLM(MODEL, tiny_processor())
    options = {"fps": 1.0, "video_start": 4.0, "video_end": 30.0, "nframes": None}
    options = {key: value for key, value in options.items() if value is not None}
    found = list(
        answer_windows(llm, frames(50), "What?", seconds=15, params=GREEDY, options=options)
    )
    assert [(window.start, window.end) for window in found] == [(4, 19), (19, 30)]
    assert all(window.completion.video_tokens for window in found)


def test_answers_are_joined_from_notes_with_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(MODEL, tiny_processor())
    found = list(answer_windows(llm, frames(40), "What?", seconds=10, params=GREEDY))
    asked: list[str] = []
    monkeypatch.setattr(
        llm, "chat", lambda messages, _params: asked.append(messages[0]["content"]) or [None]
    )
    join_windows(llm, "Who enters?", found, GREEDY)
    assert f"<00:00-00:10> {found[0].completion.text.strip()}\n<00:10-00:20> " in asked[0]
    assert asked[0].endswith("Who enters?")


@pytest.mark.parametrize("seconds", [0, -1.0, 1e-9])
def test_windows_without_length(seconds: float) -> None:
    with pytest.raises(InputError, match="would be more than 10,000; make them longer"):
        next(answer_windows(LLM(MODEL, tiny_processor()), frames(4), "What?", seconds=seconds))
    assert windows.MAX_WINDOWS == 10_000
