"""The synthetic (procedural) world as a data source: a fixed number of its samples.

Text and sizes of a sample are known before it is rendered, so lengths are measured without pixels.
The same samples come in every epoch; a stage that has a mixture instead of data never repeats one.
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
from qwen2vl.synth.world import build_conversation, check_resources

__all__ = ["SyntheticSource", "with_default_system"]


class SyntheticSource:
    """Samples 0 to `num_samples` of one seed of the synthetic world."""

    media_root = ""

    def __init__(
        self, mixture: Mixture, num_samples: int, *, seed: int, default_system: float
    ) -> None:
        """Select the samples.

        Raises:
            FontError: a font of the mixture is not installed.
        """
        check_resources(mixture)
        self.mixture, self.num_samples, self.seed = mixture, num_samples, seed
        self.default_system = default_system

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """Return all settings of the samples; a change of synth's code shows in their lengths."""
        return json.dumps([asdict(self.mixture), self.num_samples, self.seed, self.default_system])

    def name(self, index: int) -> str:
        """Return the name of a sample: its seed and index."""
        return f"world {self.seed}/{index}"

    def read(self, index: int, *, pixels: bool = True) -> Conversation:
        """Generate one sample, and render it if `pixels` is true."""
        spec = sample(self.seed, index, self.mixture)
        if pixels:
            messages = render(spec).messages
        else:
            empty = np.zeros((1, 1, 1), np.uint8)
            shapes = [(picture.height, picture.width, 3) for picture in spec.pictures]
            messages = build_conversation(spec, [np.broadcast_to(empty, shape) for shape in shapes])
        messages = with_default_system(messages, self.default_system, self.seed, index)
        return Conversation(f"{spec.family} {self.seed}/{index}", messages)


def with_default_system(
    messages: Sequence[Mapping[str, Any]], fraction: float, seed: int, index: int
) -> Sequence[Mapping[str, Any]]:
    """Give all conversations but a fraction an empty system message.

    The default system prompt takes 28 tokens of a byte-level vocabulary, more than many a question
    and its image; a fraction of the examples keeps it, since prompts of users have it.
    """
    if Random(f"system {seed} {index}").random() < fraction:
        return messages
    return [{"role": "system", "content": ""}, *messages]
