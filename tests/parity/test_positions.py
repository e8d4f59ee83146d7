"""Positions, patch order and attention bounds, exactly as transformers computes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from qwen2vl.geometry import VisionMeta, text_positions
from tests import prompts
from tests.parity.oracle import random_model, twin
from tests.prompts import Part, Visual, image, video
from tests.tiny import tiny_config

CONFIG = tiny_config()


@cache
def reference() -> Any:
    return twin(random_model(CONFIG)).model


def reference_positions(parts: list[Part]) -> tuple[list[list[int]], int]:
    prompt = prompts.prompt(parts, CONFIG)
    kinds = {CONFIG.image_token_id: 1, CONFIG.video_token_id: 2}
    position_ids, delta = reference().get_rope_index(
        torch.tensor([prompt.ids]),
        mm_token_type_ids=torch.tensor([[kinds.get(token, 0) for token in prompt.ids]]),
        image_grid_thw=torch.tensor(prompt.of_kind("image")),
        video_grid_thw=torch.tensor(prompt.of_kind("video")),
    )
    return position_ids[:, 0].tolist(), int(delta)


def our_positions(parts: list[Part]) -> tuple[list[list[int]], int]:
    prompt = prompts.prompt(parts, CONFIG)
    position_ids_3T, delta = text_positions(prompt.ids, prompt.grids, CONFIG)
    return position_ids_3T.tolist(), delta


def frames_fit(parts: list[Part]) -> bool:
    """Whether no clip has more pairs of frames than vision tokens on its longer side."""
    grids = [part.grid for part in parts if isinstance(part, Visual)]
    return all(grid.t <= max(grid.h, grid.w) // 2 for grid in grids)


@settings(max_examples=60)
@given(prompts.parts(longest_clip=5).filter(frames_fit))
def test_positions_equal_the_reference(parts: list[Part]) -> None:
    assert our_positions(parts) == reference_positions(parts)


@pytest.mark.parametrize(
    "parts",
    [
        [2, image(4, 6), 1, image(2, 14), 2, image(2, 2)],
        [1, video(3, 6, 2), image(6, 6), 3],
        [video(2, 4, 4), 2, video(1, 2, 2)],
    ],
)
def test_positions_of_common_prompts_equal_the_reference(parts: list[Part]) -> None:
    assert our_positions(parts) == reference_positions(parts)


def test_a_long_clip_is_where_the_reference_leaves_the_paper() -> None:
    # The box is the same; transformers 5.23 resumes at 2 + max(h, w) / 2, the paper at 2 + t.
    ours, our_delta = our_positions([2, video(8, 4, 4), 2])
    theirs, their_delta = reference_positions([2, video(8, 4, 4), 2])
    assert [axis[:-2] for axis in ours] == [axis[:-2] for axis in theirs]
    assert [axis[-2:] for axis in ours] == [[10, 11]] * 3
    assert [axis[-2:] for axis in theirs] == [[4, 5]] * 3
    assert (our_delta, their_delta) == (12 - 36, 10 - 36)


@given(prompts.parts().filter(lambda parts: any(isinstance(part, Visual) for part in parts)))
def test_patches_and_frames_equal_the_reference(parts: list[Part]) -> None:
    grids = prompts.prompt(parts, CONFIG).grids
    meta = VisionMeta.build(grids)
    assert torch.equal(meta.positions_N2, get_vision_position_ids(torch.tensor(grids), 2))
    assert torch.equal(meta.frames.cu_seqlens_q, get_vision_cu_seqlens(torch.tensor(grids)))
