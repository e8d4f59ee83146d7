"""AsyncLLM: asyncio interface with streaming, for many concurrent callers of one engine.

    caller --messages--> processor (a worker thread) --requests--> input queue
    engine thread: input queue -> engine step -> deltas --call_soon_threadsafe--> the caller's loop

The engine thread owns the LLM: only it uses scheduler, caches and model. A caller that stops
iterating or is canceled has its request aborted. If the engine dies, all callers get an EngineError
with the first cause, and so do later ones until `restart`. An AsyncLLM without references, and
without running requests, is closed. One process, one device. (vLLM: AsyncLLM.)
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from traceback import clear_frames
from typing import Any, Self

from qwen2vl.engine.arguments.conversations import (
    NOT_GIVEN,
    ConversationForm,
    as_batch,
    as_conversation,
)
from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.arguments.options import (
    as_params_list,
    check_sampling_keywords,
    refuse_load_options,
)
from qwen2vl.engine.async_stream import AsyncDeltaStream, PendingStream
from qwen2vl.engine.engine_core import EngineSession
from qwen2vl.engine.llm import LLM, llm_argument_names
from qwen2vl.engine.outputs import Completion
from qwen2vl.engine.request import Request, collect_completions
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.scheduler import RequestOutput
from qwen2vl.errors import EngineError, Qwen2VLError
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.processor import Processor

__all__ = ["AsyncLLM"]

logger = logging.getLogger(__name__)


class AsyncLLM:
    """An LLM for concurrent coroutines; the engine runs in its own thread and owns the LLM.

    As an async context manager it is closed at the end.
    """

    def __init__(
        self,
        llm: LLM | str | Path | Qwen2VL = "nano",
        processor: Processor | None = None,
        **options: Any,
    ) -> None:
        """Take over an LLM, or load one: other arguments are those of `LLM`.

        An LLM that was given stays usable after `close`; one that was loaded here is closed then.

        Raises:
            Qwen2VLError: as `LLM` does.
            EngineError: the LLM is in use, or was closed.
        """
        self._owns_llm = not isinstance(llm, LLM)
        check_keywords(options, (name for name in llm_argument_names() if name != "model"))
        if isinstance(llm, LLM):
            given = {"processor": processor, **options}
            refuse_load_options(given, "the LLM", "give it to LLM(...)")
        else:
            llm = LLM(llm, processor, **options)
        self.llm = llm
        self._restart_lock = threading.Lock()
        self._engine_thread = self._start_thread()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        cause = self._engine_thread.cause
        died = "closed" if cause is None else f"died: {type(cause).__name__}"
        return f"AsyncLLM({self.llm!r}, {'running' if self.is_alive else died})"

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread accepts requests."""
        return self._engine_thread.is_open

    def stream(
        self,
        conversation: ConversationForm = NOT_GIVEN,
        params: SamplingParams | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> PendingStream:
        """Submit one conversation, given as for `LLM.chat`, once the result is awaited or iterated.

        `await` returns the AsyncDeltaStream of its output; `async for` yields its deltas.

        Raises:
            InputError, CapacityError: as `LLM.chat` does, before anything is queued.
            EngineError: the engine has died, naming the first cause, or was closed.
        """

        async def submit() -> AsyncDeltaStream:
            self._engine_thread.check_open()
            check_sampling_keywords(sampling)
            messages = as_conversation(conversation, images, videos)
            prompt, request_params, seconds = await asyncio.to_thread(
                self.llm.prepare, messages, params, tools, **sampling
            )
            requests = self.llm.create_requests(prompt, request_params)
            stream = AsyncDeltaStream(self._request_abort, requests, seconds)
            self._engine_thread.submit(stream)
            return stream

        return PendingStream(submit())

    async def chat(
        self,
        conversations: ConversationForm | Sequence[ConversationForm] = NOT_GIVEN,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Generate the next assistant message of each conversation; as `LLM.chat`.

        If one conversation of a list is invalid, the others are aborted.

        Raises:
            Qwen2VLError: as `stream` does, or the only sample failed.
        """
        check_sampling_keywords(sampling)
        batch = as_batch(conversations, images, videos)
        params_list = as_params_list(params, sampling, len(batch.conversations))
        streams: list[AsyncDeltaStream] = []
        try:
            for index, conversation in enumerate(batch.conversations):
                with batch.naming(index):
                    streams.append(await self.stream(conversation, params_list[index], tools=tools))
            for stream in streams:
                async for _ in stream:
                    pass
        finally:
            for stream in streams:
                stream.abort()
        return collect_completions(
            [request for stream in streams for request in stream.requests],
            [stream.process_seconds for stream in streams for _ in stream.requests],
        )

    def close(self) -> None:
        """Stop the engine thread; running requests get an EngineError. Closing again does nothing.

        An LLM that was given to AsyncLLM stays usable; one that was loaded by it is closed.
        """
        thread = self._engine_thread
        thread.stop()
        thread.join()
        if self._owns_llm:
            self.llm.close()

    def restart(self) -> None:
        """Start the engine again, after it died or was closed; does nothing while it runs.

        Raises:
            EngineError: the LLM is in use, or was closed.
        """
        with self._restart_lock:
            if self._engine_thread.is_open:
                return
            self._engine_thread.join()  # it has delivered its last error and released the LLM
            self._engine_thread = self._start_thread()

    def _request_abort(self, requests: Sequence[Request]) -> None:
        self._engine_thread.request_abort(requests)

    def _start_thread(self) -> _EngineThread:
        thread = _EngineThread(self.llm.engine.acquire("AsyncLLM", is_async=True))
        weakref.finalize(self, thread.stop)  # else nobody could, and the LLM would stay in memory
        return thread


class _Abort:
    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests


_InputQueue = SimpleQueue[AsyncDeltaStream | _Abort | None]  # None: stop


class _EngineThread:
    """Runs the engine from the start until it is stopped or dies, and owns the LLM meanwhile.

    It refers to the AsyncLLM by running requests only. Methods are for other threads, private ones
    for its own.
    """

    def __init__(self, session: EngineSession) -> None:
        self.is_open = True
        self.cause: BaseException | None = None  # the first, if the engine died
        self._session = session
        self._lock = threading.Lock()  # of the next two: nothing is queued after the last reading
        self._input_queue: _InputQueue = SimpleQueue()
        self._streams: dict[Request, AsyncDeltaStream] = {}  # used by this thread only
        self._thread = threading.Thread(target=self._run_busy_loop, name="engine", daemon=True)
        self._thread.start()

    def check_open(self) -> None:
        """Raise an EngineError if the engine has died or was closed."""
        if not self.is_open:
            raise self._stopped_error()

    def submit(self, stream: AsyncDeltaStream) -> None:
        """Run the requests of a stream; errors as for `check_open`."""
        with self._lock:
            self.check_open()
            self._input_queue.put(stream)

    def request_abort(self, requests: Sequence[Request]) -> None:
        """Have requests aborted; a thread that has stopped has ended them already."""
        self._input_queue.put(_Abort(requests))

    def stop(self) -> None:
        """Stop after the current step; without a lock, because finalizers may run anywhere."""
        self._input_queue.put(None)

    def join(self) -> None:
        """Wait until the thread has ended all streams and released the LLM."""
        self._thread.join()

    def _stopped_error(self) -> EngineError:
        """Build the error of one caller; the first cause is that of all of them."""
        if self.cause is None:
            return EngineError("the engine was closed; AsyncLLM.restart() starts it again")
        error = EngineError(
            f"the engine died, and all its requests with it: {type(self.cause).__name__}: "
            f"{self.cause}; AsyncLLM.restart() starts it again"
        )
        error.__cause__ = self.cause
        return error

    def _run_busy_loop(self) -> None:
        """Process the input queue, run a step, deliver its outputs; until stopped or failed."""
        cause: BaseException | None = None
        try:
            while self._process_input_queue():
                for output in self._session.step():
                    self._deliver_output(output)
        except BaseException as error:
            logger.exception("the engine died")
            clear_frames(error.__traceback__)  # they hold the tensors of the failed step
            cause = error
        finally:
            self._shut_down(cause)

    def _process_input_queue(self) -> bool:
        """Read the input queue, blocking only when the engine is idle; False: stop."""
        while not self._input_queue.empty() or not self._session.has_unfinished_requests:
            if not self._process_message(self._input_queue.get()):
                return False
        return True

    def _process_message(self, message: AsyncDeltaStream | _Abort | None) -> bool:
        if isinstance(message, AsyncDeltaStream):
            self._add(message)
        elif message is not None:
            self._abort(message.requests)
        return message is not None

    def _add(self, stream: AsyncDeltaStream) -> None:
        """Add the requests of one caller; if that fails, it concerns this caller only."""
        # Before any is added: if the engine dies here, the caller must hear of it.
        self._streams.update(dict.fromkeys(stream.requests, stream))
        try:
            for request in stream.requests:
                self._session.add_request(request)
        except Qwen2VLError as error:
            self._abort(stream.requests)
            stream.deliver(error)

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self._streams.pop(request, None) is not None:
                self._session.abort(request)

    def _deliver_output(self, output: RequestOutput) -> None:
        request = output.request
        stream = self._streams.get(request)
        if stream is None:
            return  # queued by LLM.add_request before the AsyncLLM owned it
        if request.finish_reason is not None:
            del self._streams[request]
        stream.deliver(output.delta)

    def _shut_down(self, cause: BaseException | None) -> None:
        """Release the LLM, and end all streams with an error of their own."""
        try:
            self._session.release()
        finally:
            with self._lock:
                self.cause = cause
                self.is_open = False
                streams = set(self._streams.values())
                while not self._input_queue.empty():
                    message = self._input_queue.get()
                    if isinstance(message, AsyncDeltaStream):
                        streams.add(message)
            self._streams.clear()
            for stream in streams:
                stream.deliver(self._stopped_error())
