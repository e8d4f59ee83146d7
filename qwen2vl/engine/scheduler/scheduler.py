"""Which sequences run now, how many tokens of each, and which pictures are looked at.

A step has a budget of tokens and one of patches. Answers that are being written go first, one token
each (and its drafts); what is left goes to prompts, in chunks, first come first served. A chunk
may end inside a picture: it ends where rows are missing. When cache rows run out the youngest gives
way, row and all, and begins again later with what others still hold of it. No tensor is touched
here: a Plan says what is to be done, `commit` takes in what came of it. Next room: runner.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from qwen2vl.engine.kv_cache.block_pool import BLOCK, BlockPool, Row
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.scheduler.output import Budget, Chunk, Limits, Plan, Sampled
from qwen2vl.engine.speculative import Drafter
from qwen2vl.errors import Qwen2VLError
from qwen2vl.processor.inputs import Item

__all__ = ["News", "Scheduler", "Shelf"]

_SPARE = 2 * BLOCK  # tokens of room beyond the known ones, when a sequence is admitted


@dataclass(frozen=True, slots=True)
class News:
    """Text that became certain in one sequence; the last news of it carries its finish_reason."""

    sequence: Sequence
    text: str


class Shelf(Protocol):
    """What the scheduler asks about vision rows; runner.py has them."""

    def hold(self, item: Item) -> None:
        """Keep the item's rows, or what becomes of them, until it is released as often."""
        ...

    def release(self, item: Item) -> None:
        """Let go of an item."""
        ...

    def ready(self, item: Item) -> int:
        """Count the frame pairs whose rows are there."""
        ...


