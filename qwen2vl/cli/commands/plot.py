"""`qwen2vl plot RUN... -o run.png`: charts of the metrics of training runs (metrics.jsonl).

One run is plotted with its task families; several runs are overlaid. Metrics without values have no
panel. Of a run that was resumed from an earlier step, the discarded steps are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.chart import COLORS, INK, Curve, Panel, draw_chart
from qwen2vl.errors import InputError

__all__ = ["plot"]

Record = dict[str, Any]
Points = list[tuple[float, float]]
Value = Callable[[Record], float | None]


class RunMetrics(NamedTuple):
    """The records of one run: training reports and evaluations."""

    name: str
    training: list[Record]
    evaluations: list[Record]


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o",
    "--output",
    default="run.png",
    show_default=True,
    metavar="FILE",
    help="Image file to write.",
)
@terminal.debug_option
def plot(runs: tuple[str, ...], output: str) -> None:
    """Plot the metrics of RUNs: folders of training runs, or their metrics.jsonl files."""
    terminal.check_image_path(output)
    records = _with_unique_names([_read(Path(run)) for run in runs])
    panels = [*_panels_of_run(records[0])] if len(records) == 1 else [*_panels_of_runs(records)]
    steps = max(run.training[-1]["step"] for run in records)
    last = records[0].training[-1]
    subtitle = f"{steps:,} of {last['steps']:,} steps" if len(records) == 1 else f"{steps:,} steps"
    terminal.save_image(
        draw_chart(", ".join(run.name for run in records), subtitle, panels), output
    )
    terminal.echo(output)


def _read(path: Path) -> RunMetrics:
    """Read the records of a run, without those of steps that were repeated after a resume.

    Raises:
        InputError: the file does not exist, is invalid, or has no report yet.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    training: list[Record] = []
    evaluations: list[Record] = []
    try:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            record = _parse(text, file, number)
            same_kind, other_kind = (
                (training, evaluations) if "families" in record else (evaluations, training)
            )
            _drop_after(same_kind, record["step"] - 1)
            _drop_after(other_kind, record["step"])
            same_kind.append(record)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    training = [record for record in training if record["loss"] is not None]
    if not training:
        raise InputError(
            f"{file}: holds no report yet; the run writes one every logging_steps steps"
        )
    return RunMetrics(path.resolve().name if path.is_dir() else path.stem, training, evaluations)


def _drop_after(records: list[Record], step: int) -> None:
    """Remove the records after `step`."""
    while records and records[-1]["step"] > step:
        records.pop()


def _parse(text: str, file: Path, number: int) -> Record:
    try:
        record = json.loads(text)
        record["step"] += 0
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: line {number} is no line of metrics") from error
    return record


