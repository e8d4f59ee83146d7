"""Streams of AsyncLLM: the output of one request, before and after its submission.

`AsyncLLM.stream` returns a PendingStream: awaited, it submits the request and gives the
AsyncDeltaStream of its output; iterated directly, it does both. The engine thread delivers deltas
through the caller's event loop. A caller that stops iterating has its request aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from typing import Any

from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request, collect_completions
from qwen2vl.errors import EngineError, Qwen2VLError, copy_error

__all__ = ["AsyncDeltaStream", "PendingStream", "deliver_deltas", "final_delta"]


class AsyncDeltaStream:
    """A running request: iterate over its deltas, or await its completions."""

    def __init__(
        self,
        request_abort: Callable[[Sequence[Request]], None],
        requests: list[Request],
        process_seconds: float,
        *,
        final_only: bool = False,
    ) -> None:
        # A method of the AsyncLLM, which is not closed while a stream refers to it.
        self._request_abort = request_abort
        self.requests = requests
        self.process_seconds = process_seconds
        self.final_only = final_only  # deliver only the last delta of each sample
        self.loop = asyncio.get_running_loop()
        # None: the end, for other iterators that wait.
        self._deltas: asyncio.Queue[Delta | Qwen2VLError | None] = asyncio.Queue()
        self._num_unfinished = len(requests)  # samples
        self._error: Qwen2VLError | None = None  # why they will not finish

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of all samples as they are generated; leaving early aborts the request.

        Raises:
            EngineError: the engine died, or the request was aborted.
        """
        try:
            while self._num_unfinished and self._error is None:
                delta = await self._deltas.get()
                if isinstance(delta, Qwen2VLError):
                    self._error = delta
                elif delta is not None:
                    self._num_unfinished -= delta.finish_reason is not None
                    yield delta
            if self._error is not None:
                raise copy_error(self._error)
        finally:
            self.abort()
            self._deltas.put_nowait(self._error)  # wakes the next iterator that waits

    async def completions(self) -> list[Completion]:
        """Wait until all samples have finished; return one Completion for each.

        Raises:
            Qwen2VLError: the only sample failed, the request was aborted, or the engine died.
        """
        async for _ in self:
            pass
        return collect_completions(self.requests, [self.process_seconds] * len(self.requests))

    def abort(self) -> None:
        """Abort the request unless it has finished; its iterators get an EngineError."""
        if self._num_unfinished and self._error is None:
            self._error = EngineError("the request was aborted before it finished; send it again")
            self._request_abort(self.requests)
            self._deltas.put_nowait(self._error)

    def put(self, delta: Delta | Qwen2VLError) -> None:
        """Queue a delta, or the error that ends the stream; in the caller's loop."""
        self._deltas.put_nowait(delta)

    def deliver(self, delta: Delta | Qwen2VLError) -> None:
        """Pass a delta from the engine thread to the caller's loop; abort if the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(self.put, delta)
        except RuntimeError:
            self.end()

    def end(self) -> None:
        """Have the engine drop the request, because its event loop is closed."""
        self._request_abort(self.requests)


def deliver_deltas(
    loop: asyncio.AbstractEventLoop, deltas: Sequence[tuple[AsyncDeltaStream, Delta]]
) -> None:
    """Pass deltas of streams of one event loop to it, waking it once; abort if it is closed."""
    try:
        loop.call_soon_threadsafe(_put_all, deltas)
    except RuntimeError:
        for stream, _ in deltas:
            stream.end()


def final_delta(request: Request) -> Delta:
    """Return the only delta of a finished request whose stream delivers the final one only."""
    return Delta(
        index=request.index,
        text=request.text,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        token_ids=tuple(request.output_token_ids),
        logprobs=tuple(request.logprobs),
    )


def _put_all(deltas: Sequence[tuple[AsyncDeltaStream, Delta]]) -> None:
    for stream, delta in deltas:
        stream.put(delta)


class PendingStream(Coroutine[Any, Any, AsyncDeltaStream]):
    """A request that is submitted when this is awaited, or iterated directly; once, either way."""

    def __init__(self, submission: Coroutine[Any, Any, AsyncDeltaStream]) -> None:
        self._submission = submission

    def send(self, value: Any, /) -> Any:
        """Resume the submission; for the event loop, as the next two."""
        return self._submission.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error in the submission."""
        return self._submission.throw(*error)

    def close(self) -> None:
        """End a submission that has not finished."""
        self._submission.close()

    def __await__(self) -> Generator[Any, Any, AsyncDeltaStream]:
        return self._submission.__await__()

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        """Submit the request and yield its deltas; as `AsyncDeltaStream.__aiter__`."""
        stream = await self
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.abort()  # at once, not when the iterator within is finalized
