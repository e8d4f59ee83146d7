"""Int4 layers multiply by their dequantized matrix on every path, and packing is lossless."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.aot import CompilationError
from qwen2vl.quantization import int4
from qwen2vl.quantization.int4 import (
    MAX_FUSED_ROWS,
    Int4Linear,
    compile_dequantization,
    dequantize_blocks,
)
from qwen2vl.quantization.rtn import GroupwiseWeight, quantize_groupwise

# (outputs, inputs, group size) of nano's layers, and an odd number of outputs.
SHAPES = [(512, 192, 64), (192, 512, 128), (64, 192, 32), (259, 64, 32)]


def make_layer(
    shape: tuple[int, int, int], *, bias: bool = True
) -> tuple[Int4Linear, GroupwiseWeight, Any]:
    torch.manual_seed(0)
    outputs, inputs, size = shape
    weight = quantize_groupwise(torch.randn(outputs, inputs) * 0.05, size)
    bias_O = torch.randn(outputs) * 0.1 if bias else None
    return Int4Linear(weight, bias_O), weight, bias_O


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_preserves_the_integers(shape: tuple[int, int, int]) -> None:
    layer, weight, _ = make_layer(shape)
    assert torch.equal(layer.quantized_weight(), weight.ints_OI)
    # Only scales and zero points are rounded, to bfloat16.
    assert relative_error(layer.dequantize(), weight.dequantize()) < 5e-3
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True, group_size={shape[2]})")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_those_of_the_dequantized_matrix(
    shape: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make_layer(shape, bias=bias)
    for rows in (1, 5, MAX_FUSED_ROWS, MAX_FUSED_ROWS + 1):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantize(), bias_O)
        # Few rows are rounded to bfloat16 in any case; more rows keep their dtype.
        is_float32_path = (
            dtype == torch.float32
            and rows > MAX_FUSED_ROWS
            and int4._packing_block_size() is not None
        )
        assert relative_error(got_TO, want_TO) < (1e-5 if is_float32_path else 6e-3)


def test_any_tile_size_gives_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = make_layer((259, 64, 32))
    x_TI = torch.randn(MAX_FUSED_ROWS + 3, 64)
    want_TO = layer(x_TI)
    monkeypatch.setattr(int4, "TILE_OUTPUTS", int4.PAD_TO)
    torch.testing.assert_close(layer(x_TI), want_TO)


def test_unknown_packing_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, weight, bias_O = make_layer((259, 64, 32))
    monkeypatch.setattr(int4, "_packing_block_size", lambda: None)
    assert torch.equal(layer.quantized_weight(), weight.ints_OI)
    x_TI = torch.randn(MAX_FUSED_ROWS + 3, 64)
    assert relative_error(layer(x_TI), F.linear(x_TI, layer.dequantize(), bias_O)) < 6e-3


@pytest.mark.parametrize("block", int4.PACKING_BLOCK_SIZES)
def test_packing_block_size_is_detected(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    def pack(ints_OI: Tensor) -> Tensor:
        low, high = ints_OI.view(-1, 2, block // 2, ints_OI.shape[1]).unbind(1)
        return (low | high << 4).transpose(1, 2).reshape(len(ints_OI), -1)

    monkeypatch.setattr(int4, "_pack", pack)
    int4._packing_block_size.cache_clear()
    try:
        assert int4._packing_block_size() == block
    finally:
        int4._packing_block_size.cache_clear()


def test_every_integer_and_zero_point() -> None:
    ints_OI = torch.arange(16, dtype=torch.uint8).repeat(16, 4)
    zero_GO = torch.arange(16, dtype=torch.uint8).expand(2, -1)
    scale_GO = torch.full((2, 16), 0.25)
    layer = Int4Linear(GroupwiseWeight(ints_OI=ints_OI, scale_GO=scale_GO, zero_GO=zero_GO), None)
    want_OI = (ints_OI.float() - torch.arange(16.0)[:, None]) * 0.25
    assert torch.equal(layer.dequantize(), want_OI)
    one_II = torch.eye(64)
    torch.testing.assert_close(layer(one_II), want_OI.T)
    torch.testing.assert_close(layer(one_II[:1]), want_OI.T[:1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    int4._packing_block_size() is None, reason="unknown packing layout on this processor"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dequantization_equals_eager(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(int4, "TILE_OUTPUTS", 192)
    shapes = [
        (259, 64, 32),
        (640, 256, 64),
        (300, 256, 64),
        (64, 64, 32),
    ]  # several blocks, one, an odd number
    layers = nn.ModuleList([make_layer(shape)[0] for shape in shapes])
    compiled = copy.deepcopy(layers)
    compile_dequantization(compiled, dtype)
    assert len({id(layer._compiled_dequantize[dtype]) for layer in compiled}) == 2
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for layer, compiled_layer in zip(layers, compiled, strict=True):
        assert isinstance(layer, Int4Linear) and isinstance(compiled_layer, Int4Linear)
        x_TI = torch.randn(MAX_FUSED_ROWS + 1, layer.in_features)
        with torch.inference_mode():
            tolerance = 1e-5 if dtype == torch.float32 else 6e-3
            assert relative_error(compiled_layer(x_TI.to(dtype)), layer(x_TI.to(dtype))) < tolerance
            # A dtype that it was not compiled for is computed eagerly.
            assert torch.equal(compiled_layer(x_TI.to(other)), layer(x_TI.to(other)))


def test_compiled_dequantization_is_used_from_fewer_rows_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, _, _ = make_layer((128, 64, 32), bias=False)
    row_counts: list[int] = []

    def record_rows(self: Int4Linear, x_TI: Tensor) -> Tensor:
        row_counts.append(len(x_TI))
        return x_TI.new_zeros(len(x_TI), 128)

    monkeypatch.setattr(Int4Linear, "_dequantize_and_multiply", record_rows)
    monkeypatch.setattr(int4, "_packing_block_size", lambda: 64)
    num_rows = (
        int4.MAX_FUSED_ROWS_COMPILED,
        int4.MAX_FUSED_ROWS_COMPILED + 1,
        MAX_FUSED_ROWS,
        MAX_FUSED_ROWS + 1,
    )
    for dtypes in ({}, {torch.float32: dequantize_blocks}):
        monkeypatch.setattr(layer, "_compiled_dequantize", dtypes)
        for rows in num_rows:
            layer(torch.zeros(rows, 64))
    assert row_counts == [num_rows[3], *num_rows[1:]]


def test_failed_compilation_changes_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList([make_layer((64, 64, 32))[0], make_layer((64, 128, 32))[0]])
    compiled_once: list[object] = []

    def fail_the_second_time(*_: Any, **__: Any) -> object:
        if compiled_once:
            raise CompilationError("no")
        compiled_once.append(None)
        return dequantize_blocks

    monkeypatch.setattr(int4, "compile_ahead_of_time", fail_the_second_time)
    monkeypatch.setattr(int4, "_packing_block_size", lambda: 64)
    with pytest.raises(CompilationError):
        compile_dequantization(layers, torch.float32)
    assert all(isinstance(layer, Int4Linear) and not layer._compiled_dequantize for layer in layers)
