"""`qwen2vl plot RUN... -o run.png`: the curves of runs, from their metrics.jsonl.

One run is shown with its families; several are laid over each other. Only what was measured gets
a panel. A run that was resumed from an earlier step is shown as it went on from there. It must not
know how curves are drawn. Next room: chart.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.chart import COLORS, INK, Curve, Panel, draw
from qwen2vl.errors import InputError

__all__ = ["plot"]

Line = dict[str, Any]
Points = list[tuple[float, float]]
Value = Callable[[Line], float | None]


class Told(NamedTuple):
    """What one run has written."""

    name: str
    training: list[Line]
    probes: list[Line]


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "output", default="run.png", show_default=True, metavar="FILE")
@terminal.debug_option
def plot(runs: tuple[str, ...], output: str) -> None:
    """Draw the curves of RUNs: folders of training runs, or their metrics files."""
    terminal.check_picture_name(output)
    told = _named_apart([_read(Path(run)) for run in runs])
    panels = [*_of_one(told[0])] if len(told) == 1 else [*_of_several(told)]
    steps = max(one.training[-1]["step"] for one in told)
    last = told[0].training[-1]
    subtitle = f"{steps:,} of {last['steps']:,} steps" if len(told) == 1 else f"{steps:,} steps"
    terminal.save_picture(draw(", ".join(one.name for one in told), subtitle, panels), output)
    terminal.say(output)


def _read(path: Path) -> Told:
    """Read a run's lines, and forget those that a later leg has taken back.

    Raises:
        InputError: there is no such run, or nothing in it yet.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    training: list[Line] = []
    probes: list[Line] = []
    try:
        for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            line = _parse(text, file, number)
            own, other = (training, probes) if "families" in line else (probes, training)
            _forget(own, line["step"] - 1)
            _forget(other, line["step"])
            own.append(line)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    training = [line for line in training if line["loss"] is not None]
    if not training:
        raise InputError(f"{file}: holds no report yet; the run writes one every log_every steps")
    return Told(path.resolve().name if path.is_dir() else path.stem, training, probes)


def _forget(lines: list[Line], step: int) -> None:
    """Drop what was told after `step`."""
    while lines and lines[-1]["step"] > step:
        lines.pop()


def _parse(text: str, file: Path, number: int) -> Line:
    try:
        line = json.loads(text)
        line["step"] += 0
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: line {number} is no line of metrics") from error
    return line


def _named_apart(told: Sequence[Told]) -> list[Told]:
    """Number runs whose folders have the same name."""
    names = [one.name for one in told]
    return [
        one if names.count(one.name) == 1 else one._replace(name=f"{one.name} {i}")
        for i, one in enumerate(told, 1)
    ]


def _points(lines: Sequence[Line], value: Value) -> Points:
    found = ((line["step"], value(line)) for line in lines)
    return [(step, number) for step, number in found if number is not None]


def _inside(line: Line, path: Sequence[str]) -> dict[str, Any]:
    """Follow a path of objects; what is not there is empty."""
    for key in path:
        line = line.get(key) or {}
    return line


def _within(*path: str) -> Value:
    """Look a number up by its path in a line."""
    return lambda line: _inside(line, path[:-1]).get(path[-1])


class _View(NamedTuple):
    """What one panel shows of any run."""

    title: str
    note: str
    path: tuple[str, ...]
    by_family: tuple[str, ...] | None = None  # where a line holds families, and their number
    held_out: bool = False  # a number of probes
    percent: bool = False
    from_zero: bool = True


_VIEWS = (
    _View("Loss", "nats a target, training", ("loss",), ("families", "loss"), from_zero=False),
    _View(
        "Held-out loss",
        "nats a target",
        ("held_out", "loss"),
        ("held_out", "families", "loss"),
        held_out=True,
        from_zero=False,
    ),
    _View(
        "Vision gain",
        "nats a target that wrong pictures cost; 0: does not look",
        ("held_out", "vision_gain"),
        ("held_out", "families", "vision_gain"),
        held_out=True,
    ),
    _View("Right throughout", "share of conversations", (), ("families", "exact"), percent=True),
    _View("Gradient norm", "before clipping", ("grad_norm",)),
    _View("Speed", "tokens a second", ("tokens_per_second",)),
    _View("MFU", "share of the hardware's peak", ("mfu",), percent=True),
    _View("Waiting for data", "share of the time", ("data_wait",), percent=True),
)


def _of_one(told: Told) -> Iterator[Panel]:
    """Show one run: the whole bold, its families beside it."""
    marks = _stages(told.training)
    names = {name for line in told.training for name in line["families"]}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(sorted(names))}
    for view in _VIEWS:
        lines = told.probes if view.held_out else told.training
        curves: list[Curve] = []
        whole = _points(lines, _within(*view.path)) if view.path else []
        families = _families(lines, view)
        if whole:
            name = "all" if families else ""
            color = INK if families else COLORS[0]
            curves.append(_curve(name, whole, color, view))
        curves += [
            _curve(name, points, colors.get(name, INK), view, thin=True)
            for name, points in families
        ]
        if curves:
            yield _panel(view, curves, marks)
    yield from _suite(told, marks)


def _of_several(runs: Sequence[Told]) -> Iterator[Panel]:
    """Lay runs over each other, without their families."""
    for view in (view for view in _VIEWS if view.path):
        curves = []
        for i, told in enumerate(runs):
            lines = told.probes if view.held_out else told.training
            if points := _points(lines, _within(*view.path)):
                curves.append(_curve(told.name, points, COLORS[i % len(COLORS)], view))
        if curves:
            yield _panel(view, curves, ())


def _curve(name: str, points: Points, color: str, view: _View, *, thin: bool = False) -> Curve:
    return Curve(name=name, points=points, color=color, thin=thin, smooth=not view.held_out)


def _panel(view: _View, curves: Sequence[Curve], marks: Sequence[tuple[float, str]]) -> Panel:
    return Panel(
        title=view.title,
        note=view.note,
        curves=curves,
        percent=view.percent,
        from_zero=view.from_zero,
        marks=marks,
    )


def _families(lines: Sequence[Line], view: _View) -> list[tuple[str, Points]]:
    if view.by_family is None:
        return []
    *where, number = view.by_family
    names = sorted({name for line in lines for name in _inside(line, where)})
    found = ((name, _points(lines, _within(*where, name, number))) for name in names)
    return [(name, points) for name, points in found if points]


def _suite(told: Told, marks: Sequence[tuple[float, str]]) -> Iterator[Panel]:
    """Show the mini suite, where the run was asked it."""
    names = sorted({name for line in told.probes for name in line.get("mini", {})})
    if names:
        view = _View("Mini suite", "share of right answers", ("mini",), held_out=True, percent=True)
        curves = [
            _curve(name, _points(told.probes, _within("mini", name, "share_right")), color, view)
            for name, color in zip(names, COLORS * len(names), strict=False)
        ]
        yield _panel(view, curves, marks)


def _stages(training: Sequence[Line]) -> list[tuple[float, str]]:
    """Find where each stage was first told of; a run of one stage has no marks."""
    marks: list[tuple[float, str]] = []
    for line in training:
        if not marks or marks[-1][1] != line["stage"]:
            marks.append((line["step"], line["stage"]))
    return marks if len(marks) > 1 else []
