"""Signals are wishes: noted once, obeyed between steps, never seen by workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from qwen2vl.parallel.mesh import Ranks
from qwen2vl.train.signals import Stop

ONE = Ranks(torch.device("cpu"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_is_a_wish(name: str) -> None:
    stop = Stop(0)
    with stop.listening():
        assert stop.heard(ONE) == ""
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.heard(ONE) == name


def test_a_second_interrupt_is_obeyed_at_once() -> None:
    stop = Stop(0)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop(0).listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_clock_stops_a_run() -> None:
    stop = Stop(1e-9)
    time.sleep(0.001)
    assert stop.heard(ONE) == "time"
    assert Stop(60).heard(ONE) == ""


def test_a_process_started_unheard_outlives_both_signals() -> None:
    stop = Stop(0)
    context = multiprocessing.get_context("fork")
    with stop.listening():
        with stop.unheard():
            process = context.Process(target=time.sleep, args=(0.5,))
            process.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid or 0, number)
        process.join()
        assert process.exitcode == 0
        assert stop.heard(ONE) == ""


def test_elsewhere_than_in_the_main_thread_only_the_clock_is_heard() -> None:
    heard: list[str] = []

    def listen() -> None:
        with Stop(0).listening():
            heard.append(Stop(0).heard(ONE))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert heard == [""]
