"""Ends a run between two steps: the clock, SIGTERM and Ctrl-C are wishes, heard when it suits.

A signal that fell into a step would leave weights half moved, and one that reached a worker would
look like a crash; so the first one is only noted, and workers never see any. A second Ctrl-C
interrupts at once. Machines that are taken back (Slurm, Kubernetes, spot) send SIGTERM first.
It must not know what a step is. Next room: loop.py.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import torch

from qwen2vl.parallel.mesh import Ranks

__all__ = ["Stop", "Wish"]

Wish = Literal["", "time", "SIGTERM", "SIGINT"]

WISHES: tuple[Wish, ...] = ("time", "SIGTERM", "SIGINT")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Wishes to stop, from the clock and from outside."""

    def __init__(self, minutes: float) -> None:
        """Wish to stop after so many minutes; 0 is never."""
        self.ends = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.signal = 0

    def heard(self, ranks: Ranks) -> Wish:
        """Say what any rank wishes, the same on all of them: signals come when they come."""
        own = [
            time.monotonic() >= self.ends,
            self.signal == signal.SIGTERM,
            self.signal == signal.SIGINT,
        ]
        if ranks.mesh is not None:
            own = ranks.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        wishes: list[Wish] = [wish for wish, is_heard in zip(WISHES, own, strict=True) if is_heard]
        return wishes[-1] if wishes else ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals in place of obeying them; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Let processes that are started inside be deaf to both signals; they end with us."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
