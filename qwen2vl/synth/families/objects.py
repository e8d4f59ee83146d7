"""Task family `objects`: scenes of one to six shapes and icons on pictures of any size.

Scenes of shapes only, of icons only and of both have questions about names, colors, presence,
numbers, places, sizes and boxes. Some scenes have a word among the objects, which no question is
about. The questions are those of synth/object_questions, sampled with the weights of this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

from qwen2vl.synth.canvas import degrade, sample_canvas
from qwen2vl.synth.colors import contrast, sample_color
from qwen2vl.synth.compositing.layers import Composite, Ground, Text
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.families.text import sample_font
from qwen2vl.synth.object_questions import boxes, comparisons, counting, identity, lists, places
from qwen2vl.synth.object_questions.scene import ObjectScene, QuestionSampler, choose_questions
from qwen2vl.synth.objects import SceneObject, sample_objects, visible_colors
from qwen2vl.synth.scenes import overlap
from qwen2vl.synth.spec import Box, FamilySample, Mixture
from qwen2vl.synth.strings import load_words

__all__ = ["MAX_OBJECTS", "sample", "sample_scene"]

MAX_OBJECTS = counting.MAX_OBJECTS

_NUMBERS = {1: 30, 2: 16, 3: 14, 4: 13, 5: 13, 6: 14}  # of objects -> weight
_ICON_SHARES = {0.0: 45, 1.0: 22, 0.5: 33}  # share of icons in a scene -> weight
_FEW_KINDS_SHARE = 0.5  # of the scenes of three objects or more
_COLORED_SHARE = 0.12  # of the backgrounds, which have a named color
_STRONG_SHARE = 0.2  # of the textured backgrounds, whose colors differ strongly
_TEXT_SHARE = 0.1  # of the scenes of two objects or more
_MIN_TEXT_CONTRAST = 3.0

# Sampler -> weight. Those that a scene does not allow are skipped.
_SAMPLERS: Mapping[QuestionSampler, float] = {
    identity.ask_name: 14.0,
    identity.ask_description: 3.0,
    identity.ask_color: 10.0,
    identity.ask_shape_of_color: 1.2,
    identity.ask_color_of_kind: 1.5,
    identity.ask_beside_shapes: 3.0,
    identity.ask_is_color: 0.7,
    identity.ask_is_kind: 0.7,
    identity.ask_exists: 2.5,
    identity.ask_lacks: 1.2,
    identity.ask_choice: 1.5,
    identity.ask_background: 0.12,
    counting.ask_count_all: 1.5,
    counting.ask_count_some: 5.0,
    places.ask_position: 1.0,
    places.ask_half: 1.0,
    places.ask_what_at: 1.5,
    places.ask_outermost: 0.7,
    comparisons.ask_size: 0.8,
    comparisons.ask_is_larger: 0.4,
    comparisons.ask_largest: 0.8,
    comparisons.ask_further: 0.8,
    comparisons.ask_closer_to_side: 0.6,
    comparisons.ask_relation: 0.7,
    comparisons.ask_is_relation: 0.8,
    boxes.ask_box: 2.0,
    boxes.ask_name_of_box: 0.8,
}
_LIST_SAMPLERS: Mapping[QuestionSampler, float] = {
    lists.ask_list: 1.0,
    lists.ask_color_of_each: 1.0,
    lists.ask_kind_of_each: 1.0,
    lists.ask_count_of_each: 1.0,
    boxes.ask_boxes_of_each: 2.0,
    boxes.ask_boxes_of_all: 1.0,
}


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a scene and questions about it.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
        FontError: a font of the mixture is not installed.
    """
    scene = sample_scene(rng, mixture)
    if rng.random() < mixture.list_share:
        listed = choose_questions(rng, scene, _LIST_SAMPLERS, 1)
        if listed:
            return FamilySample(tuple(listed), (scene.picture,))
    questions = choose_questions(rng, scene, _SAMPLERS, mixture.max_questions)
    return FamilySample(tuple(questions), (scene.picture,))


def sample_scene(rng: Random, mixture: Mixture) -> ObjectScene:
    """Sample a picture with at least one object.

    Raises:
        DatasetNotFoundError, ConfigError, FontError: as `sample` does.
    """
    canvas = sample_canvas(rng, mixture, strong=_STRONG_SHARE)
    color = ""
    if canvas.ground.kind == "plain":
        canvas, color = _color_ground(rng, canvas)
    (count,) = rng.choices(list(_NUMBERS), list(_NUMBERS.values()))
    (icons,) = rng.choices(list(_ICON_SHARES), list(_ICON_SHARES.values()))
    few_kinds = count > 2 and rng.random() < _FEW_KINDS_SHARE
    objects = sample_objects(rng, canvas, count, icons=icons, few_kinds=few_kinds)
    text = None
    if len(objects) > 1 and rng.random() < _TEXT_SHARE:
        text = _sample_text(rng, mixture, canvas, objects)
    layers = [*(one.layer for one in objects), *([text[0]] if text else [])]
    picture = degrade(rng, replace(canvas, layers=tuple(layers)), mixture)
    return ObjectScene(
        picture=picture,
        objects=tuple(objects),
        texts=(text[1],) if text else (),
        ground_color=color,
        held_out=mixture.split == "held_out",
    )


def _color_ground(rng: Random, canvas: Composite) -> tuple[Composite, str]:
    """Give some backgrounds a named color, and return the name; pure white and black have one."""
    if rng.random() < _COLORED_SHARE:
        color = rng.choice(identity.ALL_COLORS)
        return replace(canvas, ground=Ground(rgb=sample_color(rng, color))), color
    return canvas, {(255, 255, 255): "white", (0, 0, 0): "black"}.get(canvas.ground.rgb, "")


def _sample_text(
    rng: Random, mixture: Mixture, canvas: Composite, objects: list[SceneObject]
) -> tuple[Text, Box] | None:
    """Sample a word that touches no object, with its box; None without space."""
    size = round(min(canvas.width, canvas.height) * rng.uniform(0.08, 0.25))
    colors = [sample_color(rng, name) for name in visible_colors(canvas.ground)]
    colors = [rgb for rgb in colors if contrast(rgb, canvas.ground.rgb) >= _MIN_TEXT_CONTRAST]
    if size < 10 or not colors:
        return None
    word, font = rng.choice(load_words()), sample_font(rng, mixture)
    left, top, right, bottom = text_extent(word, font, size)
    if right - left > canvas.width or bottom - top > canvas.height:
        return None
    for _ in range(8):
        x = rng.randint(0, canvas.width - (right - left))
        y = rng.randint(0, canvas.height - (bottom - top))
        box = (x, y, x + right - left, y + bottom - top)
        if not any(overlap(box, one.box) for one in objects):
            layer = Text(
                text=word, font=font, size=size, x=x - left, y=y - top, rgb=rng.choice(colors)
            )
            return layer, box
    return None
