"""Sampling of the frozen suite `synthetic`: python -m dev.suites.synthetic.

Each section takes the first specs of an endless seeded series that fill its quotas: a number of
questions of each kind, of which at most a number have the same answer, so that answering without
the image scores little. This was run once. Running it again after synth/ has changed gives a
different suite and invalidates all earlier scores; tests/eval/test_mini.py checks the file's hash.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from qwen2vl.synth import Mixture, Spec, sample
from qwen2vl.synth.spec import Line

__all__ = ["SECTIONS", "SEED", "Quota", "Section", "draw_section", "freeze"]

SEED = 20240918
FILE = FROZEN.parent / "mini.json"


@dataclass(frozen=True, slots=True)
class Quota:
    """Number of questions of one kind, and how many of them may have the same answer."""

    count: int
    max_same_answer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Distribution of the specs of a section, and the quotas that select from it."""

    mixture: Mixture
    quotas: Mapping[str, Quota]  # by kind of question


def _held_out(family: str, *, num_shapes: tuple[int, int] = (1, 5)) -> Mixture:
    return Mixture(weights={family: 1.0}, split="held_out", fonts="judge", num_shapes=num_shapes)


_SHAPES = _held_out("shapes")
_BOXES = _held_out("grounding", num_shapes=(2, 5))

SECTIONS: Mapping[str, Section] = {
    "text": Section(mixture=_held_out("text"), quotas={"read": Quota(200, 1)}),
    "shapes": Section(
        mixture=_SHAPES,
        quotas={
            "name_shape": Quota(30, 5),
            "color": Quota(30, 4),
            "describe": Quota(30, 1),
            "name_shape_of_color": Quota(30, 5),
            "color_of_kind": Quota(30, 4),
        },
    ),
    "counting": Section(
        mixture=_SHAPES,
        quotas={
            "count_all": Quota(50, 10),
            "count_kind": Quota(50, 9),
            "count_color": Quota(50, 9),
        },
    ),
    "relations": Section(
        mixture=_SHAPES,
        quotas={
            "position": Quota(20, 4),
            "left_or_right": Quota(12, 6),
            "top_or_bottom": Quota(12, 6),
            "larger": Quota(12, 2),
            "smaller": Quota(8, 2),
            "further": Quota(16, 2),
            "exists": Quota(20, 10),
        },
    ),
    "find": Section(mixture=_BOXES, quotas={"find": Quota(150, 1)}),
    "name_box": Section(mixture=_BOXES, quotas={"name_box": Quota(50, 2)}),
    "motion": Section(
        mixture=_held_out("motion"),
        quotas={
            "direction": Quota(52, 13),
            "appeared_first": Quota(16, 2),
            "appeared_last": Quota(16, 2),
            "moved_first": Quota(16, 1),
        },
    ),
    "two_pictures": Section(
        mixture=_held_out("two_pictures"),
        quotas={
            "same_shape": Quota(12, 6),
            "same_color": Quota(12, 6),
            "same_number": Quota(12, 6),
            "same_text": Quota(16, 8),
            "which_has_more": Quota(14, 7),
            "which_shows": Quota(14, 7),
            "color_of_one": Quota(8, 1),
            "shape_of_one": Quota(6, 1),
            "count_in_one": Quota(6, 2),
        },
    ),
}


def freeze(path: Path = FILE) -> None:
    """Write all sections, one spec per line.

    Raises:
        FontError: a held-out font is not installed.
    """
    sections = []
    for name, section in SECTIONS.items():
        specs = [json.dumps(s.to_json(), separators=(",", ":")) for s in draw_section(section)]
        sections.append(f'"{name}": [\n' + ",\n".join(specs) + "\n]")
    content = f'{{"seed": {SEED}, "sections": {{\n' + ",\n".join(sections) + "\n}}\n"
    path.write_text(content, encoding="utf-8")


def draw_section(section: Section) -> list[Spec]:
    """Sample specs until every quota is full, and shuffle them."""
    selected: list[Spec] = []
    num_per_answer: Counter[tuple[str, str]] = Counter()
    num_per_kind: Counter[str] = Counter()
    index = 0
    while any(num_per_kind[kind] < quota.count for kind, quota in section.quotas.items()):
        spec = sample(SEED, index, section.mixture)
        index += 1
        (question,) = spec.questions
        quota = section.quotas.get(question.task, Quota(0, 0))
        key = (question.task, question.answer)
        has_capacity = (
            num_per_kind[question.task] < quota.count
            and num_per_answer[key] < quota.max_same_answer
        )
        if has_capacity and _is_legible(spec):
            selected.append(spec)
            num_per_kind[question.task] += 1
            num_per_answer[key] += 1
    # Rare answers fill their quota last, so they would be adjacent and missing from the first
    # examples (--limit).
    Random(SEED).shuffle(selected)
    return selected


def _is_legible(spec: Spec) -> bool:
    """Return whether every character is unambiguous: EB Garamond draws 0 as o, 1 as a small I."""
    return not any(
        isinstance(image, Line)
        and image.font.startswith("EBGaramond")
        and set(image.text) & {"0", "1"}
        for image in spec.pictures
    )


if __name__ == "__main__":
    freeze()
