"""The scheduler's output: the tokens, encoder inputs and cache operations of one engine step.

`Scheduler.schedule` spends a `StepBudget` and returns a `SchedulerOutput`; `ModelRunner` executes
it and returns `SampledTokens` for each `TokenChunk`. The classes hold integers and references, no
tensors. The budget also decides how many frame pairs of an item are encoded in the step.
(vLLM: SchedulerOutput, SchedulerConfig.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen2vl.engine.kv_cache.block_pool import CacheOperation
from qwen2vl.engine.outputs import TokenLogprob
from qwen2vl.engine.request import Request
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.processor.inputs import Item

__all__ = [
    "EncoderChunk",
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
class EncoderChunk:
    """Frame pairs start..stop of one item, to run through the vision tower."""

    item: Item
    start: int
    stop: int
    adapter: LoraAdapter | None = None  # LoRA adapter of the vision tower

    @property
    def num_patches(self) -> int:
        """The number of patches to encode."""
        return (self.stop - self.start) * self.item.grid.h * self.item.grid.w


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step, executed in this order: cache operations, encoder chunks, token chunks."""

    cache_operations: deque[CacheOperation]  # the pool's own queue; executed ones are removed
    encoder_chunks: tuple[EncoderChunk, ...]
    encoder_requests: tuple[Request, ...]  # requests that wait for the encoder chunks
    token_chunks: tuple[TokenChunk, ...]

    @property
    def largest_request(self) -> Request:
        """The request with the most tokens in this step."""
        if self.token_chunks:
            return max(self.token_chunks, key=lambda chunk: chunk.num_tokens).request
        return self.largest_encoder_request

    @property
    def largest_encoder_request(self) -> Request:
        """A request that waits for the largest encoder chunk."""
        largest = max(self.encoder_chunks, key=lambda chunk: chunk.num_patches)
        digest = largest.item.digest
        return next(
            request
            for request in self.encoder_requests
            if digest in (item.digest for item in request.held_items)
        )


class StepBudget:
    """The remaining budget of a step, and what has been scheduled so far."""

    def __init__(self, limits: StepLimits) -> None:
        self.remaining_tokens = limits.max_num_batched_tokens
        self.remaining_patches = limits.max_num_encoder_patches
        self.encoder_chunks: list[EncoderChunk] = []
        self.encoder_requests: list[Request] = []
        self.token_chunks: list[TokenChunk] = []
        self._encoded: dict[bytes, int] = {}  # digest -> frame pairs encoded after this step

    def schedule_encoder(self, request: Request, item: Item, num_encoded: int) -> int:
        """Schedule more frame pairs of an item within the budget.

        Args:
            request: the request that needs the item.
            item: the image or video.
            num_encoded: frame pairs whose embeddings exist already.

        Returns:
            How many of its frame pairs will be encoded after this step.
        """
        if num_encoded < item.grid.t:
            self.encoder_requests.append(request)
        if item.digest in self._encoded:
            return self._encoded[item.digest]
        patches_per_pair = item.grid.h * item.grid.w
        count = min(item.grid.t - num_encoded, max(0, self.remaining_patches) // patches_per_pair)
        if count == 0 and num_encoded < item.grid.t and not self.encoder_chunks:
            count = 1  # one frame pair exceeds the whole budget: encode it alone
        if count > 0:
            self.encoder_chunks.append(
                EncoderChunk(item, num_encoded, num_encoded + count, request.adapter)
            )
            self.remaining_patches -= count * patches_per_pair
        self._encoded[item.digest] = num_encoded + count
        return num_encoded + count
