"""Grids cover the weights, integers stay in range, and rounding loses at most half a step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qwen2vl.quantization.rtn as room
from qwen2vl.quantization.rtn import round_channels, round_groups


def matrix(seed: int, num_outputs: int, num_inputs: int, size: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_outputs, num_inputs, generator=generator) * size


@given(seed=st.integers(0, 10**6), outputs=st.integers(1, 40), inputs=st.integers(1, 70))
def test_channels_lose_at_most_half_a_step(seed: int, outputs: int, inputs: int) -> None:
    weight_OI = matrix(seed, outputs, inputs)
    rounded = round_channels(weight_OI)
    assert rounded.ints_OI.dtype == torch.int8
    assert int(rounded.ints_OI.abs().max()) <= 127
    lost_OI = (rounded.dequantized() - weight_OI).abs()
    # The scale itself is rounded to float16, where small numbers lose digits: a row of one tiny
    # number moves by what its scale moved, 127 times.
    limit_OI = 0.5 * rounded.scale_O[:, None] + weight_OI.abs() * 2**-11 + 127 * 2**-25
    assert bool((lost_OI <= limit_OI * 1.0001).all())


@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 20),
    groups=st.integers(1, 4),
    size=st.sampled_from([8, 32, 64]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_groups_lose_at_most_one_step(
    seed: int, outputs: int, groups: int, size: int, shift: float
) -> None:
    weight_OI = matrix(seed, outputs, groups * size) + shift * 0.1
    rounded = round_groups(weight_OI, size)
    assert rounded.group_size == size
    assert rounded.scale_GO.shape == rounded.zero_GO.shape == (groups, outputs)
    assert int(rounded.ints_OI.max()) <= 15
    assert int(rounded.zero_GO.max()) <= 15
    step_OI = rounded.scale_GO.T.repeat_interleave(size, 1)
    # Half a step for the number, half for the zero, which is a whole number as well.
    limit_OI = step_OI + weight_OI.abs() * 2**-10
    assert bool(((rounded.dequantized() - weight_OI).abs() <= limit_OI).all())


def test_zero_stays_zero() -> None:
    weight_OI = matrix(0, 4, 64)
    weight_OI[:, ::3] = 0
    assert bool((round_groups(weight_OI, 32).dequantized()[:, ::3] == 0).all())
    assert bool((round_channels(weight_OI).dequantized()[:, ::3] == 0).all())


def test_rows_and_groups_of_zeros() -> None:
    nothing_OI = torch.zeros(3, 64)
    assert torch.equal(round_channels(nothing_OI).dequantized(), nothing_OI)
    assert torch.equal(round_groups(nothing_OI, 32).dequantized(), nothing_OI)


def test_scales_are_stored_as_float16_would() -> None:
    weight_OI = matrix(1, 5, 64)
    for scale in (round_channels(weight_OI).scale_O, round_groups(weight_OI, 32).scale_GO):
        assert torch.equal(scale, scale.half().float())


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = matrix(2, 10, 64)
    channels, groups = round_channels(weight_OI), round_groups(weight_OI, 32)
    monkeypatch.setattr(room, "PIECE", 3 * 64)
    assert torch.equal(round_channels(weight_OI).ints_OI, channels.ints_OI)
    again = round_groups(weight_OI, 32)
    assert torch.equal(again.ints_OI, groups.ints_OI)
    assert torch.equal(again.scale_GO, groups.scale_GO)
    assert torch.equal(again.zero_GO, groups.zero_GO)
