"""Presets and plans against known numbers, and the budget against everything."""

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
from qwen2vl.processor.media.source import MediaOptions
from qwen2vl.processor.media.timeline import Timeline
from qwen2vl.processor.video import PRESETS, Plan, plan_frames
from tests.media import PIXELS, VISION, clip, encoded, noise, smooth, video

U8, U14 = "qwen_vl_utils_0_0_8", "qwen_vl_utils_0_0_14"
GAPS = (0.0, 0.1, 0.2, 5.0, 5.1, 10.0)


def timeline(
    count: int, rate: float = 10.0, height: int = 240, width: int = 320, **fields: Any
) -> Timeline:
    return Timeline(
        times=tuple(i / rate for i in range(count)),
        rate=rate,
        seconds=count / rate,
        height=height,
        width=width,
        **fields,
    )


def plan(
    line: Timeline, preset: str = "paper", pixels: PixelLimits = PIXELS, **options: Any
) -> Plan:
    return plan_frames(
        line,
        preset=PRESETS[preset],
        vision=VISION,
        pixels=pixels,
        options=MediaOptions(**options),
        name="video 1",
    )


def tokens(chosen: Plan) -> int:
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
    chosen = plan(timeline(*source), preset)
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
def test_first_and_last_frame_are_always_seen(
    preset: str, total: int, indices: tuple[int, ...]
) -> None:
    assert plan(timeline(total), preset).indices == indices


def test_rounding_of_the_count() -> None:
    """3.5 s at 2 fps are 7 frames: to the nearest even number that is 8, downwards 6."""
    assert len(plan(timeline(35)).indices) == 8
    assert len(plan(timeline(35), U8).indices) == 8
    assert len(plan(timeline(35), U14).indices) == 6


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
def test_users_choose_the_count(options: dict[str, Any], count: int) -> None:
    assert len(plan(timeline(100), **options).indices) == count


def test_a_count_that_cannot_be_is_said() -> None:
    notes = plan(timeline(30), nframes=100).notes
    assert notes == (
        "30 of 30 frames, 10 fps, 308 x 252",
        "nframes 100 lowered to the 30 frames there are",
    )


def test_time_counts_where_there_are_gaps() -> None:
    line = Timeline(times=GAPS, rate=None, seconds=10.1, height=56, width=56)
    chosen = plan(line, nframes=6)
    assert chosen.indices == (0, 2, 3, 4, 5, 5)  # nearest to 0, 2, 4, 6, 8, 10 s
    assert len(plan(line).indices) == 20
    assert plan(line).notes[0].startswith("5 of 6 frames (15 again, for their length), 1.98 fps")


@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=40),
    st.integers(2, 30),
)
def test_no_frame_is_nearer_than_the_chosen_one(gaps: list[float], count: int) -> None:
    times = np.concatenate(([0.0], np.cumsum(gaps)))
    line = Timeline(times=tuple(times), rate=None, seconds=times[-1] + 1, height=56, width=56)
    chosen = plan(line, nframes=count).indices
    targets = np.linspace(0, times[-1], len(chosen))
    best = np.abs(times[:, None] - targets).min(0)
    np.testing.assert_allclose(np.abs(times[list(chosen)] - targets), best, atol=1e-9)
    assert list(chosen) == sorted(chosen)


def test_a_part_of_a_clip() -> None:
    chosen = plan(timeline(100), video_start=2.0, video_end=3.0)
    assert chosen.indices == (20, 23, 27, 30)
    assert plan(timeline(100), video_start=9.9).indices == (99,)
    with pytest.raises(InputError, match=r"video 1: no frame from 50 s; it lasts 10.0 s"):
        plan(timeline(100), video_start=50.0)
    with pytest.raises(InputError, match=r"no frame from 0.01 s to 0.02 s"):
        plan(timeline(100), video_start=0.01, video_end=0.02)


def test_what_max_pixels_means_in_each_preset() -> None:
    """Above the budget's share: 0.0.8 obeys, 0.0.14 does not, the paper's budget takes frames."""
    long, wish = timeline(1800, 30, 720, 1280), {"max_pixels": 602_112}
    assert tokens(plan(long, U8, **wish)) == 43200
    assert tokens(plan(long, U14, total_pixels=24576 * 784, **wish)) == 23400
    paper = plan(long, **wish)
    assert tokens(paper) <= 16384
    assert (paper.height, paper.width) == (336, 616)
    short = plan(timeline(4, 2, 1440, 2560), max_pixels=2_000_000)
    assert (short.height, short.width) == (1036, 1876)


def test_small_frames_are_enlarged_by_the_utils_only() -> None:
    small = timeline(20, 10, 112, 112)
    assert plan(small).height == 112
    assert plan(small, U8).height == plan(small, U14).height == 336


