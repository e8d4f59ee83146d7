"""Tasks whose pictures are drawn when they are asked for: a Spec each, its question, its truth.

Besides the questions as they are, three twists of them: the same line on a canvas of another
shape, a clip with its frames out of order, and every question with another example's picture. The
last two are controls, which nobody can answer better than by guessing. It must not know which
suite it serves. Next room: mini.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import NamedTuple

from qwen2vl import grounding
from qwen2vl.eval.metrics import edit_distance, iou, normalize
from qwen2vl.eval.task import Messages, Result
from qwen2vl.synth import Question, Spec, render
from qwen2vl.synth.draw import ink_extent
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.spec import Line

__all__ = [
    "Case",
    "DrawnTask",
    "cases_of",
    "chances_of",
    "is_right",
    "on_canvas",
    "out_of_order",
    "with_wrong_pictures",
]

READ = "read"  # the one kind of question whose answer is judged letter by letter
MIN_IOU = 0.5  # overlap that finds a shape

_Corners = tuple[float, float, float, float]  # of a box, in shares of the picture's sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question to ask, and what it takes to judge the answer."""

    name: str
    spec: Spec  # as shown; has one question
    box: _Corners | None  # when the answer is a box, in the picture that the question is about
    chance: float  # how likely a guess is right

    @property
    def question(self) -> Question:
        """The question with its only right answer."""
        (question,) = self.spec.questions
        return question


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnTask:
    """Cases under one name. (Satisfies eval.task.Task.)"""

    name: str
    note: str
    cases: tuple[Case, ...]

    def examples(self) -> Sequence[Case]:
        """List the cases."""
        return self.cases

    def prompt(self, example: Case) -> Messages:
        """Draw the pictures and put the question."""
        pictures = tuple(
            _fitted(picture) if isinstance(picture, Line) else picture
            for picture in example.spec.pictures
        )
        return render(replace(example.spec, pictures=pictures)).prompt

    def score(self, example: Case, answer: str) -> Result:
        """Judge an answer: letter by letter, by overlap, or word by word."""
        question = example.question
        verdict = _judge(question, example.box, answer)
        return Result(
            name=f"{self.name}/{example.name}",
            kind=question.task,
            question=question.text,
            truth=question.answer,
            answer=answer,
            score=float(verdict.right),
            chance=example.chance,
            edits=verdict.edits,
            length=verdict.length,
        )

    def check_fonts(self) -> None:
        """Make sure that all pictures can be drawn; lines are written in judging fonts only.

        Raises:
            FontError: fonts are not installed; names the packages.
        """
        pictures = [picture for case in self.cases for picture in case.spec.pictures]
        if any(isinstance(picture, Line) for picture in pictures):
            files_of("judge")


def cases_of(specs: Sequence[Spec], chances: Sequence[float]) -> tuple[Case, ...]:
    """Number the specs of one section; each asks what it is asked, at its own size."""
    return tuple(
        Case(name=f"{number:03d}", spec=spec, box=_corners(spec), chance=chance)
        for number, (spec, chance) in enumerate(zip(specs, chances, strict=True))
    )


def chances_of(specs: Sequence[Spec]) -> list[float]:
    """Say for each question how often a guess would be right.

    That is the share of the truth among equally likely answers, or what one answer given to all
    questions of the same kind would get, whichever is more.
    """
    by_kind: dict[str, list[Spec]] = defaultdict(list)
    for spec in specs:
        by_kind[spec.questions[0].task].append(spec)
    best = {kind: _best_single_answer(group) for kind, group in by_kind.items()}
    questions = [spec.questions[0] for spec in specs]
    return [max(best[q.task], 1 / q.choices if q.choices else 0.0) for q in questions]


def is_right(spec: Spec, answer: str) -> bool:
    """Judge an answer to the one question of a spec as a suite would."""
    return _judge(spec.questions[0], _corners(spec), answer).right


