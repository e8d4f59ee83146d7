"""The progress line: what is always said, and what only when it happens."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.cli.progress import Progress

LINE: dict[str, Any] = {
    "step": 20,
    "steps": 200,
    "stage": "see",
    "loss": 1.2345,
    "seconds": 30.0,
    "tokens_per_second": 12345.6,
    "pictures_per_second": 88.2,
    "data_wait": 0.013,
    "bad_samples": 0,
    "skipped": 0,
    "families": {"text": {"loss": 2.0, "exact": 0.125}, "shapes": {"loss": 0.5, "exact": 1.0}},
}


def later(**facts: Any) -> str:
    progress = Progress()
    progress(LINE, 90)
    return progress({**LINE, "step": 40, **facts}, 120)


def test_a_line_of_training() -> None:
    assert Progress()(LINE, 90) == (
        "   1.5 min  20/200 see  loss 1.234  12,346 tok/s  88 img/s  wait 1%"
        "  | text 2.000/12%  shapes 0.500/100%"
    )


def test_from_the_second_on_it_says_when_the_run_ends() -> None:
    assert "  ETA 4 min  |" in later()  # 160 steps of 1.5 s


def test_the_last_has_nothing_left() -> None:
    progress = Progress()
    progress(LINE, 90)
    assert "ETA" not in progress({**LINE, "step": 200}, 120)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"mfu": 0.4123}, "  MFU 41.2%  wait"),
        ({"bad_samples": 3}, "  3 bad samples  |"),
        ({"skipped": 1}, "  1 spikes skipped  |"),
        ({"loss": None}, "  loss -  "),
    ],
)
def test_what_is_known_or_wrong_is_said(facts: dict[str, Any], words: str) -> None:
    assert words in later(**facts)


@pytest.mark.parametrize(
    ("name", "over_mean", "shares", "words"),
    [
        ("waited", 2.5, {"data_wait": 0.3}, "slow: rank 3 (data 2.5x)"),
        ("waited", 2.5, {"data_wait": 0.01}, None),
        ("operations", 1.31, {}, "slow: rank 3 (work 1.3x)"),
        ("operations", 1.05, {}, None),
        ("optimizer", 1.5, {"phases": {"optimizer": 0.2}}, "slow: rank 3 (optimizer 1.5x)"),
        ("optimizer", 1.5, {"phases": {"optimizer": 0.01}}, None),
        ("other", 9.0, {"phases": {"other": 0.5}}, None),
    ],
)
def test_a_rank_that_others_wait_for_is_named(
    name: str, over_mean: float, shares: dict[str, Any], words: str | None
) -> None:
    told = later(slowest={name: {"rank": 3, "over_mean": over_mean}}, **shares)
    assert words is None or words in told
    assert ("slow:" in told) == (words is not None)


def test_a_line_of_a_probe() -> None:
    line = {
        "step": 500,
        "held_out": {
            "loss": 1.5,
            "vision_gain": 0.25,
            "compared": 40,
            "families": {"text": {"loss": 2.0, "vision_gain": 0.5}, "text_only": {"loss": 1.0}},
        },
        "mini": {
            "text": {"share_right": 0.5, "character_errors": 0.0671},
            "shapes": {"share_right": 0.8},
        },
    }
    assert Progress()(line, 60) == (
        "   1.0 min  500 held out  loss 1.500  vision gain 0.250"
        "  | text 2.000 gain 0.500  text_only 1.000  | mini text 6.7% wrong  shapes 80%"
    )


def test_a_probe_does_not_disturb_what_is_known_of_the_time() -> None:
    progress = Progress()
    progress(LINE, 90)
    progress({"step": 30, "held_out": None}, 100)
    assert "ETA 4 min" in progress({**LINE, "step": 40}, 120)
