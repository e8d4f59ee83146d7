"""The state of one request: prompt, output tokens, detokenized text and stop conditions.

`Request.append` takes one sampled token and returns the text that no later token can change: never
part of a character, never the beginning of a stop string. The request also holds the scheduler's
state (computed tokens, cache allocation, block hashes) and its timings. No model, no tensors but
positions. (vLLM: v1.request.Request, IncrementalDetokenizer.)
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from math import fsum
from traceback import clear_frames
from typing import Protocol

import torch
from torch import Tensor

from qwen2vl.engine.kv_cache.block_pool import BlockHashes, CacheAllocation
from qwen2vl.engine.outputs import Completion, FinishReason, ItemReport, Timings, TokenLogprob
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.sampling.sampler import Sampler
from qwen2vl.errors import EngineError, Qwen2VLError, copy_error
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = [
    "Detokenizer",
    "Request",
    "StopStringBuffer",
    "collect_completions",
    "unexpected_request_error",
]

logger = logging.getLogger(__name__)


class Detokenizer(Protocol):
    """Incremental detokenizer: token ids in, complete characters out."""

    def push(self, token: int) -> str:
        """Add one token id; return the text that is complete by now."""
        ...

    def finish(self) -> str:
        """Return the text that is still held back."""
        ...


class StopStringBuffer:
    """Finds stop strings in streamed text and holds back what may be the beginning of one.

    The stop string that is complete first wins, independent of token boundaries; of two that are
    complete at the same character, the longer.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        self.stop_strings = tuple(stop_strings)
        self.pending = ""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Add text; return what can be released, and the stop string that was found."""
        self.pending += piece
        found = [
            (at + len(stop), at, stop)
            for stop in self.stop_strings
            if (at := self.pending.find(stop)) >= 0
        ]
        if found:
            _, at, stop = min(found)
            text, self.pending = self.pending[:at], ""
            return text, stop
        num_held = self._num_held_characters()
        text = self.pending[: len(self.pending) - num_held]
        self.pending = self.pending[len(text) :]
        return text, None

    def flush(self) -> str:
        """Release the pending text: the output has ended without completing a stop string."""
        text, self.pending = self.pending, ""
        return text

    def _num_held_characters(self) -> int:
        """Count the trailing characters that are the beginning of some stop string."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        for length in range(min(longest, len(self.pending)), 0, -1):
            if any(stop.startswith(self.pending[-length:]) for stop in self.stop_strings):
                return length
        return 0


