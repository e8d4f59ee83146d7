"""Round-to-nearest: integers stay in range, the error is bounded, and chunks change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.quantization import rtn
from qwen2vl.quantization.rtn import quantize_groupwise, quantize_per_channel


def random_weight(seed: int, num_outputs: int, num_inputs: int, size: float = 0.05) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_outputs, num_inputs, generator=generator) * size


@given(seed=st.integers(0, 10**6), outputs=st.integers(1, 40), inputs=st.integers(1, 70))
def test_per_channel_error_is_at_most_half_a_step(seed: int, outputs: int, inputs: int) -> None:
    weight_OI = random_weight(seed, outputs, inputs)
    quantized = quantize_per_channel(weight_OI)
    assert quantized.ints_OI.dtype == torch.int8
    assert int(quantized.ints_OI.abs().max()) <= 127
    error_OI = (quantized.dequantize() - weight_OI).abs()
    # The scale itself is rounded to float16, where small values lose digits: a row of one tiny
    # weight changes by 127 times the change of its scale.
    limit_OI = 0.5 * quantized.scale_O[:, None] + weight_OI.abs() * 2**-11 + 127 * 2**-25
    assert bool((error_OI <= limit_OI * 1.0001).all())


@given(
    seed=st.integers(0, 10**6),
    outputs=st.integers(1, 20),
    num_groups=st.integers(1, 4),
    size=st.sampled_from([8, 32, 64]),
    shift=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_groupwise_error_is_at_most_one_step(
    seed: int, outputs: int, num_groups: int, size: int, shift: float
) -> None:
    weight_OI = random_weight(seed, outputs, num_groups * size) + shift * 0.1
    quantized = quantize_groupwise(weight_OI, size)
    assert quantized.group_size == size
    assert quantized.scale_GO.shape == quantized.zero_GO.shape == (num_groups, outputs)
    assert int(quantized.ints_OI.max()) <= 15
    assert int(quantized.zero_GO.max()) <= 15
    step_OI = quantized.scale_GO.T.repeat_interleave(size, 1)
    # Half a step for the weight, half for the zero point, which is an integer as well.
    limit_OI = step_OI + weight_OI.abs() * 2**-10
    assert bool(((quantized.dequantize() - weight_OI).abs() <= limit_OI).all())


def test_zero_is_exact() -> None:
    weight_OI = random_weight(0, 4, 64)
    weight_OI[:, ::3] = 0
    assert bool((quantize_groupwise(weight_OI, 32).dequantize()[:, ::3] == 0).all())
    assert bool((quantize_per_channel(weight_OI).dequantize()[:, ::3] == 0).all())


def test_rows_and_groups_of_zeros() -> None:
    zeros_OI = torch.zeros(3, 64)
    assert torch.equal(quantize_per_channel(zeros_OI).dequantize(), zeros_OI)
    assert torch.equal(quantize_groupwise(zeros_OI, 32).dequantize(), zeros_OI)


def test_scales_are_rounded_to_float16() -> None:
    weight_OI = random_weight(1, 5, 64)
    for scale in (
        quantize_per_channel(weight_OI).scale_O,
        quantize_groupwise(weight_OI, 32).scale_GO,
    ):
        assert torch.equal(scale, scale.half().float())


def test_any_chunk_size_gives_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI = random_weight(2, 10, 64)
    per_channel, groupwise = quantize_per_channel(weight_OI), quantize_groupwise(weight_OI, 32)
    monkeypatch.setattr(rtn, "CHUNK_NUMEL", 3 * 64)
    assert torch.equal(quantize_per_channel(weight_OI).ints_OI, per_channel.ints_OI)
    chunked = quantize_groupwise(weight_OI, 32)
    assert torch.equal(chunked.ints_OI, groupwise.ints_OI)
    assert torch.equal(chunked.scale_GO, groupwise.scale_GO)
    assert torch.equal(chunked.zero_GO, groupwise.zero_GO)
