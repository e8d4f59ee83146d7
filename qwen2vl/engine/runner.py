"""Model runner: executes a SchedulerOutput, from cache operations to sampled tokens.

    cache operations --> KV caches                encoder inputs --> encoder cache
    token chunks --> one packed forward over the caches of all requests --> hidden_TD
    (pure decode batches may go to a DecodeBackend instead)
    last hidden states --> logits_RV --> the sampler of each request --> tokens or its own error

A step that fails leaves all caches as they were, since cache lengths are advanced last, and all
samplers, since a sampling error affects only its own request. Letter: R, hidden states from which a
token is sampled. (vLLM: GPUModelRunner.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qwen2vl.engine.decode.backend import DecodeBackend, DecodeToken
from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.kv_cache.block_pool import CacheOperation, CopySlots, FreeSlots, ReserveSlots
from qwen2vl.engine.kv_cache.capacity import out_of_memory_as_capacity_error
from qwen2vl.engine.kv_cache.storage import KVStorage, copy_to_device
from qwen2vl.engine.request import Request, unexpected_request_error
from qwen2vl.engine.sampling.batched import sample_batch
from qwen2vl.engine.scheduler.output import SampledTokens, SchedulerOutput, TokenChunk
from qwen2vl.errors import CapacityError, Qwen2VLError
from qwen2vl.geometry import AttnMeta
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.threads import batch_threads

__all__ = ["ModelRunner", "StepOutOfMemoryError"]


class StepOutOfMemoryError(Exception):
    """Memory ran out in a step, attributed to `request`; caught by `EngineCore.step`."""

    def __init__(self, request: Request, error: CapacityError) -> None:
        super().__init__(str(error))
        self.request = request
        self.error = error


class ModelRunner:
    """Executes scheduler outputs on one device; owns the KV caches."""

    def __init__(
        self,
        model: Qwen2VL,
        encoder_cache: EncoderCacheManager,
        lora_manager: LoraManager,
        kv_storage: KVStorage,
        decode_backend: DecodeBackend | None = None,
    ) -> None:
        """Start without KV caches; `decode_backend` computes pure decode steps in the storage."""
        self.model = model
        self.encoder_cache = encoder_cache
        self.lora_manager = lora_manager
        self.kv_storage = kv_storage
        self.decode_backend = decode_backend
        self.caches: dict[int, KVCache] = {}  # by allocation id

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> list[SampledTokens | Qwen2VLError]:
        """Execute one step; return one result for each token chunk.

        Raises:
            StepOutOfMemoryError: memory ran out; only encoder inputs of the step have taken effect.
        """
        with _attribute_memory_errors(scheduler_output.largest_request):
            self.apply_cache_operations(scheduler_output.cache_operations)
        if scheduler_output.encoder_inputs:
            with _attribute_memory_errors(scheduler_output.largest_encoder_request):
                self._encode(scheduler_output)
        if not scheduler_output.token_chunks:
            return []
        with _attribute_memory_errors(scheduler_output.largest_request):
            if self.decode_backend is not None and _can_decode(
                self.decode_backend, scheduler_output.token_chunks
            ):
                logits_RV = self._decode(self.decode_backend, scheduler_output.token_chunks)
            else:
                hidden_TD = self._forward(scheduler_output.token_chunks)
                logits_RV = self._compute_logits(scheduler_output.token_chunks, hidden_TD)
        return _sample(scheduler_output.token_chunks, logits_RV, batch=self.device.type == "cuda")

    def _encode(self, scheduler_output: SchedulerOutput) -> None:
        began = time.perf_counter()
        self.encoder_cache.encode(scheduler_output.encoder_inputs)
        for request in scheduler_output.encoder_requests:
            request.timer.vision_seconds += time.perf_counter() - began

    def apply_cache_operations(self, cache_operations: deque[CacheOperation]) -> None:
        """Reserve, copy and free caches in order; executed operations are removed from the queue.

        The operations are idempotent: one that runs out of memory stays in the queue and is
        executed again when the step is retried, and a cache may be freed ahead of its turn.
        """
        self.apply_free_operations(cache_operations)
        while cache_operations:
            match cache_operations[0]:
                case FreeSlots(allocation_id):
                    self.caches.pop(allocation_id, None)
                case ReserveSlots(allocation_id) | CopySlots(_, allocation_id) if not _is_needed(
                    allocation_id, cache_operations
                ):
                    pass  # left over from a step that ran out of memory; its request is gone
                case ReserveSlots(allocation_id, num_tokens):
                    self.caches[allocation_id] = self.kv_storage.reserve(
                        self.caches.get(allocation_id), num_tokens, self.caches.values()
                    )
                case CopySlots(source, target, num_tokens, start):
                    self.caches[target].copy_from(self.caches[source], num_tokens, start)
            cache_operations.popleft()

    def apply_free_operations(self, cache_operations: Sequence[CacheOperation]) -> None:
        """Free, ahead of their turn, the caches that no pending copy reads from.

        This releases memory before `apply_cache_operations` allocates more.
        """
        if not cache_operations:
            return
        sources = {
            operation.source
            for operation in cache_operations
            if isinstance(operation, CopySlots) and _is_needed(operation.target, cache_operations)
        }
        for operation in cache_operations:
            if isinstance(operation, FreeSlots) and operation.allocation_id not in sources:
                self.caches.pop(operation.allocation_id, None)

    def _decode(self, decode_backend: DecodeBackend, chunks: Sequence[TokenChunk]) -> Tensor:
        """Compute the logits after the newest token of each request."""
        tokens: list[DecodeToken] = []
        for chunk in chunks:
            cache = self._kv_cache(chunk)
            cache.length = chunk.start
            position = chunk.start + chunk.request.prompt.rope_delta
            tokens.append(DecodeToken(chunk.request.all_token_ids[-1], position, cache))
        # No request of the batch has an adapter; deactivate one that an interrupt left active.
        with self.lora_manager.activate("model", [(None, len(tokens))]):
            logits_RV = decode_backend(tokens)
        for chunk, token in zip(chunks, tokens, strict=True):
            token.cache.length = chunk.stop
        return logits_RV

    def _forward(self, chunks: Sequence[TokenChunk]) -> Tensor:
        input_ids: list[int] = []
        embeddings: list[Tensor] = []
        placeholders: list[int] = []
        for chunk in chunks:
            for start, part_MD in self._vision_embeddings(chunk):
                embeddings.append(part_MD)
                first = len(input_ids) + start - chunk.start
                placeholders += range(first, first + len(part_MD))
            input_ids += chunk.input_ids
        ids_T, position_ids_3T, placeholder_index_M = copy_to_device(
            self.device,
            torch.tensor(input_ids),
            _position_ids(chunks),
            torch.tensor(placeholders, dtype=torch.int64),
        )
        meta = AttnMeta.build(
            [chunk.num_tokens for chunk in chunks],
            [chunk.start + chunk.num_tokens for chunk in chunks],
        ).to(self.device)
        caches = [self._kv_cache(chunk) for chunk in chunks]
        for chunk, cache in zip(chunks, caches, strict=True):
            cache.length = chunk.start
        segments = [(chunk.request.adapter, chunk.num_tokens) for chunk in chunks]
        with self.lora_manager.activate("model", segments), batch_threads(len(input_ids)):
            return self.model(
                ids_T,
                position_ids_3T,
                meta,
                vision_MD=torch.cat(embeddings) if embeddings else None,
                placeholder_index_M=placeholder_index_M if embeddings else None,
                caches=self.kv_storage.batch(caches, meta),
            )

    def _kv_cache(self, chunk: TokenChunk) -> KVCache:
        assert chunk.request.allocation is not None
        return self.caches[chunk.request.allocation.id]

    def _vision_embeddings(self, chunk: TokenChunk) -> list[tuple[int, Tensor]]:
        """Return (first token, embeddings) of the part of each frame pair in the chunk."""
        parts: list[tuple[int, Tensor]] = []
        for start, item, index in chunk.request.prompt.pairs_between(chunk.start, chunk.stop):
            digest = item.pair_digest(index)
            assert digest is not None, "it has been encoded"
            embeddings_MD = self.encoder_cache.embeddings(digest)
            first = max(start, chunk.start)
            parts.append((first, embeddings_MD[first - start : chunk.stop - start]))
        return parts

    def _compute_logits(self, chunks: Sequence[TokenChunk], hidden_TD: Tensor) -> Tensor:
        """Compute logits of the R hidden states from which a token is sampled."""
        logits_indices: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.num_tokens
            logits_indices += range(end - chunk.num_logits, end)
        if not logits_indices:
            return hidden_TD.new_empty(0, self.model.config.text.vocab_size)
        if len(logits_indices) < len(hidden_TD):
            hidden_TD = hidden_TD[copy_to_device(self.device, torch.tensor(logits_indices))[0]]
        adapter_segments = [(chunk.request.adapter, chunk.num_logits) for chunk in chunks]
        with self.lora_manager.activate("lm_head", adapter_segments):
            return self.model.logits(hidden_TD)


def _position_ids(chunks: Sequence[TokenChunk]) -> Tensor:
    """Return the M-RoPE positions of all tokens of a step: (3, T)."""
    parts: list[Tensor] = []
    # Positions of output tokens are equal on all axes: one tensor for those of adjacent chunks
    # saves creating and joining one for each.
    output_positions: list[int] = []
    for chunk in chunks:
        prompt, stop = chunk.request.prompt, chunk.stop + len(chunk.draft_tokens)
        if chunk.start >= len(prompt.input_ids):
            output_positions += range(chunk.start + prompt.rope_delta, stop + prompt.rope_delta)
            continue
        if output_positions:
            parts.append(torch.tensor(output_positions).expand(3, -1))
            output_positions = []
        parts.append(chunk.request.positions(chunk.start, stop))
    if output_positions:
        parts.append(torch.tensor(output_positions).expand(3, -1))
    return torch.cat(parts, dim=1)


def _sample(
    chunks: Sequence[TokenChunk], logits_RV: Tensor, *, batch: bool
) -> list[SampledTokens | Qwen2VLError]:
    """Sample the tokens of each request, with its own random draws and its own errors."""
    results: list[SampledTokens | Qwen2VLError] = []
    batched = _sample_batched(chunks, logits_RV) if batch else {}
    parts = logits_RV.split([chunk.num_logits for chunk in chunks])
    for index, (chunk, part_RV) in enumerate(zip(chunks, parts, strict=True)):
        if chunk.num_logits:
            chunk.request.timer.mark_prefilled()
        if index in batched:
            results.append(batched[index])
            continue
        try:
            # Out of memory fails the request: retrying the step would repeat the others' draws.
            with out_of_memory_as_capacity_error(chunk.request.prompt):
                results.append(_verify_draft_tokens(chunk, part_RV))
        except Qwen2VLError as error:
            results.append(error)
        except torch.AcceleratorError:
            raise  # the device has failed for all requests
        except Exception as error:
            results.append(unexpected_request_error("sampling", error))
    return results


def _sample_batched(
    chunks: Sequence[TokenChunk], logits_RV: Tensor
) -> dict[int, SampledTokens | Qwen2VLError]:
    """Sample in one batch all chunks that need one token and nothing special; by chunk index."""
    rows: dict[int, int] = {}  # chunk index -> row of the logits
    stop = 0
    for index, chunk in enumerate(chunks):
        stop += chunk.num_logits
        if chunk.num_logits == 1 and chunk.request.sampler.supports_batched_sampling:
            rows[index] = stop - 1
    if len(rows) < len(logits_RV):
        if not rows:
            return {}
        logits_RV = logits_RV[copy_to_device(logits_RV.device, torch.tensor([*rows.values()]))[0]]
    try:
        tokens = sample_batch([chunks[index].request.sampler for index in rows], logits_RV)
    except torch.OutOfMemoryError:
        return {}  # one by one they take less memory, with the same draws
    return {
        index: token if isinstance(token, Qwen2VLError) else [(token, None)]
        for index, token in zip(rows, tokens, strict=True)
    }


def _can_decode(decode_backend: DecodeBackend, chunks: Sequence[TokenChunk]) -> bool:
    """Whether the decode backend can compute all chunks: a pure decode batch without adapters."""
    return len(chunks) <= decode_backend.max_batch_size and all(
        chunk.is_decode and chunk.request.adapter is None for chunk in chunks
    )


def _is_needed(allocation_id: int, cache_operations: Sequence[CacheOperation]) -> bool:
    """Whether an allocation will not be freed, or is copied into one that will not be."""
    return FreeSlots(allocation_id) not in cache_operations or any(
        operation.source == allocation_id and _is_needed(operation.target, cache_operations)
        for operation in cache_operations
        if isinstance(operation, CopySlots)
    )


@contextmanager
def _attribute_memory_errors(request: Request) -> Iterator[None]:
    try:
        with out_of_memory_as_capacity_error(request.prompt):
            yield
    except CapacityError as error:
        raise StepOutOfMemoryError(request, error) from error


def _verify_draft_tokens(chunk: TokenChunk, logits_TV: Tensor) -> SampledTokens:
    """Sample the next token, then one more after each draft token that was accepted.

    Each token is sampled from the model's logits with the same draws as without speculation, and a
    draft token is accepted if it equals the sampled one. So drafts never change the output.
    """
    sampled: SampledTokens = []
    for index, logits_V in enumerate(logits_TV):
        token, logprob = chunk.request.sampler.sample(logits_V)
        sampled.append((token, logprob))
        if index == len(chunk.draft_tokens) or token != chunk.draft_tokens[index]:
            break
    return sampled
