"""Plan -> tensors -> model -> next ids. Owns all memory that grows with requests.

    orders --arrange--> caches      slices --encode--> shelf
    chunks --prepare--> one packed forward over every sequence's cache --> hidden_TD
    last rows --logits--> sampler of each sequence --> tokens, or the error of that sequence alone

A step that fails leaves every cache as it was, since lengths advance last. It must not know why a
plan is as it is. Next room: llm.py, which turns the wheel.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from qwen2vl.engine.blocks import Copy, Free, MemoryOrder, Reserve
from qwen2vl.engine.scheduler import Chunk, Plan, Sampled
from qwen2vl.engine.shelf import VisionShelf
from qwen2vl.errors import Qwen2VLError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, Qwen2VL

__all__ = ["Runner"]


class Runner:
    """Carries out plans on one device."""

    def __init__(self, model: Qwen2VL, shelf: VisionShelf) -> None:
        self.model = model
        self.shelf = shelf
        self.caches: dict[int, KVCache] = {}  # by row
        self._orders: deque[MemoryOrder] = deque()  # not yet carried out

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled | Qwen2VLError]:
        """Do one step; returns one result for each chunk.

        Raises:
            CapacityError: memory ran out; nothing of the step has happened but what was encoded.
        """
        self.arrange(plan.orders)
        if plan.slices:
            began = time.perf_counter()
            self.shelf.encode(plan.slices)
            for sequence in plan.viewers:
                sequence.clock.vision += time.perf_counter() - began
        if not plan.chunks:
            return []
        hidden_TD = self._forward(plan.chunks)
        return self._sample(plan.chunks, hidden_TD)

    def arrange(self, orders: SequenceOf[MemoryOrder]) -> None:
        """Reserve, copy and free rows as the pool ordered."""
        self._orders += orders
        while self._orders:
            self._carry_out(self._orders[0])
            self._orders.popleft()

    def _carry_out(self, order: MemoryOrder) -> None:
        match order:
            case Free(row):
                self.caches.pop(row, None)
            case Reserve(row) | Copy(_, row) if Free(row) in self._orders:
                pass  # left over from a step that ran out of memory; its owner is gone
            case Reserve(row, num_tokens):
                self.caches[row] = self._reserve(self.caches.get(row), num_tokens)
            case Copy(source, target, num_tokens):
                self.caches[target].copy_from(self.caches[source], num_tokens)

    def _reserve(self, old: KVCache | None, num_tokens: int) -> KVCache:
        dtype = self.model.dtype
        cache = KVCache.allocate(self.model.config.text, num_tokens, dtype, self.device)
        if old is not None:
            cache.copy_from(old, old.length)
        return cache

    def _forward(self, chunks: SequenceOf[Chunk]) -> Tensor:
        ids: list[int] = []
        positions: list[Tensor] = []
        rows: list[Tensor] = []
        pads: list[int] = []
        caches: list[KVCache] = []
        for chunk in chunks:
            for at, row_MD in self._vision_of(chunk):
                rows.append(row_MD)
                first = len(ids) + at - chunk.start
                pads += range(first, first + len(row_MD))
            ids += chunk.ids
            positions.append(chunk.sequence.positions(chunk.start, chunk.stop + len(chunk.drafts)))
            assert chunk.sequence.row is not None
            cache = self.caches[chunk.sequence.row.number]
            cache.length = chunk.start
            caches.append(cache)
        meta = AttnMeta.build(
            [len(chunk.ids) for chunk in chunks],
            [chunk.start + len(chunk.ids) for chunk in chunks],
        )
        return self.model(
            torch.tensor(ids, device=self.device),
            torch.cat(positions, dim=1).to(self.device),
            meta.to(self.device),
            vision_MD=torch.cat(rows) if rows else None,
            pad_index_M=torch.tensor(pads, device=self.device) if rows else None,
            caches=caches,
        )

    def _vision_of(self, chunk: Chunk) -> list[tuple[int, Tensor]]:
        """List (first token, rows) of what a chunk sees of each item."""
        seen: list[tuple[int, Tensor]] = []
        for start, item in chunk.sequence.items_after(chunk.start):
            first, last = max(start, chunk.start), min(start + item.num_tokens, chunk.stop)
            if first < last:
                seen.append((first, self.shelf.rows(item)[first - start : last - start]))
        return seen

    def _sample(self, chunks: SequenceOf[Chunk], hidden_TD: Tensor) -> list[Sampled | Qwen2VLError]:
        wanted: list[int] = []
        end = 0
        for chunk in chunks:
            end += len(chunk.ids)
            wanted += range(end - chunk.num_sampled, end)
        results: list[Sampled | Qwen2VLError] = []
        if not wanted:
            return [[] for _ in chunks]
        everything = len(wanted) == len(hidden_TD)
        index = torch.tensor(wanted, device=self.device)
        logits_TV = self.model.logits(hidden_TD if everything else hidden_TD[index])
        logits = iter(logits_TV.split([chunk.num_sampled for chunk in chunks]))
        for chunk in chunks:
            if chunk.num_sampled:
                chunk.sequence.clock.answer()
            try:
                results.append(_verify(chunk, next(logits)))
            except Qwen2VLError as error:
                results.append(error)
        return results


def _verify(chunk: Chunk, logits_TV: Tensor) -> Sampled:
    """Choose a token after the known ones, then after each guess that came true.

    Every token is chosen by the sampler from the model's own scores, with the same draws as
    without guesses; a guess only decides whether its scores were computed already.
    """
    sampled: Sampled = []
    for row, logits_V in enumerate(logits_TV):
        token, logprob = chunk.sequence.sampler.sample(logits_V)
        sampled.append((token, logprob))
        if row == len(chunk.drafts) or token != chunk.drafts[row]:
            break
    return sampled
