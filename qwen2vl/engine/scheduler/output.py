"""The scheduler's output: the tokens, encoder inputs and cache operations of one engine step.

`Scheduler.schedule` spends a `StepBudget` and returns a `SchedulerOutput`; `ModelRunner` executes
it and returns `SampledTokens` for each `TokenChunk`. The classes hold integers and references, and
the patches to encode. The budget also decides which frame pairs are encoded in the step.
(vLLM: SchedulerOutput, SchedulerConfig.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from qwen2vl.engine.kv_cache.block_pool import CacheOperation
from qwen2vl.engine.outputs import Delta, TokenLogprob
from qwen2vl.engine.request import Request
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.processor.inputs import Item, PairSource

__all__ = [
    "EncoderInput",
    "RequestOutput",
    "SampledTokens",
    "SchedulerOutput",
    "StepBudget",
    "StepLimits",
    "TokenChunk",
]

SampledTokens = list[
    tuple[int, TokenLogprob | None]
]  # new tokens; empty while the prompt is incomplete


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """Upper limits of one engine step."""

    max_num_batched_tokens: int = 1024  # sum over all token chunks
    max_num_encoder_patches: int = 4096  # sum over all items; a larger frame pair is encoded alone
    max_num_seqs: int = 16  # running requests


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens start..stop of one request, followed by draft tokens to verify."""

    request: Request
    start: int
    stop: int
    draft_tokens: tuple[int, ...] = ()

    @property
    def input_ids(self) -> list[int]:
        """The token ids of the forward: known tokens, then draft tokens."""
        return [*self.request.all_token_ids[self.start : self.stop], *self.draft_tokens]

    @property
    def num_tokens(self) -> int:
        """The length of `input_ids`, without building the list."""
        return self.stop - self.start + len(self.draft_tokens)

    @property
    def is_decode(self) -> bool:
        """Whether it is one output token without drafts, whose position is equal on all axes."""
        request = self.request
        return (
            self.num_tokens == 1
            and self.stop == len(request.all_token_ids)
            and self.start >= len(request.prompt.input_ids)
        )

    @property
    def num_logits(self) -> int:
        """How many of the last hidden states need logits; 0 while the prompt is incomplete."""
        return 1 + len(self.draft_tokens) if self.stop == len(self.request.all_token_ids) else 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """New text and tokens of one request; with the last, `request.finish_reason` is set."""

    request: Request
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]

    @classmethod
    def take(cls, request: Request, text: str) -> RequestOutput:
        """Return text, and the tokens that were sampled since the last output of the request."""
        return cls(request, text, *request.take_new_tokens())

    @property
    def delta(self) -> Delta:
        """What the caller of the request is given."""
        return Delta(
            index=self.request.index,
            text=self.text,
            finish_reason=self.request.finish_reason,
            stop_reason=self.request.stop_reason,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One frame pair of an item, to run through the vision tower."""

    item: Item
    index: int
    digest: bytes  # the key of its embeddings
    patches_NP: Tensor  # (h * w, P)
    adapter: LoraAdapter | None = None  # LoRA adapter of the vision tower

    @classmethod
    def load(cls, item: Item, index: int, adapter: LoraAdapter | None = None) -> EncoderInput:
        """Return the input of a pair; one that is not decoded is waited for."""
        patches_NP, digest = item.load_pair(index), item.pair_digest(index)
        assert digest is not None, "the pair is decoded"
        return cls(item, index, digest, patches_NP, adapter)

    @property
    def num_patches(self) -> int:
        """The number of patches to encode."""
        return self.item.grid.h * self.item.grid.w


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step, executed in this order: cache operations, encoder inputs, token chunks."""

    cache_operations: deque[CacheOperation]  # the pool's own queue; executed ones are removed
    encoder_inputs: tuple[EncoderInput, ...]
    encoder_requests: tuple[Request, ...]  # requests that wait for the encoder inputs
    token_chunks: tuple[TokenChunk, ...]
    awaited_pairs: tuple[tuple[PairSource, int], ...] = ()  # not decoded yet: what requests lack
    failed: tuple[RequestOutput, ...] = ()  # requests whose video could not be decoded

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.encoder_inputs and not self.token_chunks

    @property
    def largest_request(self) -> Request:
        """The request with the most tokens in this step."""
        if self.token_chunks:
            return max(self.token_chunks, key=lambda chunk: chunk.num_tokens).request
        return self.largest_encoder_request

    @property
    def largest_encoder_request(self) -> Request:
        """A request that waits for the largest encoder input."""
        largest = max(self.encoder_inputs, key=lambda one: one.num_patches).item
        return next(
            request
            for request in self.encoder_requests
            if any(item is largest for item in request.prompt.items)
        )


class StepBudget:
    """The remaining budget of a step, and what has been scheduled so far."""

    def __init__(self, limits: StepLimits) -> None:
        self.remaining_tokens = limits.max_num_batched_tokens
        self.remaining_patches = limits.max_num_encoder_patches
        self.encoder_inputs: list[EncoderInput] = []
        self.encoder_requests: list[Request] = []
        self.token_chunks: list[TokenChunk] = []
        self.awaited_pairs: list[tuple[PairSource, int]] = []
        self.failed: list[RequestOutput] = []
        self._scheduled: set[bytes] = set()  # digests of the encoder inputs

    def await_decoding(self, item: Item, index: int) -> None:
        """Have a frame pair of a streamed video decoded, which a request needs.

        Raises:
            Qwen2VLError: it cannot be decoded.
        """
        assert item.source is not None, "other items are decoded"
        item.source.prefetch(index)
        self.awaited_pairs.append((item.source, index))

    def schedule_encoder(self, request: Request, item: Item, index: int) -> bool:
        """Schedule a frame pair without embeddings, for a request that needs it.

        Returns whether it will have embeddings after this step. One that exceeds the whole budget
        is encoded alone; one that is not decoded is awaited.

        Raises:
            Qwen2VLError: it cannot be decoded.
        """
        self.encoder_requests.append(request)
        if item.pair_digest(index) in self._scheduled:
            return True
        if item.source is not None and item.pair_patches(index) is None:
            self.await_decoding(item, index)
            return False
        encoder_input = EncoderInput.load(item, index, request.adapter)
        if self.encoder_inputs and encoder_input.num_patches > self.remaining_patches:
            return False
        self.encoder_inputs.append(encoder_input)
        self.remaining_patches -= encoder_input.num_patches
        self._scheduled.add(encoder_input.digest)
        return True
