"""Which stored integers a layer can hold, and that it then holds those."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.quantization.prequantized import stored_kind, stored_layer
from qwen2vl.quantization.scheme import Kind


@pytest.mark.parametrize(
    ("bits", "size", "inputs", "want"),
    [
        (4, 128, 3584, Kind(4, 128)),
        (4, 128, 29696, Kind(4, 128)),  # the padded 72B
        (4, 128, 192, Kind(4, 64)),  # the last group is half a one
        (4, 32, 64, Kind(4, 32)),
        (4, 96, 192, Kind(4, 32)),
        (4, 1024, 4096, Kind(4, 128)),
        (4, -1, 192, Kind(4, 64)),
        (4, 16, 192, None),
        (4, -1, 72, None),
        (8, -1, 72, Kind(8)),
        (8, 128, 128, Kind(8)),
        (8, 128, 256, None),
    ],
)
def test_what_can_be_held(bits: int, size: int, inputs: int, want: Kind | None) -> None:
    assert stored_kind(bits, size, inputs, is_symmetric=True, is_ordered=True) == want
    assert stored_kind(bits, size, inputs, is_symmetric=True, is_ordered=False) is None
    uneven = stored_kind(bits, size, inputs, is_symmetric=False, is_ordered=True)
    assert uneven == (None if bits == 8 else want)


@given(
    seed=st.integers(0, 10**6),
    inputs=st.sampled_from([64, 96, 192]),
    size=st.sampled_from([32, 64, 96, 128]),
)
def test_groups_of_any_size(seed: int, inputs: int, size: int) -> None:
    kind = stored_kind(4, size, inputs, is_symmetric=False, is_ordered=True)
    assert kind is not None
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // size)
    ints_OI = torch.randint(0, 16, (24, inputs), dtype=torch.uint8, generator=generator)
    # Numbers that bfloat16 holds, so that nothing is lost on the way.
    scale_GO = torch.randint(1, 9, (groups, 24), generator=generator) / 64
    zero_GO = torch.randint(0, 17, (groups, 24), generator=generator)
    group_I = torch.arange(inputs) // size
    layer = stored_layer(ints_OI, scale_GO, zero_GO, [group_I], None, kind)
    want_OI = (ints_OI - zero_GO[group_I].T) * scale_GO[group_I].T
    assert torch.equal(layer.dequantized(), want_OI)


def test_eight_bits_are_centerd() -> None:
    ints_OI = torch.arange(256, dtype=torch.uint8).view(4, 64)
    scale_GO, zero_GO = torch.tensor([[1.0, 2.0, 0.5, 0.25]]), torch.full((1, 4), 128)
    bias_O = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = stored_layer(ints_OI, scale_GO, zero_GO, [torch.zeros(64).long()], bias_O, Kind(8))
    want_OI = (ints_OI.float() - 128) * scale_GO.T
    assert torch.equal(layer.dequantized(), want_OI)
    x_TI = torch.randn(3, 64)
    torch.testing.assert_close(layer(x_TI), x_TI @ want_OI.T + bias_O, rtol=1e-3, atol=0.05)
