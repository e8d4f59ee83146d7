"""Int4 layers multiply by their dequantized matrix, and packing is lossless."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.quantization.int4 import Int4Linear, PackedInt4Weight
from qwen2vl.quantization.rtn import GroupwiseWeight, quantize_groupwise

# (outputs, inputs, group size) of nano's layers, and an odd number of outputs.
SHAPES = [(512, 192, 64), (192, 512, 128), (64, 192, 32), (259, 64, 32)]


def make_layer(
    shape: tuple[int, int, int], *, bias: bool = True
) -> tuple[Int4Linear, GroupwiseWeight, Tensor | None]:
    torch.manual_seed(0)
    outputs, inputs, size = shape
    weight = quantize_groupwise(torch.randn(outputs, inputs) * 0.05, size)
    bias_O = torch.randn(outputs) * 0.1 if bias else None
    return Int4Linear(PackedInt4Weight.from_groupwise(weight), bias_O), weight, bias_O


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_scales_and_zero_points_are_kept(shape: tuple[int, int, int]) -> None:
    layer, weight, _ = make_layer(shape)
    assert torch.equal(layer.quantized_weight(), weight.ints_OI)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True, group_size={shape[2]})")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dequantized_matrix(
    shape: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make_layer(shape, bias=bias)
    for rows in (1, 5, 40, 41):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantize(), bias_O)
        tolerance = 1e-4 if rows == 1 and dtype == torch.float32 else 1.2e-2
        assert relative_error(got_TO, want_TO) < tolerance


def test_rounding_to_int8_adds_little_to_the_error_of_4_bits() -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(64, 512)
    weight = PackedInt4Weight.from_groupwise(quantize_groupwise(weight_OI, 64))
    layer = Int4Linear(weight, None)
    x_TI = torch.randn(40, 512)
    exact_TO = x_TI @ weight_OI.T
    by_groups = relative_error(F.linear(x_TI, layer.dequantize()), exact_TO)
    assert relative_error(layer(x_TI), exact_TO) < 1.02 * by_groups


def test_a_copy_computes_the_same() -> None:
    layer, _, _ = make_layer((64, 192, 32))
    x_TI = torch.randn(2, 192)
    assert torch.equal(copy.deepcopy(layer)(x_TI), layer(x_TI))


def test_the_layer_has_no_parameters() -> None:
    layer, _, _ = make_layer((64, 192, 32))
    assert not list(layer.parameters())
