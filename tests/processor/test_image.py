"""Image preprocessing: smart_resize, patch order, items and digests."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qwen2vl.config import VisionConfig
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.geometry import Grid, merge_order, patch_positions
from qwen2vl.processor.image import (
    PixelLimits,
    patchify,
    preprocess_image,
    resize_image,
    smart_resize,
    unpatchify,
)
from tests.media import PIXELS, VISION, encoded, image, noise, smooth

SMALL = VisionConfig(patch_size=2, embed_dim=32, num_heads=2, hidden_size=64)
OFFICIAL = {"factor": 28, "min_pixels": 3136, "max_pixels": 12_845_056}


@pytest.mark.parametrize(
    ("size", "resized", "tokens"),
    [
        ((224, 224), (224, 224), 64),
        ((1372, 2044), (1372, 2044), 3577),
        ((1080, 1920), (1092, 1932), 2691),
        ((640, 480), (644, 476), 391),
        ((333, 500), (336, 504), 216),
        ((70, 70), (56, 56), 4),
        ((28, 28), (56, 56), 4),
        ((10, 10), (56, 56), 4),
        ((4096, 4096), (3584, 3584), 16384),
        ((5000, 5000), (3556, 3556), 16129),
        ((100, 20000), (112, 19992), 2856),
        ((10, 1500), (28, 700), 25),
        ((1, 200), (28, 812), 29),
    ],
)
def test_smart_resize_at_official_limits(
    size: tuple[int, int], resized: tuple[int, int], tokens: int
) -> None:
    assert smart_resize(*size, **OFFICIAL) == resized
    assert resized[0] * resized[1] // 784 == tokens


@pytest.mark.parametrize(
    ("size", "resized"), [((1080, 1920), (728, 1316)), ((1372, 2044), (812, 1204))]
)
def test_smart_resize_at_1280_tokens(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert smart_resize(*size, factor=28, min_pixels=3136, max_pixels=1280 * 784) == resized


@pytest.mark.parametrize(("side", "resized"), [(42, 56), (98, 112), (126, 112), (154, 168)])
def test_halves_round_to_even(side: int, resized: int) -> None:
    assert smart_resize(side, 280, **OFFICIAL)[0] == resized


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    low=st.integers(1, 10**6),
    span=st.integers(0, 10**7),
)
def test_no_side_is_ever_zero(height: int, width: int, low: int, span: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    resized = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=low + span)
    assert min(resized) >= 28
    assert resized[0] % 28 == resized[1] % 28 == 0


def test_aspect_ratio_is_allowed_up_to_200() -> None:
    assert smart_resize(14, 2800, **OFFICIAL) == (28, 812)
    with pytest.raises(InputError, match=r"image: 2801 x 14 has aspect ratio 200.07143, limit 200"):
        smart_resize(14, 2801, **OFFICIAL)
    with pytest.raises(InputError) as caught:
        smart_resize(30, 40000, name="image 3", **OFFICIAL)
    assert str(caught.value) == (
        "image 3: 40000 x 30 has aspect ratio 1333, limit 200; crop it or resize it first"
    )
    with pytest.raises(InputError, match="image: 5 x 0 has no pixels"):
        smart_resize(0, 5, **OFFICIAL)


def test_pixel_limits_are_read_in_every_form() -> None:
    want = PixelLimits(min_pixels=3136, max_pixels=12_845_056)
    flat = {"min_pixels": 3136, "max_pixels": 12_845_056}
    edges = {"shortest_edge": 3136, "longest_edge": 12_845_056}
    for raw in (flat, {"size": edges}, {"size": flat}, {**flat, "size": {"shortest_edge": 1}}):
        assert PixelLimits.from_dict(raw) == want
    with pytest.raises(ConfigError, match=r"preprocessor_config.json: min_pixels is None and"):
        PixelLimits.from_dict({"max_pixels": 4000})
    with pytest.raises(ConfigError, match="give both, or size with shortest_edge"):
        PixelLimits.from_dict({"size": 448})
    with pytest.raises(ConfigError, match="min_pixels 9 and max_pixels 4"):
        PixelLimits(min_pixels=9, max_pixels=4)


def test_patch_is_flattened_as_channel_time_y_x() -> None:
    """Each patch equals the four nested loops of the definition."""
    frames_FCHW = torch.randint(0, 256, (4, 3, 8, 12), dtype=torch.uint8)
    patches_NP, grid = patchify(frames_FCHW, SMALL)
    assert grid == Grid(2, 4, 6)
    assert patches_NP.shape == (48, SMALL.patch_dim)
    positions_N2 = patch_positions([grid]).tolist()
    for n, (row, column) in enumerate(positions_N2):
        pair = n // (grid.h * grid.w)
        want = [
            frames_FCHW[2 * pair + t, c, 2 * row + y, 2 * column + x]
            for c in range(3)
            for t in range(2)
            for y in range(2)
            for x in range(2)
        ]
        assert patches_NP[n].tolist() == want


@given(h=st.integers(1, 5), w=st.integers(1, 5))
def test_patches_are_in_merge_order(h: int, w: int) -> None:
    grid = Grid(1, 2 * h, 2 * w)
    raster = torch.arange(grid.h * grid.w, dtype=torch.uint8).view(1, 1, grid.h, grid.w)
    frame = raster.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 3, -1, -1)
    patches_NP, got = patchify(frame, SMALL)
    assert got == grid
    assert patches_NP[:, 0].tolist() == merge_order(grid.h, grid.w).tolist()


@given(
    count=st.integers(1, 5),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    step=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_unpatchify_inverts_patchify(count: int, h: int, w: int, step: int, seed: int) -> None:
    vision = replace(SMALL, temporal_patch_size=step)
    torch.manual_seed(seed)
    frames = torch.randint(0, 256, (count, 3, 4 * h, 4 * w), dtype=torch.uint8)
    patches_NP, grid = patchify(frames, vision)
    back = unpatchify(patches_NP, grid, vision)
    assert torch.equal(back[:count], frames)
    for extra in back[count:]:
        assert torch.equal(extra, frames[-1])


def test_patchify_keeps_the_dtype_and_copies() -> None:
    frames = torch.rand(2, 3, 28, 28)
    patches_NP, _ = patchify(frames, VISION)
    assert patches_NP.dtype == torch.float32
    before = patches_NP.clone()
    frames.zero_()
    assert torch.equal(patches_NP, before)


def test_item_fields_of_an_image() -> None:
    item = image(encoded(smooth(100, 150)))
    assert item.kind == "image"
    assert item.grid == Grid(1, 8, 10)
    assert item.patches_NP.shape == (80, 1176)
    assert item.patches_NP.dtype == torch.uint8
    assert item.num_tokens == 20
    assert (item.original_size, item.resized_size) == ((100, 150), (112, 140))
    assert (item.name, item.notes, item.frame_timestamps) == ("image 1", (), ())
    assert len(item.pair_digests[0]) == 32


def test_pixels_are_pillow_bicubic_in_both_frames() -> None:
    pil_image = Image.fromarray(smooth(100, 150))
    item = image(pil_image)
    want = np.asarray(pil_image.resize((140, 112), Image.Resampling.BICUBIC))
    for frame_CHW in unpatchify(item.patches_NP, item.grid, VISION):
        np.testing.assert_array_equal(frame_CHW.permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize(
    "change", [np.asfortranarray, lambda a: a[::-1][::-1], lambda a: np.frombuffer(a, np.uint8)]
)
def test_arrays_of_any_layout_give_the_same_item(change: object) -> None:
    """Column-major, strided and read-only arrays; sizes with and without a resize."""
    for shape in ((56, 84, 3), (50, 90, 3)):
        plain = noise(*shape[:2])
        other = change(plain).reshape(shape)  # pyright: ignore[reportCallIssue]
        assert (
            image(other).pair_digests
            == image(plain).pair_digests
            == image(Image.fromarray(plain)).pair_digests
        )
        assert torch.equal(image(other).patches_NP, image(plain).patches_NP)


def test_options_override_the_models_limits() -> None:
    pixels = smooth(300, 300)
    assert image(pixels, max_pixels=113 * 113).resized_size == (112, 112)
    assert image(pixels, min_pixels=560 * 560).resized_size == (560, 560)
    assert image(pixels, resized_height=60, resized_width=200).resized_size == (56, 196)
    with pytest.raises(InputError, match="image 1: fps, video_end is for videos, this is an image"):
        image(pixels, fps=2.0, video_end=4.0)


def test_a_single_limit_moves_the_models_other_one() -> None:
    pixels = smooth(300, 300)
    assert image(pixels, max_pixels=784).resized_size == (28, 28)
    low = PixelLimits(min_pixels=3136, max_pixels=56 * 56)
    assert image(pixels, min_pixels=113 * 113, pixels=low).resized_size == (112, 112)
    assert low.override(784, None) == PixelLimits(min_pixels=784, max_pixels=3136)
    assert low.override(None, None) == low
    with pytest.raises(ConfigError, match="min_pixels 9 and max_pixels 4"):
        low.override(9, 4)


def test_detail_low_is_at_most_512_x_512_pixels_within_the_models_limits() -> None:
    pixels = smooth(1000, 900)
    low = image(pixels, detail="low").resized_size
    assert low == image(pixels, max_pixels=512 * 512).resized_size == (532, 476)
    for detail in ("high", "auto", "original"):
        assert image(pixels, detail=detail).resized_size == image(pixels).resized_size
    assert image(pixels, detail="high", max_pixels=112 * 112).resized_size == (112, 84)
    small = PixelLimits(min_pixels=3136, max_pixels=112 * 112)
    assert image(pixels, detail="low", pixels=small).resized_size == (112, 84)
    large = PixelLimits(min_pixels=840 * 840, max_pixels=10**6)
    assert image(pixels, detail="low", pixels=large).resized_size == (868, 784)
    text = "min_pixels 300000 is greater than 262144, the most that detail 'low' allows"
    with pytest.raises(InputError, match=text):
        image(pixels, detail="low", min_pixels=300_000)


def test_digest_depends_on_the_input_of_the_vision_tower() -> None:
    """Equal pixels, equal digest; another size, image or normalization, another digest."""
    pixels = smooth(112, 112)
    base = image(pixels).pair_digests
    assert image(encoded(pixels)).pair_digests == base
    others = {
        image(pixels, max_pixels=56 * 56).pair_digests,
        image(pixels[::-1]).pair_digests,
        preprocess_image(
            pixels, vision=replace(VISION, image_mean=(0.5, 0.5, 0.5)), pixels=PIXELS, name="x"
        ).pair_digests,
        preprocess_image(
            pixels, vision=replace(VISION, image_std=(0.5, 0.5, 0.5)), pixels=PIXELS, name="x"
        ).pair_digests,
        image(np.ascontiguousarray(smooth(112, 112).reshape(56, 224, 3))).pair_digests,
    }
    assert base not in others
    assert len(others) == 5


def test_resize_image_keeps_an_image_of_the_target_size() -> None:
    pixels = noise(56, 84)
    planes = pixels.transpose(2, 0, 1)
    np.testing.assert_array_equal(resize_image(pixels, 56, 84), planes)
    np.testing.assert_array_equal(resize_image(Image.fromarray(pixels), 56, 84), planes)


def test_preprocessing_small_arrays_is_fast() -> None:
    """Training does it hundreds of times a second: about 70 us; ten times that fails the test."""
    pixels = noise(112, 56)
    image(pixels)
    best = min(_seconds(pixels) for _ in range(20))
    assert best < 0.7e-3


def _seconds(pixels: np.ndarray) -> float:
    start = time.perf_counter()
    for _ in range(10):
        preprocess_image(pixels, vision=VISION, pixels=PIXELS, name="image 1")
    return (time.perf_counter() - start) / 10
