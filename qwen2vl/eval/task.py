"""Evaluation loop: task examples -> prompt -> model answer -> score -> results.

A `Task` provides prompts and scores answers; `run_task` runs it with any callable that answers
messages, one example at a time, and keeps each answer with its ground truth. A missing or empty
answer is scored as wrong. `qwen2vl.eval.runner` runs whole suites. No model or engine is imported
here. (lm-evaluation-harness: Task, simple_evaluate.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import chance_upper_bound, ratio_interval, wilson_interval

__all__ = [
    "Answer",
    "AnswerFn",
    "ExampleResult",
    "HasText",
    "Messages",
    "Task",
    "TaskResults",
    "run_task",
]

E = TypeVar("E")
Messages = list[dict[str, Any]]


class HasText(Protocol):
    """Object with the text of an answer, such as the engine's Completion."""

    @property
    def text(self) -> str:
        """Text of the answer."""
        ...


Answer = str | HasText | None
AnswerFn = Callable[[Messages], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleResult:
    """One question with its ground truth, the model's answer and the score."""

    name: str  # of the example within its task: "text/017"
    kind: str  # of question: "count_kind"
    question: str
    truth: str
    answer: str
    score: float  # 1 correct, 0 wrong
    chance: float  # chance level: probability that a random answer is correct
    edits: int | None = None  # text recognition: edit distance between answer and truth
    length: int | None = None  # text recognition: characters of the truth
    part: str = ""  # of a suite: row of its table
    logprob: float | None = None  # log probability of the answer, where it is known
    prompt_tokens: int | None = None  # those of images and videos included, where known
    refused: bool | None = None  # the answer says that the picture does not show it
    is_answerable: bool | None = None  # by the picture; where a suite has other questions, too
    similar_score: float | None = None  # with similar names accepted, where there are any
    similar_chance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResults:
    """Results of one task, and their aggregates."""

    task: str
    note: str  # how this measurement differs from what a reader might assume
    results: tuple[ExampleResult, ...]

    @property
    def num_examples(self) -> int:
        """Number of examples that were run."""
        return len(self.results)

    @property
    def accuracy(self) -> float:
        """Share of correct answers (exact match)."""
        return sum(r.score for r in self.results) / self.num_examples

    @property
    def character_error_rate(self) -> float | None:
        """Edits over characters (CER), summed over all lines; None without text recognition."""
        edits, lengths = self._edits_and_lengths()
        return sum(edits) / sum(lengths) if lengths else None

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson_interval(sum(r.score for r in self.results), self.num_examples)

    @property
    def character_error_interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the character error rate; None without text recognition."""
        edits, lengths = self._edits_and_lengths()
        return ratio_interval(edits, lengths) if lengths else None

    @property
    def chance_upper_bound(self) -> float:
        """Highest accuracy that guessing can explain: chance level plus 3 sigma."""
        return chance_upper_bound([r.chance for r in self.results])

    def _edits_and_lengths(self) -> tuple[list[int], list[int]]:
        pairs = [
            (r.edits, r.length)
            for r in self.results
            if r.edits is not None and r.length is not None
        ]
        return [edits for edits, _ in pairs], [length for _, length in pairs]


class Task(Protocol[E]):
    """Questions with known answers: builds prompts and scores answers."""

    @property
    def name(self) -> str:
        """Name in tables and files."""
        ...

    @property
    def note(self) -> str:
        """How the measurement differs from what a reader might assume."""
        ...

    def examples(self) -> Sequence[E]:
        """Return the examples, always in the same order."""
        ...

    def prompt(self, example: E) -> Messages:
        """Build the messages of an example: its question with its images."""
        ...

    def score(self, example: E, answer: str) -> ExampleResult:
        """Score an answer."""
        ...


def run_task(
    task: Task[E],
    answer_fn: AnswerFn,
    *,
    limit: int | None = None,
    on_result: Callable[[ExampleResult], None] | None = None,
) -> TaskResults:
    """Run the examples of a task in order and score the answers.

    Args:
        task: provides prompts and scores.
        answer_fn: answers messages; returns a text, an object with `text`, or None.
        limit: run only the first `limit` examples.
        on_result: called with each result.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"task {task.name}: limit is {limit}, must be at least 1")
    results: list[ExampleResult] = []
    for example in task.examples()[:limit]:
        results.append(task.score(example, _text_of_answer(answer_fn(task.prompt(example)))))
        if on_result is not None:
            on_result(results[-1])
    return TaskResults(task=task.name, note=task.note, results=tuple(results))


def _text_of_answer(answer: Answer) -> str:
    if answer is None or isinstance(answer, str):
        return answer or ""
    return answer.text or ""
