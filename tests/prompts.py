"""Prompts for tests of geometry and of the model: runs of text and visual items, and their ids.

A prompt is written as a list of parts: a number is that many tokens of text, `image(h, w)` and
`video(t, h, w)` are items with their grids in patches. The same parts make our packed arguments
and, in tests/parity/oracle.py, the reference's batched ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import Grid, num_tokens


class Visual(NamedTuple):
    kind: Literal["image", "video"]
    grid: Grid


Part = int | Visual


def image(h: int, w: int) -> Visual:
    return Visual("image", Grid(1, h, w))


def video(t: int, h: int, w: int) -> Visual:
    return Visual("video", Grid(t, h, w))


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    visuals: list[Visual]

    @property
    def grids(self) -> list[Grid]:
        return [visual.grid for visual in self.visuals]

    def of_kind(self, kind: str) -> list[Grid]:
        return [visual.grid for visual in self.visuals if visual.kind == kind]


def prompt(parts: list[Part], config: Qwen2VLConfig, seed: int = 0) -> Prompt:
    """Lay the parts out as ids; text is drawn below the special tokens' own ids."""
    generator = torch.Generator().manual_seed(seed)
    words = _words(config)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += words[torch.randint(len(words), (part,), generator=generator)].tolist()
        else:
            pad = config.image_token_id if part.kind == "image" else config.video_token_id
            ids += [pad] * num_tokens(part.grid)
    return Prompt(ids, [part for part in parts if isinstance(part, Visual)])


@cache
def _words(config: Qwen2VLConfig) -> Tensor:
    special = {
        config.bos_token_id,
        config.eos_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        *config.pad_ids,
    }
    return torch.tensor([i for i in range(config.text.vocab_size) if i not in special])


def patches(prompt: Prompt, config: Qwen2VLConfig, seed: int = 0) -> Tensor:
    """Draw the pixels of a prompt's items: patches_NP, normalized."""
    count = sum(grid.t * grid.h * grid.w for grid in prompt.grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.vision.patch_dim, generator=generator)


def visuals(*, longest_clip: int = 4) -> st.SearchStrategy[Visual]:
    """Draw items of 2 to 10 patches a side."""
    side = st.integers(1, 5).map(lambda n: 2 * n)
    images = st.builds(image, side, side)
    return images | st.builds(video, st.integers(1, longest_clip), side, side)


def parts(*, longest_clip: int = 4) -> st.SearchStrategy[list[Part]]:
    """Draw prompts of up to five items; equal neighbors always have text between them."""
    part = st.integers(0, 6) | visuals(longest_clip=longest_clip)
    return st.lists(part, min_size=1, max_size=9).filter(_runs_are_apart)


def _runs_are_apart(drawn: list[Part]) -> bool:
    seen = [part for part in drawn if part != 0]
    return bool(seen) and not any(
        isinstance(a, Visual) and isinstance(b, Visual) and a.kind == b.kind
        for a, b in pairwise(seen)
    )
