"""AsyncLLM: asyncio interface with streaming, for many concurrent callers of one engine.

    caller --messages--> processor (a worker thread) --requests--> input queue
    engine thread: input queue -> engine step -> deltas --call_soon_threadsafe--> the callers' loop

The engine thread owns the LLM: only it uses scheduler, caches and model. A caller that stops
iterating or is canceled has its request aborted. If the engine dies, all callers get an EngineError
with the first cause, and so do later ones until `restart`. An AsyncLLM without references, and
without running requests, is closed. One process, one device. (vLLM: AsyncLLM.)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor

from qwen2vl.engine.arguments.conversations import (
    NOT_GIVEN,
    ConversationForm,
    as_batch,
    as_conversation,
    naming,
)
from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.arguments.options import (
    as_params_list,
    check_choice,
    check_sampling_keywords,
    refuse_load_options,
)
from qwen2vl.engine.async_engine.async_stream import AsyncDeltaStream, PendingStream
from qwen2vl.engine.async_engine.engine_thread import EngineThread
from qwen2vl.engine.embed import Pooling, batch_prompts
from qwen2vl.engine.llm import LLM, llm_argument_names
from qwen2vl.engine.outputs import Completion
from qwen2vl.engine.request import Request, collect_completions
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.stats import EngineStats
from qwen2vl.engine.validation import PreparedRequest
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor

__all__ = ["AsyncLLM"]


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

    @property
    def seconds_in_step(self) -> float:
        """How long the engine thread has been in its current step or operation; 0.0 when idle.

        A step takes milliseconds to seconds; one that takes much longer hangs.
        """
        return self._engine_thread.seconds_in_step

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
            prepared = await asyncio.to_thread(
                self.llm.prepare, messages, params, tools, **sampling
            )
            return self.stream_prepared(prepared)

        return PendingStream(submit())

    def stream_prepared(
        self, prepared: PreparedRequest, *, final_only: bool = False
    ) -> AsyncDeltaStream:
        """Submit a request that `LLM.prepare` returned; call it where an event loop runs.

        With `final_only` each sample has one delta, its last, with its whole text and all of its
        tokens, and the loop is not woken before. (vLLM: RequestOutputKind.FINAL_ONLY.)

        Raises:
            EngineError: the engine has died, naming the first cause, or was closed.
        """
        self._engine_thread.check_open()
        requests = self.llm.create_requests(prepared.prompt, prepared.params)
        stream = AsyncDeltaStream(
            self._request_abort, requests, prepared.process_seconds, final_only=final_only
        )
        self._engine_thread.submit(stream)
        return stream

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

    async def embed(
        self,
        prompts: Sequence[ModelInput],
        *,
        pooling: Pooling = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Return one L2-normalized embedding for each prompt: (S, D) float32, on the CPU.

        As `LLM.embed`. Runs between the steps of other requests, a forward's worth of prompts at a
        time; a caller that is canceled ends it after the current one.

        Raises:
            InputError, CapacityError: a prompt is not valid; the text names its index.
            EngineError: the engine has died, or was closed; or the embeddings are not finite.
        """
        check_choice("pooling", pooling, get_args(Pooling))
        self._engine_thread.check_open()
        params = SamplingParams(max_tokens=1, adapter=adapter)
        for index, prompt in enumerate(prompts):
            with naming(f"prompts[{index}]"):
                self.llm.validate(prompt, params)
        vectors = [torch.empty(0, self.llm.config.text.hidden_size)]
        for batch in batch_prompts(prompts, self.llm.engine_config.max_num_batched_tokens):
            embed = partial(self.llm.embed_prompts, batch, pooling=pooling, adapter=adapter)
            future = self._engine_thread.submit_operation(embed, "embedding")
            vectors.append(await asyncio.wrap_future(future))
        return torch.cat(vectors)

    def stats(self) -> EngineStats:
        """Return the engine's statistics at this moment, without waiting; thread-safe.

        All are 0 while there is no engine, except totals, which never decrease.
        """
        stats = self.llm.stats()
        return replace(stats, num_waiting=stats.num_waiting + self._engine_thread.num_queued)

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

    def _start_thread(self) -> EngineThread:
        thread = EngineThread(self.llm.engine.acquire("AsyncLLM", is_async=True))
        weakref.finalize(self, thread.stop)  # else nobody could, and the LLM would stay in memory
        return thread
