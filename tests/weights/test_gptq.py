"""GPTQ's words by the written rule, in plain Python; packing is the reverse of unpacking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.weights import gptq
from qwen2vl.weights.quantization_config import PackedMatrix, Packing

FOUR = Packing(method="gptq", bits=4, group_size=32, is_symmetric=True, stores_zero_less_one=True)
EIGHT = Packing(method="gptq", bits=8, group_size=32, is_symmetric=True, stores_zero_less_one=True)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_the_worked_word() -> None:
    rows = torch.tensor([3, 15, 8, 0, 7, 1, 12, 9], dtype=torch.uint8)
    word = signed(0x9C1708F3)
    assert word == -1676211981
    parts = {
        "qweight": torch.tensor([[word]], dtype=torch.int32),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 1, dtype=torch.float16),
    }
    assert torch.equal(gptq.unpack(parts, FOUR).ints_OI, rows[None])


@pytest.mark.parametrize(
    ("packing", "zero", "word"), [(FOUR, 8, 0x77777777), (EIGHT, 128, 0x7F7F7F7F)]
)
def test_symmetric_zeros_are_these_words(packing: Packing, zero: int, word: int) -> None:
    matrix = PackedMatrix(
        ints_OI=torch.zeros(8, 32, dtype=torch.uint8),
        scale_GO=torch.ones(1, 8),
        zero_GO=torch.full((1, 8), zero, dtype=torch.int16),
        group_I=torch.zeros(32, dtype=torch.int64),
    )
    parts = gptq.pack(matrix, packing)
    assert set(parts["qzeros"].flatten().tolist()) == {word}
    assert torch.equal(gptq.unpack(parts, packing).zero_GO, matrix.zero_GO)


def by_the_rule(parts: dict[str, Tensor], bits: int, o: int, i: int) -> float:
    """Dequantize one weight as the format is written down: W = s * (q - (z + 1))."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    word = int(parts["qweight"][i // per_word, o])
    q = (word >> bits * (i % per_word)) & mask
    g = int(parts["g_idx"][i])
    z = (int(parts["qzeros"][g, o // per_word]) >> bits * (o % per_word)) & mask
    return float(parts["scales"][g, o]) * (q - (z + 1))


def random_parts(seed: int, bits: int, outputs: int, inputs: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)

    per_word, groups = 32 // bits, inputs // size
    return {
        "qweight": words(inputs // per_word, outputs),
        "qzeros": words(groups, outputs // per_word),
        "scales": torch.rand(groups, outputs, generator=generator).half(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // size,
    }


@pytest.mark.parametrize("packing", [FOUR, EIGHT])
def test_every_weight_by_the_rule(packing: Packing) -> None:
    parts = random_parts(1, packing.bits, 16, 64, 32)
    parts["g_idx"] = parts["g_idx"].flip(0)  # act-order is no more than another g_idx
    got_OI = gptq.unpack(parts, packing).dequantized()
    for o in range(16):
        for i in range(64):
            assert float(got_OI[o, i]) == by_the_rule(parts, packing.bits, o, i)


@given(
    seed=st.integers(0, 10**6),
    packing=st.sampled_from([FOUR, EIGHT]),
    blocks=st.integers(1, 3),
    groups=st.integers(1, 3),
)
def test_packing_gives_back_every_bit(
    seed: int, packing: Packing, blocks: int, groups: int
) -> None:
    parts = random_parts(seed, packing.bits, 8 * blocks, 32 * groups, 32)
    again = gptq.pack(gptq.unpack(parts, packing), packing)
    assert set(again) == set(parts)
    assert all(torch.equal(again[name], parts[name]) for name in parts)


def test_the_second_format_stores_zeros_as_they_are() -> None:
    second = Packing(method="gptq", bits=4, group_size=32)
    parts = random_parts(2, 4, 8, 32, 32)
    first = gptq.unpack(parts, FOUR)
    assert torch.equal(gptq.unpack(parts, second).zero_GO, first.zero_GO - 1)


def test_a_folder_without_g_idx_is_in_order() -> None:
    parts = random_parts(3, 4, 8, 96, 32)
    want = gptq.unpack(parts, FOUR)
    del parts["g_idx"]
    assert torch.equal(gptq.unpack(parts, FOUR).group_I, want.group_I)


def test_shapes_of_the_7b() -> None:
    official = Packing(method="gptq", bits=4, group_size=128)
    assert gptq.shape_of((448, 18944), official) == (18944, 3584)
    assert gptq.wanted_shapes((18944, 3584), official) == {
        "qzeros": (28, 2368),
        "scales": (28, 18944),
        "g_idx": (3584,),
    }
    eight = Packing(method="gptq", bits=8, group_size=128)
    assert gptq.shape_of((896, 18944), eight) == (18944, 3584)
    assert gptq.wanted_shapes((18944, 3584), eight)["qzeros"] == (28, 4736)
