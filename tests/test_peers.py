"""Statistics and worker handling of benchmarks/peers.py."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CASE = "448x448"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("peers")


@pytest.fixture
def figures_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("peers_figures")


def figures(first: float, step: float) -> dict[str, float]:
    return {"first_ms": first, "step_ms": step}


def test_ratios_compare_the_fastest_of_each_side(figures_module: Any) -> None:
    found = {
        "ours/int8": {CASE: figures(1000, 60)},
        "ours/int8 compiled": {CASE: figures(800, 75)},
        "OpenVINO/int8": {CASE: figures(1200, 90)},
        "llama.cpp/Q8_0": {f"{CASE}, words only": figures(1, 75)},
    }
    assert figures_module.ratios(found, CASE) == {
        "first": {"ratio": 1.5, "ours": "ours/int8 compiled", "best": "OpenVINO/int8"},
        "step": {"ratio": 1.25, "ours": "ours/int8", "best": "llama.cpp/Q8_0"},
    }


def test_paired_runs_are_compared_pairwise(figures_module: Any) -> None:
    """The ratio does not change where all peers slow down together."""

    def runner(name: str, *steps: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, times={"sprint": [figures(1, step) for step in steps]})

    benchmark = [
        runner("ours/int8", 100, 300, 100, 200),
        runner("ours/int4", 150, 450, 150, 290),
        runner("llama.cpp/Q8_0", 120, 360, 130, 250),
        runner("OpenVINO/int8", 90, 500, 500, 500),
    ]
    assert figures_module.paired_runs(benchmark) == {
        "ratio": 1.23,
        "quartiles": [1.2, 1.29],
        "ours": "ours/int8",
        "best": "llama.cpp/Q8_0",
        "pairs": 4,
    }
    assert (
        figures_module.paired_runs(benchmark[:2]) == {} == figures_module.paired_runs(benchmark[2:])
    )


def test_every_peer_run_has_a_group(peers: Any) -> None:
    names_of_all = {
        peer_run.name for peer_run in peers.peer_runs(SimpleNamespace(model="2b"), full=True)
    }
    assert names_of_all == {name for names in peers.GROUPS.values() for name in names}


def test_ratios_need_both_sides(figures_module: Any) -> None:
    assert figures_module.ratios({"ours/bf16": {CASE: figures(1, 1)}}, CASE) == {}
    assert figures_module.ratios({"transformers/bf16": {CASE: figures(1, 1)}}, CASE) == {}


def test_a_second_prompt_is_measured_in_steps(figures_module: Any) -> None:
    found = {
        "ours/bf16": {CASE: figures(2000, 100), f"{CASE}, again": figures(150, 110)},
        "transformers/bf16": {CASE: figures(3000, 200)},
    }
    assert figures_module.second_prompt_ratios(found, CASE) == {"ours/bf16": 1.5}


def test_prompt_length_includes_vision_tokens_and_their_delimiters(peers: Any) -> None:
    assert {name: shape.num_tokens for name, shape in peers.SHAPES.items()} == {
        "448x448": 308,
        "1344x1008": 1780,
        "text": 300,
        "448x448, words only": 308,
        "sprint": 32,
    }


@pytest.mark.parametrize("body", ["for line in sys.stdin: pass", "sys.stdin.close()"])
def test_a_dropped_worker_is_stopped(peers: Any, tmp_path: Path, body: str) -> None:
    script = tmp_path / "worker.py"
    ready = """print('{"ready": {}}', flush=True)"""
    script.write_text(f"import sys\n{ready}\n{body}\n")
    peer_run = peers.PeerRun("x", "y", str(script), lambda: (Path(sys.executable), {}), ())
    peer_run.worker = worker = peers.Worker(peer_run, 1, tmp_path / "log")
    benchmark = peers.PeerBenchmark.__new__(peers.PeerBenchmark)
    benchmark.peer_runs, benchmark.unmeasured = [peer_run], {}
    if "close" in body:
        worker.process.wait()
        with pytest.raises(peers.WorkerError, match="ended with"):
            worker.request({})
    benchmark.drop(peer_run, peers.WorkerError("no"))
    assert worker.process.poll() is not None
    assert (benchmark.peer_runs, benchmark.unmeasured) == ([], {"x/y": "no"})
