"""Fused layers equal separate ones to the bit, and cache nothing between forwards."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.linear.fused import FusedLinear, FusedLinearSlice, fusion_groups
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.scheme import (
    CPU_MODES,
    CpuQuantizationMode,
    QuantizedLinear,
    layer_schemes,
    quantize,
    quantize_layers,
)
from tests.quantization.test_scheme import logits_of
from tests.tiny import tiny_model


def quantize_separately(model: Qwen2VL, mode: CpuQuantizationMode) -> None:
    """Quantize every layer without fusion."""
    for name, scheme in layer_schemes(model, mode).items():
        quantize_layers(model, [name], scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_fused_layers_compute_identical_logits(
    mode: CpuQuantizationMode, dtype: torch.dtype
) -> None:
    fused, separate = tiny_model().to(dtype), tiny_model().to(dtype)
    schemes = layer_schemes(separate, mode)
    quantize(fused, mode)
    quantize_separately(separate, mode)
    for name in schemes:
        fused_layer, separate_layer = fused.get_submodule(name), separate.get_submodule(name)
        assert isinstance(fused_layer, QuantizedLinear | FusedLinearSlice)
        assert isinstance(separate_layer, QuantizedLinear)
        assert torch.equal(fused_layer.quantized_weight(), separate_layer.quantized_weight())
        assert torch.equal(fused_layer.dequantize(), separate_layer.dequantize())
    for tokens in (4, 8, 60):
        assert torch.equal(logits_of(fused, tokens), logits_of(separate, tokens))


def test_fusion_leaves_four_layers_a_block() -> None:
    model = tiny_model()
    quantize(model, "int4")
    names = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    slices = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, FusedLinearSlice)
    }
    assert slices == names
    layers = [m for m in model.model.layers[0].modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 4


def test_only_layers_of_equal_scheme_are_grouped() -> None:
    schemes = {
        "a.q_proj": 8,
        "a.k_proj": 4,
        "a.v_proj": 8,
        "a.o_proj": 8,
        "b.q_proj": 8,
        "b.gate_proj": 4,
        "b.up_proj": 4,
        "lm_head": 8,
    }
    assert fusion_groups(schemes) == [
        (("a.q_proj", "a.v_proj"), 8),
        (("a.k_proj",), 4),
        (("a.o_proj",), 8),
        (("b.q_proj",), 8),
        (("b.gate_proj", "b.up_proj"), 4),
        (("lm_head",), 8),
    ]


class CountingLayer(nn.Module):
    """Counts its forwards."""

    out_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x_TI: Tensor) -> Tensor:
        self.count += 1
        return x_TI.repeat(1, 3)


def test_first_slice_computes_and_last_slice_releases_the_cache() -> None:
    layer = CountingLayer()
    fused = FusedLinear(layer)  # type: ignore[arg-type]
    first, second, third = (FusedLinearSlice(fused, start, start + 2) for start in (0, 2, 4))
    x_TI = torch.randn(2, 2)
    for expected in (1, 2):  # computed again: the last slice has released the cache
        outs = [layer_slice(x_TI) for layer_slice in (first, second, third)]
        assert layer.count == expected
        assert all(torch.equal(out, x_TI) for out in outs)
    first(x_TI)
    assert torch.equal(first(x_TI + 1), x_TI + 1)  # another input replaces the cached one
    assert layer.count == 4
    assert torch.equal(third(x_TI), x_TI)
    input_ref = weakref.ref(x_TI)
    del x_TI, outs
    gc.collect()
    assert input_ref() is None


def test_fused_weights_are_stored_once() -> None:
    fused, separate = tiny_model(), tiny_model()
    quantize(fused, "int8")
    quantize_separately(separate, "int8")
    assert sum(b.numel() for b in fused.buffers()) == sum(b.numel() for b in separate.buffers())
