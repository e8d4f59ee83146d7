"""Step timer: seconds are attributed to the current phase, also across reports."""

from __future__ import annotations

from itertools import count

import pytest

from qwen2vl.train.logging import step_timer
from qwen2vl.train.logging.step_timer import PHASES, StepTimer


@pytest.fixture(autouse=True)
def _ticking_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock by one second at every reading."""
    ticks = count()
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: float(next(ticks)))


def test_each_phase_lasts_until_the_next() -> None:
    timer = StepTimer()
    for phase in ("data", "forward", "backward", "forward", "optimizer", "other"):
        timer.start(phase)
    assert timer.pop_seconds() == {
        "data": 1.0,
        "forward": 2.0,
        "backward": 1.0,
        "optimizer": 1.0,
        "other": 1.0,
    }


def test_a_phase_continues_after_a_report() -> None:
    timer = StepTimer()
    timer.start("backward")
    assert timer.pop_seconds()["backward"] == 1.0
    timer.start("optimizer")
    seconds = timer.pop_seconds()
    assert (seconds["backward"], seconds["optimizer"]) == (1.0, 1.0)


def test_paused_time_belongs_to_no_phase() -> None:
    timer = StepTimer()
    timer.start("other")
    with timer.paused():
        for _ in range(10):
            step_timer.time.perf_counter()
    timer.start("data")
    assert timer.pop_seconds() == {**dict.fromkeys(PHASES, 0.0), "other": 2.0, "data": 1.0}


def test_pausing_before_any_phase() -> None:
    timer = StepTimer()
    with timer.paused():
        pass
    timer.start("data")
    assert timer.pop_seconds()["data"] == 1.0


def test_an_unused_timer_has_zero_seconds() -> None:
    assert StepTimer().pop_seconds() == dict.fromkeys(PHASES, 0.0)


def test_an_unknown_phase_fails_an_assertion() -> None:
    with pytest.raises(AssertionError, match="phases are data, forward"):
        StepTimer().start("lunch")
