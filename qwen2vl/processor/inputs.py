"""The two structs that leave this room: Item, one visual thing; ModelInput, one whole prompt.

Both are plain data on the CPU. Images and videos are Items of one stream, in prompt order: an
image is a clip of two identical frames. Pixels stay uint8; scaling and normalizing is the model's
first step, so that a prompt costs a quarter of the memory and copies.
(HF: pixel_values with image_grid_thw, pixel_values_videos with video_grid_thw.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qwen2vl.geometry import Grid, VisionMeta, num_tokens

__all__ = ["Item", "ModelInput"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image or video as the model sees it, and what a person wants to know about it."""

    kind: Literal["image", "video"]
    patches_NP: Tensor  # (N, P) uint8, merge-block order
    grid: Grid  # in patches
    digest: bytes  # 32 bytes over the resized pixels, the grid, mean and std: the cache's key
    name: str  # for messages and errors: a file name, or "image 2"
    size_given: tuple[int, int]  # (height, width) in pixels, as shown to a person (EXIF applied)
    size_seen: tuple[int, int]  # (height, width) in pixels after resizing
    frame_times: tuple[float, ...] = ()  # seconds of the frames used; empty for an image
    notes: tuple[str, ...] = ()  # what was adjusted on the way, in words for people

    @property
    def num_tokens(self) -> int:
        """Vision tokens of this item, for the usual merge of 2 x 2."""
        return num_tokens(self.grid)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One prompt (or training example), ready for the model; validated when it was built."""

    input_ids: list[int]
    items: tuple[Item, ...]  # in prompt order
    position_ids_3T: Tensor  # (3, T) int64
    rope_delta: int  # add to a token's index to get its position, after the prompt
    pad_index_M: Tensor  # (M,) int64, tokens that vision rows overwrite
    loss_mask: list[bool] | None = None  # supervised tokens, only when built for training
    notes: tuple[str, ...] = ()  # of all items, each with its item's name

    @property
    def grids(self) -> list[Grid]:
        """Sizes of the items, in prompt order."""
        return [item.grid for item in self.items]

    @property
    def image_tokens(self) -> int:
        """Vision tokens of all pictures."""
        return sum(item.num_tokens for item in self.items if item.kind == "image")

    @property
    def video_tokens(self) -> int:
        """Vision tokens of all videos."""
        return sum(item.num_tokens for item in self.items if item.kind == "video")

    @cached_property
    def item_starts(self) -> tuple[int, ...]:
        """The token at which each item's placeholders begin."""
        counts = [item.num_tokens for item in self.items]
        return tuple(int(pads[0]) for pads in self.pad_index_M.split(counts)) if counts else ()

    @cached_property
    def patches_NP(self) -> Tensor | None:  # noqa: N802 - a tensor's name ends in its letters
        """All items' patches end to end, or None for a prompt of text alone."""
        return torch.cat([item.patches_NP for item in self.items]) if self.items else None

    @cached_property
    def vision_meta(self) -> VisionMeta | None:
        """Positions and frame bounds of all items' patches, or None for a prompt of text alone."""
        return VisionMeta.build(self.grids) if self.items else None
