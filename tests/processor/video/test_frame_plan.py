"""Video preprocessing: frame plans of the presets, the token budget, resizing and digests."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

import qwen2vl.processor
from qwen2vl.errors import InputError
from qwen2vl.geometry import Grid
from qwen2vl.processor.image import PixelLimits, unpatchify
from qwen2vl.processor.media.video_metadata import VideoMetadata
from qwen2vl.processor.media_options import MediaOptions
from qwen2vl.processor.video import VIDEO_PRESETS, FramePlan, plan_frames
from tests.media import PIXELS, VISION, encoded, encoded_video, noise, smooth, video

U8, U14 = "qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"
GAPS = (0.0, 0.1, 0.2, 5.0, 5.1, 10.0)


def uniform_metadata(
    count: int, rate: float = 10.0, height: int = 240, width: int = 320, **fields: Any
) -> VideoMetadata:
    return VideoMetadata(
        timestamps=tuple(i / rate for i in range(count)),
        fps=rate,
        duration=count / rate,
        height=height,
        width=width,
        **fields,
    )


def plan(
    metadata: VideoMetadata, preset: str = "paper", pixels: PixelLimits = PIXELS, **options: Any
) -> FramePlan:
    return plan_frames(
        metadata,
        preset=VIDEO_PRESETS[preset],
        vision=VISION,
        pixels=pixels,
        options=MediaOptions(**options),
        name="video 1",
    )


def tokens(chosen: FramePlan) -> int:
    return math.ceil(len(chosen.indices) / 2) * chosen.height * chosen.width // 784


CLIPS = [
    (300, 30, 720, 1280),
    (1800, 30, 720, 1280),
    (54000, 30, 720, 1280),
    (90, 30, 480, 640),
    (31, 29.97, 360, 640),
]


@pytest.mark.parametrize(
    ("preset", "source", "count", "size", "cost"),
    [
        (U8, CLIPS[0], 20, (560, 1008), 7200),
        (U8, CLIPS[1], 120, (420, 728), 23400),
        (U8, CLIPS[2], 768, (224, 420), 46080),
        (U8, CLIPS[3], 6, (476, 644), 1173),
        (U8, CLIPS[4], 4, (364, 644), 598),
        (U14, CLIPS[1], 120, (560, 1008), 43200),
        (U14, CLIPS[2], 768, (336, 644), 105984),
        ("paper", CLIPS[0], 20, (560, 1008), 7200),
        ("paper", CLIPS[1], 120, (336, 616), 15840),
        ("paper", CLIPS[2], 272, (224, 420), 16320),
    ],
)
def test_counts_sizes_and_costs(
    preset: str, source: tuple[Any, ...], count: int, size: tuple[int, int], cost: int
) -> None:
    chosen = plan(uniform_metadata(*source), preset)
    assert len(chosen.indices) == count
    assert (chosen.height, chosen.width) == size
    assert tokens(chosen) == cost


@pytest.mark.parametrize(
    ("preset", "total", "indices"),
    [
        ("paper", 1, (0,)),
        ("paper", 2, (0, 1)),
        ("paper", 3, (0, 1, 2)),
        ("paper", 5, (0, 1, 3, 4)),
        (U8, 1, (0,)),
        (U8, 3, (0, 2)),
        (U8, 5, (0, 1, 3, 4)),
        (U14, 3, (0, 2)),
        ("paper", 30, (0, 6, 12, 17, 23, 29)),
    ],
)
def test_first_and_last_frame_are_always_sampled(
    preset: str, total: int, indices: tuple[int, ...]
) -> None:
    assert plan(uniform_metadata(total), preset).indices == indices


def test_rounding_of_the_frame_count() -> None:
    """3.5 s at 2 fps are 7 frames: 8 if rounded to the nearest even number, 6 if rounded down."""
    assert len(plan(uniform_metadata(35)).indices) == 8
    assert len(plan(uniform_metadata(35), U8).indices) == 8
    assert len(plan(uniform_metadata(35), U14).indices) == 6


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"nframes": 8}, 8),
        ({"nframes": 7}, 8),
        ({"nframes": 5}, 4),
        ({"nframes": 1}, 1),
        ({"nframes": 1000}, 100),
        ({"fps": 1.0}, 10),
        ({"fps": 1000.0}, 100),
        ({"fps": 0.001}, 4),
        ({"fps": 0.001, "min_frames": 9}, 10),
        ({"max_frames": 13}, 12),
        ({"max_frames": 1}, 1),
    ],
)
def test_frame_count_from_options(options: dict[str, Any], count: int) -> None:
    assert len(plan(uniform_metadata(100), **options).indices) == count


def test_impossible_nframes_is_noted() -> None:
    notes = plan(uniform_metadata(30), nframes=100).notes
    assert notes == (
        "30 of 30 frames, 10 fps, 308 x 252",
        "num_frames (nframes) 100 lowered to the 30 frames there are",
    )


def test_sampling_by_time_where_timestamps_have_gaps() -> None:
    metadata = VideoMetadata(timestamps=GAPS, fps=None, duration=10.1, height=56, width=56)
    chosen = plan(metadata, nframes=6)
    assert chosen.indices == (0, 2, 3, 4, 5, 5)  # nearest to 0, 2, 4, 6, 8, 10 s
    assert len(plan(metadata).indices) == 20
    assert (
        plan(metadata)
        .notes[0]
        .startswith("5 of 6 frames (15 repeated, for their duration), 1.98 fps")
    )


@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=40),
    st.integers(2, 30),
)
def test_sampled_frames_are_nearest_to_their_target_times(gaps: list[float], count: int) -> None:
    timestamps = np.concatenate(([0.0], np.cumsum(gaps)))
    metadata = VideoMetadata(
        timestamps=tuple(timestamps), fps=None, duration=timestamps[-1] + 1, height=56, width=56
    )
    chosen = plan(metadata, nframes=count).indices
    targets = np.linspace(0, timestamps[-1], len(chosen))
    best = np.abs(timestamps[:, None] - targets).min(0)
    np.testing.assert_allclose(np.abs(timestamps[list(chosen)] - targets), best, atol=1e-9)
    assert list(chosen) == sorted(chosen)


def test_video_start_and_video_end() -> None:
    chosen = plan(uniform_metadata(100), video_start=2.0, video_end=3.0)
    assert chosen.indices == (20, 23, 27, 30)
    assert plan(uniform_metadata(100), video_start=9.9).indices == (99,)
    with pytest.raises(InputError, match=r"video 1: no frame from 50 s; it lasts 10.0 s"):
        plan(uniform_metadata(100), video_start=50.0)
    with pytest.raises(InputError, match=r"no frame from 0.01 s to 0.02 s"):
        plan(uniform_metadata(100), video_start=0.01, video_end=0.02)


def test_max_pixels_policy_of_each_preset() -> None:
    """Above a frame's budget: 0.0.8 overrides it, 0.0.14 does not, paper samples fewer frames."""
    long, option = uniform_metadata(1800, 30, 720, 1280), {"max_pixels": 602_112}
    assert tokens(plan(long, U8, **option)) == 43200
    assert tokens(plan(long, U14, total_pixels=24576 * 784, **option)) == 23400
    paper = plan(long, **option)
    assert tokens(paper) <= 16384
    assert (paper.height, paper.width) == (336, 616)
    short = plan(uniform_metadata(4, 2, 1440, 2560), max_pixels=2_000_000)
    assert (short.height, short.width) == (1036, 1876)


