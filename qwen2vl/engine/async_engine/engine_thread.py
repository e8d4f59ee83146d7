"""The thread of AsyncLLM that owns the engine: it runs steps and operations, and delivers outputs.

The thread reads its input queue between two steps: new requests, aborts, and operations, which are
functions of the engine core (embedding). All deltas of one step that go to one event loop are
delivered by one `call_soon_threadsafe`, since each call wakes that loop. If a step fails, the
thread ends, and all requests with it. (vLLM: EngineCoreProc.)
"""

from __future__ import annotations

import logging
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from traceback import clear_frames
from typing import Any, TypeVar

import torch

from qwen2vl.engine.async_engine.async_stream import AsyncDeltaStream, deliver_deltas, final_delta
from qwen2vl.engine.engine_core import EngineCore, EngineSession
from qwen2vl.engine.outputs import Delta
from qwen2vl.engine.request import Request, unexpected_request_error
from qwen2vl.engine.scheduler.output import RequestOutput
from qwen2vl.errors import EngineDeadError, Qwen2VLError

__all__ = ["EngineThread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Abort:
    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests


class _Operation:
    """A function that runs between two steps; an error of it concerns its caller only."""

    def __init__(self, function: Callable[[EngineCore], Any], name: str) -> None:
        self.function = function
        self.name = name
        self.future: Future[Any] = Future()

    def __call__(self, core: EngineCore) -> Any:
        try:
            return self.function(core)
        except (Qwen2VLError, torch.AcceleratorError):  # the latter: the device has failed for all
            raise
        except Exception as error:
            raise unexpected_request_error(self.name, error) from error


_Message = AsyncDeltaStream | _Abort | _Operation | None  # None: stop


class EngineThread:
    """Runs the engine from the start until it is stopped or dies, and owns the LLM meanwhile.

    It refers to the AsyncLLM by running requests only. Methods are for other threads, private ones
    for its own.
    """

    def __init__(self, session: EngineSession) -> None:
        self.is_open = True
        self.cause: BaseException | None = None  # the first, if the engine died
        self._session = session
        self._lock = threading.Lock()  # of the next two: nothing is queued after the last reading
        self._input_queue: SimpleQueue[_Message] = SimpleQueue()
        self._num_submitted = 0  # requests; written with the lock
        # The rest is written by this thread only.
        self._num_added = 0  # of the submitted requests, those read from the queue
        self._streams: dict[Request, AsyncDeltaStream] = {}
        self._operation: _Operation | None = None  # the one that runs now
        self._busy_since = 0.0  # when the current step or operation began; 0.0: idle
        self._thread = threading.Thread(target=self._run_busy_loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_queued(self) -> int:
        """Requests that were submitted and not yet read from the input queue."""
        return max(0, self._num_submitted - self._num_added) if self.is_open else 0

    @property
    def seconds_in_step(self) -> float:
        """How long the current step or operation has been running; 0.0 when idle."""
        began = self._busy_since
        return time.monotonic() - began if began else 0.0

    def check_open(self) -> None:
        """Raise an EngineError if the engine has died or was closed."""
        if not self.is_open:
            raise self._stopped_error()

    def submit(self, stream: AsyncDeltaStream) -> None:
        """Run the requests of a stream; errors as for `check_open`."""
        for request in stream.requests:
            request.timer.mark_submitted()
        with self._lock:
            self.check_open()
            self._num_submitted += len(stream.requests)
            self._input_queue.put(stream)

    def submit_operation(self, function: Callable[[EngineCore], T], name: str) -> Future[T]:
        """Run a function with the engine core between two steps; return the future of its result.

        An exception of the function is the result; `name` says in its text what has failed. It runs
        no more if the future is canceled before. Errors as for `check_open`.
        """
        operation = _Operation(function, name)
        with self._lock:
            self.check_open()
            self._input_queue.put(operation)
        return operation.future

    def request_abort(self, requests: Sequence[Request]) -> None:
        """Have requests aborted; a thread that has stopped has ended them already."""
        self._input_queue.put(_Abort(requests))

    def stop(self) -> None:
        """Stop after the current step; without a lock, because finalizers may run anywhere."""
        self._input_queue.put(None)

    def join(self) -> None:
        """Wait until the thread has ended all streams and released the LLM."""
        self._thread.join()

    def _stopped_error(self) -> EngineDeadError:
        """Build the error of one caller; the first cause is that of all of them."""
        if self.cause is None:
            return EngineDeadError("the engine was closed; AsyncLLM.restart() starts it again")
        error = EngineDeadError(
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
                self._busy_since = time.monotonic()
                self._deliver_outputs(self._session.step())
                self._busy_since = 0.0
        except BaseException as error:
            logger.exception("the engine died")
            clear_frames(error.__traceback__)  # they hold the tensors of the failed step
            cause = error
        finally:
            self._shut_down(cause)

    def _process_input_queue(self) -> bool:
        """Read the input queue, blocking only when the engine is idle; False: stop."""
        while not self._input_queue.empty() or not self._session.has_unfinished_requests:
            match self._input_queue.get():
                case None:
                    return False
                case AsyncDeltaStream() as stream:
                    self._add(stream)
                case _Abort() as message:
                    self._abort(message.requests)
                case _Operation() as operation:
                    self._run_operation(operation)
                    if self._session.has_unfinished_requests:
                        return True  # at most one operation between two steps
        return True

    def _add(self, stream: AsyncDeltaStream) -> None:
        """Add the requests of one caller; if that fails, it concerns this caller only."""
        self._num_added += len(stream.requests)
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

    def _run_operation(self, operation: _Operation) -> None:
        if not operation.future.set_running_or_notify_cancel():
            return
        self._operation, self._busy_since = operation, time.monotonic()
        try:
            result = self._session.run_operation(operation)
        except Qwen2VLError as error:
            clear_frames(error.__traceback__)
            operation.future.set_exception(error.with_traceback(None))
        else:
            operation.future.set_result(result)
        self._operation, self._busy_since = None, 0.0

    def _deliver_outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Deliver the outputs of one step, waking each event loop once."""
        deliveries: dict[AbstractEventLoop, list[tuple[AsyncDeltaStream, Delta]]] = {}
        for output in outputs:
            request = output.request
            stream = self._streams.get(request)
            if stream is None:
                continue  # queued by LLM.add_request before the AsyncLLM owned it
            if request.finish_reason is not None:
                del self._streams[request]
            elif stream.final_only:
                continue
            delta = final_delta(request) if stream.final_only else output.delta
            deliveries.setdefault(stream.loop, []).append((stream, delta))
        for loop, deltas in deliveries.items():
            deliver_deltas(loop, deltas)

    def _shut_down(self, cause: BaseException | None) -> None:
        """Release the LLM, and end all streams and operations with an error of their own."""
        try:
            self._session.release()
        finally:
            with self._lock:
                self.cause = cause
                self.is_open = False
                self._busy_since = 0.0
                streams = set(self._streams.values())
                operations = [] if self._operation is None else [self._operation]
                while not self._input_queue.empty():
                    message = self._input_queue.get()
                    if isinstance(message, AsyncDeltaStream):
                        streams.add(message)
                    elif isinstance(message, _Operation):
                        operations.append(message)
            self._streams.clear()
            for stream in streams:
                stream.deliver(self._stopped_error())
            for operation in operations:
                if operation.future.running() or operation.future.set_running_or_notify_cancel():
                    operation.future.set_exception(self._stopped_error())
