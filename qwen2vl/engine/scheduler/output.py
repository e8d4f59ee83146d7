"""One step, decided: which tokens of whom, which frame pairs, and what it may cost.

The scheduler spends a Budget and hands out a Plan, the runner carries the plan out, and `commit`
takes in what was sampled. Numbers and references alone: no tensor is touched here, and nothing is
decided but how many frame pairs a step can afford. Next room: scheduler.py, which decides the rest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen2vl.engine.kv_cache.block_pool import MemoryOrder
from qwen2vl.engine.outputs import TokenLogprob
from qwen2vl.engine.request import Sequence
from qwen2vl.lora.multi import Adapter
from qwen2vl.processor.inputs import Item

__all__ = ["Budget", "Chunk", "Limits", "Plan", "Sampled", "Slices"]

Sampled = list[tuple[int, TokenLogprob | None]]  # new tokens; empty when the prompt goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one step may do at most."""

    tokens: int = 1024  # of all chunks together
    patches: int = 4096  # of all pictures; a frame pair that is larger goes alone
    sequences: int = 16  # at work at the same time


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start..stop of one sequence, and guesses at what follows."""

    sequence: Sequence
    start: int
    stop: int
    drafts: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """What the model is fed."""
        return [*self.sequence.ids[self.start : self.stop], *self.drafts]

    @property
    def num_ids(self) -> int:
        """Count them, without making the list."""
        return self.stop - self.start + len(self.drafts)

    @property
    def is_decode(self) -> bool:
        """The newest token of an answer, without guesses: text, whose position is one number."""
        sequence = self.sequence
        return (
            self.num_ids == 1
            and self.stop == len(sequence.ids)
            and self.start >= len(sequence.prompt.input_ids)
        )

    @property
    def num_sampled(self) -> int:
        """Rows at the end from which a next token is chosen; 0 when the prompt goes on."""
        return 1 + len(self.drafts) if self.stop == len(self.sequence.ids) else 0


@dataclass(frozen=True, slots=True)
class Slices:
    """Frame pairs start..stop of one item, to be encoded."""

    item: Item
    start: int
    stop: int
    adapter: Adapter | None = None  # of the tower that looks

    @property
    def num_patches(self) -> int:
        """Count the patches to be encoded."""
        return (self.stop - self.start) * self.item.grid.h * self.item.grid.w


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: first memory, then pictures, then tokens."""

    orders: deque[MemoryOrder]  # the pool's own: what is done is taken away
    slices: tuple[Slices, ...]
    viewers: tuple[Sequence, ...]  # who waits for the slices
    chunks: tuple[Chunk, ...]

    @property
    def largest(self) -> Sequence:
        """The sequence with most tokens in this step."""
        if self.chunks:
            return max(self.chunks, key=lambda chunk: chunk.num_ids).sequence
        return self.largest_viewer

    @property
    def largest_viewer(self) -> Sequence:
        """A sequence that waits for the most patches of one item."""
        most = max(self.slices, key=lambda slices: slices.num_patches)
        digest = most.item.digest
        return next(v for v in self.viewers if digest in (item.digest for item in v.held_items))


class Budget:
    """What is left of a step's budgets, and what has been given."""

    def __init__(self, limits: Limits) -> None:
        self.tokens = limits.tokens
        self.patches = limits.patches
        self.slices: list[Slices] = []
        self.viewers: list[Sequence] = []
        self.chunks: list[Chunk] = []
        self._encoded: dict[bytes, int] = {}  # digest -> frame pairs there after this step

    def encode(self, viewer: Sequence, item: Item, ready: int) -> int:
        """Encode more of an item if the budget allows; count what will be there."""
        if ready < item.grid.t:
            self.viewers.append(viewer)
        if item.digest in self._encoded:
            return self._encoded[item.digest]
        area = item.grid.h * item.grid.w
        count = min(item.grid.t - ready, max(0, self.patches) // area)
        if count == 0 and ready < item.grid.t and not self.slices:
            count = 1  # larger than any budget, so alone
        if count > 0:
            self.slices.append(Slices(item, ready, ready + count, viewer.adapter))
            self.patches -= count * area
        self._encoded[item.digest] = ready + count
        return ready + count
