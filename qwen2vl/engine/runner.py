"""Plan -> tensors -> model -> next ids. Owns all memory that grows with requests.

    orders --arrange--> caches      slices --encode--> shelf
    chunks --prepare--> one packed forward over every sequence's cache --> hidden_TD
    last rows --logits--> sampler of each sequence --> tokens, or the error of that sequence alone

A step that fails leaves every cache as it was, since lengths advance last, and every sampler, since
sampling cannot fail but for one sequence. Letter of this room: R, the rows from which a token is
chosen. It must not know why a plan is as it is. Next room: llm.py, which turns the wheel.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager

import torch
from torch import Tensor

from qwen2vl.adapt.served import AdapterSwitch
from qwen2vl.engine.blocks import Copy, Free, MemoryOrder, Reserve
from qwen2vl.engine.capacity import memory_errors_named
from qwen2vl.engine.plan import Chunk, Plan, Sampled
from qwen2vl.engine.sequence import Sequence
from qwen2vl.engine.shelf import VisionShelf
from qwen2vl.errors import CapacityError, Qwen2VLError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, Qwen2VL

__all__ = ["OverloadError", "Runner"]


class OverloadError(Exception):
    """Memory ran out in a step, for what `sequence` asked of it; caught by llm.py."""

    def __init__(self, sequence: Sequence, error: CapacityError) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


class Runner:
    """Carries out plans on one device."""

    def __init__(self, model: Qwen2VL, shelf: VisionShelf, switch: AdapterSwitch) -> None:
        self.model = model
        self.shelf = shelf
        self.switch = switch
        self.caches: dict[int, KVCache] = {}  # by row

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled | Qwen2VLError]:
        """Do one step; returns one result for each chunk.

        Raises:
            OverloadError: memory ran out; nothing of the step has happened but what was encoded.
        """
        with _blaming(plan.largest):
            self.arrange(plan.orders)
        if plan.slices:
            with _blaming(plan.largest_viewer):
                self._encode(plan)
        if not plan.chunks:
            return []
        with _blaming(plan.largest):
            hidden_TD = self._forward(plan.chunks)
            logits_RV = self._logits(plan.chunks, hidden_TD)
        return _sample(plan.chunks, logits_RV)

    def _encode(self, plan: Plan) -> None:
        began = time.perf_counter()
        self.shelf.encode(plan.slices)
        for sequence in plan.viewers:
            sequence.clock.vision += time.perf_counter() - began

    def arrange(self, orders: deque[MemoryOrder]) -> None:
        """Reserve, copy and free rows as the pool ordered; an order is taken away when it is done.

        Carrying one out twice does no harm, so that an interrupt may come at any time.
        """
        self.free(orders)
        while orders:
            match orders[0]:
                case Free(row):
                    self.caches.pop(row, None)
                case Reserve(row) | Copy(_, row) if not _is_wanted(row, orders):
                    pass  # left over from a step that ran out of memory; its owner is gone
                case Reserve(row, num_tokens):
                    self.caches[row] = self._reserve(self.caches.get(row), num_tokens)
                case Copy(source, target, num_tokens):
                    self.caches[target].copy_from(self.caches[source], num_tokens)
            orders.popleft()

    def free(self, orders: SequenceOf[MemoryOrder]) -> None:
        """Give back at once what nobody copies from any more, before memory is asked for."""
        if not orders:
            return
        sources = {o.source for o in orders if isinstance(o, Copy) and _is_wanted(o.target, orders)}
        for order in orders:
            if isinstance(order, Free) and order.row not in sources:
                self.caches.pop(order.row, None)

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
            [chunk.num_ids for chunk in chunks],
            [chunk.start + chunk.num_ids for chunk in chunks],
        )
        with self.switch.at_work("model", [(c.sequence.adapter, c.num_ids) for c in chunks]):
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

    def _logits(self, chunks: SequenceOf[Chunk], hidden_TD: Tensor) -> Tensor:
        """Score the words after each row from which a token is chosen; R such rows."""
        wanted: list[int] = []
        end = 0
        for chunk in chunks:
            end += chunk.num_ids
            wanted += range(end - chunk.num_sampled, end)
        if not wanted:
            return hidden_TD.new_empty(0, self.model.config.text.vocab_size)
        if len(wanted) < len(hidden_TD):
            hidden_TD = hidden_TD[torch.tensor(wanted, device=self.device)]
        owners = [(chunk.sequence.adapter, chunk.num_sampled) for chunk in chunks]
        with self.switch.at_work("lm_head", owners):
            return self.model.logits(hidden_TD)


def _sample(chunks: SequenceOf[Chunk], logits_RV: Tensor) -> list[Sampled | Qwen2VLError]:
    """Choose the tokens of each sequence, which has its own draws and its own errors."""
    results: list[Sampled | Qwen2VLError] = []
    parts = logits_RV.split([chunk.num_sampled for chunk in chunks])
    for chunk, part_RV in zip(chunks, parts, strict=True):
        if chunk.num_sampled:
            chunk.sequence.clock.answer()
        try:
            # Memory, too: draws that were made cannot be made again by another attempt.
            with memory_errors_named(chunk.sequence.prompt):
                results.append(_verify(chunk, part_RV))
        except Qwen2VLError as error:
            results.append(error)
    return results


def _is_wanted(row: int, orders: SequenceOf[MemoryOrder]) -> bool:
    """Tell whether a row is to stay, or is copied into one that is to stay."""
    return Free(row) not in orders or any(
        order.source == row and _is_wanted(order.target, orders)
        for order in orders
        if isinstance(order, Copy)
    )


@contextmanager
def _blaming(sequence: Sequence) -> Iterator[None]:
    try:
        with memory_errors_named(sequence.prompt):
            yield
    except CapacityError as error:
        raise OverloadError(sequence, error) from error


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
