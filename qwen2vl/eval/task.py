"""One evaluation in one straight walk: examples -> prompt -> ask -> score -> results.

A Task says what is asked and how an answer is judged; `run_task` walks through it with any
callable that answers messages, one question at a time, and keeps every answer beside its truth.
An answer that is missing or empty is wrong and counts. It must not know models, engines or what
the tasks are about. Next room: mini.py, the suite of this house.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import chance_limit, ratio_interval, wilson_interval

__all__ = [
    "Answer",
    "Ask",
    "HasText",
    "Messages",
    "Result",
    "Results",
    "Task",
    "read_results",
    "run_task",
    "write_results",
]

E = TypeVar("E")
Messages = list[dict[str, Any]]


class HasText(Protocol):
    """What an engine's Completion is to an evaluation."""

    @property
    def text(self) -> str:
        """The answer."""
        ...


Answer = str | HasText | None
Ask = Callable[[Messages], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One question with its truth, the answer it got, and what that is worth."""

    name: str  # of the example within its task: "text/017"
    kind: str  # what was asked: "count_kind"
    question: str
    truth: str
    answer: str
    score: float  # 1 right, 0 wrong
    chance: float  # how likely a guess is right
    edits: int | None = None  # text that was read: between answer and truth
    length: int | None = None  # characters of that truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What one task came to."""

    task: str
    note: str  # how this measurement deviates from what a reader might take it for
    results: tuple[Result, ...]

    @property
    def count(self) -> int:
        """How many questions were asked."""
        return len(self.results)

    @property
    def mean(self) -> float:
        """The share of right answers."""
        return sum(r.score for r in self.results) / self.count

    @property
    def error_rate(self) -> float | None:
        """Edits over characters, all lines together; None where nothing was read."""
        edits, lengths = self._edits()
        return sum(edits) / sum(lengths) if lengths else None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of right answers lies, with 95 % confidence."""
        return wilson_interval(sum(r.score for r in self.results), self.count)

    @property
    def error_interval(self) -> tuple[float, float] | None:
        """Where the error rate lies, with 95 % confidence; None where nothing was read."""
        edits, lengths = self._edits()
        return ratio_interval(edits, lengths) if lengths else None

    @property
    def chance_limit(self) -> float:
        """The largest share of right answers that luck explains: chance and 3 sigma."""
        return chance_limit([r.chance for r in self.results])

    def _edits(self) -> tuple[list[int], list[int]]:
        pairs = [
            (r.edits, r.length)
            for r in self.results
            if r.edits is not None and r.length is not None
        ]
        return [edits for edits, _ in pairs], [length for _, length in pairs]


class Task(Protocol[E]):
    """Questions with known answers, and the judge of an answer."""

    @property
    def name(self) -> str:
        """What it is called in tables and files."""
        ...

    @property
    def note(self) -> str:
        """How the measurement deviates from what a reader might take it for."""
        ...

    def examples(self) -> Sequence[E]:
        """List the examples, always in the same order."""
        ...

    def prompt(self, example: E) -> Messages:
        """Put the question of an example, with its pictures."""
        ...

    def score(self, example: E, answer: str) -> Result:
        """Judge an answer."""
        ...


def run_task(
    task: Task[E],
    ask: Ask,
    *,
    limit: int | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Results:
    """Ask the questions of a task, in order, and judge the answers.

    Args:
        task: what to ask.
        ask: answers messages; gives a text, an object with `text`, or None.
        limit: ask only so many, from the first.
        on_result: hears of each result as it comes.

    Raises:
        InputError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"task {task.name}: limit is {limit}, must be at least 1")
    results: list[Result] = []
    for example in task.examples()[:limit]:
        results.append(task.score(example, _text(ask(task.prompt(example)))))
        if on_result is not None:
            on_result(results[-1])
    return Results(task=task.name, note=task.note, results=tuple(results))


def write_results(path: Path, runs: Iterable[Results]) -> None:
    """Write one JSON line for every question.

    Raises:
        InputError: the file cannot be written.
    """
    lines = [
        json.dumps({"task": run.task, "note": run.note, **asdict(result)}) + "\n"
        for run in runs
        for result in run.results
    ]
    try:
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def read_results(path: Path) -> list[Results]:
    """Read what `write_results` wrote.

    Raises:
        InputError: the file cannot be read, or a line of it is no result.
    """
    runs: dict[tuple[str, str], list[Result]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            raw = json.loads(line)
            runs.setdefault((raw.pop("task"), raw.pop("note")), []).append(Result(**raw))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a file of results: {error}") from error
    return [
        Results(task=task, note=note, results=tuple(results))
        for (task, note), results in runs.items()
    ]


def _text(answer: Answer) -> str:
    if answer is None or isinstance(answer, str):
        return answer or ""
    return answer.text or ""
