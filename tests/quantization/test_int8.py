"""Int8 layers multiply by their dequantized matrix; rows do not affect each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.cpu.operators import MAX_PRECISE_ROWS
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.rtn import quantize_per_channel

# (outputs, inputs) of nano's layers, and odd ones.
SHAPES = [(288, 192), (192, 512), (64, 192), (259, 61)]


def make_layer(
    shape: tuple[int, int], *, bias: bool = True
) -> tuple[Int8Linear, Tensor, Tensor | None]:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape) * 0.05
    bias_O = torch.randn(shape[0]) * 0.1 if bias else None
    return Int8Linear(quantize_per_channel(weight_OI), bias_O), weight_OI, bias_O


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_integers_are_kept(shape: tuple[int, int]) -> None:
    layer, weight_OI, _ = make_layer(shape)
    weight = quantize_per_channel(weight_OI)
    assert torch.equal(layer.quantized_weight(), weight.ints_OI)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert (layer.out_features, layer.in_features) == shape
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True)")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dequantized_matrix(
    shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make_layer(shape, bias=bias)
    for rows in (1, 2, MAX_PRECISE_ROWS, MAX_PRECISE_ROWS + 1, 40):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantize(), bias_O)
        is_precise = rows <= MAX_PRECISE_ROWS
        if dtype == torch.float32:
            tolerance = 1e-4 if is_precise else 8e-3
        else:
            tolerance = 4e-3 if is_precise else 9e-3
        assert relative_error(got_TO, want_TO) < tolerance


def test_small_batches_are_batch_invariant() -> None:
    layer, _, _ = make_layer((96, 64))
    x_TI = torch.randn(MAX_PRECISE_ROWS, 64, dtype=torch.bfloat16)
    together_TO = layer(x_TI)
    for t in range(MAX_PRECISE_ROWS):
        assert torch.equal(layer(x_TI[t : t + 1])[0], together_TO[t])


@pytest.mark.parametrize("rows", [1, 20])
def test_the_largest_value_of_a_row_does_not_overflow(rows: int) -> None:
    layer = Int8Linear(quantize_per_channel(torch.eye(64)), None)
    for value in torch.linspace(1, 2, 97).bfloat16():
        x_TI = value.expand(rows, 64).contiguous()
        torch.testing.assert_close(layer(x_TI), x_TI, rtol=0.02, atol=0)


def test_the_layer_has_no_parameters() -> None:
    layer, _, _ = make_layer((96, 64))
    assert isinstance(layer, nn.Module)
    assert not list(layer.parameters())
