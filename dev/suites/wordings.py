"""Sampling of the frozen suite `wordings`: python -m dev.suites.wordings.

The same questions about the same pictures, in patterns of training and in others: "trained/0017"
and "held_out/0017" have one picture and one answer. Pictures are those of nano's synthetic data,
so that only the wording is new. `held_out_patterns` returns the patterns that training must avoid;
`find_held_out_pattern` finds them in questions, however these are typed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, cycle
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from dev.suites.wording_patterns import (
    TASKS,
    fill_pattern,
    held_out_sentences,
    informal_questions,
    negated_questions,
    normalize_wording,
    reading_questions,
    trained_patterns,
)
from qwen2vl.eval.suites.frozen_suite import (
    FrozenHeader,
    FrozenItem,
    Part,
    open_frozen_suite,
    write_frozen_suite,
)
from qwen2vl.synth import Mixture, Question, sample
from qwen2vl.synth.fonts import BUNDLED_FAMILIES
from qwen2vl.synth.scenes import overlap, unique_phrases
from qwen2vl.synth.spec import Box, Picture, Scene
from qwen2vl.synth.strings import load_words
from qwen2vl.synth.wordings import wordings_of

__all__ = [
    "NUM_LINES",
    "QUOTAS",
    "SEED",
    "TYPING",
    "Pair",
    "draw_lines",
    "draw_pairs",
    "find_held_out_pattern",
    "freeze",
    "held_out_patterns",
]

SEED = 20250118
FILE = FROZEN / "wordings.jsonl"
NUM_LINES = 120
SCENES = Mixture(weights={"shapes": 1.0}, split="held_out", canvas=(84, 224), textured_share=0.1)
LINES = Mixture(
    weights={"text": 1.0},
    split="held_out",
    fonts="bundled",
    text_length=(3, 16),
    random_share=0.0,  # what a random string says may be unclear: 0 or O
    font_size=(16, 40),
)

# Task -> number of pairs, and how many of them may have the same answer.
QUOTAS: Mapping[str, tuple[int, int]] = {
    "name_shape": (144, 24),
    "color": (136, 17),
    "color_of_kind": (112, 14),
    "count_all": (95, 19),
    "count_kind": (95, 19),
    "exists": (100, 50),
    "position": (100, 20),
    "left_or_right": (104, 52),
    "describe": (114, 3),
}
MAX_SHAPES = 2  # but where shapes are counted; the file is to stay below 1 MB
INTERVAL = 9  # of the pairs of one answer that the small parts have
_GAP = 3  # pixels between shapes
_OFF_AXIS = 0.12  # of the canvas: beyond it a shape at the left may be called top left

_NUMBERS = ("zero", "one", "two", "three", "four", "five")
_ACCEPTED = {
    **{str(n): (str(n), word) for n, word in enumerate(_NUMBERS)},
    "0": ("0", "zero", "none"),
    "left": ("left", "on the left", "to the left", "left half"),
    "right": ("right", "on the right", "to the right", "right half"),
    "top": ("top", "at the top"),
    "bottom": ("bottom", "at the bottom"),
    "middle": (
        *("middle", "in the middle", "center"),
        "centre",  # codespell:ignore centre
        "in the center",
    ),
}
_OTHER_NAMES = {"cross": ("plus", "plus sign"), "diamond": ("rhombus",)}
_OPPOSITE = {"yes": ("no",), "no": ("yes",)}

# Casing and punctuation that training has not, applied to trained questions.
TYPING: Mapping[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "capitals without a final mark": lambda text: text.upper().rstrip("?."),
    "two final marks": lambda text: re.sub(r"\.$", "!!", re.sub(r"\?$", "??", text)),
    "a space before the final mark": lambda text: f"{text[:-1]} {text[-1]}",
}

# A name has up to three words, none of which connects a question's parts.
_WORD = r"(?!(?:the|an?|is|are|has|have|does|do|can|what|which|how|any)\b)\w+"
_NAME = f"{_WORD}(?: {_WORD}){{0,2}}"

_PARTS = {
    "trained": Part(note="wordings of the training data"),
    "held_out": Part(
        note="the same questions, in whole sentences that training lacks", compared_with="trained"
    ),
    "informal": Part(note="some of them, short and as people type", compared_with="trained"),
    "typed": Part(
        note="those in trained wordings, with other casing and punctuation",
        compared_with="trained",
    ),
    "negated": Part(
        note="is it absent? half of exists, with the opposite answers", compared_with="trained"
    ),
    "trained_read": Part(note="reading, wordings of the training data"),
    "held_out_read": Part(
        note="the same lines, in wordings that training lacks", compared_with="trained_read"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A question without its wording; each part has one for it."""

    number: int
    task: str
    name: str  # what it asks about: "red circle"; empty where there is one thing only
    answer: str
    picture: Picture


