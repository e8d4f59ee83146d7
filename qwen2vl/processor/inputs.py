"""Results of preprocessing: `Item`, one image or video; `ModelInput`, one whole prompt.

Both are plain data on the CPU. Images and videos are Items of one stream, in prompt order: an
image is a video of two identical frames. Pixels stay uint8; the model's first operation rescales
and normalizes them, so that a prompt costs a quarter of the memory and copies of float32.
(HF: pixel_values with image_grid_thw, pixel_values_videos with video_grid_thw.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qwen2vl.geometry import Grid, VisionMeta, num_vision_tokens

__all__ = ["Item", "ModelInput"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One preprocessed image or video: patches and grid, with sizes and notes for display."""

    kind: Literal["image", "video"]
    patches_NP: Tensor  # (N, P) uint8, merge-block order
    grid: Grid  # in patches
    digest: bytes  # 32 bytes over the resized pixels, the grid, mean and std: the cache key
    name: str  # for messages and errors: a file name, or "image 2"
    original_size: tuple[int, int]  # (height, width) in pixels, with EXIF orientation applied
    resized_size: tuple[int, int]  # (height, width) in pixels after resizing
    frame_timestamps: tuple[float, ...] = ()  # seconds of the sampled frames; empty for an image
    notes: tuple[str, ...] = ()  # what was adjusted during preprocessing, as readable text
    orientation: int = 1  # EXIF orientation that was applied, 1 to 8: stored -> upright pixels

    @property
    def num_tokens(self) -> int:
        """Number of vision tokens, for the default spatial merge of 2 x 2."""
        return num_vision_tokens(self.grid)


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One prompt or training example, ready for the model; validated when it was built."""

    input_ids: list[int]
    items: tuple[Item, ...]  # in prompt order
    position_ids_3T: Tensor  # (3, T) int64
    rope_delta: int  # add to a token's index to get its position, after the prompt
    placeholder_index_M: Tensor  # (M,) int64; vision embeddings replace these tokens
    loss_mask: list[bool] | None = None  # supervised tokens, only when built for training
    notes: tuple[str, ...] = ()  # of all items, each prefixed with its item's name
    cache_salt: bytes = b""  # prompts of different salts share no entry of the engine's caches

    @property
    def grids(self) -> list[Grid]:
        """Grids of the items, in prompt order."""
        return [item.grid for item in self.items]

    @property
    def image_tokens(self) -> int:
        """Number of vision tokens of all images."""
        return sum(item.num_tokens for item in self.items if item.kind == "image")

    @property
    def video_tokens(self) -> int:
        """Number of vision tokens of all videos."""
        return sum(item.num_tokens for item in self.items if item.kind == "video")

    @cached_property
    def item_starts(self) -> tuple[int, ...]:
        """Index of the first placeholder token of each item."""
        counts = [item.num_tokens for item in self.items]
        return (
            tuple(int(index[0]) for index in self.placeholder_index_M.split(counts))
            if counts
            else ()
        )

    @cached_property
    def patches_NP(self) -> Tensor | None:  # noqa: N802 - a tensor's name ends in its letters
        """Patches of all items, concatenated; None for a text-only prompt."""
        return torch.cat([item.patches_NP for item in self.items]) if self.items else None

    @cached_property
    def vision_meta(self) -> VisionMeta | None:
        """Patch positions and frame bounds of all items; None for a text-only prompt."""
        return VisionMeta.build(self.grids) if self.items else None
