"""What `batch` prints: a progress bar while it runs, a summary at the end; and its exit code.

The exit code and the commonest error are those of all answers of the file, those of earlier runs
included, so that a resumed batch ends as one that was not interrupted.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import terminal
from qwen2vl.server.batch.runner import ErrorCounts

if TYPE_CHECKING:
    from qwen2vl.server.batch.runner import BatchCounts

__all__ = ["BatchReport", "LineCounter"]

INTERRUPTED = 130
SECONDS_PER_UPDATE = 0.1
MAX_ERROR = 500  # characters that are shown
READ_CHUNK = 1 << 20


class BatchReport:
    """Counts the answers of a batch, and shows them.

    Args:
        output: file of the answers.
        noun: of what is answered, in singular.
    """

    def __init__(self, output: Path, noun: str) -> None:
        self.output = output
        self._noun = noun
        self._num_done = 0  # answers of earlier runs
        self._done_errors = ErrorCounts()  # of them

    def count_done(self, record: Mapping[str, Any]) -> None:
        """Count an answer that the file has already; an error is a text, or has a message."""
        self._num_done += 1
        error = record.get("error")
        if error:
            message = error.get("message") if isinstance(error, dict) else error
            self._done_errors.add(str(message))

    def run(
        self,
        work: Callable[[Callable[[BatchCounts], None]], Coroutine[Any, Any, None]],
        counts: BatchCounts,
        total: Callable[[], int],
    ) -> int:
        """Run a batch with a progress bar, print the summary, and return the exit code.

        Args:
            work: the batch; it gets what is called after each answer.
            counts: of the run.
            total: returns the number of jobs, as far as it is known.
        """
        began = time.perf_counter()
        last = 0.0

        with terminal.progress_bar() as update:

            def on_answer(counts: BatchCounts) -> None:
                nonlocal last
                now = time.perf_counter()
                if now - last < SECONDS_PER_UPDATE:
                    return
                last = now
                done = self._num_done + counts.answered + counts.failed
                failed = self._done_errors.total + counts.failed
                name = f"{failed:,} failed" if failed else "answering"
                update(name, done, max(done, total()))

            is_interrupted = False
            try:
                with _interrupts_by_asyncio():
                    asyncio.run(work(on_answer))
            except KeyboardInterrupt:
                is_interrupted = True
        code = self.finish(counts, time.perf_counter() - began)
        if is_interrupted:
            terminal.note("interrupted; the same command continues")
            return INTERRUPTED
        return code

    def finish(self, counts: BatchCounts, seconds: float | None = None) -> int:
        """Print the summary of a run, and return the exit code.

        Args:
            counts: of the run.
            seconds: that it took; None: nothing was left to answer.
        """
        terminal.note(self._summary(counts, seconds))
        errors = ErrorCounts()
        errors.add_all(self._done_errors)
        errors.add_all(counts.errors)
        if not errors.total:
            return 0
        text = errors.describe_commonest()
        shown = text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 3]}..."
        terminal.note(f"{shown} (--retry-failed repeats what failed)")
        return 1

    def _summary(self, counts: BatchCounts, seconds: float | None) -> str:
        text = f"{counts.answered:,} {self._noun}{'' if counts.answered == 1 else 's'} answered"
        text += f", {counts.failed:,} failed"
        if self._num_done:
            text += f", {self._num_done:,} already done"
        if self._done_errors.total:
            text += f" ({self._done_errors.total:,} failed)"
        if seconds is not None:
            text += f", in {seconds:.1f} s"
        if seconds and counts.output_tokens:
            text += f" ({counts.output_tokens / seconds:,.0f} output tokens/s)"
        return f"{text}: {self.output}"


@contextmanager
def _interrupts_by_asyncio() -> Iterator[None]:
    """Let asyncio handle Ctrl-C, by canceling what runs; it does so with Python's handler only."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can set signal handlers
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class LineCounter:
    """Counts the lines of a file in a thread, for the progress bar.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.count = 0  # so far
        self._path = path
        threading.Thread(target=self._run, name="count-lines", daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError), self._path.open("rb") as file:
            chunk = b"\n"
            while new := file.read(READ_CHUNK):
                chunk = new
                self.count += chunk.count(b"\n")
            self.count += not chunk.endswith(b"\n")