@cache
def held_out_patterns() -> Mapping[str, tuple[str, ...]]:
    """Return the patterns that training must avoid, of the frozen file: task -> patterns."""
    patterns: dict[str, tuple[str, ...]] = {}
    for listed in open_frozen_suite("wordings").header.held_out["patterns"]:
        task, pattern = listed.split(": ", 1)
        patterns[task] = (*patterns.get(task, ()), pattern)
    return patterns


def find_held_out_pattern(question: str) -> str | None:
    """Return the held-out pattern of a question, whatever its casing and punctuation.

    Args:
        question: with any name of up to three words, without article, in the place of "{0}".
    """
    normalized = normalize_wording(question)
    matches = (p for p, expression in _expressions() if expression.fullmatch(normalized))
    return next(matches, None)


def freeze(path: Path = FILE) -> None:
    """Write the file of the suite."""
    pairs, lines = draw_pairs(QUOTAS), draw_lines(NUM_LINES)
    few = _select_every(INTERVAL, pairs)
    exists = _select_every(2, [pair for pair in pairs if pair.task == "exists"])
    trained = _ask("trained", pairs, {task: trained_patterns(task) for task in TASKS})
    items = [
        *trained,
        *_ask("held_out", pairs, {task: held_out_sentences(task) for task in TASKS}),
        *_ask("informal", few, {task: informal_questions(task) for task in TASKS}),
        *_type(trained, {pair.number for pair in few}),
        *_ask("negated", exists, {"exists": negated_questions()}),
        *_ask("trained_read", lines, {"read": trained_patterns("read")}),
        *_ask("held_out_read", lines, {"read": reading_questions()}),
    ]
    write_frozen_suite(path, _header(), items)


def draw_pairs(quotas: Mapping[str, tuple[int, int]]) -> list[Pair]:
    """Sample questions about shapes until every quota is full, and shuffle them."""
    drawn: list[tuple[Question, str, Scene]] = []
    seen: set[tuple[str, str, Scene]] = set()
    num_of_task: Counter[str] = Counter()
    num_of_answer: Counter[tuple[str, str]] = Counter()
    index = 0
    while any(num_of_task[task] < count for task, (count, _) in quotas.items()):
        spec = sample(SEED, index, SCENES)
        index += 1
        (question,), (scene,) = spec.questions, spec.pictures
        count, max_same_answer = quotas.get(question.task, (0, 0))
        key = (question.task, question.answer)
        if num_of_task[question.task] >= count or num_of_answer[key] >= max_same_answer:
            continue
        assert isinstance(scene, Scene), "shapes are scenes"
        name = _asked_name(question)
        if _is_clear(scene, question.task, name) and (*key, scene) not in seen:
            drawn.append((question, name, scene))
            seen.add((*key, scene))
            num_of_task[question.task] += 1
            num_of_answer[key] += 1
    Random(SEED).shuffle(drawn)
    return [
        Pair(number=number, task=question.task, name=name, answer=question.answer, picture=scene)
        for number, (question, name, scene) in enumerate(drawn)
    ]


def draw_lines(count: int) -> list[Pair]:
    """Sample lines of whole words and numbers, all different."""
    lines: dict[str, Picture] = {}
    index = 0
    while len(lines) < count:
        spec = sample(SEED, index, LINES)
        index += 1
        (question,), (line,) = spec.questions, spec.pictures
        if _is_whole(question.answer):
            lines.setdefault(question.answer, line)
    return [
        Pair(number=number, task="read", name="", answer=text, picture=line)
        for number, (text, line) in enumerate(lines.items())
    ]


def _asked_name(question: Question) -> str:
    """Return the name in a question of the held-out split; empty if it has none."""
    task = "count_some" if question.task == "count_kind" else question.task
    text = question.text.replace(" an o", " a o")
    for wording in wordings_of(task, "held_out"):
        expression = re.escape(wording).replace(r"\{0\}", r"(\w+(?: \w+)?)")
        if found := re.fullmatch(expression, text):
            return found[1] if found.groups() else ""
    raise AssertionError(f"no held-out wording of {task} fits {text}")


