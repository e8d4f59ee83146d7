"""Task family `refusals`: questions that the picture answers, and as many that it does not.

What a picture does not show is answered by one sentence, REFUSAL. The wordings do not tell which
it is: a scene has drafts of each task with and without an answer, and a task is chosen before it is
decided which of them is asked. Whether something is there, and how many, always has an answer: "no"
and "0". Without a picture the answer is NO_PICTURE or, if none is meant, ONLY_PICTURES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import NamedTuple

from qwen2vl.synth.canvas import degrade
from qwen2vl.synth.families.text_only import SMALL_TALK
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.refusals.drafts import NO_PICTURE, ONLY_PICTURES, REFUSAL, Draft, Scene
from qwen2vl.synth.refusals.facts import sample_facts, sample_no_picture, sample_unseen
from qwen2vl.synth.refusals.shapes import (
    sample_numbers,
    sample_pattern,
    sample_row,
    sample_shapes,
    sample_shapes_on_photo,
)
from qwen2vl.synth.refusals.subjects import (
    sample_blank,
    sample_categories,
    sample_noise,
    sample_photo,
)
from qwen2vl.synth.refusals.things import sample_stickers, sample_things, sample_words
from qwen2vl.synth.spec import FamilySample, Mixture, Question
from qwen2vl.synth.wordings import load_wordings, sample_question_text

__all__ = ["KINDS", "NO_PICTURE", "ONLY_PICTURES", "REFUSAL", "SceneKind", "sample"]

_ALWAYS_SHARE = 0.25  # of the questions: whether something is there, and how many
_THERE_SHARE = 0.65  # of these, if something is there; the others are answered by "no" or "0"
_REFUSED_SHARE = 0.5  # of the others
_TALK_SHARE = 0.02  # of the conversations end with small talk
_SHARED_SHARE = 0.4  # of the questions are worded as by the families that always have an answer

_ALWAYS_ANSWERED = ("asked_exists", "asked_count")  # at most one of these in a conversation
# Task -> the task of another family that asks the same.
_SHARED_WORDINGS = {
    "asked_color": "color_of_kind",
    "asked_shape_of_color": "name_shape_of_color",
    "asked_side": "left_or_right",
    "asked_level": "top_or_bottom",
    "asked_larger": "larger",
    "asked_exists": "exists",
    "asked_count": "count_some",
    "asked_box": "find",
    "asked_object": "named_open",
    "asked_text": "read",
}
_ALWAYS_SHARED = "asked_text"  # has no wordings of its own


class SceneKind(NamedTuple):
    """One kind of scenes: its share of the family, and its function."""

    share: float
    sample: Callable[[Random, Mixture], Scene]


KINDS: Mapping[str, SceneKind] = MappingProxyType(
    {
        "shapes": SceneKind(12, sample_shapes),
        "things": SceneKind(12, sample_things),
        "row": SceneKind(3, sample_row),
        "pattern": SceneKind(4, sample_pattern),
        "numbers": SceneKind(6, sample_numbers),
        "words": SceneKind(6, sample_words),
        "blank": SceneKind(12, sample_blank),
        "noise": SceneKind(9, sample_noise),
        "photo": SceneKind(5, sample_photo),
        "shapes_on_photo": SceneKind(8, sample_shapes_on_photo),
        "stickers": SceneKind(5, sample_stickers),
        "categories": SceneKind(13, sample_categories),
        "facts": SceneKind(11, sample_facts),
        "unseen": SceneKind(3, sample_unseen),
        "no_picture": SceneKind(3, sample_no_picture),
    }
)


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a picture and questions about it, of which somewhat less than half have no answer."""
    (kind,) = rng.choices(list(KINDS), [kind.share for kind in KINDS.values()])
    scene = KINDS[kind].sample(rng, mixture)
    questions = [_word(rng, mixture, draft) for draft in _choose(rng, mixture, scene)]
    if rng.random() < _TALK_SHARE:
        topic = rng.choice(("what_can_you_do", "who_are_you", "thanks"))
        text = sample_question_text(rng, topic, mixture.split)
        questions.append(Question(task=topic, text=text, answer=SMALL_TALK[topic]))
    pictures = () if scene.picture is None else (degrade(rng, scene.picture, mixture),)
    return FamilySample(tuple(questions), pictures)


def _choose(rng: Random, mixture: Mixture, scene: Scene) -> list[Draft]:
    """Choose drafts about different things: first a task, then whether it has an answer.

    Only tasks are chosen of which there are drafts with and without an answer, besides one whether
    or how often something is there, so that no wording is refused more often than it is answered.
    """
    chosen: list[Draft] = [scene.first] if scene.first else []
    drafts = scene.drafts
    while len(chosen) < mixture.max_questions:
        used = {name for draft in chosen for name in _subjects(draft)}
        drafts = [draft for draft in drafts if used.isdisjoint(_subjects(draft))]
        by_task: dict[str, tuple[list[Draft], list[Draft]]] = {}
        for draft in drafts:
            by_task.setdefault(draft.task, ([], []))[draft.answer == REFUSAL].append(draft)
        tasks = [task for task, (answered, refused) in by_task.items() if answered and refused]
        if not any(draft.task in _ALWAYS_ANSWERED for draft in chosen):
            always = [task for task in by_task if task in _ALWAYS_ANSWERED]
            tasks = always if always and (not tasks or rng.random() < _ALWAYS_SHARE) else tasks
        if not tasks and (chosen or not by_task):
            break
        task = rng.choice(tasks or list(by_task))
        answered, refused = by_task[task]
        is_refused = not answered or (bool(refused) and rng.random() < _REFUSED_SHARE)
        fitting = refused if is_refused else _fit_presence(rng, answered, is_first=not chosen)
        if not fitting:
            break
        chosen.append(rng.choice(fitting))
    return rng.sample(chosen, len(chosen))


def _fit_presence(rng: Random, drafts: list[Draft], *, is_first: bool) -> list[Draft]:
    """Keep those of one answer, "no" and "0" or the others, so that no answer is frequent."""
    if drafts[0].task not in _ALWAYS_ANSWERED:
        return drafts
    is_there = rng.random() < _THERE_SHARE
    fitting = [d for d in drafts if (d.answer not in ("no", "0")) == is_there]
    return fitting or (drafts if is_first else [])


def _subjects(draft: Draft) -> tuple[str, ...]:
    return draft.about or (draft.task,)


def _word(rng: Random, mixture: Mixture, draft: Draft) -> Question:
    task = draft.task
    shared = _SHARED_WORDINGS.get(task)
    if shared and (task == _ALWAYS_SHARED or rng.random() < _SHARED_SHARE):
        task = shared
    if task in load_wordings():
        text = sample_question_text(rng, task, mixture.split, *draft.fields, article=True)
    else:
        held_out = mixture.split == "held_out"
        text = word_question(rng, task, *draft.fields, held_out=held_out)
    return Question(
        task=draft.task, text=text, answer=draft.answer, box=draft.box, choices=draft.choices
    )
