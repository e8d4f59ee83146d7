"""NF4 against the formulas of the QLoRA paper, and against bitsandbytes where it is installed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.quantization.nf4 import NF4_LEVELS, Nf4Weight

NF4 = torch.tensor(NF4_LEVELS)


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(*shape, generator=generator)


def nearest_level(values: Tensor, levels: Tensor) -> Tensor:
    return levels[(values[..., None] - levels).abs().argmin(-1)]


def reference_nf4(weight: Tensor) -> Tensor:
    """Quantize as the paper: blocks of 64, by their largest magnitude, to the nearest level."""
    blocks = weight.flatten().view(-1, 64)
    magnitude = blocks.abs().amax(1, keepdim=True)
    return (nearest_level(blocks / magnitude, NF4) * magnitude).view_as(weight)


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    # QLoRA, App. E: eight quantiles above zero, seven below, zero itself; divided by the last.
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(NF4, (levels / levels.max()).float(), atol=1e-6, rtol=0)


def test_every_weight_becomes_the_nearest_level_of_its_block() -> None:
    weight = random_matrix(48, 64)
    torch.testing.assert_close(Nf4Weight(weight, double=False).dequantize(), reference_nf4(weight))


def test_two_codes_share_a_byte_first_in_the_high_bits() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([1.0, -1.0, 0.0, 0.5626170039176941])
    weight_nf4 = Nf4Weight(weight, double=False)
    assert weight_nf4.codes[:2].tolist() == [15 << 4 | 0, 7 << 4 | 13]
    assert weight_nf4.codes.numel() == 32


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 90), double=st.booleans())
def test_quantization_error_is_bounded_for_any_shape(rows: int, columns: int, double: bool) -> None:
    weight = random_matrix(rows, columns, seed=rows * 100 + columns)
    dequantized = Nf4Weight(weight, double=double).dequantize()
    assert dequantized.shape == weight.shape
    # Half of the widest gap between levels, of the largest magnitude; 8 bits err by little more.
    assert (dequantized - weight).abs().max() <= (0.16 if not double else 0.2) * weight.abs().max()


def test_block_of_zeros_stays_zero() -> None:
    weight = random_matrix(4, 64)
    weight[1] = 0
    for double in (False, True):
        dequantized = Nf4Weight(weight, double=double).dequantize()
        assert not dequantized[1].any()
        assert dequantized.isfinite().all()


def test_double_quantization_saves_memory_and_changes_little() -> None:
    weight = random_matrix(512, 128)
    plain, double = (Nf4Weight(weight, double=d) for d in (False, True))
    assert (plain.is_double_quantized, double.is_double_quantized) == (False, True)

    def bits(weight_nf4: Nf4Weight) -> float:
        return sum(b.numel() * b.itemsize for b in weight_nf4.buffers()) * 8 / weight.numel()

    assert bits(plain) == 4.5
    assert bits(double) < 4.14
    assert torch.equal(plain.codes, double.codes)
    error = (double.dequantize() - plain.dequantize()).abs().max()
    assert 0 < error < 0.01 * weight.abs().max()


@pytest.mark.parametrize("double", [False, True])
def test_product_and_gradient_equal_those_of_the_dequantized_matrix(double: bool) -> None:
    weight = Nf4Weight(random_matrix(40, 64), double=double)
    x = random_matrix(7, 64, seed=1).requires_grad_()
    out = weight(x)
    assert torch.equal(out, F.linear(x, weight.dequantize()))
    (out * random_matrix(7, 40, seed=2)).sum().backward()
    torch.testing.assert_close(x.grad, random_matrix(7, 40, seed=2) @ weight.dequantize())


def test_backward_saves_no_dequantized_matrix() -> None:
    weight = Nf4Weight(random_matrix(40, 64), double=False)
    saved_shapes: list[tuple[int, ...]] = []

    def record_shape(tensor: Tensor) -> Tensor:
        saved_shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_shape, lambda tensor: tensor):
        weight(torch.randn(3, 64, requires_grad=True))
    assert (40, 64) not in saved_shapes


def test_computes_in_the_autocast_dtype() -> None:
    weight = Nf4Weight(random_matrix(40, 64), double=False)
    x = random_matrix(7, 64, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = weight(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("double", [False, True])
def test_buffers_equal_those_of_bitsandbytes(double: bool) -> None:
    bitsandbytes = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    weight = random_matrix(96, 128)
    codes, state = bitsandbytes.quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=double
    )
    quantized = Nf4Weight(weight, double=double)
    assert torch.equal(codes.flatten(), quantized.codes)
    if double:  # 8-bit codes may differ by one where a magnitude lies between two levels
        assert (state.absmax.int() - quantized.magnitude_G.int()).abs().max() <= 1
    else:
        assert torch.equal(state.absmax, quantized.magnitude_G)
    dequantized = bitsandbytes.dequantize_4bit(codes, state)
    atol = 1e-4 if double else 0
    torch.testing.assert_close(quantized.dequantize(), dequantized, atol=atol, rtol=0)


def test_works_inside_torch_compile() -> None:
    weight = Nf4Weight(random_matrix(40, 64), double=True)
    double = torch.compile(lambda x: 2 * weight(x), backend="aot_eager", dynamic=True)
    x = random_matrix(7, 64, seed=1).requires_grad_()
    out = double(x)
    assert torch.equal(out, 2 * weight(x))
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(7, 40) @ weight.dequantize())