def _with_unique_names(runs: Sequence[RunMetrics]) -> list[RunMetrics]:
    """Append a number to the names of runs that have the same name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else run._replace(name=f"{run.name} {i}")
        for i, run in enumerate(runs, 1)
    ]


def _points(records: Sequence[Record], value: Value) -> Points:
    found = ((record["step"], value(record)) for record in records)
    return [(step, value) for step, value in found if value is not None]


def _get_nested(record: Record, path: Sequence[str]) -> dict[str, Any]:
    """Return the object at a path of keys; empty if it is missing."""
    for key in path:
        record = record.get(key) or {}
    return record


def _value_at(*path: str) -> Value:
    """Return a function that gets the number at a path of keys of a record."""
    return lambda record: _get_nested(record, path[:-1]).get(path[-1])


class _PanelSpec(NamedTuple):
    """One panel: its title and unit, and where its values are in a record."""

    title: str
    note: str
    path: tuple[str, ...]
    by_family: tuple[str, ...] | None = (
        None  # path of the families in a record, then the key of the value
    )
    held_out: bool = False  # values are in the evaluation records
    percent: bool = False
    from_zero: bool = True


_PANEL_SPECS = (
    _PanelSpec(
        "Loss", "training, nats per target token", ("loss",), ("families", "loss"), from_zero=False
    ),
    _PanelSpec(
        "Held-out loss",
        "nats per target token",
        ("held_out", "loss"),
        ("held_out", "families", "loss"),
        held_out=True,
        from_zero=False,
    ),
    _PanelSpec(
        "Vision gain",
        "loss increase with mismatched images, nats per target token",
        ("held_out", "vision_gain"),
        ("held_out", "families", "vision_gain"),
        held_out=True,
    ),
    _PanelSpec(
        "Exact match", "share of conversations", (), ("families", "exact_match"), percent=True
    ),
    _PanelSpec("Gradient norm", "before clipping", ("grad_norm",)),
    _PanelSpec("Throughput", "tokens per second", ("tokens_per_second",)),
    _PanelSpec("MFU", "share of the hardware's peak", ("mfu",), percent=True),
    _PanelSpec("Waiting for data", "share of the time", ("data_wait",), percent=True),
)


def _panels_of_run(run: RunMetrics) -> Iterator[Panel]:
    """Build the panels of one run: overall curves, and thin curves of its families."""
    marks = _stage_marks(run.training)
    names = {name for record in run.training for name in record["families"]}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(sorted(names))}
    for spec in _PANEL_SPECS:
        records = run.evaluations if spec.held_out else run.training
        curves: list[Curve] = []
        overall = _points(records, _value_at(*spec.path)) if spec.path else []
        families = _family_curves(records, spec)
        if overall:
            name = "all" if families else ""
            color = INK if families else COLORS[0]
            curves.append(_curve(name, overall, color, spec))
        curves += [
            _curve(name, points, colors.get(name, INK), spec, thin=True)
            for name, points in families
        ]
        if curves:
            yield _panel(spec, curves, marks)
    yield from _mini_suite_panels(run, marks)


def _panels_of_runs(runs: Sequence[RunMetrics]) -> Iterator[Panel]:
    """Build the panels of several overlaid runs, without families."""
    for spec in (spec for spec in _PANEL_SPECS if spec.path):
        curves = []
        for i, run in enumerate(runs):
            records = run.evaluations if spec.held_out else run.training
            if points := _points(records, _value_at(*spec.path)):
                curves.append(_curve(run.name, points, COLORS[i % len(COLORS)], spec))
        if curves:
            yield _panel(spec, curves, ())


def _curve(name: str, points: Points, color: str, spec: _PanelSpec, *, thin: bool = False) -> Curve:
    return Curve(name=name, points=points, color=color, thin=thin, smooth=not spec.held_out)


def _panel(spec: _PanelSpec, curves: Sequence[Curve], marks: Sequence[tuple[float, str]]) -> Panel:
    return Panel(
        title=spec.title,
        note=spec.note,
        curves=curves,
        percent=spec.percent,
        from_zero=spec.from_zero,
        marks=marks,
    )


def _family_curves(records: Sequence[Record], spec: _PanelSpec) -> list[tuple[str, Points]]:
    if spec.by_family is None:
        return []
    *path, key = spec.by_family
    names = sorted({name for record in records for name in _get_nested(record, path)})
    found = ((name, _points(records, _value_at(*path, name, key))) for name in names)
    return [(name, points) for name, points in found if points]


def _mini_suite_panels(run: RunMetrics, marks: Sequence[tuple[float, str]]) -> Iterator[Panel]:
    """Build the panel of the mini suite, if the run evaluated it."""
    names = sorted({name for record in run.evaluations for name in record.get("mini", {})})
    if names:
        spec = _PanelSpec("Mini suite", "accuracy", ("mini",), held_out=True, percent=True)
        curves = [
            _curve(name, _points(run.evaluations, _value_at("mini", name, "accuracy")), color, spec)
            for name, color in zip(names, COLORS * len(names), strict=False)
        ]
        yield _panel(spec, curves, marks)


def _stage_marks(training: Sequence[Record]) -> list[tuple[float, str]]:
    """Return the first step of each stage; a run of one stage has no marks."""
    marks: list[tuple[float, str]] = []
    for record in training:
        if not marks or marks[-1][1] != record["stage"]:
            marks.append((record["step"], record["stage"]))
    return marks if len(marks) > 1 else []
