"""Embeddings: prompts to pooled, normalized hidden states, without generation.

Prompts are packed into forwards of at most `max_num_batched_tokens` tokens. A longer prompt is
prefilled in chunks of that size over its own KV cache, so its length does not determine the memory
of a forward. Images and videos use the engine's encoder cache. `pool` takes the last token of each
prompt or the mean over its tokens, and L2-normalizes. (vLLM: LLM.embed, pooling types LAST, MEAN.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.scheduler.output import EncoderInput, StepLimits
from qwen2vl.errors import EngineError
from qwen2vl.geometry import AttnMeta
from qwen2vl.lora.multi import LoraAdapter, LoraManager
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from qwen2vl.processor.inputs import Item, ModelInput
from qwen2vl.threads import batch_threads

__all__ = ["Embedder", "Pooling", "batch_prompts", "pool"]

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """Computes embeddings with one model; each forward stays within the limits of a step."""

    model: Qwen2VL
    encoder_cache: EncoderCacheManager
    lora_manager: LoraManager
    limits: StepLimits
    adapter: LoraAdapter | None = None

    @torch.inference_mode()
    def embed(self, prompts: Sequence[ModelInput], pooling: Pooling) -> Tensor:
        """Return one L2-normalized vector for each prompt: (S, D) float32 on the CPU.

        Raises:
            EngineError: the hidden states are not finite, because of damaged weights or overflow.
        """
        vectors = [
            pool(self._hidden_states(batch), [len(p.input_ids) for p in batch], pooling)
            for batch in batch_prompts(prompts, self.limits.max_num_batched_tokens)
        ]
        vectors_SD = torch.cat(vectors).cpu()
        if not vectors_SD.isfinite().all():
            raise EngineError(
                "the model's hidden states are not finite; its weights may be damaged: qwen2vl "
                "doctor --check-weights names such tensors; float16 overflows"
            )
        return vectors_SD

    def _hidden_states(self, prompts: Sequence[ModelInput]) -> Tensor:
        """Compute the hidden states of prompts, packed end to end: hidden_TD."""
        vision_MD = self._vision_embeddings([item for prompt in prompts for item in prompt.items])
        if len(prompts) == 1 and len(prompts[0].input_ids) > self.limits.max_num_batched_tokens:
            return self._hidden_states_in_chunks(prompts[0], vision_MD)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        starts = accumulate(lengths[:-1], initial=0)
        return self._forward(
            torch.tensor([token for prompt in prompts for token in prompt.input_ids]),
            torch.cat([prompt.position_ids_3T for prompt in prompts], dim=1),
            AttnMeta.build(lengths),
            vision_MD,
            torch.cat(
                [p.placeholder_index_M + start for p, start in zip(prompts, starts, strict=True)]
            ),
        )

    def _hidden_states_in_chunks(self, prompt: ModelInput, vision_MD: Tensor | None) -> Tensor:
        total, placeholder_index_M = len(prompt.input_ids), prompt.placeholder_index_M
        text, dtype, device = self.model.config.text, self.model.dtype, self.model.device
        cache = KVCache.allocate(text, total, dtype, device)
        parts: list[Tensor] = []
        for start in range(0, total, self.limits.max_num_batched_tokens):
            stop = min(start + self.limits.max_num_batched_tokens, total)
            first, last = torch.searchsorted(
                placeholder_index_M, torch.tensor([start, stop])
            ).tolist()
            part_TD = self._forward(
                torch.tensor(prompt.input_ids[start:stop]),
                prompt.position_ids_3T[:, start:stop],
                AttnMeta.build([stop - start], [stop]),
                None if vision_MD is None else vision_MD[first:last],
                placeholder_index_M[first:last] - start,
                cache,
            )
            parts.append(part_TD)
        return torch.cat(parts)

    def _forward(
        self,
        input_ids_T: Tensor,
        position_ids_3T: Tensor,
        meta: AttnMeta,
        vision_MD: Tensor | None,
        placeholder_index_M: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        device = self.model.device
        meta = meta.to(device)
        segments = [(self.adapter, len(input_ids_T))]
        with self.lora_manager.activate("model", segments), batch_threads(len(input_ids_T)):
            return self.model(
                input_ids_T.to(device),
                position_ids_3T.to(device),
                meta,
                vision_MD=vision_MD,
                placeholder_index_M=None if vision_MD is None else placeholder_index_M.to(device),
                caches=None if cache is None else SequenceKVCaches([cache], meta),
            )

    def _vision_embeddings(self, items: Sequence[Item]) -> Tensor | None:
        """Return the vision embeddings of items, encoding those that are not cached."""
        if not items:
            return None
        digests: list[bytes] = []
        step = self.limits.max_num_encoder_patches
        try:
            for item in items:
                pairs_per_step = max(1, step // (item.grid.h * item.grid.w))
                for start in range(0, item.grid.t, pairs_per_step):
                    indices = range(start, min(start + pairs_per_step, item.grid.t))
                    inputs = [EncoderInput.load(item, index, self.adapter) for index in indices]
                    self.encoder_cache.acquire([one.digest for one in inputs])
                    digests += [one.digest for one in inputs]
                    self._encode(inputs)
            return torch.cat([self.encoder_cache.embeddings(digest) for digest in digests])
        finally:
            for digest in digests:
                self.encoder_cache.release(digest)

    def _encode(self, inputs: Sequence[EncoderInput]) -> None:
        """Encode those frame pairs that have no embeddings."""
        has_embeddings = self.encoder_cache.has_embeddings
        missing = {one.digest: one for one in inputs if not has_embeddings(one.digest)}
        if missing:
            self.encoder_cache.encode(list(missing.values()))


def batch_prompts(prompts: Sequence[ModelInput], max_tokens: int) -> Iterator[list[ModelInput]]:
    """Split prompts into batches of at most `max_tokens` tokens; a longer prompt is alone."""
    batch: list[ModelInput] = []
    total = 0
    for prompt in prompts:
        if batch and total + len(prompt.input_ids) > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(prompt)
        total += len(prompt.input_ids)
    if batch:
        yield batch


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling = "last") -> Tensor:
    """Pool the hidden states of each sequence into an L2-normalized vector: (S, D), float32.

    Args:
        hidden_TD: the hidden states of all sequences, packed end to end.
        lengths: the number of tokens of each sequence, at least 1; their sum is T.
        pooling: the last token of each sequence, or the mean over its tokens.
    """
    assert min(lengths) > 0 and sum(lengths) == len(hidden_TD), "lengths do not cover the states"
    if pooling == "last":
        ends = torch.tensor(lengths, device=hidden_TD.device).cumsum(0)
        pooled_SD = hidden_TD[ends - 1].float()
    else:
        parts = hidden_TD.split(list(lengths))
        pooled_SD = torch.stack([part_TD.mean(dim=0, dtype=torch.float32) for part_TD in parts])
    return F.normalize(pooled_SD, dim=-1)
