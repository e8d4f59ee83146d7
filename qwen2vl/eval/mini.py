"""The mini suite: what a small Qwen2-VL must be able to do, frozen, in a few minutes.

suites/mini.json holds the specs (freeze.py made it); pictures are drawn when asked for. Each part
is one line of the table: a task and the bar that it has to pass. The parts that repeat questions
on other canvases, with shuffled frames or with wrong pictures are made here, from the same specs.
It must not know how answers come about. Next room: cli/commands/eval.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from importlib.resources import files
from typing import Literal

from qwen2vl.errors import InputError
from qwen2vl.eval.drawn import (
    Case,
    DrawnTask,
    cases_of,
    chances_of,
    on_canvas,
    out_of_order,
    with_wrong_pictures,
)
from qwen2vl.eval.task import Results
from qwen2vl.synth import Spec

__all__ = ["PARTS", "Bar", "Verdict", "build", "judge", "select", "specs_of"]

# Width / height of the canvases in text_odd_aspect; the lines themselves have from 1 to 20.
ASPECTS = (0.5, 1.0, 10.0, 20.0)

# With its frames shuffled a clip still shows the line along which something moved, not the way.
SHUFFLED_CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What the score of a part has to reach.

    share: right answers, at least `floor`. errors: characters wrong, at most `floor`. near: the
    error rate at most `floor` above that of the part `text`. chance: right answers, no more than
    luck explains. none: reported only.
    """

    kind: Literal["share", "errors", "near", "chance", "none"]
    floor: float | None = None
    goal: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of the table."""

    section: str  # of the file, whose specs it takes
    note: str
    bar: Bar
    twist: Callable[[tuple[Case, ...]], tuple[Case, ...]] = tuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a part stands to its bar."""

    measure: Literal["share right", "character errors"]
    score: float
    interval: tuple[float, float]  # 95 % confidence
    floor: float | None  # a share has to reach it, a share of chance or errors to stay below
    goal: float | None
    at_most: bool  # whether less is better
    met: bool | None  # None: there is no floor, or what it refers to was not run


def _each(change: Callable[[Spec], Spec], cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, spec=change(case.spec)) for case in cases)


def _enlarged(k: int) -> Callable[[tuple[Case, ...]], tuple[Case, ...]]:
    return partial(_each, lambda spec: spec.scaled(k))


def _on_odd_canvases(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(
        replace(case, spec=on_canvas(case.spec, ASPECTS[i % len(ASPECTS)]))
        for i, case in enumerate(cases)
    )


def _shuffled(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, chance=SHUFFLED_CHANCE) for case in _each(out_of_order, cases))


_FONTS = "fonts that training never saw; question wordings that training never saw"
_WORDINGS = "question wordings that training never saw"
_WRONG = "control: the picture belongs to another question of the same kind"
_NEAR = Bar(kind="near", floor=0.02)
_CHANCE = Bar(kind="chance")
_NO_BAR = Bar(kind="none")

_PLAIN = {
    "text": Part(section="text", note=_FONTS, bar=Bar(kind="errors", floor=0.04, goal=0.02)),
    "text_2x": Part(section="text", note="text at twice the size", bar=_NEAR, twist=_enlarged(2)),
    "text_3x": Part(section="text", note="text at 3 times the size", bar=_NEAR, twist=_enlarged(3)),
    "text_odd_aspect": Part(
        section="text",
        note="text on larger canvases, width : height 1:2, 1:1, 10:1, 20:1",
        bar=_NEAR,
        twist=_on_odd_canvases,
    ),
    "shapes": Part(section="shapes", note=_WORDINGS, bar=Bar(kind="share", floor=0.99)),
    "counting": Part(section="counting", note=_WORDINGS, bar=Bar(kind="share", floor=0.95)),
    "relations": Part(section="relations", note=_WORDINGS, bar=_NO_BAR),
    "find": Part(
        section="find",
        note=f"right where the first box overlaps the truth with an IoU of 0.5; {_WORDINGS}",
        bar=Bar(kind="share", floor=0.9),
    ),
    "name_box": Part(section="name_box", note=_WORDINGS, bar=_NO_BAR),
    "motion": Part(section="motion", note=_WORDINGS, bar=Bar(kind="share", floor=0.95)),
    "two_pictures": Part(section="two_pictures", note=_WORDINGS, bar=Bar(kind="share", floor=0.9)),
}
_SHUFFLED = Part(
    section="motion", note="control: frames out of order", bar=_CHANCE, twist=_shuffled
)

# Name -> part, in the order of the table.
PARTS: Mapping[str, Part] = {
    **_PLAIN,
    "motion_shuffled": _SHUFFLED,
    **{
        f"wrong_{part.section}": Part(
            section=part.section, note=_WRONG, bar=_CHANCE, twist=with_wrong_pictures
        )
        for part in _PLAIN.values()
    },
}


def select(patterns: Sequence[str]) -> list[str]:
    """List the parts whose names match any pattern ("text", "text*"); all without a pattern.

    Raises:
        InputError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in PARTS):
            raise InputError(f"no part of the mini suite is called {pattern}: {', '.join(PARTS)}")
    wanted = patterns or ("*",)
    return [name for name in PARTS if any(fnmatchcase(name, pattern) for pattern in wanted)]


def build(name: str) -> DrawnTask:
    """Make the task of one part."""
    part = PARTS[name]
    specs = specs_of(part.section)
    cases = part.twist(cases_of(specs, chances_of(specs)))
    return DrawnTask(name=name, note=part.note, cases=cases)


def specs_of(section: str) -> tuple[Spec, ...]:
    """Read the frozen specs of a section."""
    return tuple(Spec.from_json(raw) for raw in _sections()[section])


def judge(runs: Mapping[str, Results]) -> dict[str, Verdict]:
    """Hold the results of each part against its bar."""
    return {name: _verdict(results, PARTS[name].bar, runs) for name, results in runs.items()}


def _verdict(results: Results, bar: Bar, runs: Mapping[str, Results]) -> Verdict:
    rate, rate_interval = results.error_rate, results.error_interval
    if bar.kind in ("errors", "near") and rate is not None and rate_interval is not None:
        floor = bar.floor if bar.kind == "errors" else _near("text", bar.floor, runs)
        return Verdict(
            measure="character errors",
            score=rate,
            interval=rate_interval,
            floor=floor,
            goal=bar.goal,
            at_most=True,
            met=None if floor is None else rate <= floor,
        )
    at_most = bar.kind == "chance"
    floor = results.chance_limit if at_most else bar.floor
    score = results.mean
    met = None if floor is None else (score <= floor if at_most else score >= floor)
    return Verdict(
        measure="share right",
        score=score,
        interval=results.interval,
        floor=floor,
        goal=bar.goal,
        at_most=at_most,
        met=met,
    )


def _near(name: str, distance: float | None, runs: Mapping[str, Results]) -> float | None:
    rate = runs[name].error_rate if name in runs else None
    return None if rate is None or distance is None else rate + distance


@lru_cache(maxsize=1)
def _sections() -> dict[str, list[dict[str, object]]]:
    text = files("qwen2vl.eval").joinpath("suites", "mini.json").read_text(encoding="utf-8")
    return json.loads(text)["sections"]
