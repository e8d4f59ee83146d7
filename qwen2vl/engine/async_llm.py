"""The same engine behind a queue: many callers, one thread that computes, answers as streams.

    caller --messages--> processor (a worker thread) --sequences--> inbox
    engine thread: inbox -> step -> news --call_soon_threadsafe--> the caller's loop

The engine thread alone touches scheduler, caches and model. A caller that goes away has its request
cancelled; an engine that dies tells everybody why, and stays dead. One process, one device. It
must not know HTTP. Next room: serve, which speaks it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from collections.abc import Sequence as SequenceOf
from queue import SimpleQueue
from typing import Any

from qwen2vl.engine.llm import LLM
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.scheduler import News
from qwen2vl.engine.validation import Conversation
from qwen2vl.errors import EngineError

__all__ = ["Answer", "AsyncLLM"]

log = logging.getLogger(__name__)


class Answer:
    """One request under way: iterate over its deltas, then await its completions."""

    def __init__(self, owner: AsyncLLM, sequences: list[Sequence], process: float) -> None:
        self._owner = owner
        self._sequences = sequences
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self._open = len(sequences)  # samples that are not over
        self._failure: EngineError | None = None  # why they never will be

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield news of all samples as they come; leaving early cancels the request.

        Raises:
            EngineError: the engine died, or somebody else cancelled the request.
        """
        try:
            while self._open and self._failure is None:
                delta = await self._deltas.get()
                if isinstance(delta, EngineError):
                    self._failure = delta
                    raise delta
                self._open -= delta.finish_reason is not None
                yield delta
        finally:
            self.cancel()

    async def completions(self) -> list[Completion]:
        """Wait for the end; one Completion for each sample.

        Raises:
            Qwen2VLError: the only sample failed, the request was cancelled, or the engine died.
        """
        async for _ in self:
            pass
        if self._failure is not None:
            raise self._failure
        first = self._sequences[0]
        if len(self._sequences) == 1 and first.error is not None:
            raise first.error
        return [sequence.completion(process=self._process) for sequence in self._sequences]

    def cancel(self) -> None:
        """Stop answering, unless it is over; whoever still listens hears that it was cancelled."""
        if self._open and self._failure is None:
            self._failure = EngineError("the request was cancelled before its answer was whole")
            self._owner._send(_Cancel(self._sequences))
            self._deltas.put_nowait(self._failure)

    def _hear(self, delta: Delta | EngineError) -> None:
        """Take news from the engine thread; a loop that is closed has nobody listening."""
        try:
            self._loop.call_soon_threadsafe(self._deltas.put_nowait, delta)
        except RuntimeError:
            self._owner._send(_Cancel(self._sequences))


class _Cancel:
    def __init__(self, sequences: SequenceOf[Sequence]) -> None:
        self.sequences = sequences


class AsyncLLM:
    """An LLM that many coroutines may ask at once."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._inbox: SimpleQueue[tuple[Answer, list[Sequence]] | _Cancel | None] = SimpleQueue()
        self._answers: dict[Sequence, Answer] = {}  # of the engine thread alone
        self._death: EngineError | None = None
        self._thread = threading.Thread(target=self._turn, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The engine answers."""
        return self._death is None and self._thread.is_alive()

    async def ask(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
    ) -> Answer:
        """Begin to answer one conversation.

        Raises:
            InputError, CapacityError: as `LLM.chat` does, before anything is queued.
            EngineError: the engine has died; carries the first cause.
        """
        self._check_alive()
        wish = params or SamplingParams()
        prompt, wish, seconds = await asyncio.to_thread(self.llm.prepare, messages, wish, tools)
        sequences = self.llm.sequences(prompt, wish)
        answer = Answer(self, sequences, seconds)
        self._send((answer, sequences))
        self._check_alive()  # after sending, since one that has died reads its inbox no more
        return answer

    async def chat(
        self, messages: Conversation, params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answer one conversation; one Completion for each sample."""
        return await (await self.ask(messages, params)).completions()

    def close(self) -> None:
        """Stop the engine thread; answers under way end with an EngineError, the LLM is free."""
        self._send(None)
        self._thread.join()

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death

    def _send(self, message: tuple[Answer, list[Sequence]] | _Cancel | None) -> None:
        self._inbox.put(message)

    def _turn(self) -> None:
        """Live: take in what came, step, tell; until closed or dead."""
        try:
            while self._take_in():
                for news in self.llm.step():
                    self._tell(news)
        except Exception as error:
            log.exception("the engine died")
            self._die(EngineError(f"the engine died: {type(error).__name__}: {error}"))
        else:
            for sequence in self._answers:
                self.llm.cancel(sequence)
            self._die(EngineError("the engine was closed"))

    def _take_in(self) -> bool:
        """Read the inbox, waiting only when there is nothing to do; False: closed."""
        while not self._inbox.empty() or not self.llm.scheduler.has_work:
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, _Cancel):
                for sequence in message.sequences:
                    if self._answers.pop(sequence, None) is not None:
                        self.llm.cancel(sequence)
                continue
            answer, sequences = message
            for sequence in sequences:
                self._answers[sequence] = answer
                self.llm.scheduler.add(sequence)
        return True

    def _tell(self, news: News) -> None:
        one = news.sequence
        answer = self._answers[one]
        if one.finish_reason is not None:
            del self._answers[one]
        answer._hear(Delta(index=one.index, text=news.text, finish_reason=one.finish_reason))

    def _die(self, error: EngineError) -> None:
        self._death = error
        waiting = set(self._answers.values())
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, tuple):
                waiting.add(message[0])
        for answer in waiting:
            answer._hear(error)
