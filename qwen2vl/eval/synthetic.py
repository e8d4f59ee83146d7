"""Synthetic evaluation tasks: each case is a Spec, whose images are rendered on demand.

Three transforms of the cases are provided: a line of text on a canvas of another aspect ratio,
videos with shuffled frames, and questions with the images of another case. The last two are
controls: without the right visual input, accuracy must not exceed the chance level.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from random import Random

from qwen2vl.eval.metrics import iou
from qwen2vl.eval.suites.scoring import MIN_IOU, AnswerScore, Metric, score_answer
from qwen2vl.eval.task import ExampleResult, Messages
from qwen2vl.synth import Question, Spec, render
from qwen2vl.synth.draw import ink_extent
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.spec import Line

__all__ = [
    "EvalCase",
    "SyntheticTask",
    "build_cases",
    "chance_levels",
    "is_correct",
    "metric_of",
    "pad_to_aspect_ratio",
    "shuffle_frames",
    "with_mismatched_images",
]

READ = "read"  # text recognition: the kind of question that is scored by edit distance

_NormalizedBox = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of the image size


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalCase:
    """One example: a spec with one question, and what is needed to score the answer."""

    name: str
    spec: Spec  # as rendered; has one question
    box: _NormalizedBox | None  # ground truth, where the answer is a box
    chance: float  # chance level: probability that a random answer is correct

    @property
    def question(self) -> Question:
        """The question, with its only correct answer."""
        (question,) = self.spec.questions
        return question


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticTask:
    """Task over rendered cases. (Implements eval.task.Task.)"""

    name: str
    note: str
    cases: tuple[EvalCase, ...]

    def examples(self) -> Sequence[EvalCase]:
        """Return the cases."""
        return self.cases

    def prompt(self, example: EvalCase) -> Messages:
        """Render the images and build the messages."""
        images = tuple(
            _fit_canvas_to_ink(image) if isinstance(image, Line) else image
            for image in example.spec.pictures
        )
        return render(replace(example.spec, pictures=images)).prompt

    def score(self, example: EvalCase, answer: str) -> ExampleResult:
        """Score an answer by edit distance, by IoU or by exact match, depending on the question."""
        question = example.question
        scored = _score_case(example, answer)
        return ExampleResult(
            name=f"{self.name}/{example.name}",
            kind=question.task,
            question=question.text,
            truth=question.answer,
            answer=answer,
            score=float(scored.is_correct),
            chance=example.chance,
            edits=scored.edits,
            length=scored.length,
        )

    def check_fonts(self) -> None:
        """Check that the fonts of all images are installed; lines use held-out fonts only.

        Raises:
            FontError: fonts are not installed; the text names the packages.
        """
        images = [image for case in self.cases for image in case.spec.pictures]
        if any(isinstance(image, Line) for image in images):
            files_of("judge")


def build_cases(specs: Sequence[Spec], chances: Sequence[float]) -> tuple[EvalCase, ...]:
    """Build numbered cases from the specs of one section, without any transform."""
    return tuple(
        EvalCase(name=f"{number:03d}", spec=spec, box=_normalized_box(spec), chance=chance)
        for number, (spec, chance) in enumerate(zip(specs, chances, strict=True))
    )


def chance_levels(specs: Sequence[Spec]) -> list[float]:
    """Return the chance level of each question: the probability that a guess is correct.

    The larger of 1 / choices (equally likely answers) and the accuracy of the best constant answer
    to all questions of the same kind.
    """
    by_kind: dict[str, list[Spec]] = defaultdict(list)
    for spec in specs:
        by_kind[spec.questions[0].task].append(spec)
    best = {kind: _constant_answer_accuracy(group) for kind, group in by_kind.items()}
    questions = [spec.questions[0] for spec in specs]
    return [max(best[q.task], 1 / q.choices if q.choices else 0.0) for q in questions]


def is_correct(spec: Spec, answer: str) -> bool:
    """Return whether an answer to the only question of a spec is correct, as in a suite."""
    question, box = spec.questions[0], _normalized_box(spec)
    return score_answer(_metric(question, box), (question.answer,), answer, box=box).is_correct


def pad_to_aspect_ratio(spec: Spec, aspect: float) -> Spec:
    """Pad lines of text to canvases whose width / height is `aspect`.

    Nothing is stretched or cropped: the canvas grows, and the line gets a random position on it.
    """
    rng = Random(f"canvas/{spec.seed}/{spec.index}")
    images = tuple(
        _pad_line(image, aspect, rng) if isinstance(image, Line) else image
        for image in spec.pictures
    )
    return replace(spec, pictures=images)


def shuffle_frames(spec: Spec) -> Spec:
    """Shuffle the frames of a video, into neither their order nor its reverse.

    An order and its reverse stay equally likely, so the result holds no information about
    temporal order.
    """
    rng = Random(f"shuffle/{spec.seed}/{spec.index}")
    forward = list(range(len(spec.pictures)))
    assert len(forward) > 2, "two frames have only their order and its reverse"
    order = forward
    while order in (forward, forward[::-1]):
        order = rng.sample(forward, len(forward))
    return replace(spec, pictures=tuple(spec.pictures[i] for i in order))


def with_mismatched_images(cases: Sequence[EvalCase]) -> tuple[EvalCase, ...]:
    """Replace the images of each case with those of the next case of the same kind."""
    by_kind: dict[str, list[EvalCase]] = defaultdict(list)
    for case in cases:
        by_kind[case.question.task].append(case)
    next_cases = {
        case.name: next_case
        for group in by_kind.values()
        for case, next_case in zip(group, [*group[1:], group[0]], strict=True)
    }
    return tuple(
        replace(case, spec=replace(next_cases[case.name].spec, questions=case.spec.questions))
        for case in cases
    )


def metric_of(case: EvalCase) -> Metric:
    """Return the name of the metric that scores a case, by its kind of question."""
    return _metric(case.question, case.box)


def _metric(question: Question, box: _NormalizedBox | None) -> Metric:
    if question.task == READ:
        return "edit_distance"
    return "exact_match" if box is None else "box_iou"


def _score_case(case: EvalCase, answer: str) -> AnswerScore:
    return score_answer(metric_of(case), (case.question.answer,), answer, box=case.box)


def _constant_answer_accuracy(specs: Sequence[Spec]) -> float:
    """Return the accuracy of the best answer that is the same for all specs."""
    boxes = [box for spec in specs if (box := _normalized_box(spec)) is not None]
    if boxes:
        hits = [sum(iou(box, answer) >= MIN_IOU for box in boxes) for answer in boxes]
    else:
        hits = list(Counter(spec.questions[0].answer for spec in specs).values())
    return max(hits) / len(specs)


def _normalized_box(spec: Spec) -> _NormalizedBox | None:
    box, image = spec.questions[0].box, spec.pictures[0]
    if box is None:
        return None
    x1, y1, x2, y2 = box
    width, height = image.width, image.height
    return x1 / width, y1 / height, x2 / width, y2 / height


def _pad_line(line: Line, aspect: float, rng: Random) -> Line:
    width, height = line.width, line.height
    if width > aspect * height:
        height = ceil(width / aspect)
    else:
        width = ceil(height * aspect)
    x = line.x + rng.randint(0, width - line.width)
    y = line.y + rng.randint(0, height - line.height)
    return replace(line, width=width, height=height, x=x, y=y)


def _fit_canvas_to_ink(line: Line) -> Line:
    """Enlarge the canvas where the ink would touch its border.

    Hinting makes a line at 3 times the font size a little more than 3 times as wide, and versions
    of FreeType differ by a pixel.
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
