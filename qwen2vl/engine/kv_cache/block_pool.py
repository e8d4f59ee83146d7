"""Who owns which cache blocks, and who has computed the same beginning before.

A block is Z tokens of keys and values. A sequence owns one row of blocks, side by side, for that is
what the attention kernel of a CPU wants. When a sequence ends its row stays, as long as nobody
needs the room, and is found again by the keys of its blocks:

    key 0 = H(ids 0..Z-1, pictures there)    key 1 = H(key 0, ids Z..2Z-1, pictures there)    ...

Every picture of one size has the same ids, so a key also holds the digest of each item its block
overlaps, and where in the item it stands; key 0 holds the adapter's. A sequence that continues a
resting row takes it over; one that only begins like another copies the beginning. What is to be
done to memory comes out as a list of orders. Next room: scheduler.py, which asks for rows.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

from qwen2vl.processor.inputs import ModelInput

__all__ = ["BLOCK", "BlockPool", "Copy", "Free", "KeyChain", "MemoryOrder", "Reserve", "Row"]

BLOCK = 32  # tokens; Z in docs/conventions.md


class KeyChain:
    """The keys of one sequence's full blocks, made as its tokens come."""

    def __init__(self, prompt: ModelInput, salt: bytes = b"") -> None:
        """Begin with `salt`: sequences of different salts never share a block."""
        self.keys: list[bytes] = []
        self._salt = salt
        self._spans = [
            (start, start + item.num_tokens, item.digest)
            for start, item in zip(prompt.item_starts, prompt.items, strict=True)
        ]

    def extend(self, ids: SequenceOf[int]) -> list[bytes]:
        """Make the keys of all blocks that `ids`, the whole sequence, fill; return every key."""
        while (len(self.keys) + 1) * BLOCK <= len(ids):
            start = len(self.keys) * BLOCK
            self.keys.append(self._key(start, ids[start : start + BLOCK]))
        return self.keys

    def _key(self, start: int, ids: SequenceOf[int]) -> bytes:
        hasher = blake2b(self.keys[-1] if self.keys else self._salt, digest_size=32)
        hasher.update(array("q", ids).tobytes())
        for first, stop, digest in self._spans:
            if first < start + BLOCK and start < stop:
                hasher.update(digest + (start - first).to_bytes(8, "little", signed=True))
        return hasher.digest()


@dataclass(slots=True, eq=False)
class Row:
    """Blocks that lie side by side and hold the beginning of one sequence."""

    number: int
    num_blocks: int  # room
    keys: list[bytes] = field(default_factory=list)  # of the blocks that are filled


@dataclass(frozen=True, slots=True)
class Reserve:
    """Make room for so many tokens; a row that exists keeps what it holds."""

    row: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the first tokens of one row into another."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Free:
    """Give the memory of a row back."""

    row: int


MemoryOrder = Reserve | Copy | Free


