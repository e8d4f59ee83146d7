"""Geometry equals hand-computed vectors and naive implementations; invalid inputs are rejected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.config import PRESETS
from qwen2vl.errors import InputError
from qwen2vl.geometry import (
    AttnMeta,
    Grid,
    SegmentRun,
    VisionMeta,
    merge_order,
    mrope_positions,
    num_vision_tokens,
    patch_positions,
    placeholder_index,
    vision_seqlens,
)
from tests import prompts
from tests.prompts import Part, Visual, image, video

CONFIG = PRESETS["2B"]
PLACEHOLDER = CONFIG.image_token_id


def positions_of(parts: list[Part]) -> tuple[list[list[int]], int]:
    prompt = prompts.prompt(parts, CONFIG)
    position_ids_3T, delta = mrope_positions(prompt.ids, prompt.grids, CONFIG)
    assert position_ids_3T.dtype == torch.int64
    return position_ids_3T.tolist(), delta


# Positions of tokens --------------------------------------------------------------------------


def test_positions_around_an_image() -> None:
    (time, row, col), delta = positions_of([3, image(4, 6), 4])
    assert time == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 9]
    assert row == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 9]
    assert col == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9]
    assert delta == 10 - 13


def test_positions_of_a_video() -> None:
    (time, row, col), delta = positions_of([video(3, 4, 4), 5])
    assert time == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 5, 6, 7]
    assert row == [0, 0, 1, 1] * 3 + [3, 4, 5, 6, 7]
    assert col == [0, 1, 0, 1] * 3 + [3, 4, 5, 6, 7]
    assert delta == -9


def test_text_after_a_long_video_resumes_after_its_last_frame() -> None:
    # The paper's rule and transformers 4.x; 5.23 would resume at 4, among the frames' own times.
    positions, delta = positions_of([2, video(8, 4, 4), 2])
    assert [axis[-2:] for axis in positions] == [[10, 11]] * 3
    assert delta == 12 - 36


def test_positions_of_two_images() -> None:
    (time, _, col), _ = positions_of([2, image(4, 4), 2, image(2, 8), 1])
    assert time == [0, 1, 2, 2, 2, 2, 4, 5, 6, 6, 6, 6, 10]
    assert col[-5:-1] == [6, 7, 8, 9]


def test_text_only_positions_advance_on_all_axes() -> None:
    assert positions_of([5]) == ([[0, 1, 2, 3, 4]] * 3, 0)


def test_positions_of_an_empty_prompt() -> None:
    position_ids_3T, delta = mrope_positions([], [], CONFIG)
    assert position_ids_3T.shape == (3, 0) and delta == 0


def naive_positions(parts: list[Part]) -> tuple[list[tuple[int, int, int]], int]:
    """Compute M-RoPE positions and rope_delta one token at a time, without tensors."""
    positions_so_far: list[tuple[int, int, int]] = []
    for part in parts:
        start = 1 + max((max(position) for position in positions_so_far), default=-1)
        if isinstance(part, Visual):
            rows, cols = part.grid.h // 2, part.grid.w // 2
            for index in range(part.grid.t * rows * cols):
                a, b, c = index // (rows * cols), index // cols % rows, index % cols
                positions_so_far.append((start + a, start + b, start + c))
        else:
            positions_so_far += [(start + i, start + i, start + i) for i in range(part)]
    return positions_so_far, 1 + max(max(position) for position in positions_so_far) - len(
        positions_so_far
    )


@given(prompts.parts(max_frame_pairs=12))
def test_positions_equal_the_naive_implementation(parts: list[Part]) -> None:
    positions, delta = positions_of(parts)
    positions_so_far, expected_delta = naive_positions(parts)
    assert list(zip(*positions, strict=True)) == positions_so_far
    assert delta == expected_delta


@given(prompts.parts(max_frame_pairs=12))
def test_rope_delta_continues_the_positions_of_the_prompt(parts: list[Part]) -> None:
    extended, _ = positions_of([*parts, 3])
    prompt, delta = positions_of(parts)
    length = len(prompt[0])
    for axis in extended:
        assert axis[length:] == [length + i + delta for i in range(3)]


@pytest.mark.parametrize(
    ("ids", "grids", "text"),
    [
        (
            [1, PLACEHOLDER, PLACEHOLDER, 2],
            [],
            "input_ids hold 1 runs of image or video placeholders, but 0 visual items were given; "
            "each item needs exactly one run",
        ),
        (
            [1, 2],
            [Grid(1, 2, 2)],
            "input_ids hold 0 runs of image or video placeholders, but 1 visual items were given; "
            "each item needs exactly one run",
        ),
        (
            [1, PLACEHOLDER, 2, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER],
            [Grid(1, 2, 2), Grid(1, 4, 4)],
            "visual item 2 has grid (1, 4, 4) = 4 vision tokens, but 3 placeholders stand at "
            "token 3",
        ),
    ],
)
def test_placeholders_must_match_the_grids(ids: list[int], grids: list[Grid], text: str) -> None:
    with pytest.raises(InputError) as caught:
        mrope_positions(ids, grids, CONFIG)
    assert str(caught.value) == text


def test_an_image_and_a_video_may_be_adjacent() -> None:
    (time, _, _), _ = positions_of([image(2, 2), video(2, 2, 2), 1])
    assert time == [0, 1, 2, 3]


# Placeholders and counts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [
        (224, 224, 64),
        (1372, 2044, 3577),
        (1092, 1932, 2691),
        (644, 476, 391),
        (336, 504, 216),
        (56, 56, 4),
        (3584, 3584, 16384),
        (3556, 3556, 16129),
        (112, 19992, 2856),
    ],
)
def test_vision_tokens_of_an_image(height: int, width: int, tokens: int) -> None:
    assert num_vision_tokens(Grid(1, height // 14, width // 14)) == tokens


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [
        (Grid(10, 40, 72), 7200),
        (Grid(60, 30, 52), 23400),
        (Grid(384, 16, 30), 46080),
        (Grid(3, 34, 46), 1173),
        (Grid(2, 26, 46), 598),
    ],
)
def test_vision_tokens_of_a_video(grid: Grid, tokens: int) -> None:
    assert num_vision_tokens(grid) == tokens


def test_vision_tokens_without_merging() -> None:
    assert num_vision_tokens(Grid(2, 3, 5), merge_size=1) == 30


def test_placeholder_index_covers_images_and_videos_in_order() -> None:
    ids = [7, CONFIG.video_token_id, 8, PLACEHOLDER, PLACEHOLDER, 9]
    assert placeholder_index(ids, CONFIG).tolist() == [1, 3, 4]
    assert placeholder_index([7, 8], CONFIG).dtype == torch.int64
    assert placeholder_index([7, 8], CONFIG).tolist() == []


@given(prompts.parts())
def test_placeholder_index_has_one_entry_per_vision_token(parts: list[Part]) -> None:
    prompt = prompts.prompt(parts, CONFIG)
    assert len(placeholder_index(prompt.ids, CONFIG)) == sum(
        num_vision_tokens(grid) for grid in prompt.grids
    )


# Patches ----------------------------------------------------------------------------------------


def test_patch_order_of_a_4_by_4_grid() -> None:
    assert patch_positions([Grid(1, 4, 4)]).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3],
        [2, 0], [2, 1], [3, 0], [3, 1], [2, 2], [2, 3], [3, 2], [3, 3],
    ]  # fmt: skip


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_merge_order_equals_four_nested_loops(
    blocks_h: int, blocks_w: int, merge_size: int
) -> None:
    h, w = blocks_h * merge_size, blocks_w * merge_size
    naive = [
        (block_row + row) * w + block_col + col
        for block_row in range(0, h, merge_size)
        for block_col in range(0, w, merge_size)
        for row in range(merge_size)
        for col in range(merge_size)
    ]
    assert merge_order(h, w, merge_size).tolist() == naive
    assert sorted(naive) == list(range(h * w))


@given(st.lists(prompts.visuals(), max_size=4))
def test_patch_positions_repeat_for_each_pair_of_frames(items: list[Visual]) -> None:
    grids = [item.grid for item in items]
    naive = [
        [index // grid.w, index % grid.w]
        for grid in grids
        for _ in range(grid.t)
        for index in merge_order(grid.h, grid.w).tolist()
    ]
    positions_N2 = patch_positions(grids)
    assert positions_N2.shape == (len(naive), 2) and positions_N2.tolist() == naive


def test_each_frame_pair_is_one_segment() -> None:
    assert vision_seqlens([Grid(1, 2, 4), Grid(3, 4, 4)]) == [8, 16, 16, 16]
    assert vision_seqlens([]) == []


def test_vision_meta_holds_positions_and_segments() -> None:
    meta = VisionMeta.build([Grid(1, 4, 6), Grid(2, 2, 2)])
    assert meta.attn_meta.lengths_q == (24, 4, 4)
    assert torch.equal(meta.positions_N2, patch_positions([Grid(1, 4, 6), Grid(2, 2, 2)]))


# Attention bounds -------------------------------------------------------------------------------


def test_attn_meta_of_packed_sequences() -> None:
    meta = AttnMeta.build([3, 3, 5, 3])
    assert meta.lengths_k == meta.lengths_q == (3, 3, 5, 3)
    assert meta.cu_seqlens_q.tolist() == [0, 3, 6, 11, 14]
    assert meta.cu_seqlens_k is meta.cu_seqlens_q and meta.cu_seqlens_q.dtype == torch.int32
    assert meta.max_seqlen_q == meta.max_seqlen_k == 5
    assert meta.segment_runs == (
        SegmentRun(0, 0, 2, 3, 3),
        SegmentRun(6, 6, 1, 5, 5),
        SegmentRun(11, 11, 1, 3, 3),
    )


def test_attn_meta_of_a_chunk_over_a_cache() -> None:
    meta = AttnMeta.build([2, 2, 1], [9, 9, 4])
    assert meta.cu_seqlens_k.tolist() == [0, 9, 18, 22]
    assert (meta.max_seqlen_q, meta.max_seqlen_k) == (2, 9)
    assert meta.segment_runs == (SegmentRun(0, 0, 2, 2, 9), SegmentRun(4, 18, 1, 1, 4))


def test_attn_meta_without_segments() -> None:
    meta = AttnMeta.build([])
    assert meta.segment_runs == () and meta.cu_seqlens_q.tolist() == [0] and meta.max_seqlen_q == 0


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=12))
def test_segment_runs_cover_the_segments(drawn: list[tuple[int, int]]) -> None:
    lengths_q = [q for q, _ in drawn]
    lengths_k = [q + cached for q, cached in drawn]
    meta = AttnMeta.build(lengths_q, lengths_k)
    segments = [
        (run.length_q, run.length_k) for run in meta.segment_runs for _ in range(run.num_segments)
    ]
    assert segments == list(zip(lengths_q, lengths_k, strict=True))
    starts = [(run.start_q, run.start_k) for run in meta.segment_runs]
    assert {q for q, _ in starts} <= set(meta.cu_seqlens_q.tolist())
    assert {k for _, k in starts} <= set(meta.cu_seqlens_k.tolist())


def test_to_device_keeps_the_integers_on_the_host() -> None:
    meta = VisionMeta.build([Grid(2, 2, 2)]).to("meta")
    assert meta.positions_N2.device.type == meta.attn_meta.cu_seqlens_q.device.type == "meta"
    assert meta.attn_meta.lengths_q == (4, 4) and meta.attn_meta.segment_runs == (
        SegmentRun(0, 0, 2, 4, 4),
    )