class Scheduler:
    """Waiting and running sequences, and the rule by which they share a step."""

    def __init__(
        self, pool: BlockPool, shelf: Shelf, limits: Limits, drafter: Drafter | None = None
    ) -> None:
        self.pool = pool
        self.shelf = shelf
        self.limits = limits
        self.drafter = drafter
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the oldest first
        self.is_torn = False  # an interrupt came while the books were written: begin with new ones

    @property
    def has_work(self) -> bool:
        """Somebody waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, behind all that came before."""
        blocks = _blocks(sequence.most_ids)
        assert blocks <= self.pool.num_blocks, "a sequence that can never run was let in"
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; one that is over already is no error."""
        with self._writing():
            if sequence in self.running:
                self._leave(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)

    def plan(self) -> Plan:
        """Decide the next step."""
        step = Budget(self.limits)
        with self._writing():
            for sequence in sorted(self.running, key=lambda s: s.is_prefilling):
                if sequence.row is not None:  # else it has just given way
                    self._add_chunk(step, sequence)
            self._admit(step)
        assert step.chunks or step.slices or not self.has_work, "a step without progress"
        viewers = tuple(dict.fromkeys(step.viewers))
        return Plan(self.pool.orders, tuple(step.slices), viewers, tuple(step.chunks))

    def commit(self, plan: Plan, results: SequenceOf[Sampled | Qwen2VLError]) -> list[News]:
        """Take in what a step brought: one result for each chunk."""
        news: list[News] = []
        with self._writing():
            for chunk, result in zip(plan.chunks, results, strict=True):
                if isinstance(result, Qwen2VLError):
                    news.append(self._fail(chunk.sequence, result))
                else:
                    news += self._take_in(chunk, result)
        return news

    def fail(self, sequence: Sequence, error: Qwen2VLError) -> News:
        """End a running sequence with an error; what it stored is not used again."""
        with self._writing():
            return self._fail(sequence, error)

    def forget(self) -> None:
        """Give up the rows of sequences that are over."""
        with self._writing():
            self.pool.clear()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.is_torn = True
        yield
        self.is_torn = False  # not where something is raised

    def _fail(self, sequence: Sequence, error: Qwen2VLError) -> News:
        sequence.fail(error)
        self._leave(sequence, discard=True)
        return News(sequence, "")

    def _take_in(self, chunk: Chunk, sampled: Sampled) -> list[News]:
        sequence = chunk.sequence
        # Each guess that came true has stored its keys and values in this very step.
        accepted = max(0, len(sampled) - 1)
        sequence.num_computed = chunk.stop + accepted
        sequence.num_drafted += len(chunk.drafts)
        sequence.num_accepted += accepted
        if not sequence.is_prefilling:
            self._release_items(sequence)
        texts: list[str] = []
        for token, logprob in sampled:
            texts.append(sequence.append(token, logprob))
            if sequence.finish_reason is not None:
                break
        assert sequence.row is not None
        full = min(sequence.num_computed, len(sequence.ids)) // BLOCK
        self.pool.record(sequence.row, sequence.chain.extend(sequence.ids)[:full])
        if sequence.finish_reason is not None:
            self._leave(sequence)
            if self.drafter is not None:
                self.drafter.learn(sequence)
        text = "".join(texts)
        return [News(sequence, text)] if text or sequence.finish_reason is not None else []

    def _add_chunk(self, step: Budget, sequence: Sequence) -> None:
        """Give a running sequence what it can use of the step."""
        known = len(sequence.ids)
        stop = self._visible(step, sequence, min(known, sequence.num_computed + step.tokens))
        if stop <= sequence.num_computed:
            return
        drafts: tuple[int, ...] = ()
        if self.drafter is not None and not sequence.is_prefilling:
            most = min(step.tokens - 1, sequence.most_ids - known - 1)
            drafts = tuple(self.drafter(sequence, most))
        if not self._find_room(sequence, stop + len(drafts)):
            return
        chunk = Chunk(sequence, sequence.num_computed, stop, drafts)
        step.tokens -= chunk.num_ids
        step.chunks.append(chunk)

    def _visible(self, step: Budget, sequence: Sequence, stop: int) -> int:
        """Cut a chunk where a picture's rows are missing; have them encoded as the budget goes."""
        for start, item in sequence.items_after(sequence.num_computed):
            if start >= stop:
                break
            slices = step.encode(sequence, item, self.shelf.ready(item))
            reach = start + item.num_tokens * slices // item.grid.t
            if slices < item.grid.t and reach < stop:
                return reach
        return stop

    def _find_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Widen a row, sending the youngest away for it; False when that is the sequence itself."""
        assert sequence.row is not None
        if _blocks(num_tokens) <= sequence.row.num_blocks:
            return True
        # Half as much again, so that a long answer is moved a few times only.
        generous = min(_blocks(sequence.most_ids), _blocks(num_tokens * 3 // 2))
        if self.pool.grow(sequence.row, generous):
            return True
        while not self.pool.grow(sequence.row, _blocks(num_tokens)):
            youngest = self.running[-1]
            self._leave(youngest)
            youngest.num_computed = 0
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _admit(self, step: Budget) -> None:
        """Let waiting sequences in, in order, while the step and the cache have room."""
        for sequence in list(self.waiting):
            if step.tokens <= 0 or len(self.running) >= self.limits.sequences:
                return
            # The last token is always computed: its hidden state gives the next one.
            keys = sequence.chain.extend(sequence.ids)[: (len(sequence.ids) - 1) // BLOCK]
            if self._is_being_computed(keys):
                continue  # soon it need only be copied
            room = min(len(sequence.ids) + _SPARE, sequence.most_ids)
            claimed = self.pool.claim(keys, _blocks(room))
            if claimed is None:
                return
            self.waiting.remove(sequence)
            self._enter(sequence, *claimed)
            self._add_chunk(step, sequence)

    def _is_being_computed(self, keys: SequenceOf[bytes]) -> bool:
        """Tell whether a running prompt will soon hold more of `keys` than any row does now."""
        held = self.pool.match(keys)
        if held == len(keys):
            return False
        return any(
            sequence.row is not None and keys[held] in sequence.chain.keys[len(sequence.row.keys) :]
            for sequence in self.running
            if sequence.is_prefilling
        )

    def _enter(self, sequence: Sequence, row: Row, held: int) -> None:
        sequence.row = row
        sequence.num_computed = held * BLOCK
        if not sequence.token_ids:
            sequence.num_cached = held * BLOCK
        sequence.held_items = [item for _, item in sequence.items_after(sequence.num_computed)]
        for item in sequence.held_items:
            self.shelf.hold(item)
        sequence.clock.begin()
        self.running.append(sequence)

    def _leave(self, sequence: Sequence, *, discard: bool = False) -> None:
        assert sequence.row is not None
        self.running.remove(sequence)
        self._release_items(sequence)
        (self.pool.discard if discard else self.pool.release)(sequence.row)
        sequence.row = None

    def _release_items(self, sequence: Sequence) -> None:
        for item in sequence.held_items:
            self.shelf.release(item)
        sequence.held_items = []


def _blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)
