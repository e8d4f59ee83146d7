"""Questions about names and colors, about what is present or absent, and about the background.

What is called absent is absent beyond doubt: where there are circles, nobody is asked for ovals.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from qwen2vl.synth.colors import COLORS, MORE_COLORS, is_light
from qwen2vl.synth.compositing.icon_sampling import are_near, sample_other_names
from qwen2vl.synth.object_questions.names import is_countable, with_article
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene, unique_values
from qwen2vl.synth.objects import SceneObject, visible_colors
from qwen2vl.synth.shape_masks import MORE_SHAPE_KINDS, SHAPE_KINDS

__all__ = [
    "ALL_COLORS",
    "ALL_KINDS",
    "absent_kinds",
    "absent_names",
    "ask_background",
    "ask_beside_shapes",
    "ask_choice",
    "ask_color",
    "ask_color_of_kind",
    "ask_description",
    "ask_exists",
    "ask_is_color",
    "ask_is_kind",
    "ask_lacks",
    "ask_name",
    "ask_shape_of_color",
]

ALL_KINDS = (*SHAPE_KINDS, *MORE_SHAPE_KINDS)
ALL_COLORS = (*COLORS, *MORE_COLORS)
# Kind -> a kind that it is, too; whether there is one of these is not asked.
_IS_ALSO = {"circle": "oval", "square": "rectangle"}
_NEAR_SHARE = 0.6  # of the absent phrases, which resemble what is present
_OTHER_SORT = 0.1  # share of the questions about icons in pictures of shapes, and the reverse
_LIGHT, _DARK = 200, 60  # channels of a background that is clearly light or dark


def ask_name(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the name of the only object: "circle", "guitar"."""
    if len(scene.objects) != 1:
        return None
    one = scene.objects[0]
    task, choices = ("name_shape", len(ALL_KINDS)) if one.color else ("named_open", 0)
    return Candidate(task=task, answer=one.name, asks={"0.kind"}, choices=choices)


