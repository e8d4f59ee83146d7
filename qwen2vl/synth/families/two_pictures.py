"""Task family `two_pictures`: comparison of two images (same or different, more, which shows it).

Pairs are sampled so that yes and no, first and second are equally frequent: two single shapes that
share kind or color with probability 1/2, two scenes of several shapes, or two lines of text that
differ entirely or in one character.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import colors_on, sample_color
from qwen2vl.synth.families.text import sample_font, sample_text, write_line
from qwen2vl.synth.scenes import sample_scene
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import FamilySample, Line, Mixture, Question, Scene, Shape
from qwen2vl.synth.strings import DIGITS, LETTERS
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["sample"]

_MAX_SIDE = 140  # pixels; a pair has the vision tokens of two images
_MAX_TEXT = 8  # characters; reading long text is trained by the family `text`
_ORDINALS = ("first", "second")
_DISTINCT = [c for c in LETTERS + DIGITS if c not in "CcIKklOoPpSsUuVvWwXxZz01"]

_QuestionSampler = Callable[[Random, tuple[Scene, Scene], str], Question | None]


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample two images and questions that compare them."""
    kind = rng.random()
    multi_answer = rng.random() < mixture.list_share
    if kind < 0.25:
        return _two_lines(rng, mixture, multi_answer)
    if kind < 0.65:
        scenes, tasks, compare = _two_shapes(rng, mixture), list(_SHAPE_SAMPLERS), _compare_shapes
    else:
        scenes, tasks, compare = _two_scenes(rng, mixture), list(_SCENE_SAMPLERS), _compare_numbers
    if multi_answer:
        return FamilySample((compare(rng, scenes, mixture.split),), scenes)
    rng.shuffle(tasks)
    asked = (task(rng, scenes, mixture.split) for task in tasks)
    questions = [question for question in asked if question is not None]
    return FamilySample(tuple(questions[: mixture.max_questions]), scenes)


def _two_lines(rng: Random, mixture: Mixture, multi_answer: bool) -> FamilySample:
    """Sample one text in two styles, or two different texts."""
    low, high = mixture.text_length
    short = replace(mixture, text_length=(min(low, _MAX_TEXT), min(high, _MAX_TEXT)))
    fonts = sample_font(rng, short), sample_font(rng, short)
    first = sample_text(rng, short, fonts[0])
    # `write_line` cuts text that is too wide; the second text is derived from the result.
    one = write_line(rng, short, first, fonts[0])
    same = rng.random() < 0.5
    second = one.text if same else _other_text(rng, short, one.text, fonts[1])
    two = write_line(rng, short, second, fonts[1])
    if same != (one.text == two.text):
        return _two_lines(rng, mixture, multi_answer)
    if multi_answer:
        compared = _compare(rng, mixture.split, (one.text, two.text), {"text": same})
        return FamilySample((compared,), (one, two))
    answer = "yes" if same else "no"
    text = sample_question_text(rng, "same_text", mixture.split)
    questions = [Question(task="same_text", text=text, answer=answer, choices=2)]
    questions.append(_read_one(rng, (one, two), mixture.split))
    rng.shuffle(questions)
    return FamilySample(tuple(questions[: mixture.max_questions]), (one, two))


def _other_text(rng: Random, mixture: Mixture, text: str, font: str) -> str:
    """Replace one character by a clearly different one, or the whole text."""
    if rng.random() < 0.3 and mixture.alphabet == "all":
        at = rng.randrange(len(text))
        new = rng.choice([c for c in _DISTINCT if c.lower() != text[at].lower()])
        return text[:at] + new + text[at + 1 :]
    other = text
    while other.lower() == text.lower():
        other = sample_text(rng, mixture, font)
    return other


def _read_one(rng: Random, lines: tuple[Line, Line], split: str) -> Question:
    which = rng.randrange(2)
    text = sample_question_text(rng, "read_one", split, _ORDINALS[which])
    return Question(task="read_one", text=text, answer=lines[which].text)


def _two_shapes(rng: Random, mixture: Mixture) -> tuple[Scene, Scene]:
    """Sample two scenes of one shape each that share kind, color, both or neither."""
    canvas = _canvas(mixture)
    scenes = [sample_scene(rng, mixture, count=1, canvas=canvas) for _ in _ORDINALS]
    colors = [c for c in colors_on(scenes[0].ground) if c in colors_on(scenes[1].ground)]
    first_color, other_color = rng.sample(colors, 2)
    first_kind, other_kind = rng.sample(SHAPE_KINDS, 2)
    second_color = first_color if rng.random() < 0.5 else other_color
    second_kind = first_kind if rng.random() < 0.5 else other_kind
    return (
        _with_shape(rng, scenes[0], first_kind, first_color),
        _with_shape(rng, scenes[1], second_kind, second_color),
    )


