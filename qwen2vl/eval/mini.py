"""The mini suite: a frozen benchmark of OCR, counting, grounding, relations and video, in minutes.

suites/mini.json holds the specs (sampled once by freeze.py); images are rendered on demand. Each
part is one line of the result table: a task and the threshold of its score. The parts with scaled
text, other canvases, shuffled frames or mismatched images are derived here from the same specs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from importlib.resources import files

from qwen2vl.errors import InputError
from qwen2vl.eval.suites.thresholds import (
    CHANCE,
    NO_THRESHOLD,
    Threshold,
    ThresholdCheck,
    check_results,
)
from qwen2vl.eval.synthetic import (
    EvalCase,
    SyntheticTask,
    build_cases,
    chance_levels,
    pad_to_aspect_ratio,
    shuffle_frames,
    with_mismatched_images,
)
from qwen2vl.eval.task import TaskResults
from qwen2vl.synth import Spec

__all__ = [
    "PARTS",
    "build_task",
    "check_thresholds",
    "load_section",
    "select_parts",
]

# Width / height of the canvases in text_odd_aspect; those of the lines themselves are 1 to 20.
ASPECT_RATIOS = (0.5, 1.0, 10.0, 20.0)

# Shuffled frames still show the axis of a motion, but not its direction: two answers are left.
SHUFFLED_CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SuitePart:
    """One part of the suite: a line of the result table."""

    section: str  # of the file, whose specs it uses
    note: str
    threshold: Threshold
    transform: Callable[[tuple[EvalCase, ...]], tuple[EvalCase, ...]] = tuple


def _map_specs(
    transform: Callable[[Spec], Spec], cases: Sequence[EvalCase]
) -> tuple[EvalCase, ...]:
    return tuple(replace(case, spec=transform(case.spec)) for case in cases)


def _scale(k: int) -> Callable[[tuple[EvalCase, ...]], tuple[EvalCase, ...]]:
    return partial(_map_specs, lambda spec: spec.scaled(k))


def _pad_to_odd_aspects(cases: Sequence[EvalCase]) -> tuple[EvalCase, ...]:
    return tuple(
        replace(case, spec=pad_to_aspect_ratio(case.spec, ASPECT_RATIOS[i % len(ASPECT_RATIOS)]))
        for i, case in enumerate(cases)
    )


def _shuffle(cases: Sequence[EvalCase]) -> tuple[EvalCase, ...]:
    return tuple(
        replace(case, chance=SHUFFLED_CHANCE) for case in _map_specs(shuffle_frames, cases)
    )


_FONTS = "fonts and question wordings that were held out from training"
_WORDINGS = "question wordings that were held out from training"
_MISMATCHED = "control: the image belongs to another question of the same kind"
_NEAR_TEXT = Threshold(kind="relative_cer", limit=0.02)

_BASE_PARTS = {
    "text": SuitePart(
        section="text", note=_FONTS, threshold=Threshold(kind="cer", limit=0.04, goal=0.02)
    ),
    "text_2x": SuitePart(
        section="text", note="text at twice the size", threshold=_NEAR_TEXT, transform=_scale(2)
    ),
    "text_3x": SuitePart(
        section="text", note="text at 3 times the size", threshold=_NEAR_TEXT, transform=_scale(3)
    ),
    "text_odd_aspect": SuitePart(
        section="text",
        note="text on larger canvases, width : height 1:2, 1:1, 10:1, 20:1",
        threshold=_NEAR_TEXT,
        transform=_pad_to_odd_aspects,
    ),
    "shapes": SuitePart(
        section="shapes", note=_WORDINGS, threshold=Threshold(kind="accuracy", limit=0.99)
    ),
    "counting": SuitePart(
        section="counting", note=_WORDINGS, threshold=Threshold(kind="accuracy", limit=0.95)
    ),
    "relations": SuitePart(section="relations", note=_WORDINGS, threshold=NO_THRESHOLD),
    "find": SuitePart(
        section="find",
        note=f"correct where the first box has an IoU of at least 0.5; {_WORDINGS}",
        threshold=Threshold(kind="accuracy", limit=0.9),
    ),
    "name_box": SuitePart(section="name_box", note=_WORDINGS, threshold=NO_THRESHOLD),
    "motion": SuitePart(
        section="motion", note=_WORDINGS, threshold=Threshold(kind="accuracy", limit=0.95)
    ),
    "two_pictures": SuitePart(
        section="two_pictures", note=_WORDINGS, threshold=Threshold(kind="accuracy", limit=0.9)
    ),
}
_SHUFFLED_MOTION = SuitePart(
    section="motion", note="control: shuffled frames", threshold=CHANCE, transform=_shuffle
)

# Name -> part, in the order of the table.
PARTS: Mapping[str, SuitePart] = {
    **_BASE_PARTS,
    "motion_shuffled": _SHUFFLED_MOTION,
    **{
        f"wrong_{part.section}": SuitePart(
            section=part.section,
            note=_MISMATCHED,
            threshold=CHANCE,
            transform=with_mismatched_images,
        )
        for part in _BASE_PARTS.values()
    },
}


def select_parts(patterns: Sequence[str]) -> list[str]:
    """Return the names of the parts that match any pattern ("text", "text*"); all without one.

    Raises:
        InputError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in PARTS):
            raise InputError(f"no part of the mini suite is called {pattern}: {', '.join(PARTS)}")
    selected = patterns or ("*",)
    return [name for name in PARTS if any(fnmatchcase(name, pattern) for pattern in selected)]


def build_task(name: str) -> SyntheticTask:
    """Build the task of one part."""
    part = PARTS[name]
    specs = load_section(part.section)
    cases = part.transform(build_cases(specs, chance_levels(specs)))
    return SyntheticTask(name=name, note=part.note, cases=cases)


def load_section(section: str) -> tuple[Spec, ...]:
    """Load the frozen specs of a section."""
    return tuple(Spec.from_json(raw) for raw in _load_sections()[section])


def check_thresholds(runs: Mapping[str, TaskResults]) -> dict[str, ThresholdCheck]:
    """Compare the results of each part with its threshold."""
    return check_results(runs, {name: PARTS[name].threshold for name in runs})


@lru_cache(maxsize=1)
def _load_sections() -> dict[str, list[dict[str, object]]]:
    text = files("qwen2vl.eval").joinpath("suites", "mini.json").read_text(encoding="utf-8")
    return json.loads(text)["sections"]
