"""GPTQ packing against its definition in plain Python; pack is the inverse of unpack."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.weights.packing import gptq_format
from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix
from tests.packing import pack

GPTQ_4BIT = PackedFormat(
    packing="gptq", bits=4, group_size=32, is_symmetric=True, stores_zero_minus_one=True
)
GPTQ_8BIT = PackedFormat(
    packing="gptq", bits=8, group_size=32, is_symmetric=True, stores_zero_minus_one=True
)


def to_signed(packed: int) -> int:
    return packed - 2**32 if packed >= 2**31 else packed


def test_worked_example() -> None:
    ints = torch.tensor([3, 15, 8, 0, 7, 1, 12, 9], dtype=torch.uint8)
    packed = to_signed(0x9C1708F3)
    assert packed == -1676211981
    parts = {
        "qweight": torch.tensor([[packed]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 1, dtype=torch.float16),
    }
    assert torch.equal(gptq_format.unpack(parts, GPTQ_4BIT).ints_OI, ints[None])


@pytest.mark.parametrize(
    ("config", "zero", "packed"),
    [(GPTQ_4BIT, 8, 0x77777777), (GPTQ_8BIT, 128, 0x7F7F7F7F)],
)
def test_packed_value_of_symmetric_zero_points(
    config: PackedFormat, zero: int, packed: int
) -> None:
    matrix = QuantizedMatrix(
        ints_OI=torch.zeros(8, 32, dtype=torch.uint8),
        scale_GO=torch.ones(1, 8),
        zero_GO=torch.full((1, 8), zero, dtype=torch.int16),
        group_I=torch.zeros(32, dtype=torch.int64),
    )
    parts = pack(matrix, config)
    assert set(parts["qzeros"].flatten().tolist()) == {packed}
    assert torch.equal(gptq_format.unpack(parts, config).zero_GO, matrix.zero_GO)


def dequantize_one(parts: dict[str, Tensor], bits: int, o: int, i: int) -> float:
    """Dequantize one weight by the definition of the format: W = s * (q - (z + 1))."""
    per_int32, mask = 32 // bits, (1 << bits) - 1
    packed = int(parts["qweight"][i // per_int32, o])
    q = (packed >> bits * (i % per_int32)) & mask
    g = int(parts["g_idx"][i])
    z = (int(parts["qzeros"][g, o // per_int32]) >> bits * (o % per_int32)) & mask
    return float(parts["scales"][g, o]) * (q - (z + 1))


def random_parts(seed: int, bits: int, outputs: int, inputs: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random_int32(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    per_int32, groups = 32 // bits, inputs // size
    return {
        "qweight": random_int32(inputs // per_int32, outputs),
        "qzeros": random_int32(groups, outputs // per_int32),
        "scales": torch.rand(groups, outputs, generator=generator).half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // size,
    }


@pytest.mark.parametrize("config", [GPTQ_4BIT, GPTQ_8BIT])
def test_every_weight_equals_the_format_definition(config: PackedFormat) -> None:
    parts = random_parts(1, config.bits, 16, 64, 32)
    parts["g_idx"] = parts["g_idx"].flip(0)  # act-order is another g_idx
    got_OI = gptq_format.unpack(parts, config).dequantize()
    for o in range(16):
        for i in range(64):
            assert float(got_OI[o, i]) == dequantize_one(parts, config.bits, o, i)


@given(
    seed=st.integers(0, 10**6),
    config=st.sampled_from([GPTQ_4BIT, GPTQ_8BIT]),
    blocks=st.integers(1, 3),
    groups=st.integers(1, 3),
)
def test_pack_is_the_inverse_of_unpack(
    seed: int, config: PackedFormat, blocks: int, groups: int
) -> None:
    parts = random_parts(seed, config.bits, 8 * blocks, 32 * groups, 32)
    repacked = pack(gptq_format.unpack(parts, config), config)
    assert set(repacked) == set(parts)
    assert all(torch.equal(repacked[name], parts[name]) for name in parts)


def test_gptq_v2_stores_zero_points_unchanged() -> None:
    v2_config = PackedFormat(packing="gptq", bits=4, group_size=32)
    parts = random_parts(2, 4, 8, 32, 32)
    v1 = gptq_format.unpack(parts, GPTQ_4BIT)
    assert torch.equal(gptq_format.unpack(parts, v2_config).zero_GO, v1.zero_GO - 1)


def test_missing_g_idx_means_contiguous_groups() -> None:
    parts = random_parts(3, 4, 8, 96, 32)
    want = gptq_format.unpack(parts, GPTQ_4BIT)
    del parts["g_idx"]
    assert torch.equal(gptq_format.unpack(parts, GPTQ_4BIT).group_I, want.group_I)


def test_shapes_of_the_7b() -> None:
    official = PackedFormat(packing="gptq", bits=4, group_size=128)
    assert gptq_format.unpacked_shape((448, 18944), official) == (18944, 3584)
    assert gptq_format.part_shapes((18944, 3584), official) == {
        "qzeros": (28, 2368),
        "scales": (28, 18944),
        "g_idx": (3584,),
    }
    eight_bit = PackedFormat(packing="gptq", bits=8, group_size=128)
    assert gptq_format.unpacked_shape((896, 18944), eight_bit) == (18944, 3584)
    assert gptq_format.part_shapes((18944, 3584), eight_bit)["qzeros"] == (28, 4736)