def test_only_qwen_vl_utils_presets_upscale_small_frames() -> None:
    small = uniform_metadata(20, 10, 112, 112)
    assert plan(small).height == 112
    assert plan(small, U8).height == plan(small, U14).height == 336


def test_the_models_pixel_limits_apply_in_every_preset() -> None:
    nano = PixelLimits(min_pixels=784, max_pixels=112 * 112)
    for preset in VIDEO_PRESETS:
        chosen = plan(uniform_metadata(20, 10, 112, 112), preset, pixels=nano)
        assert (chosen.height, chosen.width) == (112, 112)


@given(
    count=st.integers(1, 60_000),
    rate=st.sampled_from([0.5, 10.0, 30.0, 1000.0]),
    height=st.integers(1, 2500),
    width=st.integers(1, 2500),
    budget=st.one_of(st.none(), st.integers(200_000, 10**8)),
)
def test_paper_budget_is_never_exceeded(
    count: int, rate: float, height: int, width: int, budget: int | None
) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    chosen = plan(uniform_metadata(count, rate, height, width), total_pixels=budget)
    assert tokens(chosen) * 784 <= (budget or 16384 * 784)
    assert 1 <= len(chosen.indices) <= 768
    assert len(chosen.indices) % 2 == 0 or len(chosen.indices) == count
    assert chosen.indices[0] == 0
    assert chosen.indices[-1] == (count - 1 if len(chosen.indices) > 1 else 0)