def _with_shape(rng: Random, scene: Scene, kind: str, color: str) -> Scene:
    box = scene.shapes[0].box
    shape = Shape(kind=kind, color=color, rgb=sample_color(rng, color), box=box)
    return replace(scene, shapes=(shape,))


def _two_scenes(rng: Random, mixture: Mixture) -> tuple[Scene, Scene]:
    """Sample two scenes of several shapes; in 40 % of the pairs the counts are drawn equal."""
    low, high = mixture.num_shapes
    counts = list(range(low, max(high, low + 1) + 1))
    first, other = rng.sample(counts, 2)
    second = first if rng.random() < 0.4 else other
    canvas = _canvas(mixture)
    return (
        sample_scene(rng, mixture, count=first, canvas=canvas),
        sample_scene(rng, mixture, count=second, canvas=canvas),
    )


def _canvas(mixture: Mixture) -> tuple[int, int]:
    low, high = mixture.canvas
    return low, max(low, min(high, _MAX_SIDE))


def _compare_shapes(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    one, two = (scene.shapes[0] for scene in scenes)
    same = {"color": one.color == two.color, "shape": one.kind == two.kind}
    return _compare(rng, split, (one.phrase, two.phrase), same)


def _compare_numbers(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    one, two = (len(scene.shapes) for scene in scenes)
    return _compare(rng, split, (str(one), str(two)), {"number": one == two})


def _compare(rng: Random, split: str, shown: tuple[str, str], same: dict[str, bool]) -> Question:
    """Ask for a description of both images and a verdict; the answer gives them in this order."""
    both = ", ".join(f"{ordinal}: {what}" for ordinal, what in zip(_ORDINALS, shown, strict=True))
    verdicts = [f"{name}: {'same' if holds else 'different'}" for name, holds in same.items()]
    task = f"compare_{next(reversed(same))}"
    return Question(
        task=task, text=sample_question_text(rng, task, split), answer=", ".join([both, *verdicts])
    )


def _same_shape(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    one, two = (scene.shapes[0] for scene in scenes)
    return _yes_or_no(rng, "same_shape", one.kind == two.kind, split)


def _same_color(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    one, two = (scene.shapes[0] for scene in scenes)
    return _yes_or_no(rng, "same_color", one.color == two.color, split)


def _same_number(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    one, two = (len(scene.shapes) for scene in scenes)
    return _yes_or_no(rng, "same_number", one == two, split)


def _yes_or_no(rng: Random, task: str, holds: bool, split: str) -> Question:
    text = sample_question_text(rng, task, split)
    return Question(task=task, text=text, answer="yes" if holds else "no", choices=2)


def _which_has_more(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question | None:
    one, two = (len(scene.shapes) for scene in scenes)
    if one == two:
        return None
    text = sample_question_text(rng, "which_has_more", split)
    return Question(
        task="which_has_more", text=text, answer=_ORDINALS[0 if one > two else 1], choices=2
    )


def _which_shows(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question | None:
    """Ask for a shape that only one of the two images has; which one is sampled first."""
    which = rng.randrange(2)
    here, there = ({shape.phrase for shape in s.shapes} for s in (scenes[which], scenes[1 - which]))
    only = sorted(here - there)
    if not only:
        return None
    phrase = rng.choice(only)
    text = sample_question_text(rng, "which_shows", split, phrase, article=True)
    return Question(task="which_shows", text=text, answer=_ORDINALS[which], choices=2)


def _color_of_one(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    which = rng.randrange(2)
    text = sample_question_text(rng, "color_of_one", split, _ORDINALS[which])
    return Question(task="color_of_one", text=text, answer=scenes[which].shapes[0].color)


def _shape_of_one(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    which = rng.randrange(2)
    text = sample_question_text(rng, "shape_of_one", split, _ORDINALS[which])
    return Question(task="shape_of_one", text=text, answer=scenes[which].shapes[0].kind)


def _count_in_one(rng: Random, scenes: tuple[Scene, Scene], split: str) -> Question:
    which = rng.randrange(2)
    text = sample_question_text(rng, "count_in_one", split, _ORDINALS[which])
    return Question(task="count_in_one", text=text, answer=str(len(scenes[which].shapes)))


_SHAPE_SAMPLERS: tuple[_QuestionSampler, ...] = (
    _same_shape,
    _same_color,
    _which_shows,
    _color_of_one,
    _shape_of_one,
)
_SCENE_SAMPLERS: tuple[_QuestionSampler, ...] = (
    _same_number,
    _which_has_more,
    _which_shows,
    _count_in_one,
)
