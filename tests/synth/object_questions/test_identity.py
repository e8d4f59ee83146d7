"""Names, colors and presence: answers are true, and yes as often as no."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from qwen2vl.synth.colors import COLORS, MORE_COLORS
from qwen2vl.synth.compositing import Ground
from qwen2vl.synth.compositing.icon_sampling import are_near
from qwen2vl.synth.object_questions import identity
from tests.synth.object_questions import make_scene, sample_many

BOXES = [(0, 0, 20, 20), (80, 40, 100, 60), (150, 0, 190, 90), (30, 60, 60, 90)]
SHAPE = make_scene(("red circle", BOXES[0]))
ICON = make_scene(("guitar", BOXES[0]))
SHAPES = make_scene(("red circle", BOXES[0]), ("blue circle", BOXES[1]), ("red square", BOXES[2]))
MIXED = make_scene(("red circle", BOXES[0]), ("guitar", BOXES[1]), ("red star", BOXES[2]))
ICONS = make_scene(("guitar", BOXES[0]), ("owl", BOXES[1]), ("bread", BOXES[2]))


def test_the_only_object_is_named_and_described() -> None:
    rng = Random(0)
    for sampler, shape, icon in (
        (identity.ask_name, ("name_shape", "circle"), ("named_open", "guitar")),
        (identity.ask_description, ("describe", "red circle"), None),
        (identity.ask_color, ("color", "red"), None),
    ):
        found = [sampler(rng, scene) for scene in (SHAPE, ICON, SHAPES, ICONS)]
        assert [c and (c.task, c.answer) for c in found] == [shape, icon, None, None]


def test_a_kind_or_a_color_that_occurs_once_is_asked_for() -> None:
    by_color = {(c.fields, c.answer) for c in sample_many(identity.ask_shape_of_color, SHAPES, 20)}
    assert by_color == {(("blue",), "circle")}
    by_kind = {(c.fields, c.answer) for c in sample_many(identity.ask_color_of_kind, SHAPES, 20)}
    assert by_kind == {(("square",), "red")}
    assert not list(sample_many(identity.ask_shape_of_color, MIXED, 9))  # icons have colors, too
    assert {c.answer for c in sample_many(identity.ask_beside_shapes, MIXED, 5)} == {"guitar"}
    assert not list(sample_many(identity.ask_beside_shapes, SHAPES, 9))
    assert not list(sample_many(identity.ask_beside_shapes, ICONS, 9))


def test_whether_a_shape_has_a_color_or_a_kind() -> None:
    answers: Counter[tuple[str, str]] = Counter()
    for candidate in [
        *sample_many(identity.ask_is_color, SHAPES, 200),
        *sample_many(identity.ask_is_kind, SHAPES, 200),
        *sample_many(identity.ask_is_kind, SHAPE, 100),
    ]:
        name, value = candidate.fields
        (one,) = {one for n, one in (*SHAPES.names.items(), *SHAPE.names.items()) if n == name}
        assert (value in (one.color, one.name)) == (candidate.answer == "yes")
        assert (value in {**COLORS, **MORE_COLORS}) == (candidate.task == "is_color")
        assert (one.name, value) not in (("circle", "oval"), ("square", "rectangle"))
        answers[candidate.task, candidate.answer] += 1
    assert len(answers) == 4 and min(answers.values()) > 70


@pytest.mark.parametrize("scene", [SHAPES, MIXED, ICONS], ids=["shapes", "mixed", "icons"])
def test_presence_is_true_balanced_and_nothing_absent_is_nearly_present(
    scene: identity.ObjectScene,
) -> None:
    present = {name for one in scene.objects for name in (one.phrase, one.name)}
    present |= {f"{one.color} shape" for one in scene.shapes}
    answers: Counter[tuple[str, str]] = Counter()
    near = 0
    for task, sampler, if_present in (
        ("exists", identity.ask_exists, "yes"),
        ("lacks", identity.ask_lacks, "no"),
    ):
        for candidate in sample_many(sampler, scene, 300):
            (name,) = candidate.fields
            assert candidate.task == task and name != "bread"
            assert (name in present) == (candidate.answer == if_present), name
            answers[task, candidate.answer] += 1
            if name not in present:
                kind = name.split()[-1]
                assert (kind, "circle" in present) != ("oval", True)
                near += any(word in name for one in scene.shapes for word in (one.color, one.name))
                if scene is not SHAPES:
                    assert not any(are_near(name, one.name) for one in scene.icons)
    total = answers.total()
    assert all(0.4 * total / 2 < n < 0.6 * total / 2 for n in answers.values())
    assert near > 0.08 * total or scene is ICONS


def test_absent_things_share_color_or_kind_with_what_is_there() -> None:
    absent = identity.absent_kinds(SHAPES)
    assert "oval" not in absent and "rectangle" not in absent and "circle" not in absent
    assert {"star", "heart", "hexagon"} <= set(absent)
    names = identity.absent_names(Random(0), ICONS, 12)
    assert len(set(names)) == 12
    assert not any(are_near(a, b) for a in names for b in (*names, "guitar", "owl") if a != b)


def test_one_of_four_names_is_present() -> None:
    positions: Counter[int] = Counter()
    for scene in (SHAPES, MIXED, ICONS):
        present = {name for one in scene.objects for name in (one.phrase, one.name)}
        for candidate in sample_many(identity.ask_choice, scene, 100):
            bare = [f.removeprefix("a ").removeprefix("an ") for f in candidate.fields]
            assert [name for name in bare if name in present] == [candidate.answer]
            assert len(set(bare)) == 4
            positions[bare.index(candidate.answer)] += 1
    assert min(positions.values()) > 50


def test_the_background_has_a_color_or_is_clearly_light_or_dark() -> None:
    def answers(ground: Ground, color: str = "") -> set[str]:
        scene = replace(SHAPES, picture=replace(SHAPES.picture, ground=ground), ground_color=color)
        return {c.answer for c in sample_many(identity.ask_background, scene, 30)}

    assert answers(Ground(rgb=(255, 255, 255)), "white") == {"white", "light"}
    assert answers(Ground(rgb=(0, 0, 255)), "blue") == {"blue"}
    assert answers(Ground(rgb=(30, 40, 20))) == {"dark"}
    assert answers(Ground(kind="checks", rgb=(230, 230, 230), rgb2=(210, 210, 210))) == {"light"}
    assert answers(Ground(kind="checks", rgb=(230, 230, 230), rgb2=(150, 150, 150))) == set()
