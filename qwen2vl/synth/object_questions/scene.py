"""Scenes as the question samplers see them, and the choice of questions about one.

Every question says what it asks for and what it reveals, as facts: "2.color" is the color of the
third object, "0.x" where the first one is. A question is left out if earlier ones of the same
conversation reveal all that it asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TypeVar

from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.object_questions.names import is_countable
from qwen2vl.synth.objects import SceneObject, unique_names
from qwen2vl.synth.spec import Box, Question

__all__ = [
    "Candidate",
    "ObjectScene",
    "QuestionSampler",
    "choose_balanced",
    "choose_questions",
    "unique_values",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A question that is not yet worded, and what it has to do with others."""

    task: str
    fields: tuple[str, ...] = ()  # of the wording
    answer: str
    asks: Iterable[str]  # facts from which the answer follows
    reveals: Iterable[str] = ()  # other facts, of its text or its answer
    # Of a comparison, which follows from what it asks for, but does not reveal that; and of the
    # absence of something.
    result: str = ""
    choices: int = 0
    box: Box | None = None
    wording: str = ""  # the task of the grammar, if it is another


@dataclass(frozen=True, kw_only=True)
class ObjectScene:
    """A picture with its objects."""

    picture: Composite
    objects: tuple[SceneObject, ...]
    texts: tuple[Box, ...] = ()  # boxes of text, which no question is about
    ground_color: str = ""  # its name, if the background has one
    held_out: bool = False  # whether questions use the wordings that are held out of training

    @cached_property
    def shapes(self) -> list[SceneObject]:
        """The objects that are geometric shapes."""
        return [one for one in self.objects if one.color]

    @cached_property
    def icons(self) -> list[SceneObject]:
        """The objects that are icons."""
        return [one for one in self.objects if not one.color]

    @cached_property
    def names(self) -> Mapping[str, SceneObject]:
        """Names for use in questions, each of which refers to one object; no uncountable ones."""
        named = {
            name: one for name, one in unique_names(self.objects).items() if is_countable(name)
        }
        if len(self.shapes) == 1:
            named["shape"] = self.shapes[0]
        if len(self.objects) == 1:
            named["object"] = self.objects[0]
        return named

    @cached_property
    def full_names(self) -> Mapping[str, SceneObject]:
        """The names of the objects' phrases alone: "red circle", "guitar"."""
        return {name: one for name, one in self.names.items() if name == one.phrase}

    @cached_property
    def _numbers(self) -> Mapping[int, int]:
        return {id(one): number for number, one in enumerate(self.objects)}

    def index(self, one: SceneObject) -> int:
        """Return the number of an object in facts."""
        return self._numbers[id(one)]

    def facts(self, one: SceneObject, *kinds: str) -> set[str]:
        """Return facts about one object: "2.color" for the kind "color"."""
        return {f"{self.index(one)}.{kind}" for kind in kinds}

    def facts_of_name(self, name: str) -> set[str]:
        """Return what a name of one object reveals."""
        one = self.names[name]
        facts = self.facts(one, "color") if one.color and one.color in name.split() else set()
        return facts | (self.facts(one, "kind") if name.endswith(one.name) else set())

    def offset(self, one: SceneObject) -> tuple[float, float]:
        """Return the position of the center, from -0.5 (left, top) to 0.5 (right, bottom)."""
        x, y = one.center
        return x / self.picture.width - 0.5, y / self.picture.height - 0.5

    def word(self, rng: Random, candidate: Candidate) -> Question:
        """Word a question."""
        task = candidate.wording or candidate.task
        return Question(
            task=candidate.task,
            text=word_question(rng, task, *candidate.fields, held_out=self.held_out),
            answer=candidate.answer,
            box=candidate.box,
            choices=candidate.choices,
        )


T = TypeVar("T")
QuestionSampler = Callable[[Random, ObjectScene], Candidate | None]


def choose_questions(
    rng: Random, scene: ObjectScene, samplers: Mapping[QuestionSampler, float], limit: int
) -> list[Question]:
    """Sample up to `limit` questions, none of which can be answered from the ones before.

    Args:
        rng: source of the choices.
        scene: with at least one object.
        samplers: with their weights; a weight above one may sample more than one question.
        limit: how many.
    """
    # Each weight is a rate: the first arrivals are asked.
    arrivals: list[tuple[float, QuestionSampler]] = []
    for sampler, weight in samplers.items():
        first = rng.expovariate(weight)
        arrivals.append((first, sampler))
        if weight > 1:
            arrivals.append((first + rng.expovariate(weight), sampler))
    questions: dict[str, Question] = {}
    known: set[str] = set()
    for _, sampler in sorted(arrivals, key=lambda arrival: arrival[0]):
        candidate = sampler(rng, scene)
        if candidate is None or candidate.result in known or known.issuperset(candidate.asks):
            continue
        question = scene.word(rng, candidate)
        questions.setdefault(question.text, question)
        known.update(candidate.reveals, [candidate.result] if candidate.result else candidate.asks)
        if len(questions) == limit:
            break
    return list(questions.values())


def choose_balanced(rng: Random, options: Iterable[tuple[T, str]]) -> tuple[T, str] | None:
    """Choose an answer, all with the same probability, then an option that has it."""
    by_answer: dict[str, list[T]] = {}
    for option, answer in options:
        by_answer.setdefault(answer, []).append(option)
    if not by_answer:
        return None
    answer = rng.choice(list(by_answer))
    return rng.choice(by_answer[answer]), answer


def unique_values(values: Sequence[str]) -> list[str]:
    """Return the values that occur once."""
    return [value for value, uses in Counter(values).items() if uses == 1]
