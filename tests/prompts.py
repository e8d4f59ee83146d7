"""Prompts for tests of geometry and model: segments of text and visual items, and their ids.

A prompt is written as a list of parts: a number is that many tokens of text, `image(h, w)` and
`video(t, h, w)` are items with their grids in patches. The same parts make the packed arguments of
this model and, in tests/parity/reference.py, the batched ones of the reference.
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
from qwen2vl.geometry import Grid, num_vision_tokens


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
    """Convert parts to token ids; text tokens are drawn from all but the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    text_tokens = _text_tokens(config)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += text_tokens[
                torch.randint(len(text_tokens), (part,), generator=generator)
            ].tolist()
        else:
            placeholder = config.image_token_id if part.kind == "image" else config.video_token_id
            ids += [placeholder] * num_vision_tokens(part.grid)
    return Prompt(ids, [part for part in parts if isinstance(part, Visual)])


@cache
def _text_tokens(config: Qwen2VLConfig) -> Tensor:
    special = {
        config.bos_token_id,
        config.eos_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
        *config.placeholder_ids,
    }
    return torch.tensor([i for i in range(config.text.vocab_size) if i not in special])


def patches(prompt: Prompt, config: Qwen2VLConfig, seed: int = 0) -> Tensor:
    """Draw the pixels of a prompt's items: patches_NP, normalized."""
    count = sum(grid.t * grid.h * grid.w for grid in prompt.grids)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.vision.patch_dim, generator=generator)


def visuals(*, max_frame_pairs: int = 4) -> st.SearchStrategy[Visual]:
    """Draw items of 2 to 10 patches a side."""
    side = st.integers(1, 5).map(lambda n: 2 * n)
    images = st.builds(image, side, side)
    return images | st.builds(video, st.integers(1, max_frame_pairs), side, side)


def parts(*, max_frame_pairs: int = 4) -> st.SearchStrategy[list[Part]]:
    """Draw prompts of up to nine parts; items of equal kind always have text between them."""
    part = st.integers(0, 6) | visuals(max_frame_pairs=max_frame_pairs)
    return st.lists(part, min_size=1, max_size=9).filter(_equal_kinds_are_separated)


def _equal_kinds_are_separated(drawn: list[Part]) -> bool:
    nonempty = [part for part in drawn if part != 0]
    return bool(nonempty) and not any(
        isinstance(a, Visual) and isinstance(b, Visual) and a.kind == b.kind
        for a, b in pairwise(nonempty)
    )
