"""Runs the items of a suite: batches of messages -> answers -> scores -> results file.

Batches are consecutive items, always the same ones, and fewer of large images: of a batch that a
killed run has begun, all questions are answered again, and only the missing results are appended.
So a resumed run computes what an uninterrupted one does, bit for bit, and writes the same file,
where whatever answers keeps nothing from one batch to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qwen2vl.eval.runner.results_file import ResultsFile
from qwen2vl.eval.suites.scoring import score_answer
from qwen2vl.eval.suites.suite import Suite, SuiteItem
from qwen2vl.eval.task import ExampleResult, Messages

__all__ = [
    "BATCH_SIZE",
    "MAX_BATCH_PIXELS",
    "Answerer",
    "SuiteAnswer",
    "num_missing",
    "run_items",
    "score_item",
    "split_batches",
]

BATCH_SIZE = 64
MAX_BATCH_PIXELS = 8_000_000  # of a batch, so that few answers are lost if a slow run is killed
SYNC_SECONDS = 5.0  # between two times that results are forced to disk
LOGPROB_DECIMALS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteAnswer:
    """The answer to one item."""

    text: str
    logprob: float | None = None  # log probability of all of its tokens, if it is known
    prompt_tokens: int | None = None  # those of images and videos included, if it is known


class Answerer(Protocol):
    """Whatever answers the items of a suite: a model, a server, a test."""

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        """Answer a batch, in its order.

        Args:
            batch: messages of at most BATCH_SIZE items.
            on_answer: called once for each answer, when it is complete.
        """
        ...


def num_missing(items: Sequence[SuiteItem], results: ResultsFile) -> int:
    """Return how many of the items have no result yet."""
    return sum(item.id not in results.results for item in items)


def run_items(
    suite: Suite,
    items: Sequence[SuiteItem],
    answerer: Answerer,
    results: ResultsFile,
    *,
    on_progress: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> None:
    """Answer the items that have no result yet.

    Args:
        suite: draws their media, a batch at a time.
        items: in their order.
        answerer: answers a batch.
        results: has the results of earlier runs, and gets the new ones.
        on_progress: called with the part, the number of answers so far, and that of all.
    """
    done, total = len(items) - num_missing(items, results), len(items)
    synced = time.monotonic()
    for batch in split_batches(items):
        missing = [item for item in batch if item.id not in results.results]
        if not missing:
            continue
        progress = _BatchProgress(batch[0].part, done, done + len(missing), total, on_progress)
        answers = answerer.answer([suite.messages(item) for item in batch], progress.advance)
        scored = [score_item(*pair) for pair in zip(batch, answers, strict=True)]
        results.append([result for result in scored if result.name not in results.results])
        done += len(missing)
        on_progress(batch[-1].part, done, total)
        if time.monotonic() - synced > SYNC_SECONDS:
            results.sync()
            synced = time.monotonic()


def split_batches(items: Sequence[SuiteItem]) -> Iterator[Sequence[SuiteItem]]:
    """Split items into batches of at most BATCH_SIZE items and MAX_BATCH_PIXELS pixels, or one."""
    start = pixels = 0
    for end, item in enumerate(items):
        is_full = end - start == BATCH_SIZE or pixels + item.num_pixels > MAX_BATCH_PIXELS
        if end > start and is_full:
            yield items[start:end]
            start, pixels = end, 0
        pixels += item.num_pixels
    if items:
        yield items[start:]


def score_item(item: SuiteItem, answer: SuiteAnswer) -> ExampleResult:
    """Score the answer to an item."""
    scored = score_answer(item.metric, item.answers, answer.text, box=item.box)
    similar: dict[str, float] = {}
    if item.similar_chance:
        accepted = (*item.answers, *item.similar_answers)
        is_similar = score_answer(item.metric, accepted, answer.text).is_correct
        similar = {"similar_score": float(is_similar), "similar_chance": item.similar_chance}
    refused: bool | None = None
    if item.refusals:
        refused = score_answer("exact_match", item.refusals, answer.text).is_correct
    return ExampleResult(
        name=item.id,
        part=item.part,
        kind=item.kind,
        question=item.question,
        truth=item.answers[0],
        answer=answer.text,
        score=float(scored.is_correct),
        chance=item.chance,
        edits=scored.edits,
        length=scored.length,
        refused=refused,
        is_answerable=item.is_answerable if item.refusals else None,
        prompt_tokens=answer.prompt_tokens,
        logprob=None if answer.logprob is None else round(answer.logprob, LOGPROB_DECIMALS),
        **similar,
    )


@dataclass(slots=True)
class _BatchProgress:
    """Counts the answers of a batch as they are completed."""

    part: str
    done: int
    last: int
    total: int
    on_progress: Callable[[str, int, int], None]

    def advance(self) -> None:
        """Count one; of a batch that is answered again, no more than are missing."""
        self.done = min(self.done + 1, self.last)
        self.on_progress(self.part, self.done, self.total)
