"""Pixels equal those of transformers' Qwen2VLImageProcessorPil bit for bit, sizes included."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from qwen2vl.errors import InputError
from qwen2vl.geometry import num_vision_tokens
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.image import PixelLimits, smart_resize
from tests.media import FORMATS, PIXELS, VISION, encoded, image, noise, smooth

Processor = reference.Qwen2VLImageProcessorPil


def reference_pixels(
    image_in: Image.Image, pixels: PixelLimits = PIXELS
) -> tuple[torch.Tensor, list[int]]:
    """Return pixel values and grid computed by transformers."""
    size = {"shortest_edge": pixels.min_pixels, "longest_edge": pixels.max_pixels}
    out = Processor(size=size)(images=[image_in], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def assert_equal(
    image_in: Image.Image, source: object = None, pixels: PixelLimits = PIXELS
) -> None:
    item = image(image_in if source is None else source, pixels=pixels)
    expected, grid = reference_pixels(image_in, pixels)
    assert list(item.grid) == grid
    assert expected.dtype == torch.float32
    assert torch.equal(normalize_pixels(item.patches_NP, VISION), expected)


@settings(max_examples=25)
@given(height=st.integers(1, 200), width=st.integers(1, 200), seed=st.integers(0, 9))
def test_pixels_of_any_size(height: int, width: int, seed: int) -> None:
    if max(height, width) <= 200 * min(height, width):
        assert_equal(Image.fromarray(noise(height, width, seed)))


def test_every_byte_value_normalizes_to_the_same_float() -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(49).reshape(112, 112)
    assert_equal(Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=-1)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_opaque_files_end_to_end(kind: str, mode: str) -> None:
    data = encoded(Image.fromarray(smooth(90, 130)).convert(mode), kind)
    with Image.open(io.BytesIO(data)) as opened:
        assert_equal(opened, data)


@pytest.mark.parametrize("mode", ["CMYK", "P", "1"])
def test_converted_modes_end_to_end(mode: str) -> None:
    assert_equal(Image.fromarray(smooth(90, 130)).convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_end_to_end(mode: str) -> None:
    """transformers 5 also composites transparency on white."""
    image_in = Image.fromarray(smooth(90, 130))
    image_in.putalpha(Image.fromarray(smooth(90, 130, seed=1)[..., 0]))
    assert_equal(image_in.convert(mode))


def test_large_and_limited_images() -> None:
    assert_equal(
        Image.fromarray(smooth(1080, 1920)), pixels=PixelLimits(min_pixels=3136, max_pixels=200_704)
    )
    assert_equal(
        Image.fromarray(smooth(20, 30)), pixels=PixelLimits(min_pixels=100_352, max_pixels=200_704)
    )


@settings(max_examples=300)
@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    min_pixels=st.integers(1, 2_000_000),
    span=st.integers(0, 20_000_000),
)
def test_sizes_and_rejected_aspect_ratios(
    height: int, width: int, min_pixels: int, span: int
) -> None:
    limits = {"min_pixels": min_pixels, "max_pixels": min_pixels + span}
    try:
        expected = reference.smart_resize(height, width, factor=28, **limits)
    except ValueError:
        with pytest.raises(InputError, match="has aspect ratio"):
            smart_resize(height, width, factor=28, **limits)
        return
    assert smart_resize(height, width, factor=28, **limits) == expected


@settings(max_examples=40)
@given(height=st.integers(1, 400), width=st.integers(1, 400), max_pixels=st.integers(3136, 60_000))
def test_grids_and_token_counts(height: int, width: int, max_pixels: int) -> None:
    if max(height, width) > 200 * min(height, width):
        return
    item = image(np.zeros((height, width), np.uint8), max_pixels=max_pixels)
    processor = Processor(size={"shortest_edge": 3136, "longest_edge": max_pixels})
    patches = processor.get_number_of_image_patches(height, width)
    assert len(item.patches_NP) == patches
    assert num_vision_tokens(item.grid) == patches // 4
