"""Supervisor of media workers: starts them, lends them, and replaces those that ended.

One thread starts all workers, because Linux ends a worker with the thread that started it (not
only with the process). Threads that decode take an idle worker and give it back; a worker that
died while it was idle is noticed when it would be lent, or within half a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from qwen2vl.errors import EngineError, MediaWorkerError, MediaWorkersBusyError
from qwen2vl.processor.media_worker.worker_process import WorkerLimits, WorkerProcess

__all__ = ["WorkerSupervisor"]

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 0.5  # between two checks of idle workers
_RETRY_SECONDS = (0.1, 5.0)  # shortest and longest wait after a failed start
_MAX_FAILURES = 3  # starts that fail in a row before it is an error: one may have been killed


class WorkerSupervisor:
    """Keeps `num_workers` workers running. Thread-safe."""

    def __init__(self, num_workers: int, limits: WorkerLimits) -> None:
        self.limits = limits
        self._num_workers = num_workers
        self._workers: set[WorkerProcess] = set()  # idle, lent and starting ones
        self._idle: deque[WorkerProcess] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._start_error: EngineError | None = None
        self._is_reported = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        with self._changed:
            return [worker.pid for worker in self._workers]

    def start(self) -> None:
        """Start the workers in the background; does nothing the second time.

        Raises:
            EngineError: closed before.
        """
        with self._changed:
            self._check_open()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="media-worker-supervisor", daemon=True
                )
                self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait until a worker is idle.

        Raises:
            EngineError: the workers do not start.
        """
        self.release(self.acquire(self.limits.start_seconds))

    def acquire(self, seconds: float | None = None) -> WorkerProcess:
        """Take an idle worker; wait for one if there is none, `limits.wait_seconds` by default.

        Raises:
            EngineError: not started, closed, the workers do not start, or all of them are busy for
                longer than the limit.
        """
        seconds = self.limits.wait_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                self._check_open()
                if self._thread is None:
                    raise MediaWorkerError("the media workers are not started; call start() first")
                while self._idle:
                    worker = self._idle.pop()  # the last one: its caches are warm
                    if not worker.has_ended():
                        return worker
                    worker.kill()
                    self._remove(worker)
                if self._start_error is not None and not self._workers:
                    raise MediaWorkerError(str(self._start_error)) from self._start_error
                if not self._changed.wait(deadline - time.monotonic()):
                    raise MediaWorkersBusyError(
                        f"all {self._num_workers} media workers are busy for "
                        f"{seconds:g} s; try again later"
                    )

    def release(self, worker: WorkerProcess) -> None:
        """Give back a worker that waits for its next job."""
        if worker.num_jobs >= self.limits.max_jobs:
            self.discard(worker)
            return
        with self._changed:
            if not self._is_closed:
                self._idle.append(worker)
                self._changed.notify_all()
                return
        self.discard(worker)

    def discard(self, worker: WorkerProcess) -> None:
        """End a worker; another one is started in its place."""
        worker.kill()
        with self._changed:
            self._remove(worker)

    def close(self) -> None:
        """End all workers, also those that are decoding; a second call does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._end_all()
        if self._thread is not None:
            self._thread.join()

    @property
    def is_closed(self) -> bool:
        """Whether the workers have been closed."""
        return self._is_closed

    def _check_open(self) -> None:
        if self._is_closed:
            raise MediaWorkerError("the media workers are closed")

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        self._changed.notify_all()

    # The thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._is_closed:
            try:
                self._start_missing()
                failures = 0
                self._wait(_CHECK_SECONDS)
                self._remove_ended()
            except Exception as error:  # must go on: the workers end with this thread
                logger.error("media workers cannot be started: %s", error)
                failures += 1
                if failures >= _MAX_FAILURES:
                    self._set_start_error(error)
                shortest, longest = _RETRY_SECONDS
                self._pause(min(longest, shortest * 2**failures))
        self._end_all()  # those that started meanwhile, too

    def _end_all(self) -> None:
        with self._changed:
            idle, self._idle = self._idle, deque()
            lent = self._workers - set(idle)
            self._workers -= set(idle)
        for worker in idle:
            worker.kill()
        for worker in lent:  # closed by the thread that uses it: its descriptor is in use
            worker.terminate()

    def _start_missing(self) -> None:
        """Start the missing workers together, then wait for each; raise the last failure."""
        started: list[WorkerProcess] = []
        failure: EngineError | None = None
        while len(self._workers) < self._num_workers and not self._is_closed:
            try:
                worker = WorkerProcess(self.limits)
            except EngineError as error:  # the others can work
                failure = error
                break
            started.append(worker)
            with self._changed:
                self._workers.add(worker)
        for worker in started:
            try:
                confinement = worker.wait_until_ready(self.limits.start_seconds)
            except EngineError as error:
                failure, confinement = error, None
            if confinement is None:
                self.discard(worker)
                continue
            self._report(confinement)
            self._start_error = None
            self.release(worker)
        if failure is not None:
            raise failure

    def _set_start_error(self, error: Exception) -> None:
        with self._changed:
            self._start_error = MediaWorkerError(f"the media workers do not start: {error}")
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed, seconds)

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or len(self._workers) < self._num_workers, seconds
            )

    def _remove_ended(self) -> None:
        with self._changed:
            ended = [worker for worker in self._idle if worker.has_ended()]
            for worker in ended:
                self._idle.remove(worker)
        for worker in ended:
            self.discard(worker)

    def _report(self, confinement: tuple[str, ...]) -> None:
        if not self._is_reported:
            self._is_reported = True
            logger.info(
                "media workers: %d processes of at most %d MB; %s",
                self._num_workers,
                self.limits.memory_bytes >> 20,
                ", ".join(confinement) or "neither network nor files could be taken from them",
            )