class BlockPool:
    """A bounded number of blocks, shared out in rows; rows at rest make room, oldest first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # To be carried out in this order by the runner, which takes away what is done.
        self.orders: deque[MemoryOrder] = deque()
        self.num_free = num_blocks  # blocks that nobody owns and no resting row occupies
        self.num_busy = 0  # blocks of rows in use
        # Thousands of rows rest after some hours: nothing below walks over all of them.
        self._numbers = count()
        self._busy: dict[int, Row] = {}
        self._resting: dict[int, Row] = {}  # the longest at rest first
        self._ends: dict[bytes, Row] = {}  # last key -> the newest resting row that ends there
        self._holders: dict[bytes, dict[int, Row]] = {}  # key -> rows that hold it, oldest first

    @property
    def num_resting(self) -> int:
        """Blocks of rows that nobody uses now."""
        return self.num_blocks - self.num_free - self.num_busy

    def match(self, keys: SequenceOf[bytes]) -> int:
        """Count the leading blocks that some row holds."""
        held = 0
        while held < len(keys) and keys[held] in self._holders:
            held += 1
        return held

    def claim(self, keys: SequenceOf[bytes], num_blocks: int) -> tuple[Row, int] | None:
        """Find a row with room for `num_blocks` that already holds the first of `keys`, if any do.

        Returns:
            The row and how many of its blocks need no computing; None when there is no room.
        """
        held = self.match(keys)
        if held and keys[held - 1] in self._ends:
            return self._take_over(self._ends[keys[held - 1]], held, num_blocks)
        # The oldest, since what a younger one holds may itself be a copy still to be made.
        source = next(iter(self._holders[keys[held - 1]].values())) if held else None
        if self._make_room(num_blocks, spare=source):
            return self._branch_off(keys[:held], source, num_blocks), held
        if source is not None and source.number in self._resting:
            return self._take_over(source, held, num_blocks)  # its own end is lost
        return None

    def grow(self, row: Row, num_blocks: int) -> bool:
        """Widen a row in use to `num_blocks`; False, and nothing changed, when there is no room."""
        assert row.number in self._busy, "only a row in use grows"
        more = num_blocks - row.num_blocks
        if more <= 0:
            return True
        if not self._make_room(more):
            return False
        row.num_blocks = num_blocks
        self._own(more)
        self.orders.append(Reserve(row.number, num_blocks * BLOCK))
        return True

    def record(self, row: Row, keys: SequenceOf[bytes]) -> None:
        """Note that the row's first blocks are filled and hold what `keys`, all of them, say."""
        assert len(keys) <= row.num_blocks, "more keys than blocks"
        for key in keys[len(row.keys) :]:
            row.keys.append(key)
            self._holders.setdefault(key, {})[row.number] = row

    def release(self, row: Row) -> None:
        """Let a row rest: it may be found again, and is given up when room is needed."""
        del self._busy[row.number]
        self.num_busy -= row.num_blocks
        if row.keys:
            self._resting[row.number] = row
            self._ends[row.keys[-1]] = row
        else:
            self._drop(row)

    def discard(self, row: Row) -> None:
        """Give up a row in use; nobody finds what it held."""
        del self._busy[row.number]
        self.num_busy -= row.num_blocks
        self._drop(row)

    def clear(self) -> None:
        """Give up every row at rest."""
        for row in list(self._resting.values()):
            self._evict(row)

    def _take_over(self, row: Row, held: int, num_blocks: int) -> tuple[Row, int] | None:
        """Go on with a resting row after its first `held` blocks."""
        self._wake(row)
        self._busy[row.number] = row
        self.num_busy += row.num_blocks
        if not self.grow(row, num_blocks):
            self.release(row)
            return None
        self._forget(row, held)
        return row, held

    def _branch_off(self, keys: SequenceOf[bytes], source: Row | None, num_blocks: int) -> Row:
        """Begin a new row with a copy of what `source` holds of it."""
        row = Row(next(self._numbers), num_blocks)
        self._busy[row.number] = row
        self._own(num_blocks)
        self.orders.append(Reserve(row.number, num_blocks * BLOCK))
        if source is not None:
            self.orders.append(Copy(source.number, row.number, len(keys) * BLOCK))
            self.record(row, keys)
        return row

    def _make_room(self, num_blocks: int, spare: Row | None = None) -> bool:
        """Evict resting rows until `num_blocks` are free, `spare` only if it cannot be helped."""
        evictable = self.num_blocks - self.num_busy
        if spare is not None and spare.number in self._resting:
            evictable -= spare.num_blocks
        if evictable < num_blocks:
            return False
        while self.num_free < num_blocks:
            self._evict(next(row for row in self._resting.values() if row is not spare))
        return True

    def _own(self, num_blocks: int) -> None:
        """Count blocks that were free as in use."""
        self.num_free -= num_blocks
        self.num_busy += num_blocks

    def _wake(self, row: Row) -> None:
        """Take a row from those at rest."""
        del self._resting[row.number]
        if self._ends.get(row.keys[-1]) is row:
            del self._ends[row.keys[-1]]

    def _evict(self, row: Row) -> None:
        self._wake(row)
        self._drop(row)

    def _drop(self, row: Row) -> None:
        self._forget(row, 0)
        self.num_free += row.num_blocks
        self.orders.append(Free(row.number))

    def _forget(self, row: Row, held: int) -> None:
        """Take back the keys of all blocks but the first `held`."""
        for key in row.keys[held:]:
            holders = self._holders[key]
            del holders[row.number]
            if not holders:
                del self._holders[key]
        del row.keys[held:]
