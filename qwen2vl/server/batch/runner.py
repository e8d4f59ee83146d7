"""Runs the jobs of a batch: a bounded number at a time; answers are appended as they are finished.

    jobs (an iterator, read lazily) -> `answer`, for max_in_flight of them -> RecordFile

More jobs are in flight than the engine runs, so that its batch is full while answers are written
and the next prompts are prepared. If the engine dies, it is restarted and its jobs run again, one
at a time, so that the one that has killed it is found. Whatever ends a run, the same run continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from qwen2vl.errors import EngineError

if TYPE_CHECKING:
    from qwen2vl.engine import AsyncLLM
    from qwen2vl.server.batch.record_file import RecordFile

__all__ = ["MAX_ATTEMPTS", "Answer", "BatchCounts", "Operator", "run_jobs"]

MAX_ATTEMPTS = 3  # of a job with which the engine dies
SYNC_SECONDS = 5.0  # between two times at which what was written is forced to disk

Job_contra = TypeVar("Job_contra", contravariant=True)
Job = TypeVar("Job")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a job: a row of the file."""

    row: bytes
    is_failed: bool = False


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """Numbers of one run."""

    answered: int = 0
    failed: int = 0  # jobs whose answer is an error
    output_tokens: int = 0

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        if answer.is_failed:
            self.failed += 1
        else:
            self.answered += 1


class Operator(Protocol[Job_contra]):
    """How one job is answered."""

    async def answer(self, job: Job_contra, /) -> Answer:
        """Answer a job, also one that is wrong.

        Raises:
            EngineError: not the job has failed, but what answers it; it may be tried again.
        """
        ...

    def failure(self, job: Job_contra, error: EngineError, /) -> Answer:
        """Return the answer of a job with which the engine died again and again."""
        ...


async def run_jobs(
    jobs: Iterator[Job],
    operator: Operator[Job],
    file: RecordFile,
    engine: AsyncLLM,
    counts: BatchCounts,
    *,
    max_in_flight: int | None = None,
    on_answer: Callable[[BatchCounts], None] = lambda counts: None,
) -> None:
    """Answer all jobs and append their answers, in the order in which they are finished.

    Args:
        jobs: read one by one, when there is a place.
        operator: answers them.
        file: of the answers, open.
        engine: that the operator uses; restarted if it dies.
        counts: of the run, counted up; also what was done if the run is canceled.
        max_in_flight: jobs; None: twice as many as the engine runs.
        on_answer: called after each answer.

    Raises:
        InputError: of `jobs`, or the file cannot be written.
        EngineError: the engine died and could not be restarted.
    """
    restart = _Restart(engine)

    async def work() -> None:
        for job in jobs:
            answer = await _answer(job, operator, restart)
            file.append(answer.row)
            counts.add(answer)
            on_answer(counts)
            await asyncio.sleep(0)  # lines that are no requests are answered without a wait

    syncing = asyncio.create_task(_sync_repeatedly(file))
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_in_flight or 2 * engine.llm.engine_config.max_num_seqs):
                group.create_task(work())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the others were canceled because of it
    finally:
        syncing.cancel()


class _Restart:
    """Restarts an engine that died, and lets jobs be repeated one at a time."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self.lock = asyncio.Lock()

    async def ensure_alive(self) -> None:
        if not self._engine.is_alive:
            await asyncio.to_thread(self._engine.restart)


async def _answer(job: Job, operator: Operator[Job], restart: _Restart) -> Answer:
    try:
        return await operator.answer(job)
    except EngineError as error:
        failure = error
    async with restart.lock:
        for _ in range(MAX_ATTEMPTS - 1):
            await restart.ensure_alive()
            try:
                return await operator.answer(job)
            except EngineError as error:
                failure = error
        await restart.ensure_alive()
    return operator.failure(job, failure)


async def _sync_repeatedly(file: RecordFile) -> None:
    while True:
        await asyncio.sleep(SYNC_SECONDS)
        await asyncio.to_thread(file.sync)
