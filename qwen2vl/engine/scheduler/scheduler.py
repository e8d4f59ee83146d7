"""Continuous batching scheduler with chunked prefill, prefix caching and preemption.

Each step has a token budget and an encoder (patch) budget. Decoding requests are scheduled first,
one token each plus its draft tokens; the remaining budget goes to prompts, in chunks, first come
first served. A chunk ends early, also inside an image, where vision embeddings are not encoded yet.
When the KV cache is full, the most recently started request is preempted: its allocation is
released, and it is recomputed later, except for prefix blocks that are still cached. No tensors:
`schedule` returns a SchedulerOutput, and `update_from_output` applies the sampled tokens.
(vLLM: v1.core.sched.scheduler.Scheduler.)
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE, BlockPool, CacheAllocation
from qwen2vl.engine.request import Request, unexpected_request_error
from qwen2vl.engine.sampling.sampler import NonFiniteLogitsError
from qwen2vl.engine.scheduler.output import (
    RequestOutput,
    SampledTokens,
    SchedulerOutput,
    StepBudget,
    StepLimits,
    TokenChunk,
)
from qwen2vl.engine.scheduler.speculative import NgramProposer
from qwen2vl.engine.stats import EngineCounters
from qwen2vl.errors import Qwen2VLError
from qwen2vl.processor.inputs import Item

__all__ = ["EncoderCache", "Scheduler"]

logger = logging.getLogger(__name__)

# Slots allocated beyond the known tokens when a request is admitted.
_NUM_LOOKAHEAD_TOKENS = 2 * BLOCK_SIZE


class EncoderCache(Protocol):
    """The part of `EncoderCacheManager` that the scheduler uses."""

    def acquire(self, digests: Sequence[bytes]) -> None:
        """Pin embeddings, present or future, until `release` is called as often."""
        ...

    def release(self, digest: bytes) -> None:
        """Drop one reference to a frame pair."""
        ...

    def discard(self, digests: Sequence[bytes]) -> None:
        """Remove embeddings from all caches; those in use stay until released."""
        ...

    def has_embeddings(self, digest: bytes) -> bool:
        """Return whether a frame pair that was acquired has embeddings."""
        ...


class Scheduler:
    """Holds the waiting and running requests and decides what each step computes."""

    def __init__(
        self,
        pool: BlockPool,
        encoder_cache: EncoderCache,
        limits: StepLimits,
        drafter: NgramProposer | None = None,
        counters: EngineCounters | None = None,
    ) -> None:
        self.pool = pool
        self.encoder_cache = encoder_cache
        self.limits = limits
        self.drafter = drafter
        self.counters = counters or EngineCounters()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def add_request(self, request: Request) -> None:
        """Append a request to the waiting queue."""
        blocks = _num_blocks(request.max_num_tokens)
        assert blocks <= self.pool.num_blocks, "the request can never fit into the KV cache"
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Remove a waiting or running request; does nothing if it has finished."""
        if request in self.running:
            self._stop_running(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def schedule(self) -> SchedulerOutput:
        """Decide what the next step computes."""
        budget = StepBudget(self.limits)
        for request in sorted(self.running, key=lambda r: r.is_prefilling):
            if request.allocation is not None:  # else it was preempted in this loop
                self._schedule_chunk(budget, request)
        self._admit_waiting(budget)
        assert (
            budget.token_chunks
            or budget.encoder_inputs
            or budget.awaited_pairs
            or budget.failed
            or not self.has_unfinished_requests
        ), "the step schedules nothing"
        encoder_requests = tuple(dict.fromkeys(budget.encoder_requests))
        return SchedulerOutput(
            self.pool.cache_operations,
            tuple(budget.encoder_inputs),
            encoder_requests,
            tuple(budget.token_chunks),
            tuple(budget.awaited_pairs),
            tuple(budget.failed),
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, results: Sequence[SampledTokens | Qwen2VLError]
    ) -> list[RequestOutput]:
        """Apply the results of a step, one for each token chunk; return the new text."""
        outputs = list(scheduler_output.failed)
        for chunk, result in zip(scheduler_output.token_chunks, results, strict=True):
            if isinstance(result, NonFiniteLogitsError) and self._recompute(chunk.request):
                continue
            if isinstance(result, Qwen2VLError):
                outputs.append(self.fail(chunk.request, result))
            else:
                outputs += self._update_request(chunk, result)
        return outputs

    def fail(self, request: Request, error: Qwen2VLError, text: str = "") -> RequestOutput:
        """End a running request with an error and discard its KV cache; `text` is its last."""
        request.fail(error)
        if isinstance(error, NonFiniteLogitsError):
            self._evict_shared(request)
        self._stop_running(request, discard=True)
        return RequestOutput.take(request, text)

    def reset_prefix_cache(self) -> None:
        """Evict the cached blocks of finished requests."""
        self.pool.reset_prefix_cache()

    def _recompute(self, request: Request) -> bool:
        """Preempt a request whose logits are not finite, once, if it has reused cached blocks.

        Blocks are cached before logits show that they are damaged, and NaN in one token's values
        reaches earlier tokens, since kernels multiply them by a weight of zero. So the damage may
        come from another request, for example in the blocks of a system prompt that they share.
        """
        if not request.num_reused_tokens or request.skip_reading_prefix_cache:
            return False
        self._evict_shared(request)
        request.skip_reading_prefix_cache = True
        self._preempt(request, discard=True)
        return True

    def _evict_shared(self, request: Request) -> None:
        """Evict cached blocks and embeddings that the request shares: they may be damaged."""
        assert request.allocation is not None
        self.pool.evict_holders(request.allocation.block_hashes)
        for item in request.prompt.items:
            digests = (item.pair_digest(index) for index in range(item.grid.t))
            self.encoder_cache.discard([digest for digest in digests if digest is not None])

    def _preempt(self, request: Request, *, discard: bool = False) -> None:
        self._stop_running(request, discard=discard)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.counters.num_preemptions += 1

    def _update_request(self, chunk: TokenChunk, sampled: SampledTokens) -> list[RequestOutput]:
        request = chunk.request
        # The keys and values of accepted draft tokens were stored by this step's forward.
        num_accepted = max(0, len(sampled) - 1)
        request.num_computed_tokens = chunk.stop + num_accepted
        if chunk.draft_tokens:
            request.num_draft_tokens += len(chunk.draft_tokens)
            request.num_accepted_tokens += num_accepted
            self.counters.num_draft_tokens += len(chunk.draft_tokens)
            self.counters.num_accepted_tokens += num_accepted
        self._release_pairs(request, request.num_computed_tokens)
        if chunk.start < len(request.prompt.input_ids) and not request.is_prefilling:
            request.end_decoding()
        texts: list[str] = []
        try:
            for token, logprob in sampled:
                texts.append(request.append(token, logprob))
                if request.finish_reason is not None:
                    break
        except Exception as error:
            unexpected = unexpected_request_error("detokenizing", error)
            return [self.fail(request, unexpected, "".join(texts))]
        assert request.allocation is not None
        num_full = min(request.num_computed_tokens, len(request.all_token_ids)) // BLOCK_SIZE
        self.pool.cache_full_blocks(
            request.allocation, request.block_hashes.extend(request.all_token_ids)[:num_full]
        )
        if request.finish_reason is not None:
            self._stop_running(request)
            if self.drafter is not None:
                self.drafter.add_finished(request)
        text = "".join(texts)
        if not text and request.finish_reason is None:
            return []
        return [RequestOutput.take(request, text)]

    def _schedule_chunk(self, budget: StepBudget, request: Request) -> None:
        """Schedule as many tokens of a running request as the budget allows."""
        self._reuse_blocks(request)
        num_known = len(request.all_token_ids)
        stop = min(num_known, request.num_computed_tokens + budget.remaining_tokens)
        try:
            stop = self._cut_at_missing_embeddings(budget, request, stop)
        except Qwen2VLError as error:  # of decoding its video
            budget.failed.append(self.fail(request, error))
            return
        if stop <= request.num_computed_tokens:
            return
        draft_tokens: tuple[int, ...] = ()
        if self.drafter is not None and request.can_draft and not request.is_prefilling:
            max_tokens = min(budget.remaining_tokens - 1, request.max_num_tokens - num_known - 1)
            draft_tokens = self._propose_draft_tokens(self.drafter, request, max_tokens)
        if not self._allocate_slots(request, stop + len(draft_tokens)):
            return
        chunk = TokenChunk(request, request.num_computed_tokens, stop, draft_tokens)
        budget.remaining_tokens -= chunk.num_tokens
        budget.token_chunks.append(chunk)

    def _reuse_blocks(self, request: Request) -> None:
        """Copy cached blocks of a streamed video, whose hashes become known as it is decoded."""
        num_computed = request.num_computed_tokens
        if not request.is_prefilling or num_computed % BLOCK_SIZE or not request.streams_video:
            return
        assert request.allocation is not None
        block_hashes = self._reusable_hashes(request)
        num_filled = self.pool.copy_cached_blocks(
            request.allocation, block_hashes, num_computed // BLOCK_SIZE
        )
        num_copied = num_filled * BLOCK_SIZE - num_computed
        request.num_computed_tokens += num_copied
        request.num_reused_tokens += num_copied
        if not request.output_token_ids:
            request.num_cached_tokens += num_copied
        self._release_pairs(request, request.num_computed_tokens)

    def _reusable_hashes(self, request: Request) -> Sequence[bytes]:
        """Return the hashes of the full blocks before the last token.

        That is always computed: its hidden state gives the next token.
        """
        if request.skip_reading_prefix_cache:
            return []
        block_hashes = request.block_hashes.extend(request.all_token_ids)
        return block_hashes[: (len(request.all_token_ids) - 1) // BLOCK_SIZE]

    def _propose_draft_tokens(
        self, drafter: NgramProposer, request: Request, max_tokens: int
    ) -> tuple[int, ...]:
        """Return draft tokens; after an unexpected error this request goes on without any."""
        try:
            return tuple(drafter.propose(request, max_tokens))
        except Exception:
            logger.exception("no more draft tokens for one request")
            request.can_draft = False
            return ()

    def _cut_at_missing_embeddings(self, budget: StepBudget, request: Request, stop: int) -> int:
        """Return where a chunk must end for lack of vision embeddings, at most `stop`.

        Frame pairs that are missing are scheduled for encoding within the budget.
        """
        pairs: list[tuple[int, Item, int, bytes]] = []
        undecoded: tuple[Item, int] | None = None
        for start, item, index in request.prompt.pairs_between(request.num_computed_tokens, stop):
            digest = item.pair_digest(index)  # once: it may become known at any time
            if digest is None:
                # Whole blocks: what comes next may be cached.
                undecoded, stop = (item, index), start // BLOCK_SIZE * BLOCK_SIZE
                break
            pairs.append((start, item, index, digest))
        self._acquire_pairs(request, pairs)
        for start, item, index, digest in pairs:
            has_embeddings = self.encoder_cache.has_embeddings(digest)
            if not has_embeddings and not budget.schedule_encoder(request, item, index):
                return start
        if undecoded is not None:  # after the others: what comes before it is released
            budget.await_decoding(*undecoded)
        return stop

    def _acquire_pairs(
        self, request: Request, pairs: Sequence[tuple[int, Item, int, bytes]]
    ) -> None:
        """Acquire the frame pairs, in prompt order, that the request does not hold yet."""
        held_until = request.held_pairs[-1][0] if request.held_pairs else 0
        new = [
            (start + item.tokens_per_pair, digest)
            for start, item, _, digest in pairs
            if start >= held_until
        ]
        if new:
            self.encoder_cache.acquire([digest for _, digest in new])
            request.held_pairs += new

    def _allocate_slots(self, request: Request, num_tokens: int) -> bool:
        """Grow a request's allocation, preempting the most recently admitted requests for it.

        Returns False when the request itself was preempted.
        """
        assert request.allocation is not None
        if _num_blocks(num_tokens) <= request.allocation.num_blocks:
            return True
        # Half as much again, so that a growing output is moved only a few times.
        preferred = min(_num_blocks(request.max_num_tokens), _num_blocks(num_tokens * 3 // 2))
        if self.pool.grow(request.allocation, preferred):
            return True
        while not self.pool.grow(request.allocation, _num_blocks(num_tokens)):
            preempted = self.running[-1]
            self._preempt(preempted)
            if preempted is request:
                return False
        return True

    def _admit_waiting(self, budget: StepBudget) -> None:
        """Start waiting requests, in order, while the step's budget and the KV cache allow."""
        for request in list(self.waiting):
            if budget.remaining_tokens <= 0 or len(self.running) >= self.limits.max_num_seqs:
                return
            block_hashes = self._reusable_hashes(request)
            if self._is_being_computed(block_hashes) or self._is_being_decoded(request):
                continue  # wait: its prefix can soon be copied
            num_slots = min(
                len(request.all_token_ids) + _NUM_LOOKAHEAD_TOKENS, request.max_num_tokens
            )
            allocated = self.pool.allocate(block_hashes, _num_blocks(num_slots))
            if allocated is None:
                return
            self.waiting.remove(request)
            self._start_running(request, *allocated)
            self._schedule_chunk(budget, request)

    def _is_being_computed(self, block_hashes: Sequence[bytes]) -> bool:
        """Whether a running prefill will soon cache more of this prefix than is cached now."""
        num_cached = self.pool.match_prefix(block_hashes)
        if num_cached == len(block_hashes):
            return False
        return any(
            request.allocation is not None
            and block_hashes[num_cached]
            in request.block_hashes.hashes[len(request.allocation.block_hashes) :]
            for request in self.running
            if request.is_prefilling
        )

    def _is_being_decoded(self, request: Request) -> bool:
        """Whether a running prefill decodes the same video, whose digests are not all known yet."""
        sources = {id(item.source) for item in request.prompt.items if item.source is not None}
        return bool(sources) and any(
            id(item.source) in sources
            for other in self.running
            if other.is_prefilling
            for item in other.prompt.items
        )

    def _start_running(
        self, request: Request, allocation: CacheAllocation, num_cached_blocks: int
    ) -> None:
        request.allocation = allocation
        request.num_computed_tokens = request.num_reused_tokens = num_cached_blocks * BLOCK_SIZE
        if not request.output_token_ids:
            request.num_cached_tokens = num_cached_blocks * BLOCK_SIZE
        if not request.timer.scheduled_at:  # else it was preempted before
            self.counters.prefix_cache_queries += len(request.prompt.input_ids)
            self.counters.prefix_cache_hits += request.num_cached_tokens
        request.timer.mark_scheduled()
        self.running.append(request)

    def _stop_running(self, request: Request, *, discard: bool = False) -> None:
        assert request.allocation is not None
        self.running.remove(request)
        self._release_pairs(request, len(request.prompt.input_ids))
        request.end_decoding()
        (self.pool.discard if discard else self.pool.release)(request.allocation)
        request.allocation = None

    def _release_pairs(self, request: Request, num_tokens: int) -> None:
        """Release the frame pairs that end within the first `num_tokens`: they are computed."""
        while request.held_pairs and request.held_pairs[0][0] <= num_tokens:
            self.encoder_cache.release(request.held_pairs.popleft()[1])


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)