def _is_clear(scene: Scene, task: str, name: str) -> bool:
    """Return whether shapes are few and apart, and the one that is asked for is in no corner."""
    if not task.startswith("count") and len(scene.shapes) > MAX_SHAPES:
        return False
    if any(overlap(_enlarge(a.box), b.box) for a, b in combinations(scene.shapes, 2)):
        return False
    if task != "position":
        return True
    shape = scene.shapes[0] if name == "shape" else unique_phrases(scene)[name]
    x, y = shape.center
    return min(abs(x / scene.width - 0.5), abs(y / scene.height - 0.5)) <= _OFF_AXIS


def _enlarge(box: Box) -> Box:
    x1, y1, x2, y2 = box
    return (x1 - _GAP, y1 - _GAP, x2 + _GAP, y2 + _GAP)


def _is_whole(text: str) -> bool:
    """Return whether a text ends with a word or number, of which nothing was cut off."""
    return text[-1].isalnum() and set(re.findall("[a-z]+", text.lower())) <= set(load_words())


def _select_every(interval: int, pairs: Sequence[Pair]) -> list[Pair]:
    """Select one in `interval` pairs of each task and answer, in the order of the pairs."""
    groups: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        # Descriptions are nearly all different.
        groups[pair.task, "" if pair.task == "describe" else pair.answer].append(pair)
    selected = [pair for group in groups.values() for pair in group[::interval]]
    return sorted(selected, key=lambda pair: pair.number)


def _ask(
    part: str, pairs: Sequence[Pair], patterns: Mapping[str, tuple[str, ...]]
) -> list[FrozenItem]:
    """Word questions in patterns of their task, each of which is used equally often."""
    rng = Random(f"{SEED}/{part}")
    order: dict[str, Iterator[str]] = {
        task: cycle(rng.sample(listed, len(listed))) for task, listed in patterns.items()
    }
    return [
        FrozenItem(
            id=f"{part}/{pair.number:04d}",
            part=part,
            kind=pair.task,
            question=fill_pattern(next(order[pair.task]), pair.name),
            answers=_OPPOSITE[pair.answer] if part == "negated" else _accepted(pair),
            metric="edit_distance" if pair.task == "read" else "exact_match",
            pictures=(pair.picture,),
        )
        for pair in pairs
    ]


def _type(trained: Sequence[FrozenItem], numbers: set[int]) -> list[FrozenItem]:
    """Ask trained questions again, typed in other ways."""
    selected = [item for item in trained if int(item.id.split("/")[1]) in numbers]
    return [
        FrozenItem(
            id=f"typed/{item.id.split('/')[1]}",
            part="typed",
            kind=item.kind,
            question=typing(item.question),
            answers=item.answers,
            pictures=item.pictures,
        )
        for item, typing in zip(selected, cycle(TYPING.values()), strict=False)
    ]


def _accepted(pair: Pair) -> tuple[str, ...]:
    """Return the answers that are correct, the shortest of them first."""
    if pair.task in ("name_shape", "describe"):
        *color, kind = pair.answer.split()
        return tuple(" ".join((*color, name)) for name in (kind, *_OTHER_NAMES.get(kind, ())))
    if pair.task == "read":
        return (pair.answer,)
    return _ACCEPTED.get(pair.answer, (pair.answer,))


def _header() -> FrozenHeader:
    patterns = [
        f"{task}: {pattern}"
        for task in TASKS
        for pattern in (*held_out_sentences(task), *informal_questions(task))
    ]
    patterns += [f"exists_negated: {pattern}" for pattern in negated_questions()]
    patterns += [f"read: {pattern}" for pattern in reading_questions()]
    return FrozenHeader(
        suite="wordings",
        parts=_PARTS,
        held_out={
            "patterns": tuple(patterns),
            "typing": tuple(TYPING),
            "fonts": tuple(BUNDLED_FAMILIES),
        },
    )


@cache
def _expressions() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (pattern, re.compile(normalize_wording(pattern).replace("{0}", _NAME)))
        for patterns in held_out_patterns().values()
        for pattern in patterns
    )


if __name__ == "__main__":
    freeze()
