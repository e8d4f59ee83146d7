"""The procedural world as one source among others: a fixed number of its samples.

Its text and sizes are known before anything is drawn, so measuring a sample costs no pixels. The
same pictures come again in every pass; a stage with nothing but a mixture never repeats one. It
must not know tokens. Next rooms: sources.py, synth/.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from random import Random
from typing import Any

import numpy as np

from qwen2vl.data.formats import Conversation
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.synth.world import check_fonts, converse

__all__ = ["World", "with_system"]


class World:
    """Samples 0 to `count` of one series of the world."""

    base = ""

    def __init__(self, mixture: Mixture, count: int, *, seed: int, default_system: float) -> None:
        """Choose a piece of the world.

        Raises:
            FontError: a font of the mixture is not installed.
        """
        check_fonts(mixture)
        self.mixture, self.count, self.seed = mixture, count, seed
        self.default_system = default_system

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Name what is drawn; a change of the world itself shows when lengths disagree."""
        return json.dumps([asdict(self.mixture), self.count, self.seed, self.default_system])

    def name(self, index: int) -> str:
        """Name a sample by the numbers that make it."""
        return f"world {self.seed}/{index}"

    def read(self, index: int, *, pixels: bool = True) -> Conversation:
        """Make up one sample, and draw it if `pixels` are wanted."""
        spec = sample(self.seed, index, self.mixture)
        if pixels:
            messages = render(spec).messages
        else:
            empty = np.zeros((1, 1, 1), np.uint8)
            shapes = [(picture.height, picture.width, 3) for picture in spec.pictures]
            messages = converse(spec, [np.broadcast_to(empty, shape) for shape in shapes])
        said = with_system(messages, self.default_system, self.seed, index)
        return Conversation(f"{spec.family} {self.seed}/{index}", said)


def with_system(
    messages: Sequence[Mapping[str, Any]], share: float, seed: int, index: int
) -> Sequence[Mapping[str, Any]]:
    """Give all conversations but a `share` an empty system turn.

    The default sentence costs 28 tokens of a byte-level vocabulary, more than many a question and
    its picture; a share of the examples keeps it, since that is what a user's prompt has.
    """
    if Random(f"system {seed} {index}").random() < share:
        return messages
    return [{"role": "system", "content": ""}, *messages]
