"""Training nano on a CPU: one process with all threads against one process of one thread for each.

    python benchmarks/train_ranks.py [--rounds 3] [--steps 16] [--stage world]

Both train the same samples from the same random weights, compiled; runs alternate. Compared are the
tokens a second of the second half of the steps, so that starting and compiling do not count. Prints
the ratio of each round and a line for results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from record import format_result

from qwen2vl.recipes import nano
from qwen2vl.threads import available_cpus


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--stage", default="world", help="of the recipe")
    args = parser.parse_args()
    num_ranks = available_cpus()
    speeds: dict[int, list[float]] = {1: [], num_ranks: []}
    for index in range(args.rounds):
        for ranks in sorted(speeds, reverse=bool(index % 2)):
            speeds[ranks].append(
                tokens_per_second(ranks, num_ranks // ranks, args.steps, args.stage)
            )
    ratios = [round(b / a, 2) for a, b in zip(speeds[1], speeds[num_ranks], strict=True)]
    numbers = {
        "stage": args.stage,
        "tokens_per_second": {
            f"{ranks} x {num_ranks // ranks} threads": [round(value) for value in values]
            for ranks, values in speeds.items()
        },
        "ratios": ratios,
        "ratio": median(ratios),
    }
    print(format_result(numbers))


def tokens_per_second(ranks: int, threads: int, steps: int, stage: str) -> float:
    """Train `steps` steps of one stage, and return the speed of the second half."""
    numbers = {own.name: index for index, own in enumerate(nano.recipe().stages)}
    overrides = [f"stages.{index}.steps=0" for name, index in numbers.items() if name != stage]
    overrides += [f"stages.{numbers[stage]}.steps={steps}", f"num_threads={threads}"]
    overrides += [f"optim.warmup_steps={steps // 2}", f"logging_steps={steps // 2}"]
    overrides += [
        "logging_seconds=0",
        "evaluation.eval_steps=0",
        "mesh.reshard_after_forward=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "qwen2vl", "train", "nano", *overrides]
        subprocess.run(
            [*command, f"output_dir={folder}/run"],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    reports = [json.loads(line) for line in lines]
    last = [report for report in reports if "tokens_per_second" in report][-1]
    return float(last["tokens_per_second"])


if __name__ == "__main__":
    main()
