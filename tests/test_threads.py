"""Tests of qwen2vl.threads: number of threads by measurement, and how they wait."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl import LLM, threads
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def _restored_setting() -> Iterator[None]:
    setting = torch.get_num_threads()
    yield
    torch.set_num_threads(setting)


def _sleep_by_threads(milliseconds: dict[int, float]) -> Callable[[], None]:
    def run() -> None:
        time.sleep(milliseconds[torch.get_num_threads()] / 1000)

    return run


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({8: 2, 4: 4, 2: 8, 1: 16}, 8),
        ({8: 9, 4: 4, 2: 8, 1: 16}, 4),
        ({8: 40, 4: 20, 2: 12, 1: 4}, 1),
    ],
)
def test_the_fastest_number_of_threads_is_chosen(
    milliseconds: dict[int, float], chosen: int
) -> None:
    assert threads.measure_num_threads(_sleep_by_threads(milliseconds), max_threads=8) == chosen


def test_of_equally_fast_numbers_the_smallest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    assert threads.measure_num_threads(lambda: None, max_threads=4, max_seconds=1e6) == 1


def test_measuring_restores_the_setting_also_after_an_error() -> None:
    torch.set_num_threads(1)

    def fail() -> None:
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        threads.measure_num_threads(fail, max_threads=2)
    assert torch.get_num_threads() == 1
    threads.measure_num_threads(lambda: None, max_threads=2)
    assert torch.get_num_threads() == 1


def test_a_slow_run_is_measured_in_few_rounds() -> None:
    calls = []
    threads.measure_num_threads(lambda: calls.append(1), max_threads=2, max_seconds=-1)
    assert len(calls) == 2 * (1 + threads.MIN_ROUNDS)


def test_a_large_model_runs_on_all_threads_without_further_trials() -> None:
    run = _sleep_by_threads({2: 5, 1: 2})
    assert threads.measure_num_threads(run, max_threads=2) == 1
    assert threads.measure_num_threads(run, max_threads=2, slow_seconds=0.004) == 2


def test_numbers_below_a_far_slower_one_are_not_tried() -> None:
    tried: list[int] = []
    sleep = _sleep_by_threads({16: 2, 8: 3, 4: 30})  # no time of 2 or 1: KeyError

    def run() -> None:
        tried.append(torch.get_num_threads())
        sleep()

    assert threads.measure_num_threads(run, max_threads=16) == 16
    assert tried.count(4) == 1


def test_spinning_is_limited_unless_the_user_decides() -> None:
    environ: dict[str, str] = {}
    threads.limit_spinning(environ)
    assert environ == {"GOMP_SPINCOUNT": "1500"}
    for given in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "100"}):
        environ = dict(given)
        threads.limit_spinning(environ)
        assert environ == given


@pytest.mark.parametrize(
    ("content", "limit"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1)]
)
def test_the_cgroup_quota_limits_the_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, limit: int | None
) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(content)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(threads, "CGROUP_CPU_MAX", path)
    assert threads.available_cpus() == (limit or 16)


def test_importing_the_package_changes_no_setting() -> None:
    """Every module: environment and torch's numbers of threads are as a program set them."""
    code = """
import os, pkgutil, importlib
import torch
torch.set_num_threads(3)
def settings():
    # torch's compiler, which transformers imports, names its cache folder
    environ = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR_")}
    return environ, torch.get_num_threads(), torch.get_num_interop_threads()
before = settings()
import qwen2vl
for module in pkgutil.walk_packages(qwen2vl.__path__, "qwen2vl."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError:  # an extra that is not installed
            pass
assert settings() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_commands_limit_spinning() -> None:
    code = """
import os, sys
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
    os.environ.pop(name, None)
from qwen2vl.cli.main import main
sys.argv = ["qwen2vl", "--version"]
assert "torch" not in sys.modules
try:
    main()
except SystemExit as end:
    assert not end.code
assert os.environ["GOMP_SPINCOUNT"] == "1500"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("environ", "spin"),
    [
        ({}, True),
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, False),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"GOMP_SPINCOUNT": "1500"}, False),
        ({"GOMP_SPINCOUNT": "300000"}, True),
    ],
)
def test_threads_spin_unless_a_variable_lets_them_sleep(
    environ: dict[str, str], spin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in threads.WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert threads.threads_spin() == spin


@pytest.mark.parametrize(
    ("num_preemptions", "seconds", "num_threads", "is_told"),
    [(200, 1.0, 2, True), (20, 1.0, 2, False), (200, 0.2, 2, False), (200, 1.0, 1, False)],
)
def test_preemptions_of_spinning_threads_are_told_once(
    num_preemptions: int,
    seconds: float,
    num_threads: int,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(threads, "_has_warned", False)
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads, "threads_spin", lambda: True)
    monkeypatch.setattr(threads, "_num_torch_threads", lambda: num_threads)
    now = {"preemptions": 7, "time": 100.0}
    monkeypatch.setattr(threads, "_num_preemptions", lambda: now["preemptions"])
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now["time"])
    for _ in range(2):
        with threads.warn_if_preempted():
            now["preemptions"] += num_preemptions
            now["time"] += seconds
    assert len(caplog.records) == is_told
    if is_told:
        assert "preempted 200 times in 1.0 s" in caplog.text


@pytest.fixture
def _batch_setting() -> Iterator[None]:
    torch.set_num_threads(1)
    threads.set_num_threads_batch(3)
    yield
    threads.set_num_threads_batch(None)


@pytest.mark.usefixtures("_batch_setting")
def test_forwards_of_many_rows_run_on_the_threads_for_batches() -> None:
    with threads.batch_threads(threads.MIN_BATCH_ROWS - 1):
        assert torch.get_num_threads() == 1
    found: list[int] = []

    def fail() -> None:
        with threads.batch_threads(threads.MIN_BATCH_ROWS):
            found.append(torch.get_num_threads())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert found == [3]
    assert torch.get_num_threads() == 1
    threads.set_num_threads_batch(None)
    with threads.batch_threads(threads.MIN_BATCH_ROWS):
        assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("_batch_setting")
def test_the_engine_prefills_and_encodes_on_the_threads_for_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "MIN_BATCH_ROWS", 40)
    monkeypatch.setenv("QWEN2VL_KERNELS", "off")  # decode steps call the forward, too
    llm = LLM(tiny_model(), tiny_processor())
    found: dict[str, list[tuple[int, int]]] = {"encode": [], "forward": []}
    for name, calls in found.items():
        monkeypatch.setattr(type(llm.model), name, _noting_threads(type(llm.model), name, calls))
    image = np.zeros((140, 112, 3), np.uint8)  # 80 patches, 20 tokens
    text = "What is this? " * 5
    llm.chat(text, images=[image], max_tokens=3, temperature=0, ignore_eos=True)
    llm.embed(text)
    assert found["encode"] == [(80, 3)]
    assert [count for rows, count in found["forward"] if rows == 1] == [1, 1]
    assert [count for rows, count in found["forward"] if rows >= 40] == [3, 3]


def _noting_threads(owner: type, name: str, calls: list[tuple[int, int]]) -> Callable[..., Any]:
    method = getattr(owner, name)

    def noting(model: Any, rows: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        calls.append((len(rows), torch.get_num_threads()))
        return method(model, rows, *args, **keywords)

    return noting
