"""Load balancing of synthetic samples: ranks that train at the same time get about equal FLOPs.

A picture of 1,000 pixels costs as much as a hundred small ones, and ranks wait for the slowest. The
sizes of a sample are known before it is rendered, so that each rank samples what its group of ranks
shares and renders its own part. (Data in files are balanced by their bins: data/bin_packing.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.flops import BatchCounts, FlopCounter, inference_flop_counter
from qwen2vl.processor.image import smart_resize
from qwen2vl.processor.processor import Processor
from qwen2vl.synth.spec import Spec

__all__ = ["RankGroup", "balanced_share", "estimate_flops", "rank_group"]

# Each rank samples the conversations of its whole group, at 1 to 2 ms each.
MAX_GROUP_SIZE = 8


class RankGroup(NamedTuple):
    """Consecutive ranks that share their samples by cost, and the place of one of them."""

    number: int  # of the group
    num_groups: int
    rank: int  # in the group
    size: int  # ranks of a group


def rank_group(rank: int, world_size: int) -> RankGroup:
    """Return the group of a rank: the largest that divides the ranks evenly, of at most 8."""
    size = max(n for n in range(1, MAX_GROUP_SIZE + 1) if world_size % n == 0)
    return RankGroup(rank // size, world_size // size, rank % size, size)


def balanced_share(costs: Sequence[float], rank: int, num_ranks: int) -> list[int]:
    """Return the indices of one rank's samples, ascending: each goes to the least loaded rank.

    Most expensive first (longest processing time), so no rank has more than 4/3 of the optimum. The
    shares of all ranks are disjoint and complete, and none is empty if there are enough samples.
    """
    loads = [0.0] * num_ranks
    share: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        if least == rank:
            share.append(index)
    return sorted(share)


def estimate_flops(spec: Spec, processor: Processor) -> float:
    """Estimate the FLOPs of a sample's forward, from its sizes and the text of its questions."""
    vision, text = processor.config.vision, processor.tokenizer
    frames = [_num_patches(p.height, p.width, processor) for p in spec.pictures]
    if spec.clip:
        frames = frames[:: vision.temporal_patch_size]
    num_tokens = sum(frames) // vision.spatial_merge_size**2 + sum(
        len(text.encode_text(question.text)) + len(text.encode_text(question.answer))
        for question in spec.questions
    )
    counts = BatchCounts.from_lengths(frames, [num_tokens])
    return float(_flop_counter(processor.config).count(counts).model)


def _num_patches(height: int, width: int, processor: Processor) -> int:
    vision = processor.config.vision
    resized = smart_resize(
        height,
        width,
        factor=vision.patch_size * vision.spatial_merge_size,
        min_pixels=processor.pixels.min_pixels,
        max_pixels=processor.pixels.max_pixels,
    )
    return resized[0] * resized[1] // vision.patch_size**2


@lru_cache(maxsize=4)
def _flop_counter(config: Qwen2VLConfig) -> FlopCounter:
    return inference_flop_counter(config)
