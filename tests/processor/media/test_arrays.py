"""Pixel arrays: the axis of the channels is found by one rule; tensors of any kind are read."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import InputError
from qwen2vl.processor.media.arrays import (
    frames_channels_last,
    image_channels_last,
    tensor_to_array,
    to_uint8,
)


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((9, 7), (9, 7)),
        ((3, 7), (3, 7)),
        ((9, 7, 3), (9, 7, 3)),
        ((3, 9, 7), (9, 7, 3)),
        ((4, 9, 7), (9, 7, 4)),
        ((1, 9, 7), (9, 7, 1)),
        ((9, 7, 1), (9, 7, 1)),
        ((9, 4, 3), (9, 4, 3)),
        ((3, 4, 9), (4, 9, 3)),
        ((1, 9, 3), (1, 9, 3)),  # a row of RGB
        ((3, 9, 1), (9, 1, 3)),  # a column of RGB
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_channels_become_the_last_axis(shape: tuple[int, ...], last: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    for name, found in (
        ("image", image_channels_last(array, "x")),
        ("video", frames_channels_last(array[None], "x")[0] if len(shape) == 3 else None),
    ):
        if found is not None:
            assert found.shape == last, name
            axes = (1, 2, 0) if shape != last else tuple(range(len(shape)))
            np.testing.assert_array_equal(found, array.transpose(axes))


@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from([3, 4]))
def test_every_array_is_read_in_its_own_way_or_rejected(
    height: int, width: int, channels: int
) -> None:
    """Colors are never taken for rows or columns, in either layout."""
    for shape in ((height, width, channels), (channels, height, width)):
        array = np.zeros(shape, np.uint8)
        if shape[0] in (3, 4) and shape[2] in (3, 4):
            with pytest.raises(InputError, match="could have its channels first or last"):
                image_channels_last(array, "x")
        else:
            assert image_channels_last(array, "x").shape == (height, width, channels)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_values_of_a_tensor_are_those_of_the_array(dtype: torch.dtype) -> None:
    ramp = torch.arange(256).to(dtype).requires_grad_(dtype.is_floating_point)
    array = tensor_to_array(ramp.reshape(1, 256), "x")
    values = array if dtype == torch.uint8 else to_uint8(array, "x")[0]
    assert values.ravel().tolist() == list(range(256))


def test_a_ramp_as_torchvision_scales_it_is_exact() -> None:
    ramp = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(tensor_to_array(ramp / 255, "x"), "x")[0].tolist() == list(range(256))


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(3, 9, 9, device="meta"), r"x: a tensor on device meta .* give a dense uint8"),
        (torch.zeros(9, 9).to_sparse(), "layout torch.sparse_coo .* has no plain pixels"),
    ],
)
def test_tensors_without_plain_pixels(tensor: torch.Tensor, text: str) -> None:
    with pytest.raises(InputError, match=text):
        tensor_to_array(tensor, "x")


def test_normalized_tensors_are_rejected_with_the_remedy() -> None:
    text = r"float32 values from -2.0 to 2.0 are not colors; .* after undoing their normalization"
    with pytest.raises(InputError, match=text):
        to_uint8(np.array([-2, 2], np.float32), "x")


def test_overshoot_of_interpolation_is_clipped_with_a_note() -> None:
    """Bicubic resizing leaves [0, 1] a little; as 0..255 the picture would be black."""
    values, note = to_uint8(np.array([-0.05, 0, 0.5, 1, 1.0001], np.float32), "x")
    assert values.tolist() == [0, 0, 128, 255, 255]
    assert note == "float values scaled from [0, 1]; those from -0.05 to 1.0001 clipped to it"
    assert to_uint8(np.array([0, 1.1]), "x")[0].tolist() == [0, 255]


@pytest.mark.parametrize("high", [1.25, 2.0, 3.0])
def test_floats_of_no_clear_range_are_rejected(high: float) -> None:
    text = f"x: float32 values from 0.0 to {high} are neither 0..1 nor 0..255; scale them to uint8"
    with pytest.raises(InputError, match=re.escape(text)):
        to_uint8(np.array([0, high], np.float32), "x")
    assert to_uint8(np.array([0, 3.5], np.float32), "x")[0].tolist() == [0, 4]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_wide_integers_that_fit_are_read_as_8_bit(dtype: type[np.generic]) -> None:
    values, note = to_uint8(np.array([[0, 200, 255]]).astype(dtype), "x")
    assert values.tolist() == [[0, 200, 255]]
    assert note == f"{8 * np.dtype(dtype).itemsize}-bit values read as 8-bit"


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint32])
def test_wider_values_are_16_bit(dtype: type[np.generic]) -> None:
    values, note = to_uint8(np.array([0, 257, 65535]).astype(dtype), "x")
    assert (values.tolist(), note) == ([0, 1, 255], "16-bit scaled to 8-bit")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_brightest_of_dark_values_is_told(dtype: type[np.generic]) -> None:
    """12 bits in 16, as of medical images, are nearly black."""
    values, note = to_uint8(np.array([0, 2056, 4095]).astype(dtype), "x")
    assert values.tolist() == [0, 8, 16]
    assert note == "16-bit scaled to 8-bit; the brightest value is 4095 of 65535"


def test_booleans_are_black_and_white() -> None:
    values, note = to_uint8(np.array([[False, True]]), "x")
    assert (values.tolist(), note) == ([[0, 255]], "false and true read as 0 and 255")


@pytest.mark.parametrize(("dtype", "value"), [(np.int64, 65536), (np.int16, 300), (np.uint32, 1e6)])
def test_integers_that_are_no_colors(dtype: type[np.generic], value: float) -> None:
    with pytest.raises(InputError, match=rf"values from 0 to {value:.0f} are not colors"):
        to_uint8(np.array([0, value]).astype(dtype), "x")
