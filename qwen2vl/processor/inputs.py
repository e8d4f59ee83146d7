"""Results of preprocessing: `Item`, one image or video; `ModelInput`, one whole prompt.

Both are data on the CPU; only a long video is decoded later, by its `PairSource`. Images and videos
are Items of one stream, in prompt order: an image is a video of two identical frames. Pixels stay
uint8; the model's first operation rescales and normalizes them, so that a prompt costs a quarter of
the memory and copies of float32.
(HF: pixel_values with image_grid_thw, pixel_values_videos with video_grid_thw.)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from qwen2vl.geometry import Grid, VisionMeta, num_vision_tokens

__all__ = ["Item", "ModelInput", "PairSource", "PairSourceView"]


class PairSource(Protocol):
    """The frame pairs of a long video, decoded while they are consumed; see FramePairStream."""

    def digest(self, index: int) -> bytes | None:
        """Return the digest of a pair; None if it has not been decoded yet."""
        ...

    def patches(self, index: int) -> Tensor | None:
        """Return the patches of a pair; None if they are not decoded, or released again."""
        ...

    def prefetch(self, index: int) -> None:
        """Decode from this pair on; raise the error that decoding ended with."""
        ...

    def wait(self, index: int, timeout: float) -> None:
        """Return when the pair has been decoded, at the latest after `timeout` seconds."""
        ...

    def close(self) -> None:
        """Release all patches; a later `prefetch` decodes again."""
        ...

    @property
    def num_bytes(self) -> int:
        """The largest number of bytes that it keeps in memory."""
        ...


@dataclass(frozen=True, slots=True)
class PairSourceView:
    """The frame pairs of another source from one on, under other digests. (Is a PairSource.)"""

    source: PairSource
    first: int = 0
    map_digest: Callable[[bytes], bytes] | None = None  # None: the same digests

    def digest(self, index: int) -> bytes | None:
        """Return the digest of a pair; None if it has not been decoded yet."""
        digest = self.source.digest(self.first + index)
        return digest if digest is None or self.map_digest is None else self.map_digest(digest)

    def patches(self, index: int) -> Tensor | None:
        """Return the patches of a pair, if they are there."""
        return self.source.patches(self.first + index)

    def prefetch(self, index: int) -> None:
        """Decode from this pair on."""
        self.source.prefetch(self.first + index)

    def wait(self, index: int, timeout: float) -> None:
        """Wait until the pair has been decoded."""
        self.source.wait(self.first + index, timeout)

    def close(self) -> None:
        """Release all patches."""
        self.source.close()

    @property
    def num_bytes(self) -> int:
        """The largest number of bytes that the source keeps in memory."""
        return self.source.num_bytes


@dataclass(frozen=True, kw_only=True)
class Item:
    """One preprocessed image or video: patches and grid, with sizes and notes for display."""

    kind: Literal["image", "video"]
    patches_NP: Tensor  # (N, P) uint8, merge-block order; empty where `source` decodes them
    grid: Grid  # in patches
    # 32 bytes for each frame pair, over its resized pixels, size, mean and std: the keys of the
    # engine's caches. Equal pairs of any two items have equal digests.
    pair_digests: tuple[bytes, ...]
    name: str  # for messages and errors: a file name, or "image 2"
    original_size: tuple[int, int]  # (height, width) in pixels, with EXIF orientation applied
    resized_size: tuple[int, int]  # (height, width) in pixels after resizing
    frame_timestamps: tuple[float, ...] = ()  # seconds of the sampled frames; empty for an image
    notes: tuple[str, ...] = ()  # what was adjusted during preprocessing, as readable text
    orientation: int = 1  # EXIF orientation that was applied, 1 to 8: stored -> upright pixels
    source: PairSource | None = None  # of a long video, in place of patches and digests

    @property
    def num_tokens(self) -> int:
        """Number of vision tokens, for the default spatial merge of 2 x 2."""
        return num_vision_tokens(self.grid)

    @property
    def tokens_per_pair(self) -> int:
        """Number of vision tokens of one frame pair."""
        return self.num_tokens // self.grid.t

    @property
    def num_bytes(self) -> int:
        """Bytes that the item keeps in memory, at most."""
        return self.patches_NP.nbytes if self.source is None else self.source.num_bytes

    def pair_digest(self, index: int) -> bytes | None:
        """Return the digest of one frame pair; None: `source` has not decoded it yet."""
        return self.pair_digests[index] if self.source is None else self.source.digest(index)

    def pair_patches(self, index: int) -> Tensor | None:
        """Return the patches of one frame pair, (h * w, P); None: `source` lacks them now."""
        if self.source is not None:
            return self.source.patches(index)
        area = self.grid.h * self.grid.w
        return self.patches_NP[area * index : area * (index + 1)]

    def load_pair(self, index: int) -> Tensor:
        """Return the patches of one frame pair, (h * w, P), waiting until it is decoded.

        Raises:
            InputError, EngineError: it cannot be decoded.
        """
        while (patches_NP := self.pair_patches(index)) is None:
            assert self.source is not None
            self.source.prefetch(index)
            self.source.wait(index, 1.0)
        return patches_NP


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

    def pairs_between(self, start: int, stop: int) -> Iterator[tuple[int, Item, int]]:
        """Yield the frame pairs with tokens in start..stop: (first token, item, index in the item).

        First tokens may lie before `start`.
        """
        number = max(0, bisect_right(self.item_starts, start) - 1)
        while number < len(self.items) and self.item_starts[number] < stop:
            first, item = self.item_starts[number], self.items[number]
            size = item.tokens_per_pair
            for index in range(max(0, start - first) // size, item.grid.t):
                if first + index * size >= stop:
                    return
                yield first + index * size, item, index
            number += 1

    @cached_property
    def patches_NP(self) -> Tensor | None:  # noqa: N802 - a tensor's name ends in its letters
        """Patches of all items, concatenated; None for a text-only prompt."""
        assert all(item.source is None for item in self.items), "a long video is only streamed"
        return torch.cat([item.patches_NP for item in self.items]) if self.items else None

    @cached_property
    def vision_meta(self) -> VisionMeta | None:
        """Patch positions and frame bounds of all items; None for a text-only prompt."""
        return VisionMeta.build(self.grids) if self.items else None
