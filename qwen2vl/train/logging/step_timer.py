"""Step timer: seconds spent in data, forward, backward, optimizer and everything else.

A phase lasts until the next one starts. On a GPU timestamps are CUDA events in the current stream,
so that a phase is the time the device spends on it, the host never waits within a step, and data
loading that overlaps with device work costs nothing. Events are read when a report is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PHASES", "StepTimer"]

# other: reports and checkpoints
PHASES: tuple[str, ...] = ("data", "forward", "backward", "optimizer", "other")


class StepTimer:
    """Seconds of each phase, on one rank."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._timestamps: list[tuple[str, _Timestamp]] = []

    def start(self, phase: str) -> None:
        """End the current phase and start another."""
        assert phase in PHASES, f"phases are {', '.join(PHASES)}"
        self._timestamps.append((phase, _now(self._device)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context; the current phase continues afterwards."""
        if not self._timestamps:
            yield
            return
        phase = self._timestamps[-1][0]
        self._timestamps.append(("", _now(self._device)))
        yield
        self._timestamps.append((phase, _now(self._device)))

    def pop_seconds(self) -> dict[str, float]:
        """Return seconds by phase since the last call (a device sync); the phase continues."""
        if not self._timestamps:
            return dict.fromkeys(PHASES, 0.0)
        now = (self._timestamps[-1][0], _now(self._device))
        self._timestamps.append(now)
        now[1].wait()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._timestamps, self._timestamps[1:], strict=False):
            if phase:
                seconds[phase] += begin.seconds_until(end)
        self._timestamps = [now]
        return seconds


class _HostTimestamp:
    """Host time, for devices whose work is done when a call returns."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds_until(self, end: _Timestamp) -> float:
        assert isinstance(end, _HostTimestamp)
        return end.seconds - self.seconds


class _CudaTimestamp:
    """A CUDA event: the time when the stream reaches it."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_until(self, end: _Timestamp) -> float:
        assert isinstance(end, _CudaTimestamp)
        return self.event.elapsed_time(end.event) / 1000


_Timestamp = _HostTimestamp | _CudaTimestamp


def _now(device: torch.device) -> _Timestamp:
    return _CudaTimestamp(device) if device.type == "cuda" else _HostTimestamp()
