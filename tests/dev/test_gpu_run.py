"""`make gpu-run`: both parts on a CPU with a tiny model, time limits, and what is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dev.gpu_run import FIGURES, MAX_FILE_BYTES, Step, main, newest_model, run_check
from qwen2vl import load


@pytest.mark.slow
def test_training_exports_a_folder_of_small_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(out), "--part", "train", "--device", "cpu", "--recipe", "tiny"]
    few = [f"stages.{i}.steps={steps}" for i, steps in enumerate((0, 0, 2, 0))]
    assert main([*arguments, *few, "num_workers=0", "num_threads=1"]) == 0
    assert max(file.stat().st_size for file in out.rglob("*") if file.is_file()) <= MAX_FILE_BYTES
    model, _ = load(out / "model")
    assert model.config.text.num_hidden_layers == 2
    last = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["step"] == 2


def test_a_failed_training_has_its_exit_code_and_log(tmp_path: Path) -> None:
    arguments = ["--part", "train", "--device", "cpu", "--recipe", "tiny", "no_such_key=1"]
    assert main([str(tmp_path), *arguments]) != 0
    assert "no_such_key" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_check_runs_steps_and_collects_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = json.dumps({"numbers": {"rate": 1}})
    steps = [
        Step(name="absent", command=(), modules=("no_such_module",), max_seconds=60),
        Step(name="figure", command=("-c", f"print('text'); print('{figure}')"), max_seconds=60),
        Step(name="wrong", command=("-c", "raise SystemExit(3)"), max_seconds=60),
    ]
    assert run_check(tmp_path, steps, minutes=2) == 1
    printed = capsys.readouterr().out
    assert "absent: skipped, not installed: no_such_module" in printed
    assert "figure: passed" in printed
    assert "wrong: exit code 3" in printed
    assert (tmp_path / FIGURES).read_text(encoding="utf-8") == figure + "\n"


@pytest.mark.slow
def test_a_step_ends_when_its_time_is_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endless = Step(name="endless", command=("-c", "while True: pass"), max_seconds=60)
    assert run_check(tmp_path, [endless, endless], minutes=11 / 60) == 1
    printed = capsys.readouterr().out
    assert "endless: exit code 124" in printed
    assert "endless: skipped, no time is left" in printed


def test_the_newest_export_is_the_last_step(tmp_path: Path) -> None:
    assert newest_model(tmp_path) is None
    for step in (20, 400, 60):
        (tmp_path / f"model-{step:06d}").mkdir()
    assert newest_model(tmp_path) == tmp_path / "model-000400"


def test_steps_run_with_the_python_that_started_them(tmp_path: Path) -> None:
    step = Step(name="python", command=("-c", "import sys; print(sys.prefix)"), max_seconds=60)
    run_check(tmp_path, [step], minutes=1)
    assert (tmp_path / "python.log").read_text(encoding="utf-8").strip() == sys.prefix
