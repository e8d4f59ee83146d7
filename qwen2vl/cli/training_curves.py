"""Training curves: reads metrics.jsonl of runs and draws panels of curves with matplotlib.

Raw values are pale behind a moving average, whose last value stands beside the curve. Metrics
without values have no panel. Of a run that was resumed from an earlier step, the discarded steps
are left out. matplotlib is an extra; only `qwen2vl plot` imports this module, when it runs.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: needs no display, keeps no global state
from numpy.typing import NDArray

from qwen2vl.errors import InputError
from qwen2vl.train.logging.loggers import flatten_scalars

__all__ = ["RunMetrics", "build_figure", "read_run"]

Points = list[tuple[float, float]]  # (step, value), ordered by step
Curves = dict[str, Points]  # by name

# Distinguishable with color vision deficiency (Okabe and Ito, Tol), dark enough for text.
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #B8860B #56A0D3 #5B4B8A #7F7F7F #882255 #225522".split()
INK, GRAY, FAINT = "#1F2328", "#6E7781", "#E6E9ED"
SMOOTHING_DIVISOR = 40  # half window of the moving average = number of points // this
MAX_MARKERS = 30  # curves with at most this many points get a marker each
# As fractions of a panel; the highest label is below the names of the stages.
LABEL_HEIGHT, MAX_HEIGHT, LETTER_WIDTH = 0.075, 0.97, 0.022

OVERALL = "all"  # name of the curve of a whole run
FAMILY = "(families/(?P<name>.+)/)?"


class RunMetrics(NamedTuple):
    """The metrics of one run: scalars by path ("families/text/loss"), first steps of stages."""

    name: str
    scalars: Curves
    stages: dict[str, float]


# Title, unit of the y axis, and pattern of the paths of the scalars; values of "%" are shares.
PANELS = (
    ("Loss", "nats per target token", FAMILY + "loss"),
    ("Validation loss", "nats per target token", f"held_out/{FAMILY}loss"),
    ("Vision gain", "loss increase, mismatched images", f"held_out/{FAMILY}vision_gain"),
    ("Exact match", "% of conversations", "families/(?P<name>.+)/exact_match"),
    ("Mini suite", "% correct", "mini/(?P<name>.+)/accuracy"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Learning rate", "of the optimizer, at rule multiple 1", "lr"),
    ("Throughput", "tokens per second", "tokens_per_second"),
    ("MFU", "% of the hardware's peak", "mfu"),
    ("Waiting for data", "% of the time", "data_wait"),
)


def read_run(path: Path) -> RunMetrics:
    """Read a run from its folder or its metrics.jsonl, without reports that have no targets.

    Raises:
        InputError: the file does not exist, is invalid, or has no report with a finite loss.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    records = _read_records(file)
    run = RunMetrics(path.resolve().name if path.is_dir() else path.stem, {}, {})
    for record in records:
        step = record["step"]
        if record.get("loss", 0) is None:
            continue
        for name, value in flatten_scalars(record).items():
            run.scalars.setdefault(name, []).append((step, value))
        if "stage" in record:
            run.stages.setdefault(record["stage"], step)
    if "loss" not in run.scalars:
        raise InputError(f"{file}: {_missing_loss(records)}")
    return run


def _read_records(file: Path) -> list[dict[str, Any]]:
    """Read the records of a run, without the steps that a resume has discarded."""
    records: dict[tuple[int, bool], dict[str, Any]] = {}  # key: step, and whether it is a report
    number = 0
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            number += 1
            record = json.loads(line)
            step = index(record["step"])
            if "loss" in record:
                index(record["steps"])
            while records and next(reversed(records))[0] > step:  # discarded by a resume
                records.popitem()
            records[step, "loss" in record] = record
    except OSError as error:
        beside = file.parent.parent / file.name  # of a checkpoint or model inside a run
        run = beside.parent if beside.is_file() else "the output_dir of `qwen2vl train`"
        raise InputError(f"{file}: cannot be read: {error.strerror}; give {run}") from error
    except KeyError as error:
        raise InputError(f"{file}: line {number} has no {error}; reports need it") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{file}: line {number} is no line of metrics") from error
    return list(records.values())


def _missing_loss(records: Sequence[Mapping[str, Any]]) -> str:
    """Say why none of the records of a run has a loss that can be drawn."""
    losses = [record["loss"] for record in records if "loss" in record]
    if not losses:
        return "holds no report yet; a run writes one every logging_steps steps"
    if all(loss is None for loss in losses):
        return f"none of its {len(losses)} reports has targets, so there is no loss to plot"
    return (
        f"none of the losses of its {len(losses)} reports is finite; training diverged, "
        "lower the learning rate"
    )


