"""What benchmarks/peers.py makes of figures: who is compared with whom, and by what."""

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
def sums(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("peers_figures")


def figures(first: float, step: float) -> dict[str, float]:
    return {"first_ms": first, "step_ms": step}


def test_the_fastest_of_each_side_are_compared(sums: Any) -> None:
    found = {
        "ours/int8": {CASE: figures(1000, 60)},
        "ours/int8 compiled": {CASE: figures(800, 75)},
        "OpenVINO/int8": {CASE: figures(1200, 90)},
        "llama.cpp/Q8_0": {f"{CASE}, words only": figures(1, 75)},
    }
    assert sums.ratios(found, CASE) == {
        "first": {"ratio": 1.5, "ours": "ours/int8 compiled", "best": "OpenVINO/int8"},
        "step": {"ratio": 1.25, "ours": "ours/int8", "best": "llama.cpp/Q8_0"},
    }


def test_sprints_are_compared_turn_by_turn(sums: Any) -> None:
    """Where everybody slows down together, the ratio stays."""

    def runner(name: str, *steps: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, times={"sprint": [figures(1, step) for step in steps]})

    race = [
        runner("ours/int8", 100, 300, 100, 200),
        runner("ours/int4", 150, 450, 150, 290),
        runner("llama.cpp/Q8_0", 120, 360, 130, 250),
        runner("OpenVINO/int8", 90, 500, 500, 500),
    ]
    assert sums.sprints(race) == {
        "ratio": 1.23,
        "quartiles": [1.2, 1.29],
        "ours": "ours/int8",
        "best": "llama.cpp/Q8_0",
        "sprints": 4,
    }
    assert sums.sprints(race[:2]) == {} == sums.sprints(race[2:])


def test_everybody_has_a_group(peers: Any) -> None:
    everybody = {own.name for own in peers.contestants(SimpleNamespace(model="2b"), full=True)}
    assert everybody == {name for names in peers.GROUPS.values() for name in names}


def test_nobody_is_compared_with_nobody(sums: Any) -> None:
    assert sums.ratios({"ours/bf16": {CASE: figures(1, 1)}}, CASE) == {}
    assert sums.ratios({"transformers/bf16": {CASE: figures(1, 1)}}, CASE) == {}


def test_a_second_question_is_measured_in_steps(sums: Any) -> None:
    found = {
        "ours/bf16": {CASE: figures(2000, 100), f"{CASE}, again": figures(150, 110)},
        "transformers/bf16": {CASE: figures(3000, 200)},
    }
    assert sums.second(found, CASE) == {"ours/bf16": 1.5}


def test_a_shape_counts_its_vision_tokens_and_their_marks(peers: Any) -> None:
    assert {name: shape.num_tokens for name, shape in peers.SHAPES.items()} == {
        "448x448": 308,
        "1344x1008": 1780,
        "text": 300,
        "448x448, words only": 308,
        "sprint": 32,
    }


@pytest.mark.parametrize("body", ["for line in sys.stdin: pass", "sys.stdin.close()"])
def test_who_gives_up_is_sent_home(peers: Any, tmp_path: Path, body: str) -> None:
    script = tmp_path / "worker.py"
    ready = """print('{"ready": {}}', flush=True)"""
    script.write_text(f"import sys\n{ready}\n{body}\n")
    own = peers.Contestant("x", "y", str(script), lambda: (Path(sys.executable), {}), ())
    own.worker = worker = peers.Worker(own, 1, tmp_path / "log")
    race = peers.Race.__new__(peers.Race)
    race.contestants, race.unmeasured = [own], {}
    if "close" in body:
        worker.process.wait()
        with pytest.raises(peers.WorkerError, match="ended with"):
            worker.ask({})
    race.give_up(own, peers.WorkerError("no"))
    assert worker.process.poll() is not None
    assert (race.contestants, race.unmeasured) == ([], {"x/y": "no"})
