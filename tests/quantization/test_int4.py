"""The 4-bit layer multiplies by the matrix it stands for, whichever way; packing is undone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qwen2vl.quantization.int4 as room
from qwen2vl.linear.aot import NotCompiledError
from qwen2vl.quantization.int4 import FEW_ROWS, Int4Linear, compile_widening, widen
from qwen2vl.quantization.rtn import Groups, round_groups

# Widths of nano's layers with the size of their groups; outputs that are a multiple of nothing.
SHAPES = [(512, 192, 64), (192, 512, 128), (64, 192, 32), (259, 64, 32)]


def make(shape: tuple[int, int, int], *, bias: bool = True) -> tuple[Int4Linear, Groups, Any]:
    torch.manual_seed(0)
    outputs, inputs, size = shape
    rounded = round_groups(torch.randn(outputs, inputs) * 0.05, size)
    bias_O = torch.randn(outputs) * 0.1 if bias else None
    return Int4Linear(rounded, bias_O), rounded, bias_O


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_integers_survive_packing(shape: tuple[int, int, int]) -> None:
    layer, rounded, _ = make(shape)
    assert torch.equal(layer.integers(), rounded.ints_OI)
    # Only scales and zeros have lost digits, to bfloat16.
    assert error(layer.dequantized(), rounded.dequantized()) < 5e-3
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True, group_size={shape[2]})")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_matrix(
    shape: tuple[int, int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make(shape, bias=bias)
    for rows in (1, 5, FEW_ROWS, FEW_ROWS + 1):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantized(), bias_O)
        # Few rows are rounded to bfloat16 in any case, many keep what they are.
        wide = dtype == torch.float32 and rows > FEW_ROWS and room._block() is not None
        assert error(got_TO, want_TO) < (1e-5 if wide else 6e-3)


def test_strips_of_any_size_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = make((259, 64, 32))
    x_TI = torch.randn(FEW_ROWS + 3, 64)
    want_TO = layer(x_TI)
    monkeypatch.setattr(room, "STRIP", room.PAD_TO)
    torch.testing.assert_close(layer(x_TI), want_TO)


def test_a_packing_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rounded, bias_O = make((259, 64, 32))
    monkeypatch.setattr(room, "_block", lambda: None)
    assert torch.equal(layer.integers(), rounded.ints_OI)
    x_TI = torch.randn(FEW_ROWS + 3, 64)
    assert error(layer(x_TI), F.linear(x_TI, layer.dequantized(), bias_O)) < 6e-3


@pytest.mark.parametrize("block", room.BLOCKS)
def test_the_packing_is_found_out(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    def pack(ints_OI: Tensor) -> Tensor:
        low, high = ints_OI.view(-1, 2, block // 2, ints_OI.shape[1]).unbind(1)
        return (low | high << 4).transpose(1, 2).reshape(len(ints_OI), -1)

    monkeypatch.setattr(room, "_pack", pack)
    room._block.cache_clear()
    try:
        assert room._block() == block
    finally:
        room._block.cache_clear()


def test_every_level_and_zero() -> None:
    ints_OI = torch.arange(16, dtype=torch.uint8).repeat(16, 4)
    zero_GO = torch.arange(16, dtype=torch.uint8).expand(2, -1)
    scale_GO = torch.full((2, 16), 0.25)
    layer = Int4Linear(Groups(ints_OI=ints_OI, scale_GO=scale_GO, zero_GO=zero_GO), None)
    want_OI = (ints_OI.float() - torch.arange(16.0)[:, None]) * 0.25
    assert torch.equal(layer.dequantized(), want_OI)
    one_II = torch.eye(64)
    torch.testing.assert_close(layer(one_II), want_OI.T)
    torch.testing.assert_close(layer(one_II[:1]), want_OI.T[:1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(room._block() is None, reason="torch packs in a way that is not known here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_widening_is_the_widening(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(room, "STRIP", 192)
    shapes = [(259, 64, 32), (640, 256, 64), (300, 256, 64), (64, 64, 32)]  # several, one, odd
    layers = nn.ModuleList([make(shape)[0] for shape in shapes])
    compiled = copy.deepcopy(layers)
    compile_widening(compiled, dtype)
    assert len({id(layer._widen[dtype]) for layer in compiled}) == 2
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    for plain, quick in zip(layers, compiled, strict=True):
        assert isinstance(plain, Int4Linear) and isinstance(quick, Int4Linear)
        x_TI = torch.randn(FEW_ROWS + 1, plain.in_features)
        with torch.inference_mode():
            limit = 1e-5 if dtype == torch.float32 else 6e-3
            assert error(quick(x_TI.to(dtype)), plain(x_TI.to(dtype))) < limit
            # What it was not compiled for goes the ordinary way.
            assert torch.equal(quick(x_TI.to(other)), plain(x_TI.to(other)))


def test_more_rows_are_widened_for_where_that_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = make((128, 64, 32), bias=False)
    seen: list[int] = []

    def strips(self: Int4Linear, x_TI: Tensor) -> Tensor:
        seen.append(len(x_TI))
        return x_TI.new_zeros(len(x_TI), 128)

    monkeypatch.setattr(Int4Linear, "_by_strips", strips)
    monkeypatch.setattr(room, "_block", lambda: 64)
    counts = (room.FEW_ROWS_COMPILED, room.FEW_ROWS_COMPILED + 1, FEW_ROWS, FEW_ROWS + 1)
    for dtypes in ({}, {torch.float32: widen}):
        monkeypatch.setattr(layer, "_widen", dtypes)
        for rows in counts:
            layer(torch.zeros(rows, 64))
    assert seen == [counts[3], *counts[1:]]


def test_a_layer_is_not_left_half_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.ModuleList([make((64, 64, 32))[0], make((64, 128, 32))[0]])
    made: list[object] = []

    def fails_the_second_time(*_: Any, **__: Any) -> object:
        if made:
            raise NotCompiledError("no")
        made.append(None)
        return widen

    monkeypatch.setattr(room, "compile_direct", fails_the_second_time)
    monkeypatch.setattr(room, "_block", lambda: 64)
    with pytest.raises(NotCompiledError):
        compile_widening(layers, torch.float32)
    assert all(isinstance(layer, Int4Linear) and not layer._widen for layer in layers)
