"""AsyncLLM: asyncio interface with streaming, for many concurrent callers of one engine.

    caller --messages--> processor (a worker thread) --requests--> input queue
    engine thread: input queue -> LLM.step -> deltas --call_soon_threadsafe--> the caller's loop

Only the engine thread uses scheduler, caches and model. A caller that stops iterating or is
canceled has its request aborted. If the engine fails, all callers get an EngineError with the
cause, and so do later ones. One process, one device. (vLLM: AsyncLLM.)
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from qwen2vl.engine.llm import LLM
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.scheduler import RequestOutput
from qwen2vl.engine.validation import Conversation
from qwen2vl.errors import EngineError

__all__ = ["AsyncLLM", "CompletionStream"]

logger = logging.getLogger(__name__)


class CompletionStream:
    """A running request: iterate over its deltas, or await its completions."""

    def __init__(self, engine: AsyncLLM, requests: list[Request], process_seconds: float) -> None:
        self._engine = engine
        self._requests = requests
        self._process_seconds = process_seconds
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self._num_unfinished = len(requests)  # samples
        self._error: EngineError | None = None  # why they will not finish

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the deltas of all samples as they are generated; leaving early aborts the request.

        Raises:
            EngineError: the engine died, or the request was aborted elsewhere.
        """
        try:
            while self._num_unfinished and self._error is None:
                delta = await self._deltas.get()
                if isinstance(delta, EngineError):
                    self._error = delta
                    raise delta
                self._num_unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            self.abort()

    async def completions(self) -> list[Completion]:
        """Wait until all samples have finished; return one Completion for each.

        Raises:
            Qwen2VLError: the only sample failed, the request was aborted, or the engine died.
        """
        async for _ in self:
            pass
        if self._error is not None:
            raise self._error
        first = self._requests[0]
        if len(self._requests) == 1 and first.error is not None:
            raise first.error
        return [
            request.completion(process_seconds=self._process_seconds) for request in self._requests
        ]

    def abort(self) -> None:
        """Abort the request unless it has finished; other iterators get an EngineError."""
        if self._num_unfinished and self._error is None:
            self._error = EngineError("the request was aborted before it finished")
            self._engine._enqueue(_Abort(self._requests))
            self._deltas.put_nowait(self._error)

    def _deliver(self, delta: Delta | EngineError) -> None:
        """Pass a delta from the engine thread to the caller's loop; abort if the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)
        except RuntimeError:
            self._engine._enqueue(_Abort(self._requests))


class _Abort:
    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests


class AsyncLLM:
    """An LLM for concurrent coroutines; the engine runs in its own thread."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._input_queue: SimpleQueue[tuple[CompletionStream, list[Request]] | _Abort | None] = (
            SimpleQueue()
        )
        self._streams: dict[Request, CompletionStream] = {}  # used by the engine thread only
        self._error: EngineError | None = None
        self._thread = threading.Thread(target=self._run_busy_loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread is running."""
        return self._error is None and self._thread.is_alive()

    async def stream(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> CompletionStream:
        """Submit one conversation; return the stream of its output.

        Raises:
            InputError, CapacityError: as `LLM.chat` does, before anything is queued.
            EngineError: the engine has died; names the first cause.
        """
        self._check_alive()
        request_params = params or SamplingParams()
        prompt, request_params, seconds = await asyncio.to_thread(
            self.llm.prepare, messages, request_params, tools
        )
        requests = self.llm.create_requests(prompt, request_params)
        stream = CompletionStream(self, requests, seconds)
        self._enqueue((stream, requests))
        self._check_alive()  # again: a dead engine no longer reads its input queue
        return stream

    async def chat(
        self, messages: Conversation, params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate the reply to one conversation; one Completion for each sample."""
        return await (await self.stream(messages, params)).completions()

    def close(self) -> None:
        """Stop the engine thread; running requests get an EngineError, the LLM stays usable."""
        self._enqueue(None)
        self._thread.join()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise self._error

    def _enqueue(self, message: tuple[CompletionStream, list[Request]] | _Abort | None) -> None:
        self._input_queue.put(message)

    def _run_busy_loop(self) -> None:
        """Process the input queue, run a step, deliver its outputs; until closed or failed."""
        try:
            while self._process_input_queue():
                for output in self.llm.step():
                    self._deliver_output(output)
        except Exception as error:
            logger.exception("the engine died")
            self._shut_down(EngineError(f"the engine died: {type(error).__name__}: {error}"))
        else:
            for request in self._streams:
                self.llm.abort(request)
            self._shut_down(EngineError("the engine was closed"))

    def _process_input_queue(self) -> bool:
        """Read the input queue, blocking only when the engine is idle; False: closed."""
        while not self._input_queue.empty() or not self.llm.has_unfinished_requests:
            message = self._input_queue.get()
            if message is None:
                return False
            if isinstance(message, _Abort):
                for request in message.requests:
                    if self._streams.pop(request, None) is not None:
                        self.llm.abort(request)
                continue
            stream, requests = message
            for request in requests:
                self._streams[request] = stream
                self.llm.add_request(request)
        return True

    def _deliver_output(self, output: RequestOutput) -> None:
        request = output.request
        stream = self._streams[request]
        if request.finish_reason is not None:
            del self._streams[request]
        stream._deliver(
            Delta(index=request.index, text=output.text, finish_reason=request.finish_reason)
        )

    def _shut_down(self, error: EngineError) -> None:
        self._error = error
        streams = set(self._streams.values())
        while not self._input_queue.empty():
            message = self._input_queue.get()
            if isinstance(message, tuple):
                streams.add(message[0])
        for stream in streams:
            stream._deliver(error)
