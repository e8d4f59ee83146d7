"""Plan -> tensors -> model -> next ids. Owns all memory that grows with requests.

    orders --arrange--> caches      slices --encode--> shelf
    chunks --prepare--> one packed forward over every sequence's cache --> hidden_TD
    (chunks of one token of an answer may go to decode.py instead)
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

from qwen2vl.engine.decode.decoder import Decode, Token
from qwen2vl.engine.encoder_cache.manager import VisionShelf
from qwen2vl.engine.host_to_device import send
from qwen2vl.engine.kv_cache.arena import Arena
from qwen2vl.engine.kv_cache.block_pool import Copy, Free, MemoryOrder, Reserve
from qwen2vl.engine.kv_cache.capacity import memory_errors_named
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.sampling.batched import choose
from qwen2vl.engine.scheduler.output import Chunk, Plan, Sampled
from qwen2vl.errors import CapacityError, Qwen2VLError
from qwen2vl.geometry import AttnMeta
from qwen2vl.lora.multi import AdapterSwitch
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.model.attention import SharedCache

__all__ = ["OverloadError", "Runner"]


class OverloadError(Exception):
    """Memory ran out in a step, for what `sequence` asked of it; caught by llm.py."""

    def __init__(self, sequence: Sequence, error: CapacityError) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


class Runner:
    """Carries out plans on one device."""

    def __init__(
        self,
        model: Qwen2VL,
        shelf: VisionShelf,
        switch: AdapterSwitch,
        arena: Arena | None = None,
        decode: Decode | None = None,
    ) -> None:
        """Begin without rows, those of `arena` included, if rows are to lie in one.

        `decode` computes steps of single tokens of answers, on a GPU in the same arena.
        """
        self.model = model
        self.shelf = shelf
        self.switch = switch
        self.arena = arena
        self.decode = decode
        self.caches: dict[int, KVCache] = {}  # by row
        if arena is not None:
            arena.is_torn = False

    @property
    def is_torn(self) -> bool:
        """An interrupt came while rows were moved: begin with a new runner."""
        return self.arena is not None and self.arena.is_torn

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
            if self.decode is not None and _suits(self.decode, plan.chunks):
                logits_RV = self._decode(self.decode, plan.chunks)
            else:
                hidden_TD = self._forward(plan.chunks)
                logits_RV = self._logits(plan.chunks, hidden_TD)
        return _sample(plan.chunks, logits_RV, at_once=self.device.type == "cuda")

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
        if self.arena is not None:
            return self.arena.reserve(old, num_tokens, self.caches.values())
        dtype = self.model.dtype
        cache = KVCache.allocate(self.model.config.text, num_tokens, dtype, self.device)
        if old is not None:
            cache.copy_from(old, old.length)
        return cache

    def _decode(self, decode: Decode, chunks: SequenceOf[Chunk]) -> Tensor:
        """Score the words after the newest token of each answer."""
        tokens: list[Token] = []
        for chunk in chunks:
            cache = self._row(chunk)
            cache.length = chunk.start
            position = chunk.start + chunk.sequence.prompt.rope_delta
            tokens.append(Token(chunk.sequence.ids[-1], position, cache))
        # Nobody's rows ask for an adapter here, and none that an interrupt has left may answer.
        with self.switch.at_work("model", [(None, len(tokens))]):
            logits_RV = decode(tokens)
        for chunk, token in zip(chunks, tokens, strict=True):
            token.cache.length = chunk.stop
        return logits_RV

    def _forward(self, chunks: SequenceOf[Chunk]) -> Tensor:
        ids: list[int] = []
        positions: list[Tensor] = []
        rows: list[Tensor] = []
        pads: list[int] = []
        for chunk in chunks:
            for at, row_MD in self._vision_of(chunk):
                rows.append(row_MD)
                first = len(ids) + at - chunk.start
                pads += range(first, first + len(row_MD))
            ids += chunk.ids
            positions.append(chunk.sequence.positions(chunk.start, chunk.stop + len(chunk.drafts)))
        ids_T, position_ids_3T, pad_index_M = send(
            self.device,
            torch.tensor(ids),
            torch.cat(positions, dim=1),
            torch.tensor(pads, dtype=torch.int64),
        )
        meta = AttnMeta.build(
            [chunk.num_ids for chunk in chunks],
            [chunk.start + chunk.num_ids for chunk in chunks],
        ).to(self.device)
        caches = [self._row(chunk) for chunk in chunks]
        for chunk, cache in zip(chunks, caches, strict=True):
            cache.length = chunk.start
        with self.switch.at_work("model", [(c.sequence.adapter, c.num_ids) for c in chunks]):
            hidden_TD = self.model(
                ids_T,
                position_ids_3T,
                meta,
                vision_MD=torch.cat(rows) if rows else None,
                pad_index_M=pad_index_M if rows else None,
                caches=self._packed(chunks, caches, meta) or caches,
            )
        for cache, length in zip(caches, meta.lengths_k, strict=True):
            cache.length = length
        return hidden_TD

    def _packed(
        self, chunks: SequenceOf[Chunk], caches: SequenceOf[KVCache], meta: AttnMeta
    ) -> SharedCache | None:
        """Say to a kernel that takes all rows at once where they lie; None: there is none."""
        if self.arena is None or not self.arena.packs:
            return None
        starts = [self.arena.start(cache) for cache in caches]
        slots = [
            torch.arange(start + chunk.start, start + chunk.start + chunk.num_ids)
            for start, chunk in zip(starts, chunks, strict=True)
        ]
        starts_S, totals_S, slots_T = send(
            self.device, torch.tensor(starts), torch.tensor(meta.lengths_k), torch.cat(slots)
        )
        return self.arena.rows(meta, starts_S, totals_S, slots_T)

    def _row(self, chunk: Chunk) -> KVCache:
        assert chunk.sequence.row is not None
        return self.caches[chunk.sequence.row.number]

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
            hidden_TD = hidden_TD[send(self.device, torch.tensor(wanted))[0]]
        owners = [(chunk.sequence.adapter, chunk.num_sampled) for chunk in chunks]
        with self.switch.at_work("lm_head", owners):
            return self.model.logits(hidden_TD)


def _sample(
    chunks: SequenceOf[Chunk], logits_RV: Tensor, *, at_once: bool
) -> list[Sampled | Qwen2VLError]:
    """Choose the tokens of each sequence, which has its own draws and its own errors."""
    results: list[Sampled | Qwen2VLError] = []
    chosen = _chosen_at_once(chunks, logits_RV) if at_once else {}
    parts = logits_RV.split([chunk.num_sampled for chunk in chunks])
    for index, (chunk, part_RV) in enumerate(zip(chunks, parts, strict=True)):
        if chunk.num_sampled:
            chunk.sequence.clock.answer()
        if index in chosen:
            results.append(chosen[index])
            continue
        try:
            # Memory, too: draws that were made cannot be made again by another attempt.
            with memory_errors_named(chunk.sequence.prompt):
                results.append(_verify(chunk, part_RV))
        except Qwen2VLError as error:
            results.append(error)
    return results


def _chosen_at_once(
    chunks: SequenceOf[Chunk], logits_RV: Tensor
) -> dict[int, Sampled | Qwen2VLError]:
    """Choose for all whose token depends on one row of logits alone, by place in `chunks`."""
    plain: dict[int, int] = {}  # place -> row
    stop = 0
    for index, chunk in enumerate(chunks):
        stop += chunk.num_sampled
        if chunk.num_sampled == 1 and chunk.sequence.sampler.is_plain:
            plain[index] = stop - 1
    if len(plain) < len(logits_RV):
        if not plain:
            return {}
        logits_RV = logits_RV[send(logits_RV.device, torch.tensor([*plain.values()]))[0]]
    try:
        tokens = choose([chunks[index].sequence.sampler for index in plain], logits_RV)
    except torch.OutOfMemoryError:
        return {}  # one by one they take less, and will draw the same
    return {
        index: token if isinstance(token, Qwen2VLError) else [(token, None)]
        for index, token in zip(plain, tokens, strict=True)
    }


def _suits(decode: Decode, chunks: SequenceOf[Chunk]) -> bool:
    """Tell whether all chunks are tokens decoded without anything that a quick step has not."""
    return len(chunks) <= decode.most and all(
        chunk.is_decode and chunk.sequence.adapter is None for chunk in chunks
    )


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
