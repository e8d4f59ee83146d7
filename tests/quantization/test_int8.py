"""Both 8-bit layers multiply by the matrix they stand for; a row never depends on another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qwen2vl.quantization.int8 as room
from qwen2vl.quantization.int8 import (
    FEW_ROWS,
    Int8Linear,
    WideInt8Linear,
    has_integer_products,
    int8_linear,
)
from qwen2vl.quantization.rtn import round_channels

Layer = type[Int8Linear] | type[WideInt8Linear]

LAYERS = [
    pytest.param(
        Int8Linear,
        marks=pytest.mark.skipif(not has_integer_products(), reason="no integer products here"),
    ),
    WideInt8Linear,
]
# Widths of nano's layers, and some that are a multiple of nothing.
SHAPES = [(288, 192), (192, 512), (64, 192), (259, 61)]


def make(kind: Layer, shape: tuple[int, int], *, bias: bool = True) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape) * 0.05
    bias_O = torch.randn(shape[0]) * 0.1 if bias else None
    return kind(round_channels(weight_OI), bias_O), weight_OI, bias_O


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_integers_survive_packing(kind: Layer, shape: tuple[int, int]) -> None:
    layer, weight_OI, _ = make(kind, shape)
    rounded = round_channels(weight_OI)
    assert torch.equal(layer.integers(), rounded.ints_OI)
    assert torch.equal(layer.dequantized(), rounded.dequantized())
    assert (layer.out_features, layer.in_features) == shape
    assert repr(layer).endswith(f"({shape[1]}, {shape[0]}, bias=True)")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_matrix(
    kind: Layer, shape: tuple[int, int], bias: bool, dtype: torch.dtype
) -> None:
    layer, _, bias_O = make(kind, shape, bias=bias)
    for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1, 40):
        x_TI = torch.randn(rows, shape[1]).to(dtype)
        got_TO = layer(x_TI)
        assert got_TO.dtype == dtype
        assert got_TO.shape == (rows, shape[0])
        want_TO = F.linear(x_TI.float(), layer.dequantized(), bias_O)
        exact = kind is WideInt8Linear or rows <= FEW_ROWS
        limit = (1e-4 if exact else 8e-3) if dtype == torch.float32 else (4e-3 if exact else 9e-3)
        assert error(got_TO, want_TO) < limit


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rows", [FEW_ROWS, 30])
def test_rows_do_not_see_each_other(kind: Layer, rows: int) -> None:
    layer, _, _ = make(kind, (96, 64))
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


@pytest.mark.skipif(not has_integer_products(), reason="no integer products here")
def test_few_rows_are_the_same_alone_and_together() -> None:
    layer, _, _ = make(Int8Linear, (96, 64))
    x_TI = torch.randn(FEW_ROWS, 64, dtype=torch.bfloat16)
    together_TO = layer(x_TI)
    for t in range(FEW_ROWS):
        assert torch.equal(layer(x_TI[t : t + 1])[0], together_TO[t])


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_zeros_give_the_bias(kind: Layer) -> None:
    layer, _, bias_O = make(kind, (96, 64))
    for rows in (1, 20):
        assert torch.equal(layer(torch.zeros(rows, 64)), bias_O.expand(rows, -1))


@pytest.mark.skipif(not has_integer_products(), reason="no integer products here")
@pytest.mark.parametrize("rows", [1, 20])
def test_the_largest_number_of_a_row_never_wraps_around(rows: int) -> None:
    layer = Int8Linear(round_channels(torch.eye(64)), None)
    for top in torch.linspace(1, 2, 97).bfloat16():
        x_TI = top.expand(rows, 64).contiguous()
        torch.testing.assert_close(layer(x_TI), x_TI, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("words", "kind"),
    [("flags : fpu avx512_vnni amx_int8", Int8Linear), ("flags : fpu avx2", WideInt8Linear)],
)
def test_the_processor_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, kind: Layer
) -> None:
    (tmp_path / "cpuinfo").write_text(words)
    monkeypatch.setattr(room, "Path", lambda _: tmp_path / "cpuinfo")
    assert type(int8_linear(round_channels(torch.randn(32, 32)), None)) is kind


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_to_train_and_nothing_that_names_a_parameter(kind: Layer) -> None:
    layer, _, _ = make(kind, (96, 64))
    assert isinstance(layer, nn.Module)
    assert not list(layer.parameters())
