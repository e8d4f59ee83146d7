"""What data become: one conversation ready to train on, or the reason why it is not.

It must not know batches, but how long a conversation is in one: bins are planned by that.
Next rooms: train/pack.py, which lays examples end to end; train/bad.py, which counts the others.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen2vl.processor.inputs import ModelInput

__all__ = ["ROUND", "BadSample", "Example", "rounded"]

ROUND = 8  # lengths are rounded up to a multiple of this


class Example(NamedTuple):
    """One supervised conversation, and which family of tasks it belongs to."""

    input: ModelInput
    family: str


class BadSample(NamedTuple):
    """A sample that could not be used; nothing took its place."""

    id: str
    source: str
    reason: str  # one word, to count by
    text: str
    known: bool = False  # before the run began, and judged then: bad by its header, or too large


def rounded(length: int) -> int:
    """Tell how many tokens a conversation of `length` takes up in a batch."""
    return -(-length // ROUND) * ROUND
