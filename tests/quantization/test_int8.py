"""Both int8 layers multiply by their dequantized matrix; rows do not affect each other."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.quantization import int8
from qwen2vl.quantization.int8 import (
    MAX_HIGH_PRECISION_ROWS,
    Int8Linear,
    Int8WeightOnlyLinear,
    build_int8_linear,
    has_int8_dot_product,
)
from qwen2vl.quantization.rtn import PerChannelWeight, quantize_per_channel

LayerClass = type[Int8Linear] | type[Int8WeightOnlyLinear]

LAYERS = [
    pytest.param(
        Int8Linear,
        marks=pytest.mark.skipif(
            not has_int8_dot_product(), reason="no int8 dot products on this processor"
        ),
    ),
    Int8WeightOnlyLinear,
]
# (outputs, inputs) of nano's layers, and odd ones.
SHAPES = [(288, 192), (192, 512), (64, 192), (259, 61)]


def make_layer(
    layer_class: LayerClass, shape: tuple[int, int], *, bias: bool = True
) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape) * 0.05
    bias_O = torch.randn(shape[0]) * 0.1 if bias else None
    return layer_class(quantize_per_channel(weight_OI), bias_O), weight_OI, bias_O


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_preserves_the_integers(layer_class: LayerClass, shape: tuple[int, int]) -> None:
    layer, weight_OI, _ = make_layer(layer_class, shape)
    weight = quantize_per_channel(weight_OI)
    assert torch.equal(layer.quantized_weight(), weight.ints_OI)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert (layer.out_features, layer.in_features) == shape
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True)")


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dequantized_matrix(
    layer_class: LayerClass, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make_layer(layer_class, shape, bias=bias)
    for rows in (1, 2, MAX_HIGH_PRECISION_ROWS, MAX_HIGH_PRECISION_ROWS + 1, 40):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantize(), bias_O)
        is_high_precision = layer_class is Int8WeightOnlyLinear or rows <= MAX_HIGH_PRECISION_ROWS
        tolerance = (
            (1e-4 if is_high_precision else 8e-3)
            if dtype == torch.float32
            else (4e-3 if is_high_precision else 9e-3)
        )
        assert relative_error(got_TO, want_TO) < tolerance


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("rows", [MAX_HIGH_PRECISION_ROWS, 30])
def test_rows_do_not_affect_each_other(layer_class: LayerClass, rows: int) -> None:
    layer, _, _ = make_layer(layer_class, (96, 64))
    x_TI = torch.randn(rows, 64, dtype=torch.bfloat16)
    want_TO = layer(x_TI)
    x_TI[3] = 1e4
    x_TI[5] = float("nan")
    x_TI[7] = float("inf")
    got_TO = layer(x_TI)
    others = [t for t in range(rows) if t not in (3, 5, 7)]
    assert torch.equal(got_TO[others], want_TO[others])
    assert bool(got_TO[5].isnan().all())
    assert not bool(got_TO[7].isfinite().any())


@pytest.mark.skipif(not has_int8_dot_product(), reason="no int8 dot products on this processor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 3, 64])
@pytest.mark.parametrize("flag", ["amx_int8", "avx512_vnni"])
def test_signed_and_unsigned_products_are_exact(
    monkeypatch: pytest.MonkeyPatch, flag: str, rows: int, dtype: torch.dtype
) -> None:
    """Processors with AMX multiply signed bytes, others unsigned ones."""
    monkeypatch.setattr(int8, "_cpu_flags", lambda: {flag})
    torch.manual_seed(0)
    ints_TI = torch.randint(-128, 128, (rows, 192)).to(torch.int8)
    ints_OI = torch.randint(-127, 128, (288, 192)).to(torch.int8)
    layer = Int8Linear(PerChannelWeight(ints_OI=ints_OI, scale_O=torch.rand(288)), None)
    want_TO = (ints_TI.double() @ ints_OI.double().T).float() * layer.scale_O
    assert torch.equal(layer._matmul(ints_TI, dtype), want_TO.to(dtype))


@pytest.mark.skipif(not has_int8_dot_product(), reason="no int8 dot products on this processor")
def test_many_rows_take_less_time_than_in_float32() -> None:
    """oneDNN's fallback for signed bytes without AMX takes a thousand times as long."""
    layer, weight_OI, _ = make_layer(Int8Linear, (1536, 1280))
    x_TI = torch.randn(64, 1280)

    def seconds(run: Callable[[], object]) -> float:
        times: list[float] = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    # Four times, because the machine may be busy: a fallback is far above it.
    assert seconds(lambda: layer(x_TI)) < 4 * seconds(lambda: F.linear(x_TI, weight_OI))


@pytest.mark.skipif(not has_int8_dot_product(), reason="no int8 dot products on this processor")
def test_small_batches_are_batch_invariant() -> None:
    layer, _, _ = make_layer(Int8Linear, (96, 64))
    x_TI = torch.randn(MAX_HIGH_PRECISION_ROWS, 64, dtype=torch.bfloat16)
    together_TO = layer(x_TI)
    for t in range(MAX_HIGH_PRECISION_ROWS):
        assert torch.equal(layer(x_TI[t : t + 1])[0], together_TO[t])


@pytest.mark.parametrize("layer_class", LAYERS)
def test_rows_of_zeros_give_the_bias(layer_class: LayerClass) -> None:
    layer, _, bias_O = make_layer(layer_class, (96, 64))
    for rows in (1, 20):
        assert torch.equal(layer(torch.zeros(rows, 64)), bias_O.expand(rows, -1))


@pytest.mark.skipif(not has_int8_dot_product(), reason="no int8 dot products on this processor")
@pytest.mark.parametrize("rows", [1, 20])
def test_largest_value_of_a_row_does_not_overflow_int8(rows: int) -> None:
    layer = Int8Linear(quantize_per_channel(torch.eye(64)), None)
    for value in torch.linspace(1, 2, 97).bfloat16():
        x_TI = value.expand(rows, 64).contiguous()
        torch.testing.assert_close(layer(x_TI), x_TI, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("flags", "layer_class"),
    [
        ({"fpu", "avx512_vnni", "amx_int8"}, Int8Linear),
        ({"fpu", "avx512_vnni"}, Int8Linear),
        ({"fpu", "avx_vnni"}, Int8Linear),
        ({"fpu", "avx2"}, Int8WeightOnlyLinear),
        (set(), Int8WeightOnlyLinear),
    ],
)
def test_layer_class_depends_on_cpu_flags(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], layer_class: LayerClass
) -> None:
    monkeypatch.setattr(int8, "_cpu_flags", lambda: flags)
    assert type(build_int8_linear(quantize_per_channel(torch.randn(32, 32)), None)) is layer_class


@pytest.mark.parametrize("layer_class", LAYERS)
def test_layers_have_no_parameters(layer_class: LayerClass) -> None:
    layer, _, _ = make_layer(layer_class, (96, 64))
    assert isinstance(layer, nn.Module)
    assert not list(layer.parameters())