def test_the_models_own_limit_counts_in_every_preset() -> None:
    nano = PixelLimits(min_pixels=784, max_pixels=112 * 112)
    for preset in PRESETS:
        chosen = plan(timeline(20, 10, 112, 112), preset, pixels=nano)
        assert (chosen.height, chosen.width) == (112, 112)


@given(
    count=st.integers(1, 60_000),
    rate=st.sampled_from([0.5, 10.0, 30.0, 1000.0]),
    height=st.integers(1, 2500),
    width=st.integers(1, 2500),
    budget=st.one_of(st.none(), st.integers(200_000, 10**8)),
)
def test_the_papers_budget_is_never_exceeded(
    count: int, rate: float, height: int, width: int, budget: int | None
) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    chosen = plan(timeline(count, rate, height, width), total_pixels=budget)
    assert tokens(chosen) * 784 <= (budget or 16384 * 784)
    assert 1 <= len(chosen.indices) <= 768
    assert len(chosen.indices) % 2 == 0 or len(chosen.indices) == count
    assert chosen.indices[0] == 0
    assert chosen.indices[-1] == (count - 1 if len(chosen.indices) > 1 else 0)


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="one pair of frames of 308 x 252 exceeds the video's bud"):
        plan(timeline(30), total_pixels=784)


def test_a_wished_size_takes_frames_instead() -> None:
    chosen = plan(timeline(6000), resized_height=560, resized_width=560)
    assert (chosen.height, chosen.width) == (560, 560)
    assert len(chosen.indices) == 16384 // 400 * 2


def test_listed_frames_are_all_seen() -> None:
    line = timeline(9, 2.0, listed=True)
    for preset in PRESETS:
        assert plan(line, preset).indices == tuple(range(9))
    assert plan(line, nframes=4).indices == (0, 3, 5, 8)
    assert len(plan(timeline(2000, 2.0, 56, 56, listed=True)).indices) == 768
    listed = plan(timeline(9, 2.0, 1440, 2560, listed=True), U8)
    assert (listed.height, listed.width) == (1428, 2548)  # the limits of pictures, as theirs


def test_an_item_tells_what_was_seen() -> None:
    item = video(clip(30, width=320, height=240))
    assert item.kind == "video"
    assert item.grid == Grid(3, 18, 22)
    assert item.patches_NP.shape == (3 * 18 * 22, 1176)
    assert item.frame_times == pytest.approx((0.0, 0.6, 1.2, 1.7, 2.3, 2.9))
    assert (item.size_given, item.size_seen) == ((240, 320), (252, 308))
    assert item.notes == ("6 of 30 frames, 2 fps, 308 x 252",)


def test_frames_are_resized_by_torch_on_bytes() -> None:
    frames = np.stack([smooth(100, 150, seed) for seed in range(3)])
    item = video(frames)
    seen = unpatchify(item.patches_NP, item.grid, VISION)
    want = F.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
        size=(112, 140),
        mode="bicubic",
        antialias=True,
    )
    assert torch.equal(seen[:3], want)
    assert torch.equal(seen[3], want[2])


def test_listed_frames_of_0_0_8_are_resized_as_pictures() -> None:
    frames = [Image.fromarray(smooth(100, 150, seed)) for seed in range(2)]
    item = video(frames, preset=U8)
    seen = unpatchify(item.patches_NP, item.grid, VISION)
    for frame, frame_CHW in zip(frames, seen, strict=True):
        want = np.asarray(frame.resize((140, 112), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(frame_CHW.permute(1, 2, 0).numpy(), want)


def test_only_the_papers_preset_turns_listed_pictures() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    frames = [encoded(smooth(56, 84), "JPEG", exif=exif.tobytes())]
    assert video(frames).size_given == (84, 56)
    assert video(frames, preset=U8).size_given == (56, 84)
    assert video(frames, preset=U14).size_given == (56, 84)


def test_digest_follows_frames_and_size() -> None:
    frames = np.stack([noise(56, 56, seed) for seed in range(4)])
    base = video(frames).digest
    assert video(list(frames)).digest == base
    assert video(frames, fps=1.0).digest == base  # time is not seen by the tower
    assert video(frames[[1, 0, 2, 3]]).digest != base


def test_presets_are_named_in_the_refusal() -> None:
    with pytest.raises(InputError, match="unknown video preset 'x'; choose one of paper, qwen_vl"):
        video(clip(2), preset="x")


def test_pyav_comes_with_the_first_file_only() -> None:
    """Only film.py imports av, and nothing imports film.py before it is needed."""
    room = Path(qwen2vl.processor.__file__).parent
    for path in sorted(room.glob("*.py")):
        imported = {
            name.partition(".")[2].rpartition(".")[2] or name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for name in _names(node)
        }
        assert "film" not in imported, path.name
        assert ("av" in imported) == (path.name == "film.py"), path.name


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
