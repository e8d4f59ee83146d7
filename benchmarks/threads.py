"""Slowdown by a busy process, of answering with nano and of training it, and the quiet speed.

    python benchmarks/threads.py [--only answer|train] [--rounds 5] [--base CHECKOUT]

Two processes take turns: `commands` limits spinning, and for answers has measured its number of
threads, as the commands of qwen2vl do; `defaults` has torch's settings, and the code of --base if
given. Each is measured quiet and beside one process that is always busy, interleaved. Answering is
64 tokens about an image, training blocks of steps of nano's recipe with live rendering. Prints one
line for results.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from record import ROOT, format_result

from qwen2vl.threads import limit_spinning

VARIANTS = ("defaults", "commands")
NUM_TOKENS = 64
ANSWERS_PER_BLOCK = 5
STEPS_PER_BLOCK = 6
CONVERSATIONS_PER_STEP = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=["answer", "train"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", type=Path, help="checkout that `defaults` runs")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        task, variant = args.worker
        (answer if task == "answer" else train)(is_command=variant == "commands")
        return
    tasks = [args.only] if args.only else ["answer", "train"]
    print(format_result({task: compare(task, args.rounds, args.base) for task in tasks}))


def compare(task: str, rounds: int, base: Path | None) -> dict[str, Any]:
    """Measure both variants quiet and busy, in turns; return milliseconds and ratios."""
    folders = {"defaults": base or ROOT, "commands": ROOT}
    workers = {variant: Worker(task, variant, folders[variant]) for variant in VARIANTS}
    for worker in workers.values():
        worker.measure()  # warm-up
    times: dict[tuple[str, str], list[float]] = {
        (variant, state): [] for variant in VARIANTS for state in ("quiet", "busy")
    }
    try:
        for round_index in range(rounds):
            order = sorted(VARIANTS, reverse=bool(round_index % 2))
            for variant in order:
                times[variant, "quiet"].append(workers[variant].measure())
            with busy_process():
                for variant in order:
                    times[variant, "busy"].append(workers[variant].measure())
    finally:
        for worker in workers.values():
            worker.stop()
    slowdown = {
        variant: _quartiles(_ratios(times[variant, "busy"], times[variant, "quiet"]))
        for variant in VARIANTS
    }
    return {
        "threads": {variant: workers[variant].num_threads for variant in VARIANTS},
        "ms": {f"{name} {state}": round(median(ms), 2) for (name, state), ms in times.items()},
        "busy_over_quiet": slowdown,
        "quiet_commands_over_defaults": _quartiles(
            _ratios(times["commands", "quiet"], times["defaults", "quiet"])
        ),
    }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [round(value, 3) for value in quantiles(values, n=4, method="inclusive")]


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a single-threaded process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


class Worker:
    """A process that measures one block each time it reads a line, and waits between them."""

    def __init__(self, task: str, variant: str, checkout: Path) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        environ["PYTHONPATH"] = str(checkout.resolve())
        if variant == "commands":
            limit_spinning(environ)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", task, variant],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.num_threads = 0

    def measure(self) -> float:
        """Return the milliseconds of a token, or of a training step."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        milliseconds, num_threads = self._process.stdout.readline().split()
        self.num_threads = int(num_threads)
        return float(milliseconds)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _wait_for_line() -> None:
    if not sys.stdin.readline():
        raise SystemExit


def _print_block(milliseconds: float) -> None:
    import torch

    print(milliseconds, torch.get_num_threads(), flush=True)


def answer(*, is_command: bool) -> None:
    """Answer questions about an image, a block of answers for each line that is read."""
    from PIL import Image

    from qwen2vl import LLM, SamplingParams
    from qwen2vl.cli.options import load_model_from_options

    llm = load_model_from_options({"model": "nano"}).llm if is_command else LLM()
    content = [{"image": Image.new("RGB", (112, 112), "red")}, {"text": "What color is it?"}]
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0)
    while True:
        _wait_for_line()
        start = time.perf_counter()
        for _ in range(ANSWERS_PER_BLOCK):
            llm.chat([{"role": "user", "content": content}], params)
        seconds = time.perf_counter() - start
        _print_block(1e3 * seconds / NUM_TOKENS / ANSWERS_PER_BLOCK)


def train(*, is_command: bool) -> None:
    """Train nano further, a block of steps for each line that is read."""
    import torch

    from qwen2vl.recipes.nano import WORLD, recipe
    from qwen2vl.recipes.stages import TRAIN_ALL
    from qwen2vl.train.config import EvaluationConfig, Stage
    from qwen2vl.train.loop import train as run_training

    stage = Stage(
        name="world",
        steps=10_000,
        global_batch_size=CONVERSATIONS_PER_STEP,
        rules=TRAIN_ALL,
        mixture=WORLD,
    )
    start = 0.0

    def report(line: dict[str, Any]) -> None:
        nonlocal start
        if start:
            _print_block(1e3 * (time.perf_counter() - start) / STEPS_PER_BLOCK)
        _wait_for_line()
        start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            recipe(),
            init="nano",
            stages=(stage,),
            output_dir=str(Path(folder) / "run"),
            evaluation=EvaluationConfig(eval_steps=0),
            logging_steps=STEPS_PER_BLOCK,
            save_steps=10_000,
            num_threads=0 if is_command else torch.get_num_threads(),
        )
        run_training(config, report=report)


if __name__ == "__main__":
    main()
