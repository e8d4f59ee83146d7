"""Runs the jobs of a batch: a bounded number at a time; answers are appended as they are finished.

    jobs (an iterator, read lazily) -> `answer`, for max_in_flight of them -> RecordFile

More jobs are in flight than the engine runs, so that its batch is full while answers are written
and the next prompts are prepared. If the engine dies, it is restarted and the jobs that ran are
repeated one at a time, while no other job runs, so that the one that has killed it is found.
Whatever ends a run, the next run of the same command continues it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from qwen2vl.errors import EngineError

if TYPE_CHECKING:
    from qwen2vl.engine import AsyncLLM
    from qwen2vl.files.record_file import RecordFile

__all__ = ["MAX_ATTEMPTS", "Answer", "BatchCounts", "ErrorCounts", "JobHandler", "run_jobs"]

MAX_ATTEMPTS = 3  # of a job with which the engine dies
SYNC_SECONDS = 5.0  # between two times at which what was written is forced to disk
MAX_KINDS = 1000  # of errors that are counted
# Texts in quotes, and words with a digit, or a period within: line numbers, fields, paths.
_NAMES = re.compile(r"""'[^']*'|"[^"]*"|\S*\d\S*|\S+\.\S+""")

Job_contra = TypeVar("Job_contra", contravariant=True)
Job = TypeVar("Job")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a job: a row of the file."""

    row: bytes
    error: str | None = None  # why it is an error


@dataclass(slots=True)
class _ErrorKind:
    example: str  # the first text
    count: int = 0
    is_uniform: bool = True  # all texts are equal


class ErrorCounts:
    """Counts errors by kind: texts of one kind differ in names and numbers only."""

    def __init__(self) -> None:
        self.total = 0
        self._kinds: dict[str, _ErrorKind] = {}

    def add(self, text: str) -> None:
        """Count an error."""
        self.total += 1
        name = _NAMES.sub("", text)
        if name in self._kinds or len(self._kinds) < MAX_KINDS:
            kind = self._kinds.setdefault(name, _ErrorKind(text))
            kind.count += 1
            kind.is_uniform &= kind.example == text

    def add_all(self, other: ErrorCounts) -> None:
        """Count the errors of another one, too."""
        self.total += other.total
        for name, added in other._kinds.items():
            kind = self._kinds.setdefault(name, _ErrorKind(added.example))
            kind.count += added.count
            kind.is_uniform &= added.is_uniform and kind.example == added.example

    def describe_commonest(self) -> str:
        """Say how many errors are of the commonest kind, with the first text; "" without errors."""
        if not self._kinds:
            return ""
        kind = max(self._kinds.values(), key=lambda one: one.count)
        if self.total == 1:
            return f"the error: {kind.example}"
        number = "all" if kind.count == self.total else f"{kind.count:,} of"
        such_as = "" if kind.is_uniform else "such as "
        return f"{number} {self.total:,} errors: {such_as}{kind.example}"


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """Numbers of one run."""

    answered: int = 0
    output_tokens: int = 0
    errors: ErrorCounts = field(default_factory=ErrorCounts)

    @property
    def failed(self) -> int:
        """Number of jobs whose answer is an error."""
        return self.errors.total

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        if answer.error is None:
            self.answered += 1
        else:
            self.errors.add(answer.error)


class JobHandler(Protocol[Job_contra]):
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
    handler: JobHandler[Job],
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
        handler: answers them.
        file: of the answers, open.
        engine: that the handler uses; restarted if it dies.
        counts: of the run, counted up; also what was done if the run is canceled.
        max_in_flight: jobs; None: twice as many as the engine runs.
        on_answer: called after each answer.

    Raises:
        InputError: of `jobs`, or the file cannot be written or forced to disk.
        EngineError: the engine died and could not be restarted.
    """
    restart = _Restart(engine)
    is_finished = asyncio.Event()

    async def work() -> None:
        for job in jobs:
            answer = await _answer(job, handler, restart)
            file.append(answer.row)
            counts.add(answer)
            on_answer(counts)
            await asyncio.sleep(0)  # lines that are no requests are answered without a wait

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_sync_until(is_finished, file))
            async with asyncio.TaskGroup() as workers:
                for _ in range(max_in_flight or 2 * engine.llm.engine_config.max_num_seqs):
                    workers.create_task(work())
            is_finished.set()
    except BaseExceptionGroup as failures:
        raise _first(failures) from None  # the others were canceled because of it


def _first(failure: BaseException) -> BaseException:
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


class _Restart:
    """Restarts an engine that died, and lets jobs be repeated one at a time, and nothing else."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._num_first = 0  # first attempts that run
        self._num_repeated = 0  # jobs that wait for their repeat, or are repeated
        self._changed = asyncio.Condition()

    async def ensure_alive(self) -> None:
        if not self._engine.is_alive:
            await asyncio.to_thread(self._engine.restart)

    @asynccontextmanager
    async def first_attempt(self) -> AsyncIterator[None]:
        """Wait until no job is repeated, and count a first attempt while it runs."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._num_repeated)
            self._num_first += 1
        try:
            yield
        except EngineError:
            self._num_repeated += 1  # before others can begin
            raise
        finally:
            self._num_first -= 1
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def repeat(self) -> AsyncIterator[None]:
        """Wait until nothing else runs; for a job whose first attempt has failed."""
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._num_first)
                yield  # the others wait for the lock
        finally:
            self._num_repeated -= 1
            async with self._changed:
                self._changed.notify_all()


async def _answer(job: Job, handler: JobHandler[Job], restart: _Restart) -> Answer:
    try:
        async with restart.first_attempt():
            return await handler.answer(job)
    except EngineError as error:
        failure = error
    async with restart.repeat():
        for _ in range(MAX_ATTEMPTS - 1):
            await restart.ensure_alive()
            try:
                return await handler.answer(job)
            except EngineError as error:
                failure = error
        await restart.ensure_alive()
    return handler.failure(job, failure)


async def _sync_until(is_finished: asyncio.Event, file: RecordFile) -> None:
    """Force what was written to disk every few seconds, and once more at the end."""
    while not is_finished.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(is_finished.wait(), SYNC_SECONDS)
        await asyncio.to_thread(file.sync)