def on_canvas(spec: Spec, aspect: float) -> Spec:
    """Put lines of text on canvases whose width / height is `aspect`.

    Nothing is stretched or cut: the canvas grows and the line takes a place on it by chance.
    """
    rng = Random(f"canvas/{spec.seed}/{spec.index}")
    pictures = tuple(
        _grown(picture, aspect, rng) if isinstance(picture, Line) else picture
        for picture in spec.pictures
    )
    return replace(spec, pictures=pictures)


def out_of_order(spec: Spec) -> Spec:
    """Shuffle the frames of a clip, into neither their order nor its reverse.

    An order and its reverse stay equally likely, so nothing is left of what came first.
    """
    rng = Random(f"shuffle/{spec.seed}/{spec.index}")
    forward = list(range(len(spec.pictures)))
    assert len(forward) > 2, "two frames have no third order"
    order = forward
    while order in (forward, forward[::-1]):
        order = rng.sample(forward, len(forward))
    return replace(spec, pictures=tuple(spec.pictures[i] for i in order))


def with_wrong_pictures(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Show with each question the pictures of the next one of the same kind."""
    by_kind: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_kind[case.question.task].append(case)
    donors = {
        case.name: donor
        for group in by_kind.values()
        for case, donor in zip(group, [*group[1:], group[0]], strict=True)
    }
    return tuple(
        replace(case, spec=replace(donors[case.name].spec, questions=case.spec.questions))
        for case in cases
    )


class _Verdict(NamedTuple):
    right: bool
    edits: int | None = None
    length: int | None = None


def _judge(question: Question, box: _Corners | None, answer: str) -> _Verdict:
    if question.task == READ:
        read = answer.strip()
        edits = edit_distance(read, question.answer)
        return _Verdict(edits == 0, edits, len(question.answer))
    if box is not None:
        return _Verdict(_overlap(box, answer) >= MIN_IOU)
    return _Verdict(normalize(answer) == normalize(question.answer))


def _overlap(box: _Corners, answer: str) -> float:
    """Hold the first shape of an answer against the truth; what is no box overlaps nothing."""
    found = grounding.parse(answer, bare=True)
    if not found or not isinstance(found[0].shape, grounding.Box):
        return 0.0
    return iou(box, found[0].shape.to_pixels((1, 1)))


def _best_single_answer(specs: Sequence[Spec]) -> float:
    boxes = [box for spec in specs if (box := _corners(spec)) is not None]
    if boxes:
        hits = [sum(iou(box, guess) >= MIN_IOU for box in boxes) for guess in boxes]
    else:
        hits = list(Counter(spec.questions[0].answer for spec in specs).values())
    return max(hits) / len(specs)


def _corners(spec: Spec) -> _Corners | None:
    box, picture = spec.questions[0].box, spec.pictures[0]
    if box is None:
        return None
    x1, y1, x2, y2 = box
    width, height = picture.width, picture.height
    return x1 / width, y1 / height, x2 / width, y2 / height


def _grown(line: Line, aspect: float, rng: Random) -> Line:
    width, height = line.width, line.height
    if width > aspect * height:
        height = ceil(width / aspect)
    else:
        width = ceil(height * aspect)
    x = line.x + rng.randint(0, width - line.width)
    y = line.y + rng.randint(0, height - line.height)
    return replace(line, width=width, height=height, x=x, y=y)


def _fitted(line: Line) -> Line:
    """Grow a canvas where the ink would touch its border.

    A font's hinting makes a line at 3 times the size a little more than 3 times as wide, and
    another version of FreeType may differ by a pixel.
    """
    left, top, right, bottom = ink_extent(
        line.text,
        line.font,
        line.size,
        cell=line.cell,
        tracking=line.tracking,
        leading=line.leading,
    )
    x, y = max(line.x, 1 - left), max(line.y, 1 - top)
    width, height = max(line.width, x + right + 1), max(line.height, y + bottom + 1)
    return replace(line, x=x, y=y, width=width, height=height)
