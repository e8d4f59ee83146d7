"""Dequantizing an unpacked matrix, and formats in words."""

from __future__ import annotations

import pytest
import torch

from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix


def test_dequantized_matrix_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = QuantizedMatrix(
        ints_OI=torch.randint(0, 16, (3, 8), dtype=torch.uint8, generator=generator),
        scale_GO=torch.rand(2, 3, generator=generator).half(),
        zero_GO=torch.randint(0, 17, (2, 3), dtype=torch.int16, generator=generator),
        group_I=torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]),
    )
    got_OI = matrix.dequantize()
    for o in range(3):
        for i in range(8):
            g = int(matrix.group_I[i])
            scale, zero = float(matrix.scale_GO[g, o]), int(matrix.zero_GO[g, o])
            assert float(got_OI[o, i]) == scale * (int(matrix.ints_OI[o, i]) - zero)


@pytest.mark.parametrize(
    ("packed_format", "text", "groups"),
    [
        (PackedFormat(packing="awq", bits=4, group_size=128), "AWQ of 4 bits in groups of 128", 2),
        (
            PackedFormat(packing="gptq", bits=8, group_size=32, has_contiguous_groups=False),
            "GPTQ of 8 bits in groups of 32, out of order",
            5,
        ),
        (
            PackedFormat(packing="int-quantized", bits=8, group_size=-1),
            "int-quantized of 8 bits, a scale for each output",
            1,
        ),
    ],
)
def test_description_and_number_of_groups(
    packed_format: PackedFormat, text: str, groups: int
) -> None:
    assert packed_format.describe() == text
    assert packed_format.num_groups(160) == groups
    assert packed_format.is_row_major == (packed_format.packing == "int-quantized")
