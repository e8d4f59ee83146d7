"""M-RoPE positions, patch order and attention bounds equal those of transformers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from qwen2vl.geometry import VisionMeta, mrope_positions
from tests import prompts
from tests.parity.reference import random_model, to_reference
from tests.prompts import Part, Visual, image, video
from tests.tiny import tiny_config

CONFIG = tiny_config()


@cache
def reference() -> Any:
    return to_reference(random_model(CONFIG)).model


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
    position_ids_3T, delta = mrope_positions(prompt.ids, prompt.grids, CONFIG)
    return position_ids_3T.tolist(), delta


def has_no_long_video(parts: list[Part]) -> bool:
    """Return whether no video has more frame pairs than vision tokens on its longer side."""
    grids = [part.grid for part in parts if isinstance(part, Visual)]
    return all(grid.t <= max(grid.h, grid.w) // 2 for grid in grids)


@settings(max_examples=60)
@given(prompts.parts(max_frame_pairs=5).filter(has_no_long_video))
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


def test_long_videos_are_where_the_reference_departs_from_the_paper() -> None:
    # Only the text after the video differs: transformers 5.23 resumes at 2 + max(h, w) / 2, the
    # paper at 2 + t.
    own_positions, own_delta = our_positions([2, video(8, 4, 4), 2])
    expected_positions, expected_delta = reference_positions([2, video(8, 4, 4), 2])
    assert [axis[:-2] for axis in own_positions] == [axis[:-2] for axis in expected_positions]
    assert [axis[-2:] for axis in own_positions] == [[10, 11]] * 3
    assert [axis[-2:] for axis in expected_positions] == [[4, 5]] * 3
    assert (own_delta, expected_delta) == (12 - 36, 10 - 36)


@given(prompts.parts().filter(lambda parts: any(isinstance(part, Visual) for part in parts)))
def test_patches_and_frames_equal_the_reference(parts: list[Part]) -> None:
    grids = prompts.prompt(parts, CONFIG).grids
    meta = VisionMeta.build(grids)
    assert torch.equal(meta.positions_N2, get_vision_position_ids(torch.tensor(grids), 2))
    assert torch.equal(meta.attn_meta.cu_seqlens_q, get_vision_cu_seqlens(torch.tensor(grids)))
