"""Where the time of a step goes: data, forward, backward, optimizer, and the rest.

`enter` says what begins; what ran until then ends. On a GPU the marks are events in its stream,
so that a phase is what the device spends on it, the host never waits in a step, and time that
data takes behind the device's back costs nothing. They are read when a report is made. It must
not know what happens in a phase. Next room: metrics.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PHASES", "PhaseClock"]

# other: reports and checkpoints
PHASES: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "other")


class PhaseClock:
    """Seconds of each phase, on one rank."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._marks: list[tuple[str, _Mark]] = []

    def enter(self, phase: str) -> None:
        """End the phase that runs, and begin another."""
        assert phase in PHASES, f"phases are {', '.join(PHASES)}"
        self._marks.append((phase, _mark(self._device)))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count what happens inside for no phase; the one that runs goes on behind it."""
        if not self._marks:
            yield
            return
        running = self._marks[-1][0]
        self._marks.append(("", _mark(self._device)))
        yield
        self._marks.append((running, _mark(self._device)))

    def take_seconds(self) -> dict[str, float]:
        """Add up the phases since the last call; waits for a GPU. The last one goes on."""
        if not self._marks:
            return dict.fromkeys(PHASES, 0.0)
        now = (self._marks[-1][0], _mark(self._device))
        self._marks.append(now)
        now[1].wait()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                seconds[phase] += begin.seconds_until(end)
        self._marks = [now]
        return seconds


class _HostMark:
    """A moment of a host whose work is done when a call returns."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _HostMark)
        return later.at - self.at


class _StreamMark:
    """The moment in which a GPU gets to here."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_until(self, later: _Mark) -> float:
        assert isinstance(later, _StreamMark)
        return self.event.elapsed_time(later.event) / 1000


_Mark = _HostMark | _StreamMark


def _mark(device: torch.device) -> _Mark:
    return _StreamMark(device) if device.type == "cuda" else _HostMark()