class Request:
    """One request, from its prompt to its completion."""

    def __init__(
        self,
        prompt: ModelInput,
        params: SamplingParams,
        detokenizer: Detokenizer,
        sampler: Sampler,
        *,
        stop_token_ids: frozenset[int],
        max_model_len: int,
        index: int = 0,
        adapter: LoraAdapter | None = None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.sampler = sampler
        self.index = index  # which completion of the call
        self.adapter = adapter
        self.all_token_ids = list(prompt.input_ids)  # the prompt, then the output
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None  # the stop string or token of `params`
        self.can_draft = True  # False after an error of the draft proposer
        self.error: Qwen2VLError | None = None
        self.max_tokens = min(params.max_tokens, max_model_len - len(prompt.input_ids))
        # State of the scheduler.
        self.block_hashes = BlockHashes(prompt, b"" if adapter is None else adapter.digest)
        self.allocation: CacheAllocation | None = None
        self.num_computed_tokens = 0  # tokens whose keys and values are in the KV cache
        self.num_cached_tokens = 0  # of them, found in the prefix cache at first admission
        self.num_reused_tokens = 0  # the same, at the last admission
        self.skip_reading_prefix_cache = False  # after reused blocks gave logits with NaN
        self.num_draft_tokens = self.num_accepted_tokens = 0  # of speculative decoding
        # Frame pairs whose embeddings are kept for it: (token after their last one, digest).
        self.held_pairs: deque[tuple[int, bytes]] = deque()
        self.timer = RequestTimer()
        self._num_streamed_tokens = 0  # output tokens that deltas have reported
        self._stop_token_ids = stop_token_ids
        self._detokenizer = detokenizer
        self._stop_buffer = StopStringBuffer(params.stop)

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.all_token_ids[len(self.prompt.input_ids) :]

    @property
    def max_num_tokens(self) -> int:
        """The maximum number of tokens of prompt and output together."""
        return len(self.prompt.input_ids) + self.max_tokens

    @property
    def streams_video(self) -> bool:
        """Whether a video of the prompt is decoded while it is prefilled."""
        return any(item.source is not None for item in self.prompt.items)

    def end_decoding(self) -> None:
        """End the decoding of its videos, which are computed, or no longer wanted."""
        for item in self.prompt.items:
            if item.source is not None:
                item.source.close()

    @property
    def is_prefilling(self) -> bool:
        """Whether more tokens than the newest one are still to be computed."""
        return len(self.all_token_ids) - self.num_computed_tokens > 1

    def positions(self, start: int, stop: int) -> Tensor:
        """Return M-RoPE positions of tokens start..stop: (3, stop - start).

        Output tokens are text: their position is their index plus `rope_delta` on all three axes.
        """
        prompt_length, delta = len(self.prompt.input_ids), self.prompt.rope_delta
        prompt_3T = self.prompt.position_ids_3T[:, start:stop]
        if stop <= prompt_length:
            return prompt_3T
        output_3T = torch.arange(max(start, prompt_length) + delta, stop + delta).expand(3, -1)
        return output_3T if start >= prompt_length else torch.cat([prompt_3T, output_3T], dim=1)

    def append(self, token_id: int, logprob: TokenLogprob | None = None) -> str:
        """Append a sampled token; return the text that it completes."""
        assert self.finish_reason is None, "the request has finished"
        self.all_token_ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self._stop_token_ids:
            if token_id in self.params.stop_token_ids:
                self.stop_reason = token_id
            return self._finish("stop", self._flush())
        text, self.stop_reason = self._stop_buffer.push(self._detokenizer.push(token_id))
        if self.stop_reason is not None:
            return self._finish("stop", text)
        if len(self.all_token_ids) == self.max_num_tokens:
            return self._finish("length", text + self._flush())
        self.text += text
        return text

    def take_new_tokens(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Return the output tokens since the last call, and their logprobs if asked for."""
        start = self._num_streamed_tokens
        token_ids = tuple(self.all_token_ids[len(self.prompt.input_ids) + start :])
        self._num_streamed_tokens += len(token_ids)
        return token_ids, tuple(self.logprobs[start:])

    def fail(self, error: Qwen2VLError) -> None:
        """Finish with an error; the output so far is kept."""
        # The frames of the tracebacks would keep the failed step's tensors while memory is short.
        # Without a traceback they can still be part of cycles (contextlib, from Python 3.12 on).
        raised: BaseException | None = error
        while raised is not None:
            clear_frames(raised.__traceback__)
            raised = raised.__cause__ or raised.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        self.error = error
        self._finish("error", "")

    def completion(self, *, process_seconds: float = 0.0) -> Completion:
        """Build the completion; `process_seconds` is the time that preprocessing took."""
        assert self.finish_reason is not None, "the request has not finished"
        prompt = self.prompt
        logprobs = None if self.params.logprobs is None else tuple(self.logprobs)
        return Completion(
            text=self.text,
            token_ids=tuple(self.output_token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            prompt_tokens=len(prompt.input_ids),
            image_tokens=prompt.image_tokens,
            video_tokens=prompt.video_tokens,
            items=tuple(_item_report(item) for item in prompt.items),
            cached_tokens=self.num_cached_tokens,
            seconds=self.timer.timings(process_seconds),
            logprobs=logprobs,
            cumulative_logprob=None if logprobs is None else fsum(one.logprob for one in logprobs),
            error=None if self.error is None else str(self.error),
        )

    def _flush(self) -> str:
        """Release the text held back; its last characters may still complete a stop string."""
        text, found = self._stop_buffer.push(self._detokenizer.finish())
        return text if found else text + self._stop_buffer.flush()

    def _finish(self, reason: FinishReason, text: str) -> str:
        self.finish_reason = reason
        self.text += text
        self.timer.finished_at = time.perf_counter()
        return text


class RequestTimer:
    """Timestamps of one request: submitted, first scheduled, prefilled, finished."""

    def __init__(self) -> None:
        self.submitted_at = self.scheduled_at = self.prefilled_at = self.finished_at = 0.0
        self.vision_seconds = 0.0  # encoder time of all steps that encoded any of its items

    def mark_submitted(self) -> None:
        """Record when the request is submitted; later calls do nothing."""
        self.submitted_at = self.submitted_at or time.perf_counter()

    def mark_scheduled(self) -> None:
        """Record when the request is first scheduled; later calls do nothing."""
        self.scheduled_at = self.scheduled_at or time.perf_counter()

    def mark_prefilled(self) -> None:
        """Record when the prompt is computed, before the first token is sampled."""
        self.prefilled_at = self.prefilled_at or time.perf_counter()

    def timings(self, process_seconds: float) -> Timings:
        """Divide the time from submitted to finished into phases."""
        prefilled_at = self.prefilled_at or self.finished_at
        return Timings(
            process=process_seconds,
            queue=max(0.0, self.scheduled_at - (self.submitted_at or self.scheduled_at)),
            vision=self.vision_seconds,
            prefill=max(0.0, prefilled_at - self.scheduled_at - self.vision_seconds),
            decode=self.finished_at - prefilled_at,
        )


def collect_completions(
    requests: Sequence[Request], process_seconds: Sequence[float]
) -> list[Completion]:
    """Build the completions of finished requests, given their preprocessing times.

    Raises:
        Qwen2VLError: the only request failed; of several, a failed one has finish_reason "error".
    """
    if len(requests) == 1 and requests[0].error is not None:
        raise copy_error(requests[0].error)
    pairs = zip(requests, process_seconds, strict=True)
    return [request.completion(process_seconds=seconds) for request, seconds in pairs]


def unexpected_request_error(part: str, error: Exception) -> EngineError:
    """Log an unexpected error in a part of one request, and return what that request ends with."""
    logger.error("%s failed in one request, which ends; the others go on", part, exc_info=error)
    ended = EngineError(
        f"{part} failed in this request only, by a bug of this library: "
        f"{type(error).__name__}: {error}; report it, and send the request again without its "
        "rarer parameters"
    )
    ended.__cause__ = error
    return ended


def _item_report(item: Item) -> ItemReport:
    return ItemReport(
        kind=item.kind,
        name=item.name,
        original_size=item.original_size,
        resized_size=item.resized_size,
        tokens=item.num_tokens,
        frame_timestamps=item.frame_timestamps,
        notes=item.notes,
        orientation=item.orientation,
    )