def ask_description(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for color and kind of the only shape."""
    if len(scene.objects) != 1 or not scene.shapes:
        return None
    choices = len(ALL_KINDS) * len(visible_colors(scene.picture.ground))
    answer = scene.shapes[0].phrase
    return Candidate(task="describe", answer=answer, asks={"0.kind", "0.color"}, choices=choices)


def ask_color(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the color of the only shape."""
    if len(scene.objects) != 1 or not scene.shapes:
        return None
    choices = len(visible_colors(scene.picture.ground))
    answer = scene.shapes[0].color
    return Candidate(task="color", answer=answer, asks={"0.color"}, choices=choices)


def ask_shape_of_color(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the kind of the only shape of a color, in a picture without icons."""
    unique = unique_values([one.color for one in scene.shapes])
    if scene.icons or not unique:
        return None
    color = rng.choice(unique)
    (one,) = (one for one in scene.shapes if one.color == color)
    return Candidate(
        task="name_shape_of_color",
        fields=(color,),
        answer=one.name,
        asks=scene.facts(one, "kind"),
        reveals=scene.facts(one, "color"),
        choices=len(ALL_KINDS),
    )


def ask_color_of_kind(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the color of the only shape of a kind."""
    unique = unique_values([one.name for one in scene.shapes])
    if not unique:
        return None
    kind = rng.choice(unique)
    (one,) = (one for one in scene.shapes if one.name == kind)
    return Candidate(
        task="color_of_kind",
        fields=(kind,),
        answer=one.color,
        asks=scene.facts(one, "color"),
        reveals=scene.facts(one, "kind"),
        choices=len(visible_colors(scene.picture.ground)),
    )


def ask_beside_shapes(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the name of the only icon among shapes."""
    if len(scene.icons) != 1 or not scene.shapes:
        return None
    (one,) = scene.icons
    return Candidate(task="object_beside_shapes", answer=one.name, asks=scene.facts(one, "kind"))


def ask_is_color(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether a shape, called by its kind, has a color."""
    named = [
        (name, one)
        for name, one in scene.names.items()
        if one.color and name in (one.name, "shape")
    ]
    if not named:
        return None
    name, one = rng.choice(named)
    others = [color for color in visible_colors(scene.picture.ground) if color != one.color]
    return _ask_is(rng, scene, "is_color", name, one.color, rng.choice(others))


def ask_is_kind(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether a shape, called by its color, is of a kind."""
    named = [
        (name, one)
        for name, one in scene.names.items()
        if one.color and name in (f"{one.color} shape", "shape")
    ]
    if not named:
        return None
    name, one = rng.choice(named)
    others = [kind for kind in ALL_KINDS if kind not in (one.name, _IS_ALSO.get(one.name))]
    return _ask_is(rng, scene, "is_kind", name, one.name, rng.choice(others))


def ask_exists(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether something is there; in half of the cases it is."""
    return _ask_presence(rng, scene, "exists", "yes", "no")


def ask_lacks(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether something is absent; in half of the cases it is."""
    return _ask_presence(rng, scene, "lacks", "no", "yes")


def ask_choice(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask which of four names is that of an object."""
    one = rng.choice(scene.objects)
    facts = ("kind",)
    if not one.color:
        others, name = absent_names(rng, scene, 3), one.name
    elif rng.random() < 0.4:
        others, name = absent_kinds(scene), one.name
    else:
        others, name, facts = _absent_phrases(rng, scene), one.phrase, ("kind", "color")
    if len(others) < 3:
        return None
    listed = [name, *rng.sample(others, 3)]
    rng.shuffle(listed)
    # Only if all have one: the odd one out would be the answer.
    has_articles = rng.random() < 0.5 and all(is_countable(other) for other in listed)
    fields = [with_article(other) if has_articles else other for other in listed]
    return Candidate(
        task="which_of",
        fields=tuple(fields),
        answer=name,
        asks=scene.facts(one, *facts),
        choices=4,
    )


def ask_background(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the color of the background, or whether it is light or dark."""
    ground = scene.picture.ground
    if scene.ground_color and rng.random() < 0.7:
        task, answer, choices = "background_color", scene.ground_color, len(ALL_COLORS)
    else:
        ends = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
        channels = [channel for end in ends for channel in end]
        if max(channels) > _DARK and min(channels) < _LIGHT:
            return None
        task, answer, choices = "background_shade", ("dark", "light")[is_light(ground.rgb)], 2
    return Candidate(task=task, answer=answer, asks={"background"}, choices=choices)


def absent_kinds(scene: ObjectScene) -> list[str]:
    """Return the kinds of which there is clearly none."""
    present = {one.name for one in scene.shapes}
    present |= {_IS_ALSO[kind] for kind in present if kind in _IS_ALSO}
    return [kind for kind in ALL_KINDS if kind not in present]


def absent_names(rng: Random, scene: ObjectScene, count: int) -> list[str]:
    """Sample names of icons, with no word in common with each other and those that are present."""
    shown = [one.name for one in scene.icons] or ["star"]
    names: list[str] = []
    while len(names) < count:
        (name,) = sample_other_names(rng, [*shown, *names], 1)
        if is_countable(name) and not any(are_near(name, kind) for kind in ALL_KINDS):
            names.append(name)
    return names


def _ask_is(
    rng: Random, scene: ObjectScene, task: str, name: str, true: str, false: str
) -> Candidate:
    value, answer = rng.choice(((true, "yes"), (false, "no")))
    one = scene.names[name]
    return Candidate(
        task=task,
        fields=(name, value),
        answer=answer,
        asks=scene.facts(one, task.removeprefix("is_")),
        reveals=scene.facts_of_name(name),
        choices=2,
    )


def _ask_presence(
    rng: Random, scene: ObjectScene, task: str, if_present: str, if_absent: str
) -> Candidate | None:
    is_icon = rng.random() < len(scene.icons) / len(scene.objects)
    present = _present_names(scene.icons if is_icon else scene.shapes)
    if not present:
        return None
    name = rng.choice(rng.choice(present))
    # Who knows the names of all objects knows what is present.
    asks = scene.facts_of_name(name) if name in scene.names else {f"has {name}"}
    if rng.random() < 0.5:
        return Candidate(
            task=task,
            fields=(name,),
            answer=if_present,
            asks=asks,
            reveals={f"has {name}"},
            choices=2,
        )
    if is_icon != (rng.random() < _OTHER_SORT):
        (name,) = absent_names(rng, scene, 1)
    else:
        name = _sample_absent_shape(rng, scene)
    # Left out if what is present would be, so that neither answer is more frequent.
    return Candidate(
        task=task, fields=(name,), answer=if_absent, asks=asks, result=f"has {name}", choices=2
    )


def _present_names(objects: Sequence[SceneObject]) -> list[list[str]]:
    """Return the names of each object; the full one of a shape twice."""
    return [
        [one.phrase, one.phrase, one.name, f"{one.color} shape"] if one.color else [one.name]
        for one in objects
        if is_countable(one.name)
    ]


def _sample_absent_shape(rng: Random, scene: ObjectScene) -> str:
    """Sample a phrase, a kind or a color of which there is none, as often as the present ones."""
    how = rng.randrange(4)
    if how == 0:
        return rng.choice(absent_kinds(scene))
    if how == 1:
        colors = {one.color for one in scene.shapes}
        return f"{rng.choice([color for color in ALL_COLORS if color not in colors])} shape"
    return rng.choice(_absent_phrases(rng, scene))


def _absent_phrases(rng: Random, scene: ObjectScene) -> list[str]:
    """Return phrases of absent shapes; most share color or kind with one of the picture."""
    present = {one.phrase for one in scene.shapes}
    kinds = [*absent_kinds(scene), *dict.fromkeys(one.name for one in scene.shapes)]
    if scene.shapes and rng.random() < _NEAR_SHARE:
        near = rng.choice(scene.shapes)
        phrases = [f"{near.color} {kind}" for kind in kinds]
        phrases += [f"{color} {near.name}" for color in ALL_COLORS]
    else:
        phrases = [f"{color} {kind}" for color in ALL_COLORS for kind in kinds]
    return [phrase for phrase in phrases if phrase not in present]
