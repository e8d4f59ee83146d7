"""Which prequantized integers a layer can hold, and that it holds them exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.quantization.int4 import Int4Linear, PackedInt4Weight
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.prequantized import (
    build_prequantized_layer,
    build_row_major_layer,
    prequantized_scheme,
)
from qwen2vl.quantization.rtn import quantize_groupwise, quantize_per_channel
from qwen2vl.quantization.scheme import LayerScheme


@pytest.mark.parametrize(
    ("bits", "size", "inputs", "expected"),
    [
        (4, 128, 3584, LayerScheme(4, 128)),
        (4, 128, 29696, LayerScheme(4, 128)),  # the padded 72B
        (4, 128, 192, LayerScheme(4, 64)),  # the last stored group is half full
        (4, 32, 64, LayerScheme(4, 32)),
        (4, 96, 192, LayerScheme(4, 32)),
        (4, 1024, 4096, LayerScheme(4, 128)),
        (4, -1, 192, LayerScheme(4, 64)),
        (4, 16, 192, None),
        (4, -1, 72, None),
        (8, -1, 72, LayerScheme(8)),
        (8, 128, 128, LayerScheme(8)),
        (8, 128, 256, None),
    ],
)
def test_scheme_of_prequantized_matrices(
    bits: int, size: int, inputs: int, expected: LayerScheme | None
) -> None:
    assert (
        prequantized_scheme(bits, size, inputs, is_symmetric=True, has_contiguous_groups=True)
        == expected
    )
    assert (
        prequantized_scheme(bits, size, inputs, is_symmetric=True, has_contiguous_groups=False)
        is None
    )
    asymmetric = prequantized_scheme(
        bits, size, inputs, is_symmetric=False, has_contiguous_groups=True
    )
    assert asymmetric == (None if bits == 8 else expected)


@given(
    seed=st.integers(0, 10**6),
    inputs=st.sampled_from([64, 96, 192]),
    size=st.sampled_from([32, 64, 96, 128]),
)
def test_any_group_size_is_held_exactly(seed: int, inputs: int, size: int) -> None:
    scheme = prequantized_scheme(4, size, inputs, is_symmetric=False, has_contiguous_groups=True)
    assert scheme is not None
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // size)
    ints_OI = torch.randint(0, 16, (24, inputs), dtype=torch.uint8, generator=generator)
    # Values that bfloat16 represents exactly, so that nothing is rounded.
    scale_GO = torch.randint(1, 9, (groups, 24), generator=generator) / 64
    zero_GO = torch.randint(0, 17, (groups, 24), generator=generator)
    group_I = torch.arange(inputs) // size
    layer = build_prequantized_layer(ints_OI, scale_GO, zero_GO, [group_I], None, scheme)
    want_OI = (ints_OI - zero_GO[group_I].T) * scale_GO[group_I].T
    assert torch.equal(layer.dequantize(), want_OI)


def test_unsigned_8_bits_become_signed() -> None:
    ints_OI = torch.arange(256, dtype=torch.uint8).view(4, 64)
    scale_GO, zero_GO = torch.tensor([[1.0, 2.0, 0.5, 0.25]]), torch.full((1, 4), 128)
    bias_O = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = build_prequantized_layer(
        ints_OI, scale_GO, zero_GO, [torch.zeros(64).long()], bias_O, LayerScheme(8)
    )
    want_OI = (ints_OI.float() - 128) * scale_GO.T
    assert torch.equal(layer.dequantize(), want_OI)
    x_TI = torch.randn(3, 64)
    torch.testing.assert_close(layer(x_TI), x_TI @ want_OI.T + bias_O, rtol=1e-3, atol=0.05)


def test_row_major_integers_are_not_copied() -> None:
    weight_OI, bias_O = torch.randn(24, 64), torch.randn(24).bfloat16()
    int8 = quantize_per_channel(weight_OI)
    layer = build_row_major_layer(int8, bias_O)
    assert isinstance(layer, Int8Linear)
    assert layer.weight_OI.data_ptr() == int8.ints_OI.data_ptr()
    int4 = PackedInt4Weight.from_groupwise(quantize_groupwise(weight_OI, 32))
    layer = build_row_major_layer(int4, bias_O)
    assert isinstance(layer, Int4Linear)
    assert layer.packed.data_ptr() == int4.packed.data_ptr()
    assert layer.scale_OG.data_ptr() == int4.scale_OG.data_ptr()
    assert layer.group_size == 32
    assert torch.equal(layer.dequantize(), int4.dequantize())
    assert layer.bias_O is not None
    assert layer.bias_O.dtype == torch.float32
