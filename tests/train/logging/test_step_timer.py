"""Phases: seconds go to what was entered last, also across reports."""

from __future__ import annotations

from itertools import count

import pytest

from qwen2vl.train.logging import step_timer
from qwen2vl.train.logging.step_timer import PHASES, PhaseClock


@pytest.fixture(autouse=True)
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock be one second after the last."""
    ticks = count()
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: float(next(ticks)))


def test_each_phase_lasts_until_the_next() -> None:
    clock = PhaseClock()
    for phase in ("data", "forward", "backward", "forward", "optimizer", "other"):
        clock.enter(phase)
    assert clock.take_seconds() == {
        "data": 1.0,
        "forward": 2.0,
        "backward": 1.0,
        "optimizer": 1.0,
        "other": 1.0,
    }


def test_what_runs_goes_on_behind_a_report() -> None:
    clock = PhaseClock()
    clock.enter("backward")
    assert clock.take_seconds()["backward"] == 1.0
    clock.enter("optimizer")
    found = clock.take_seconds()
    assert (found["backward"], found["optimizer"]) == (1.0, 1.0)


def test_what_happens_while_it_is_stopped_counts_for_no_phase() -> None:
    clock = PhaseClock()
    clock.enter("other")
    with clock.stopped():
        for _ in range(10):
            step_timer.time.perf_counter()
    clock.enter("data")
    assert clock.take_seconds() == {**dict.fromkeys(PHASES, 0.0), "other": 2.0, "data": 1.0}


def test_a_clock_may_be_stopped_before_any_phase() -> None:
    clock = PhaseClock()
    with clock.stopped():
        pass
    clock.enter("data")
    assert clock.take_seconds()["data"] == 1.0


def test_a_clock_that_nobody_used_shows_nothing() -> None:
    assert PhaseClock().take_seconds() == dict.fromkeys(PHASES, 0.0)


def test_a_phase_of_another_name_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="phases are data, forward"):
        PhaseClock().enter("lunch")
