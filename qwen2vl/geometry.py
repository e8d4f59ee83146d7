"""Index tensors of the model: M-RoPE positions, patch order and positions, attention bounds.

Computed once per prompt on the CPU from token ids and grids, integers only: the order of patches,
the number of vision tokens, positions of patches (row, column) and of tokens (time, height, width),
and the segment bounds (cu_seqlens) of packed attention. `Qwen2VL.forward` takes all of them as
inputs. (Qwen2-VL sec. 2.1; HF: get_rope_index, get_vision_position_ids.)
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
    "SegmentRun",
    "VisionMeta",
    "merge_order",
    "mrope_positions",
    "num_vision_tokens",
    "patch_positions",
    "placeholder_index",
    "vision_seqlens",
]


class Grid(NamedTuple):
    """Size of one visual item in patches, host integers (HF: a row of grid_thw).

    t counts temporal patches, which are pairs of frames; an image has t = 1.
    """

    t: int
    h: int
    w: int


class SegmentRun(NamedTuple):
    """Consecutive segments of equal lengths, which one batched SDPA call computes."""

    start_q: int
    start_k: int
    num_segments: int
    length_q: int
    length_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttnMeta:
    """Attention metadata: bounds of S packed segments; tokens attend within their segment only.

    Lengths are host integers, by which the CPU path slices; cu_seqlens are their cumulative sums
    as tensors, the input of varlen GPU kernels. Without a KV cache `lengths_k` equals `lengths_q`.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor  # (S+1,) int32
    cu_seqlens_k: Tensor  # (S+1,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    segment_runs: tuple[SegmentRun, ...]
    # Attention masks of these lengths: the first layer builds them, the others reuse them.
    masks: dict[tuple[int, int, torch.dtype], Tensor] = field(
        default_factory=dict[tuple[int, int, torch.dtype], Tensor], compare=False, repr=False
    )

    @classmethod
    def build(cls, lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> AttnMeta:
        """Build the metadata of segments with `lengths_q` queries and `lengths_k` keys.

        `lengths_k` defaults to `lengths_q`.
        """
        q = tuple(lengths_q)
        k = q if lengths_k is None else tuple(lengths_k)
        assert len(q) == len(k), "one key length for each query length"
        cu_q = _cu_seqlens(q)
        return cls(
            lengths_q=q,
            lengths_k=k,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_q if k is q else _cu_seqlens(k),
            max_seqlen_q=max(q, default=0),
            max_seqlen_k=max(k, default=0),
            segment_runs=tuple(_segment_runs(q, k)),
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
    """Positions and attention bounds of packed patches, the second input of the vision tower."""

    positions_N2: Tensor  # (N, 2) int64, (row, column) inside the item
    attn_meta: AttnMeta  # one segment of h*w patches for each pair of frames

    @classmethod
    def build(cls, grids: Sequence[Grid], merge_size: int = 2) -> VisionMeta:
        """Build the metadata of the patches of `grids`, in the order of the grids."""
        return cls(patch_positions(grids, merge_size), AttnMeta.build(vision_seqlens(grids)))

    def to(self, device: torch.device | str) -> VisionMeta:
        """Move the tensors; the integers stay on the host."""
        return VisionMeta(
            self.positions_N2.to(device, non_blocking=True), self.attn_meta.to(device)
        )


def num_vision_tokens(grid: Grid, merge_size: int = 2) -> int:
    """Return the number of vision tokens of one item: a quarter of its patches for merge_size 2."""
    return grid.t * grid.h * grid.w // merge_size**2


def vision_seqlens(grids: Sequence[Grid]) -> list[int]:
    """List the segment lengths of the vision tower's attention: h*w patches, t times per item.

    Patches of different frame pairs never attend to each other in the tower; treating a whole video
    as one segment is a common mistake. (HF: get_vision_attention_seqlens.)
    """
    return [g.h * g.w for g in grids for _ in range(g.t)]


def merge_order(h: int, w: int, merge_size: int = 2) -> Tensor:
    """Return the raster index of each patch of one frame, in model order: (h*w,) int64.

    Patches are ordered by merge_size x merge_size blocks, so that the patches of one vision token
    are consecutive:

        raster   0  1  2  3        model order   0  1  4  5   2  3  6  7
                 4  5  6  7                      (block 0,0)  (block 0,1)

    `processor.image.patchify` (pixels) and `patch_positions` (rotary) both use it, so the two
    orders cannot differ.
    """
    raster = torch.arange(h * w).view(h // merge_size, merge_size, w // merge_size, merge_size)
    return raster.permute(0, 2, 1, 3).flatten()


def patch_positions(grids: Sequence[Grid], merge_size: int = 2) -> Tensor:
    """Compute the (row, column) of each patch in its frame; the tower does not encode time.

    Returns:
        positions_N2, int64, in model order (merge blocks, row-major, frame pair by frame pair).
    """
    parts = [torch.empty(0, 2, dtype=torch.int64)]
    for grid in grids:
        order = merge_order(grid.h, grid.w, merge_size)
        frame = torch.stack((order // grid.w, order % grid.w), dim=1)
        parts.append(frame.repeat(grid.t, 1))
    return torch.cat(parts)


def placeholder_index(input_ids: Sequence[int], config: Qwen2VLConfig) -> Tensor:
    """Return the indices of the placeholder tokens, in order: (M,) int64."""
    placeholder_ids = config.placeholder_ids
    indices = [i for i, token in enumerate(input_ids) if token in placeholder_ids]
    return torch.tensor(indices, dtype=torch.int64)


def mrope_positions(
    input_ids: Sequence[int], grids: Sequence[Grid], config: Qwen2VLConfig
) -> tuple[Tensor, int]:
    """Compute the M-RoPE positions (time, height, width) of one sequence.

    Text tokens advance all three axes together. The vision tokens of an item take the coordinates
    of a t x h/2 x w/2 grid, offset by the position after the preceding text; text resumes one past
    the largest coordinate of the grid.
    (Qwen2-VL sec. 2.1; HF: get_rope_index of transformers 4.x, which is also Qwen's own. 5.23
    ignores t when it resumes, so that long videos share positions with the text after them.)

        ids   a  b  v  v  v  v  c        v: one image of 2 x 2 vision tokens
        time  0  1  2  2  2  2  4
        row   0  1  2  2  3  3  4
        col   0  1  2  3  2  3  4        next position is 5, next index is 7

    Returns:
        position_ids_3T (int64, CPU) and rope_delta = next position - next index (here -2), which
        decode adds to a token's index to get its position.

    Raises:
        InputError: the placeholder runs in `input_ids` do not match `grids`, item by item.
    """
    merge_size = config.vision.spatial_merge_size
    parts: list[Tensor] = []
    position = index = 0
    for start, grid in _placeholder_spans(input_ids, grids, config):
        parts.append(_text_position_ids(position, start - index))
        position += start - index
        merged_grid = Grid(grid.t, grid.h // merge_size, grid.w // merge_size)
        parts.append(_vision_position_ids(position, merged_grid))
        position += max(merged_grid)
        index = start + num_vision_tokens(grid, merge_size)
    parts.append(_text_position_ids(position, len(input_ids) - index))
    position += len(input_ids) - index
    return torch.cat(parts, dim=1), position - len(input_ids)


def _text_position_ids(position: int, length: int) -> Tensor:
    return torch.arange(position, position + length).expand(3, length)


def _vision_position_ids(position: int, grid: Grid) -> Tensor:
    time = torch.arange(grid.t).view(-1, 1, 1).expand(grid)
    row = torch.arange(grid.h).view(1, -1, 1).expand(grid)
    col = torch.arange(grid.w).view(1, 1, -1).expand(grid)
    return torch.stack((time, row, col)).view(3, -1) + position


def _placeholder_spans(
    input_ids: Sequence[int], grids: Sequence[Grid], config: Qwen2VLConfig
) -> Iterator[tuple[int, Grid]]:
    """Match each placeholder run with its grid; yields (index of its first token, grid)."""
    merge_size = config.vision.spatial_merge_size
    placeholder_ids = config.placeholder_ids
    spans: list[tuple[int, int]] = []
    index = 0
    for token, group in groupby(input_ids):
        length = len(list(group))
        if token in placeholder_ids:
            spans.append((index, length))
        index += length
    if len(spans) != len(grids):
        raise InputError(
            f"input_ids hold {len(spans)} runs of image or video placeholders, but {len(grids)} "
            "visual items were given; each item needs exactly one run"
        )
    for i, ((start, length), grid) in enumerate(zip(spans, grids, strict=True)):
        expected = num_vision_tokens(grid, merge_size)
        if length != expected:
            raise InputError(
                f"visual item {i + 1} has grid {tuple(grid)} = {expected} vision tokens, but "
                f"{length} placeholders stand at token {start}"
            )
        yield start, grid


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _segment_runs(q: Sequence[int], k: Sequence[int]) -> Iterator[SegmentRun]:
    start_q = start_k = 0
    for (length_q, length_k), group in groupby(zip(q, k, strict=True)):
        count = sum(1 for _ in group)
        yield SegmentRun(start_q, start_k, count, length_q, length_k)
        start_q += count * length_q
        start_k += count * length_k
