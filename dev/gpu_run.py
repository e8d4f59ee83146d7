"""Use a GPU that is lent for minutes: python3 -m dev.gpu_run OUT --part check|train.

    check   the GPU tests, then benchmarks; names steps whose modules are not installed
    train   trains from the newest checkpoint on the device, while all CPU cores draw; exports it

It runs with the Python that starts it, without network. OUT gets the logs, figures.jsonl (lines
that benchmarks print for results.md) and the trained folder, in files below 16 MB. `--device cpu
--recipe tiny` tries both parts anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Step", "main", "newest_model", "run_check", "run_train"]

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_BYTES = 15_000_000
LAST_SECONDS = 45  # of the time for training, in which the checkpoint is saved and exported
FIGURES = "figures.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of the part `check`."""

    name: str
    command: tuple[str, ...]  # after the Python
    modules: tuple[str, ...] = ()  # that it imports, beside those of the package
    max_seconds: int

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


def check_steps(device: str) -> tuple[Step, ...]:
    """Return the steps of the part `check`, the most important one first."""
    tests = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
    if device == "cpu":  # what shows that the part works: there are no GPU tests to run
        return (
            Step(
                name="tests",
                command=(*tests, "tests/test_geometry.py"),
                modules=("pytest",),
                max_seconds=120,
            ),
        )
    return (
        Step(
            name="tests",
            command=(*tests, "-m", "gpu", "tests"),
            modules=("pytest", "hypothesis"),
            max_seconds=240,
        ),
        Step(name="gpu_decode", command=("benchmarks/gpu_decode.py",), max_seconds=150),
        Step(
            name="gpu_decode_compiled",
            command=("benchmarks/gpu_decode.py", "--shapes", "2B", "--compile"),
            modules=("triton",),
            max_seconds=150,
        ),
        Step(
            name="quantized_tests",
            command=(*tests, "-m", "gpu", "tests/gpu/test_torchao.py"),
            modules=("pytest", "torchao"),
            max_seconds=90,
        ),
    )


def run_check(folder: Path, steps: Sequence[Step], minutes: float) -> int:
    """Run steps until the time is used up; return the number of those that failed."""
    end = time.monotonic() + 60 * minutes
    failed = 0
    for step in steps:
        seconds = min(step.max_seconds, end - time.monotonic())
        if step.missing:
            print(f"{step.name}: skipped, not installed: {', '.join(step.missing)}", flush=True)
            continue
        if seconds < 10:
            print(f"{step.name}: skipped, no time is left", flush=True)
            continue
        failed += not _run_step(folder, step, seconds)
    return failed


def run_train(
    folder: Path, *, recipe: str, model: str, device: str, minutes: float, overrides: Sequence[str]
) -> int:
    """Train for a time, and write the exported folder; return the exit code of the trainer."""
    begin = time.monotonic()
    run_folder = folder.parent / f"{folder.name}-run"
    seconds = max(20.0, 60 * minutes - LAST_SECONDS)
    command = [
        *("-m", "qwen2vl", "train", recipe, f"device={device}"),
        *(f"output_dir={run_folder}", f"max_minutes={seconds / 60:.2f}"),
        *(f"num_workers={max(1, (os.cpu_count() or 2) - 1)}", f"seed={int(time.time())}"),
        *([f"model={model}"] if model else []),
        *overrides,
    ]
    code = _run(command, folder / "train.log", 60 * minutes + 60)
    exported = newest_model(run_folder)
    if exported is not None:
        _copy_in_small_files(exported, folder / "model")
        metrics = run_folder / "metrics.jsonl"
        (folder / "metrics.jsonl").write_bytes(metrics.read_bytes())
    print(f"train: exit code {code}, {time.monotonic() - begin:.0f} s", flush=True)
    return code


def newest_model(run_folder: Path) -> Path | None:
    """Return the last folder that a run has exported; None if it has none."""
    exported = sorted(run_folder.glob("model-*"))
    return exported[-1] if exported else None


def _run_step(folder: Path, step: Step, seconds: float) -> bool:
    log = folder / f"{step.name}.log"
    begin = time.monotonic()
    code = _run(step.command, log, seconds)
    figures = [line for line in log.read_text(encoding="utf-8").splitlines() if _is_figure(line)]
    with (folder / FIGURES).open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in figures)
    spent = time.monotonic() - begin
    print(
        f"{step.name}: {'passed' if code == 0 else f'exit code {code}'}, {spent:.0f} s", flush=True
    )
    return code == 0


def _run(command: Sequence[str], log: Path, seconds: float) -> int:
    """Run Python with arguments, its output into a file; 124 if the time is up."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()}
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {seconds:.0f} s\n")
            return 124
    return done.returncode


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{given}" if given else str(ROOT)


def _is_figure(line: str) -> bool:
    """Return whether a line is one for benchmarks/results.md."""
    try:
        found: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(found, Mapping) and "numbers" in found


def _copy_in_small_files(source: Path, target: Path) -> None:
    """Write a model folder again, its weights split into files that are small enough to return."""
    from qwen2vl.loading import load
    from qwen2vl.weights.save import save_folder

    model, processor = load(source, device="cpu", dtype="float32")
    save_folder(
        target,
        config=processor.config,
        state_dict=model.state_dict(),
        tokenizer_folder=source,
        pixels=processor.pixels,
        max_shard_bytes=MAX_FILE_BYTES,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; return 0 if all that ran passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of what is written")
    parser.add_argument("--part", choices=("check", "train"), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for the part")
    parser.add_argument("--recipe", default="nano", help="of `qwen2vl train`")
    parser.add_argument("--model", default="", help="folder to train from; default: as the recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of `qwen2vl train`")
    args = parser.parse_intermixed_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.part == "check":
        return min(1, run_check(args.folder, check_steps(args.device), args.minutes))
    return run_train(
        args.folder,
        recipe=args.recipe,
        model=args.model,
        device=args.device,
        minutes=args.minutes,
        overrides=args.overrides,
    )


if __name__ == "__main__":
    sys.exit(main())
