"""Two checkouts of this repository, measured alternately: did a change cost speed?

    python benchmarks/checkouts.py BASE [--new .] [--pairs 20] [--only FIGURE ...] [--worker FILE]

One worker process per checkout (`benchmarks/checkout_worker.py` of that checkout, or the file given
by --worker for an older BASE) loads nano once and then measures one figure at a time, in
alternating order. The statistic is the median of the paired ratios new / base with its 95 %
interval from order statistics: below 1 the new checkout is faster. Prints one line for results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from record import ROOT, format_result

FIGURES = ("step_overhead", "first_token", "decode", "train_step")


class Worker:
    """A process that imports one checkout and measures on request."""

    def __init__(self, checkout: Path, script: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(threads)],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'benchmarks'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, figure: str) -> float:
        """Return milliseconds of one measurement."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{figure}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker ended while measuring {figure}: see its error above")
        return float(json.loads(answer)["ms"])

    def close(self) -> None:
        """End the process by closing its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def interval_of_median(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the order statistics that enclose the median with at least `confidence`.

    The number of values below the median is binomial (n, 1/2), whatever their distribution.
    """
    ordered, count = sorted(values), len(values)
    low, tail = 0, 0.0
    while low < count // 2:
        tail += comb(count, low) / 2**count
        if 2 * tail > 1 - confidence:
            break
        low += 1
    rank = max(low - 1, 0)
    return ordered[rank], ordered[count - 1 - rank]


def compare(base: Worker, new: Worker, figure: str, pairs: int) -> dict[str, Any]:
    """Measure one figure in both checkouts, changing which goes first."""
    for worker in (base, new):
        worker.measure(figure)  # warm-up
    times: dict[str, list[float]] = {"base": [], "new": []}
    for number in range(pairs):
        order = [("base", base), ("new", new)]
        for name, worker in order if number % 2 else reversed(order):
            times[name].append(worker.measure(figure))
    ratios = [n / b for n, b in zip(times["new"], times["base"], strict=True)]
    low, high = interval_of_median(ratios)
    return {
        "base_ms": round(median(times["base"]), 3),
        "new_ms": round(median(times["new"]), 3),
        "ratio": round(median(ratios), 3),
        "interval": [round(low, 3), round(high, 3)],
        "pairs": pairs,
    }


def main() -> None:
    """Compare the figures asked for, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("--new", type=Path, default=ROOT)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES)
    parser.add_argument("--worker", type=Path, help="The worker script for BASE.")
    given = parser.parse_args()
    name = Path("benchmarks", "checkout_worker.py")
    script = (given.worker or given.base / name).resolve()
    base = Worker(given.base.resolve(), script, given.threads)
    new = Worker(given.new.resolve(), given.new.resolve() / name, given.threads)
    numbers = {figure: compare(base, new, figure, given.pairs) for figure in given.only}
    for worker in (base, new):
        worker.close()
    print(format_result(numbers))


if __name__ == "__main__":
    main()