def test_too_small_budget_is_rejected() -> None:
    with pytest.raises(InputError, match="one pair of frames of 308 x 252 exceeds the video's bud"):
        plan(uniform_metadata(30), total_pixels=784)


def test_resized_height_and_width_lower_the_frame_count() -> None:
    chosen = plan(uniform_metadata(6000), resized_height=560, resized_width=560)
    assert (chosen.height, chosen.width) == (560, 560)
    assert len(chosen.indices) == 16384 // 400 * 2


def test_all_frames_of_a_list_are_sampled() -> None:
    metadata = uniform_metadata(9, 2.0, is_frame_list=True)
    for preset in VIDEO_PRESETS:
        assert plan(metadata, preset).indices == tuple(range(9))
    assert plan(metadata, nframes=4).indices == (0, 3, 5, 8)
    assert len(plan(uniform_metadata(2000, 2.0, 56, 56, is_frame_list=True)).indices) == 768
    listed = plan(uniform_metadata(9, 2.0, 1440, 2560, is_frame_list=True), U8)
    assert (listed.height, listed.width) == (
        1428,
        2548,
    )  # the limits of images, as there


def test_item_fields_of_a_video() -> None:
    item = video(encoded_video(30, width=320, height=240))
    assert item.kind == "video"
    assert item.grid == Grid(3, 18, 22)
    assert item.patches_NP.shape == (3 * 18 * 22, 1176)
    assert item.frame_timestamps == pytest.approx((0.0, 0.6, 1.2, 1.7, 2.3, 2.9))
    assert (item.original_size, item.resized_size) == ((240, 320), (252, 308))
    assert item.notes == ("6 of 30 frames, 2 fps, 308 x 252",)


def test_frames_are_resized_by_torch_on_uint8() -> None:
    frames = np.stack([smooth(100, 150, seed) for seed in range(3)])
    item = video(frames)
    resized = unpatchify(item.patches_NP, item.grid, VISION)
    want = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
        size=(112, 140),
        mode="bicubic",
        antialias=True,
    )
    assert torch.equal(resized[:3], want)
    assert torch.equal(resized[3], want[2])


def test_frame_lists_of_0_0_8_are_resized_as_images() -> None:
    frames = [Image.fromarray(smooth(100, 150, seed)) for seed in range(2)]
    item = video(frames, preset=U8)
    resized = unpatchify(item.patches_NP, item.grid, VISION)
    for frame, frame_CHW in zip(frames, resized, strict=True):
        want = np.asarray(frame.resize((140, 112), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(frame_CHW.permute(1, 2, 0).numpy(), want)


def test_only_the_paper_preset_applies_exif_orientation_to_frame_lists() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    frames = [encoded(smooth(56, 84), "JPEG", exif=exif.tobytes())]
    assert video(frames).original_size == (84, 56)
    assert video(frames, preset=U8).original_size == (56, 84)
    assert video(frames, preset=U14).original_size == (56, 84)


def test_digest_depends_on_frames_and_size() -> None:
    frames = np.stack([noise(56, 56, seed) for seed in range(4)])
    base = video(frames).pair_digests
    assert video(list(frames)).pair_digests == base
    assert (
        video(frames, fps=1.0).pair_digests == base
    )  # timestamps are no input of the vision tower
    assert video(frames[[1, 0, 2, 3]]).pair_digests != base


def test_unknown_preset_error_lists_the_presets() -> None:
    with pytest.raises(InputError, match="unknown video preset 'x'; choose one of paper, qwen_vl"):
        video(encoded_video(2), preset="x")


def test_pyav_is_imported_lazily() -> None:
    """By video_reader.py and video_packets.py, which no other module imports at the top level."""
    package = Path(qwen2vl.processor.__file__).parent
    for path in sorted(package.rglob("*.py")):
        imported = {
            name.partition(".")[2].rpartition(".")[2] or name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for name in _imported_names(node)
        }
        imports_av = path.name in ("video_reader.py", "video_packets.py")
        assert ("av" in imported) == imports_av, path.name
        assert "video_reader" not in imported, path.name
        assert "video_packets" not in imported or imports_av, path.name


def _imported_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
