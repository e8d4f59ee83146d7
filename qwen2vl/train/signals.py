"""Graceful shutdown: a time limit, SIGTERM or Ctrl-C (SIGINT) ends a run between two steps.

A signal in the middle of a step would leave the weights half updated, and one that reached a data
worker would look like a crash. So the first signal is only recorded and polled between steps, and
workers start with both signals blocked. The handler acknowledges it at once, since a step may take
minutes. A second Ctrl-C interrupts at once, without a checkpoint of this step; one that is being
written is completed. Schedulers that preempt machines (Slurm, Kubernetes, spot instances) send
SIGTERM first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

import torch

from qwen2vl.parallel.mesh import DistributedContext, is_main_process

__all__ = ["SignalHandler", "StopReason"]

StopReason = Literal["", "time", "SIGTERM", "SIGINT"]

STOP_REASONS: tuple[StopReason, ...] = ("time", "SIGTERM", "SIGINT")

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A terminal shows ^C in the line where its cursor is.
ACKNOWLEDGMENTS = {
    signal.SIGINT: (
        "\nqwen2vl: Ctrl-C: stopping after this step, with a checkpoint; Ctrl-C again to stop now, "
        "without\n"
    ),
    signal.SIGTERM: "qwen2vl: SIGTERM: stopping after this step, with a checkpoint\n",
}


class SignalHandler:
    """Records requests to stop: the time limit, SIGTERM and SIGINT."""

    def __init__(self, max_minutes: float) -> None:
        """Set the time limit, in minutes from now; 0: none."""
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self.received = 0

    def poll(self, distributed: DistributedContext) -> StopReason:
        """Return why to stop, or an empty string; all ranks agree, whichever got the signal."""
        flags = [
            time.monotonic() >= self.deadline,
            self.received == signal.SIGTERM,
            self.received == signal.SIGINT,
        ]
        if distributed.mesh is not None:
            flags = distributed.all_reduce(torch.tensor(flags, dtype=torch.int64)).tolist()
        reasons: list[StopReason] = [
            reason for reason, is_set in zip(STOP_REASONS, flags, strict=True) if is_set
        ]
        return reasons[-1] if reasons else ""

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Record both signals inside the block; a no-op outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def block_signals(self) -> Iterator[None]:
        """Start the processes created inside the block with both signals blocked."""
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_main_process():
            _write_to_stderr(ACKNOWLEDGMENTS[signal.Signals(number)])


def _write_to_stderr(text: str) -> None:
    """Write without sys.stderr, whose buffer the interrupted code may be writing to."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or no file
        os.write(sys.__stderr__.fileno(), text.encode())  # type: ignore[union-attr]
