"""Where everything stands: from ids and grids to every index the network needs.

Integers only, on the CPU, without weights: order of patches, number of vision tokens, positions
of patches (row, column) and of tokens (time, height, width), bounds of attention. The model takes
all of it as data. It must not know pixels, text or parameters.
(Qwen2-VL sec. 2.1; HF: get_rope_index, get_vision_position_ids.) Next room: model/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import InputError

__all__ = [
    "AttnMeta",
    "Grid",
    "Run",
    "VisionMeta",
    "frame_lengths",
    "merge_order",
    "num_tokens",
    "pad_index",
    "patch_positions",
    "text_positions",
]


class Grid(NamedTuple):
    """Size of one visual item in patches; an image has t = 1. Always host integers."""

    t: int
    h: int
    w: int


class Run(NamedTuple):
    """Neighboring segments of the same lengths, which attention handles in one call."""

    start_q: int
    start_k: int
    num: int
    length_q: int
    length_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttnMeta:
    """Which tokens attend to which: S segments laid end to end, each a world of its own.

    Lengths are host integers (the CPU path slices by them), cu_seqlens their running sums as
    tensors (what variable-length GPU kernels take). Without a cache `lengths_k` is `lengths_q`.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor  # (S+1,) int32
    cu_seqlens_k: Tensor  # (S+1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    runs: tuple[Run, ...]
    # What attention has drawn for these lengths: the first layer draws, all layers read.
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(
        default_factory=dict[tuple[int, int, torch.dtype], Tensor], compare=False, repr=False
    )

    @classmethod
    def build(cls, lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> AttnMeta:
        """Describe segments of `lengths_q` queries over `lengths_k` keys (default: the same)."""
        q = tuple(lengths_q)
        k = q if lengths_k is None else tuple(lengths_k)
        assert len(q) == len(k), "one key length for each query length"
        cu_q = _cumulative(q)
        return cls(
            lengths_q=q,
            lengths_k=k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_q if k is q else _cumulative(k),
            max_seqlen_q=max(q, default=0),
            max_seqlen_k=max(k, default=0),
            runs=tuple(_runs(q, k)),
        )

    def to(self, device: torch.device | str) -> AttnMeta:
        """Move the tensors; the integers stay on the host."""
        return replace(
            self,
            cu_seqlens_q=self.cu_seqlens_q.to(device, non_blocking=True),
            cu_seqlens_k=self.cu_seqlens_k.to(device, non_blocking=True),
            masks={},
        )


@dataclass(frozen=True, slots=True)
class VisionMeta:
    """What the vision tower needs to know of a stream of patches besides the pixels."""

    positions_N2: Tensor  # (N, 2) int64, (row, column) inside the item
    frames: AttnMeta  # one segment of h*w patches for each pair of frames

    @classmethod
    def build(cls, grids: Sequence[Grid], merge: int = 2) -> VisionMeta:
        """Describe the patches of `grids`, in stream order."""
        return cls(patch_positions(grids, merge), AttnMeta.build(frame_lengths(grids)))

    def to(self, device: torch.device | str) -> VisionMeta:
        """Move the tensors; the integers stay on the host."""
        return VisionMeta(self.positions_N2.to(device, non_blocking=True), self.frames.to(device))


def num_tokens(grid: Grid, merge: int = 2) -> int:
    """Count the vision tokens of one item: a quarter of its patches for merge 2."""
    return grid.t * grid.h * grid.w // merge**2


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """List the attention segments of the vision tower: h*w patches, t times for each item.

    Patches of different frame pairs never see each other inside the tower; a whole clip as one
    segment is a classic mistake. (HF: get_vision_attention_seqlens.)
    """
    return [g.h * g.w for g in grids for _ in range(g.t)]


def merge_order(h: int, w: int, merge: int = 2) -> Tensor:
    """Raster index of each patch of one frame, in the order the stream holds them.

    Patches come in merge x merge blocks, so that four neighbors are consecutive:

        raster   0  1  2  3        stream   0  1  4  5   2  3  6  7
                 4  5  6  7                 (block 0,0)  (block 0,1)

    Shared by `processor.image.patchify` (pixels) and `patch_positions` (rotary), so that the two
    cannot disagree. Returns (h*w,) int64.
    """
    raster = torch.arange(h * w).view(h // merge, merge, w // merge, merge)
    return raster.permute(0, 2, 1, 3).flatten()


def patch_positions(grids: Sequence[Grid], merge: int = 2) -> Tensor:
    """Give each patch its (row, column) inside its item; time is not encoded in the tower.

    Returns:
        positions_N2, int64, in stream order (merge blocks, row-major, frame pair by frame pair).
    """
    parts = [torch.empty(0, 2, dtype=torch.int64)]
    for grid in grids:
        order = merge_order(grid.h, grid.w, merge)
        frame = torch.stack((order // grid.w, order % grid.w), dim=1)
        parts.append(frame.repeat(grid.t, 1))
    return torch.cat(parts)


def pad_index(input_ids: Sequence[int], config: Qwen2VLConfig) -> Tensor:
    """Find the tokens that vision tokens overwrite, in order: (M,) int64."""
    pads = config.pad_ids
    found = [i for i, token in enumerate(input_ids) if token in pads]
    return torch.tensor(found, dtype=torch.int64)


def text_positions(
    input_ids: Sequence[int], grids: Sequence[Grid], config: Qwen2VLConfig
) -> tuple[Tensor, int]:
    """Place every token of one sequence in (time, height, width).

    Text advances the three axes together. A visual item fills a box of merged patches that
    begins where the text stopped; text resumes one past the box's largest corner.
    (Qwen2-VL sec. 2.1; HF: get_rope_index of transformers 4.x, which is also Qwen's own. 5.23
    ignores t when it resumes, so that long clips share positions with the text after them.)

        ids   a  b  v  v  v  v  c        v: one image of 2 x 2 vision tokens
        time  0  1  2  2  2  2  4
        row   0  1  2  2  3  3  4
        col   0  1  2  3  2  3  4        next position is 5, next index is 7

    Returns:
        position_ids_3T (int64, CPU) and rope_delta = next position - next index (here -2): what
        decode adds to a token's index to find its position.

    Raises:
        InputError: the runs of pads in `input_ids` and `grids` disagree, item by item.
    """
    merge = config.vision.spatial_merge_size
    parts: list[Tensor] = []
    position = index = 0
    for start, grid in _items(input_ids, grids, config):
        parts.append(_text_box(position, start - index))
        position += start - index
        box = Grid(grid.t, grid.h // merge, grid.w // merge)
        parts.append(_vision_box(position, box))
        position += max(box)
        index = start + num_tokens(grid, merge)
    parts.append(_text_box(position, len(input_ids) - index))
    position += len(input_ids) - index
    return torch.cat(parts, dim=1), position - len(input_ids)


def _text_box(position: int, length: int) -> Tensor:
    return torch.arange(position, position + length).expand(3, length)


def _vision_box(position: int, box: Grid) -> Tensor:
    time = torch.arange(box.t).view(-1, 1, 1).expand(box)
    row = torch.arange(box.h).view(1, -1, 1).expand(box)
    col = torch.arange(box.w).view(1, 1, -1).expand(box)
    return torch.stack((time, row, col)).view(3, -1) + position


def _items(
    input_ids: Sequence[int], grids: Sequence[Grid], config: Qwen2VLConfig
) -> Iterator[tuple[int, Grid]]:
    """Match each run of pads with its grid; yields (index of the first pad, grid)."""
    merge = config.vision.spatial_merge_size
    pads = config.pad_ids
    runs: list[tuple[int, int]] = []
    index = 0
    for token, group in groupby(input_ids):
        length = sum(1 for _ in group)
        if token in pads:
            runs.append((index, length))
        index += length
    if len(runs) != len(grids):
        raise InputError(
            f"input_ids hold {len(runs)} runs of image or video placeholders, but {len(grids)} "
            "visual items were given; each item needs exactly one run"
        )
    for i, ((start, length), grid) in enumerate(zip(runs, grids, strict=True)):
        want = num_tokens(grid, merge)
        if length != want:
            raise InputError(
                f"visual item {i + 1} has grid {tuple(grid)} = {want} vision tokens, but "
                f"{length} placeholders stand at token {start}"
            )
        yield start, grid


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _runs(q: Sequence[int], k: Sequence[int]) -> Iterator[Run]:
    start_q = start_k = 0
    for (length_q, length_k), group in groupby(zip(q, k, strict=True)):
        count = sum(1 for _ in group)
        yield Run(start_q, start_k, count, length_q, length_k)
        start_q += count * length_q
        start_k += count * length_k