def build_figure(runs: Sequence[RunMetrics]) -> Figure:
    """Draw one run with its stages and families, or several runs overlaid."""
    counts = Counter(run.name for run in runs)
    runs = [
        run._replace(name=f"{i} {run.name}") if counts[run.name] > 1 else run
        for i, run in enumerate(runs, 1)
    ]
    found = ((title, unit, _select_curves(runs, pattern)) for title, unit, pattern in PANELS)
    panels = [panel for panel in found if panel[-1]]
    names = dict.fromkeys(name for *_, curves in panels for name in curves if name != OVERALL)
    colors = dict(zip(names, cycle(COLORS))) | {OVERALL: INK}
    last_step, steps = (max(run.scalars[x][-1][1] for run in runs) for x in ("step", "steps"))
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 0.5 + 3.2 * rows))
    figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    figure.suptitle(f"{name}: {last_step:,.0f} of {steps:,.0f} steps", x=0.01, ha="left", size=15)
    for i, (title, unit, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i, frameon=False, xlim=(0, last_step))
        axes.set_title(title, loc="left", weight="bold", pad=18)
        axes.set_ylabel(unit, color=GRAY, size=9)
        _draw_curves(axes, curves, colors, percent=unit.startswith("%"))
        if len(runs) == 1 and len(runs[0].stages) > 1:
            _draw_stages(axes, runs[0].stages, last_step)
    return figure


def _select_curves(runs: Sequence[RunMetrics], pattern: str) -> Curves:
    """Return the curves of a panel: one of each run, or of one run and its families."""
    curves: Curves = {}
    for run in runs:
        for path, points in sorted(run.scalars.items()):
            if found := re.fullmatch(pattern, path):
                family = found.groupdict().get("name")
                if len(runs) == 1:
                    curves[family or OVERALL] = points
                elif family is None:
                    curves[run.name] = points
    families = [name for name in curves if name != OVERALL]
    if len(families) == 1 and _are_equal(curves[families[0]], curves.get(OVERALL, [])):
        del curves[OVERALL]  # the only family is the whole: one of the two would hide the other
    return curves


def _are_equal(one: Points, other: Points) -> bool:
    """Return whether two curves have the same points, up to rounding."""
    return len(one) == len(other) and np.allclose(one, other)


def _draw_curves(axes: Axes, curves: Curves, colors: dict[str, str], *, percent: bool) -> None:
    axes.grid(axis="y", color=FAINT)
    axes.tick_params(length=0, labelcolor=GRAY, labelsize=9)
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda step, _: _format(step))
    axes.yaxis.set_major_formatter(lambda value, _: _format(value, percent=percent))
    bottom, top = axes.set_ylim(_limits([y for points in curves.values() for _, y in points]))
    ends: list[tuple[float, str]] = []
    for name, points in curves.items():
        steps, values = np.array(points).T
        smoothed = _smooth(values)
        axes.plot(steps, values, color=colors[name], lw=0.8, alpha=0.2)
        marker, width = "o" if len(points) <= MAX_MARKERS else "", 2.2 if name == OVERALL else 1.5
        axes.plot(steps, smoothed, color=colors[name], lw=width, marker=marker, ms=4, label=name)
        ends.append((smoothed[-1], name))
    ends.sort()
    heights = _spread(np.array([(value - bottom) / (top - bottom) for value, _ in ends]))
    for height, (value, name) in zip(heights, ends, strict=True):
        label = "" if list(curves) == [OVERALL] else f"{name} "
        label += _format(value, ".3g", percent=percent)
        axes.text(1.02, height, label, color=colors[name], va="center", transform=axes.transAxes)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return y limits: from zero unless all values are high, without outliers of a long run."""
    low, high = min(values), float(np.quantile(values, 0.985 if len(values) >= 200 else 1))
    low = 0.0 if 0 < low < 0.6 * high else low
    margin = 0.04 * (high - low or abs(high) or 1)
    return low - margin, high + margin


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centered moving average, over fewer values near both ends."""
    window = np.ones(2 * (len(values) // SMOOTHING_DIVISOR) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _spread(heights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift sorted heights of labels, as fractions of a panel, apart by the height of a label."""
    gap = min(LABEL_HEIGHT, MAX_HEIGHT / len(heights))
    lowest = gap * np.arange(len(heights))
    for _ in range(300):
        heights = np.clip(heights, lowest, MAX_HEIGHT - lowest[::-1])
        overlaps = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= overlaps
        heights[1:] += overlaps
    return heights


def _draw_stages(axes: Axes, stages: dict[str, float], last_step: float) -> None:
    """Draw a line where each stage begins, and its name unless it would overlap the one before."""
    end = 0.0
    for name, start in stages.items():
        axes.axvline(start, color=FAINT, lw=1, zorder=0)
        if start >= end:
            axes.text(start, 1.02, name, color=GRAY, size=8, transform=axes.get_xaxis_transform())
            end = start + LETTER_WIDTH * (len(name) + 1) * last_step


def _format(value: float, spec: str = "g", *, percent: bool = False) -> str:
    """Format a number: 25000 as 25k, 0.5 as 0.5 or 50%."""
    if percent:
        return f"{100 * value:{spec}}%"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:{spec}}{letter}"
    return f"{value:{spec}}"
