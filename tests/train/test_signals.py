"""Graceful shutdown: signals are recorded once, polled between steps, blocked in workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.train.signals import SignalHandler

SINGLE_PROCESS = DistributedContext(torch.device("cpu"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_is_recorded(name: str) -> None:
    handler = SignalHandler(0)
    with handler.handle_signals():
        assert handler.poll(SINGLE_PROCESS) == ""
        os.kill(os.getpid(), getattr(signal, name))
        assert handler.poll(SINGLE_PROCESS) == name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "SIGINT",
            "\nqwen2vl: Ctrl-C: stopping after this step, with a checkpoint; Ctrl-C again to stop "
            "now, without\n",
        ),
        ("SIGTERM", "qwen2vl: SIGTERM: stopping after this step, with a checkpoint\n"),
    ],
)
def test_the_first_signal_is_acknowledged_at_once_by_rank_0(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    for rank, expected in ((None, text), ("0", text), ("1", "")):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with SignalHandler(0).handle_signals():
            os.kill(os.getpid(), getattr(signal, name))
            assert capfd.readouterr().err == expected  # between two bytecodes, before any poll


def test_a_signal_is_recorded_where_stderr_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stderr__", None)
    handler = SignalHandler(0)
    with handler.handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.poll(SINGLE_PROCESS) == "SIGINT"


def test_a_second_interrupt_raises_at_once() -> None:
    handler = SignalHandler(0)
    with handler.handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored() -> None:
    previous = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with SignalHandler(0).handle_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == previous


def test_the_time_limit_stops_a_run() -> None:
    handler = SignalHandler(1e-9)
    time.sleep(0.001)
    assert handler.poll(SINGLE_PROCESS) == "time"
    assert SignalHandler(60).poll(SINGLE_PROCESS) == ""


def test_a_process_started_with_blocked_signals_survives_both() -> None:
    handler = SignalHandler(0)
    context = multiprocessing.get_context("fork")
    with handler.handle_signals():
        with handler.block_signals():
            process = context.Process(target=time.sleep, args=(0.5,))
            process.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid or 0, number)
        process.join()
        assert process.exitcode == 0
        assert handler.poll(SINGLE_PROCESS) == ""


def test_outside_of_the_main_thread_signals_are_not_handled() -> None:
    reasons: list[str] = []

    def poll_in_thread() -> None:
        with SignalHandler(0).handle_signals():
            reasons.append(SignalHandler(0).poll(SINGLE_PROCESS))

    thread = threading.Thread(target=poll_in_thread)
    thread.start()
    thread.join()
    assert reasons == [""]
