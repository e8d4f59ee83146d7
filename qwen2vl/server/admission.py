"""Admission control: bounds how many requests run or wait, and refuses new ones while draining.

routing.py counts a POST request as `receiving` while its body arrives, which takes no place in the
queue (a client that sends slowly costs a connection), then lets it `enter` until its response has
been sent; handlers call neither. Requests that the engine cannot run at once wait in its
scheduler; those beyond `max_queue` get 429 with Retry-After. A request that has begun to arrive is
finished even if the server begins to drain. (vLLM has no such limit.)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwen2vl.server.errors import SERVER_ERROR, APIError

__all__ = ["Admission"]

MAX_RETRY_SECONDS = 60.0
EWMA_WEIGHT = 0.1  # of the last request in the mean duration


class Admission:
    """Counts the requests that have not ended; for one event loop."""

    def __init__(
        self,
        *,
        max_running: int,
        max_queue: int,
        max_per_key: int | None = None,
        on_reject: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the limits.

        Args:
            max_running: requests that the engine runs at the same time (max_num_seqs).
            max_queue: requests that may wait besides those.
            max_per_key: running and waiting requests of one API key; None: no such limit.
            on_reject: called with the reason of each refusal: "queue_full", "key_limit",
                "draining".
            clock: returns seconds.
        """
        self.max_running = max_running
        self.max_queue = max_queue
        self.max_per_key = max_per_key
        self.is_draining = False
        self.num_requests = 0  # that have entered
        self.num_receiving = 0  # whose body has not arrived
        self._on_reject = on_reject
        self._clock = clock
        self._num_of_key: Counter[bytes] = Counter()
        self._mean_seconds = 1.0  # moving average of a request's duration, for Retry-After

    @property
    def is_idle(self) -> bool:
        """Whether no request runs, waits or arrives."""
        return self.num_requests == 0 and self.num_receiving == 0

    @contextmanager
    def receiving(self, key: bytes = b"") -> Iterator[None]:
        """Count a request whose body arrives; it counts for its key, but not for the queue.

        Raises:
            APIError: as `enter`: what would be refused is refused before its body is read.
        """
        self._check_draining()
        self._check(key)
        self.num_receiving += 1
        try:
            with self._counted(key):
                yield
        finally:
            self.num_receiving -= 1

    @contextmanager
    def enter(self, key: bytes = b"", *, has_arrived: bool = False) -> Iterator[None]:
        """Count a request while the context lasts.

        Args:
            key: tells API keys apart.
            has_arrived: whether it was `receiving` before, so that draining does not refuse it.

        Raises:
            APIError: 503 while draining; 429 if the queue is full or the key has its limit.
        """
        if not has_arrived:
            self._check_draining()
        self._check(key)
        began = self._clock()
        self.num_requests += 1
        try:
            with self._counted(key):
                yield
        finally:
            self.num_requests -= 1
            self._mean_seconds += EWMA_WEIGHT * (self._clock() - began - self._mean_seconds)

    @contextmanager
    def _counted(self, key: bytes) -> Iterator[None]:
        self._num_of_key[key] += 1
        try:
            yield
        finally:
            self._num_of_key[key] -= 1
            if not self._num_of_key[key]:
                del self._num_of_key[key]

    def _check_draining(self) -> None:
        if self.is_draining:
            self._on_reject("draining")
            raise APIError(
                503,
                "the server is shutting down and takes no new requests; send it to another one",
                type=SERVER_ERROR,
                code="shutting_down",
            )

    def _check(self, key: bytes) -> None:
        if self.num_requests >= self.max_running + self.max_queue:
            self._on_reject("queue_full")
            raise self._rate_limit_error(
                f"{self.num_requests} requests run or wait, the limits are {self.max_running} "
                f"running (--max-num-seqs) and {self.max_queue} waiting (--max-queue); retry later"
            )
        if self.max_per_key is not None and self._num_of_key[key] >= self.max_per_key:
            self._on_reject("key_limit")
            raise self._rate_limit_error(
                f"this API key has {self._num_of_key[key]} requests that run or wait, the limit is "
                f"{self.max_per_key} (--max-requests-per-key); wait until one has ended"
            )

    def _rate_limit_error(self, message: str) -> APIError:
        # Waiting requests are served in groups of max_running.
        groups = max(1.0, self.num_requests / self.max_running - 1)
        seconds = min(MAX_RETRY_SECONDS, max(1.0, groups * self._mean_seconds))
        return APIError(
            429,
            message,
            type="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after=seconds,
        )
