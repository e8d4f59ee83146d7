"""AWQ packing against its definition in plain Python; pack is the inverse of unpack."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.weights.packing import awq_format
from qwen2vl.weights.packing.packed_format import PackedFormat
from tests.packing import pack

PACKING = PackedFormat(packing="awq", bits=4, group_size=32)
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def random_parts(seed: int, outputs: int, inputs: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random_int32(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    return {
        "qweight": random_int32(inputs, outputs // 8),
        "qzeros": random_int32(inputs // size, outputs // 8),
        "scales": torch.rand(inputs // size, outputs, generator=generator).half(),
    }


def test_worked_example() -> None:
    packed = 0x910FC783 - 2**32
    parts = {
        "qweight": torch.tensor([[packed]], dtype=torch.int32),
        "qzeros": torch.tensor([[packed]], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    matrix = awq_format.unpack(parts, PACKING)
    assert matrix.ints_OI[:, 0].tolist() == [3, 15, 8, 0, 7, 1, 12, 9]
    # As stored, without an offset of 1.
    assert matrix.zero_GO[0].tolist() == [3, 15, 8, 0, 7, 1, 12, 9]


def unpack_one(packed: Tensor, row: int, column: int) -> int:
    position = ORDER.index(column % 8)
    return (int(packed[row, column // 8]) >> 4 * position) & 15


def test_every_weight_equals_the_format_definition() -> None:
    parts = random_parts(1, 16, 64, 32)
    got_OI = awq_format.unpack(parts, PACKING).dequantize()
    for o in range(16):
        for i in range(64):
            g = i // 32
            q, z = unpack_one(parts["qweight"], i, o), unpack_one(parts["qzeros"], g, o)
            assert float(got_OI[o, i]) == float(parts["scales"][g, o]) * (q - z)


@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 4), groups=st.integers(1, 3))
def test_pack_is_the_inverse_of_unpack(seed: int, blocks: int, groups: int) -> None:
    parts = random_parts(seed, 8 * blocks, 32 * groups, 32)
    repacked = pack(awq_format.unpack(parts, PACKING), PACKING)
    assert set(repacked) == set(parts)
    assert all(torch.equal(repacked[name], parts[name]) for name in parts)


def test_shapes_of_the_7b() -> None:
    official = PackedFormat(packing="awq", bits=4, group_size=128)
    assert awq_format.unpacked_shape((3584, 2368), official) == (18944, 3584)
    assert awq_format.part_shapes((18944, 3584), official) == {
        "qzeros": (28, 2368),
        "scales": (28, 18944),
    }
