"""Prompts -> vectors: packed forwards for many prompts, chunks for a long one, and no answers.

Prompts are packed as they come, up to a budget of tokens; one that exceeds it is read in chunks of
that size over keys and values of its own, so that its length does not decide how much memory a
forward takes. Pictures go through the same shelf as those of questions: one asked about before
costs no vision work. Next room: pool.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.engine.encoder_cache.manager import VisionShelf
from qwen2vl.engine.scheduler.output import Limits, Slices
from qwen2vl.geometry import AttnMeta
from qwen2vl.lora.multi import Adapter, AdapterSwitch
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["Embedder", "Pooling", "pool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """Reads prompts with one model, each forward within the limits of a step."""

    model: Qwen2VL
    shelf: VisionShelf
    switch: AdapterSwitch
    limits: Limits
    adapter: Adapter | None = None

    @torch.inference_mode()
    def embed(self, prompts: SequenceOf[ModelInput], pooling: Pooling) -> Tensor:
        """Compute (S, D) float32 on the CPU, each of length one."""
        vectors = [
            pool(self._read(group), [len(p.input_ids) for p in group], pooling)
            for group in _groups(prompts, self.limits.tokens)
        ]
        return torch.cat(vectors).cpu()

    def _read(self, prompts: SequenceOf[ModelInput]) -> Tensor:
        """Compute the states of prompts, end to end: hidden_TD."""
        vision_MD = self._vision([item for prompt in prompts for item in prompt.items])
        if len(prompts) == 1 and len(prompts[0].input_ids) > self.limits.tokens:
            return self._read_in_chunks(prompts[0], vision_MD)
        lengths = [len(prompt.input_ids) for prompt in prompts]
        starts = accumulate(lengths[:-1], initial=0)
        return self._forward(
            torch.tensor([token for prompt in prompts for token in prompt.input_ids]),
            torch.cat([prompt.position_ids_3T for prompt in prompts], dim=1),
            AttnMeta.build(lengths),
            vision_MD,
            torch.cat([p.pad_index_M + start for p, start in zip(prompts, starts, strict=True)]),
        )

    def _read_in_chunks(self, prompt: ModelInput, vision_MD: Tensor | None) -> Tensor:
        total, pads_M = len(prompt.input_ids), prompt.pad_index_M
        text, dtype, device = self.model.config.text, self.model.dtype, self.model.device
        caches = [KVCache.allocate(text, total, dtype, device)]
        parts: list[Tensor] = []
        for start in range(0, total, self.limits.tokens):
            stop = min(start + self.limits.tokens, total)
            first, last = torch.searchsorted(pads_M, torch.tensor([start, stop])).tolist()
            part_TD = self._forward(
                torch.tensor(prompt.input_ids[start:stop]),
                prompt.position_ids_3T[:, start:stop],
                AttnMeta.build([stop - start], [stop]),
                None if vision_MD is None else vision_MD[first:last],
                pads_M[first:last] - start,
                caches,
            )
            parts.append(part_TD)
        return torch.cat(parts)

    def _forward(
        self,
        ids_T: Tensor,
        position_ids_3T: Tensor,
        meta: AttnMeta,
        vision_MD: Tensor | None,
        pads_M: Tensor,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        device = self.model.device
        with self.switch.at_work("model", [(self.adapter, len(ids_T))]):
            return self.model(
                ids_T.to(device),
                position_ids_3T.to(device),
                meta.to(device),
                vision_MD=vision_MD,
                pad_index_M=None if vision_MD is None else pads_M.to(device),
                caches=caches,
            )

    def _vision(self, items: SequenceOf[Item]) -> Tensor | None:
        """Take the rows of items, encoding those that are new."""
        if not items:
            return None
        for item in items:
            self.shelf.hold(item)
        try:
            for item in items:
                self._encode(item)
            return torch.cat([self.shelf.rows(item) for item in items])
        finally:
            for item in items:
                self.shelf.release(item)

    def _encode(self, item: Item) -> None:
        """Make an item's rows whole, a few frame pairs at a time."""
        each = max(1, self.limits.patches // (item.grid.h * item.grid.w))
        while (ready := self.shelf.ready(item)) < item.grid.t:
            stop = min(ready + each, item.grid.t)
            self.shelf.encode([Slices(item, ready, stop, self.adapter)])


def _groups(prompts: SequenceOf[ModelInput], max_tokens: int) -> Iterator[list[ModelInput]]:
    """Cut the prompts into groups of at most `max_tokens`; a longer one is alone."""
    group: list[ModelInput] = []
    total = 0
    for prompt in prompts:
        if group and total + len(prompt.input_ids) > max_tokens:
            yield group
            group, total = [], 0
        group.append(prompt)
        total += len(prompt.input_ids)
    if group:
        yield group


Pooling = Literal["last", "mean"]


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling = "last") -> Tensor:
    """Give each sequence its vector: (S, D), float32, of length one.

    Args:
        hidden_TD: the states of all sequences, end to end.
        lengths: tokens of each sequence, at least one; together they are T.
        pooling: the last token of each sequence, or the mean of its tokens.
    """
    assert min(lengths) > 0 and sum(lengths) == len(hidden_TD), "lengths do not cover the states"
    if pooling == "last":
        ends = torch.tensor(lengths, device=hidden_TD.device).cumsum(0)
        pooled_SD = hidden_TD[ends - 1].float()
    else:
        parts = hidden_TD.split(list(lengths))
        pooled_SD = torch.stack([part_TD.mean(dim=0, dtype=torch.float32) for part_TD in parts])
    return F.normalize(pooled_SD, dim=-1)
