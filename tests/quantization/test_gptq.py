"""GPTQ equals a float64 reference, and loses less of the outputs than round-to-nearest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization import gptq
from qwen2vl.quantization.gptq import gptq_quantize_decoder, gptq_quantize_weight
from qwen2vl.quantization.rtn import QMAX, GroupwiseWeight, choose_qparams, quantize_groupwise
from qwen2vl.quantization.scheme import layer_schemes
from tests.tiny import tiny_model


def correlated_inputs(seed: int, rows: int, width: int) -> Tensor:
    """Draw rows with correlated columns, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(rows, width // 4, generator=generator)
    mixed = factors @ torch.randn(width // 4, width, generator=generator)
    return mixed + 0.3 * torch.randn(rows, width, generator=generator)


def random_weights(seed: int, outputs: int, width: int) -> Tensor:
    return torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def reference_gptq(
    weight_OI: Tensor, hessian_II: Tensor, group_size: int
) -> tuple[GroupwiseWeight, Tensor]:
    """Compute GPTQ one column at a time with the explicit inverse, in float64.

    Returns the weight, and the levels (O, I) before they were rounded.
    """
    remaining, width = weight_OI.double().clone(), weight_OI.shape[1]
    damping = 0.01 * float(hessian_II.diagonal().mean())
    inverse = torch.linalg.inv(hessian_II.double() + damping * torch.eye(width))
    ints, levels_OI = torch.empty_like(weight_OI), remaining.clone()
    scales, zeros = [], []
    for i in range(width):
        if i % group_size == 0:
            scale, zero = choose_qparams(remaining[:, i : i + group_size].float())
            scales.append(scale)
            zeros.append(zero)
        levels_OI[:, i] = (remaining[:, i : i + 1] / scale)[:, 0]
        ints[:, i] = ((remaining[:, i : i + 1] / scale).round() + zero).clamp(0, QMAX)[:, 0]
        error = remaining[:, i] - ((ints[:, i : i + 1] - zero) * scale)[:, 0]
        remaining[:, i + 1 :] -= torch.outer(error / inverse[i, i], inverse[i, i + 1 :])
        # A quantized column cannot compensate any more: eliminate it from the inverse.
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    weight = GroupwiseWeight(
        ints_OI=ints.to(torch.uint8),
        scale_GO=torch.cat(scales, 1).T,
        zero_GO=torch.cat(zeros, 1).T.to(torch.uint8),
    )
    return weight, levels_OI


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("block_size", [64, 128])
def test_equals_reference_gptq(
    monkeypatch: pytest.MonkeyPatch, group_size: int, block_size: int
) -> None:
    monkeypatch.setattr(gptq, "BLOCK_SIZE", block_size)
    weight_OI, x_TI = random_weights(0, 8, 192), correlated_inputs(1, 400, 192)
    got = gptq_quantize_weight(weight_OI, x_TI.T @ x_TI, group_size)
    want, levels_OI = reference_gptq(weight_OI, x_TI.T @ x_TI, group_size)
    assert got.group_size == group_size
    # A level halfway between two integers is rounded by the last bit of float32, which differs
    # between processors, and all later columns of its row compensate for it. So a row may differ
    # only from such a level on.
    differs_OI = got.ints_OI != want.ints_OI
    for row in differs_OI.any(dim=1).nonzero().flatten().tolist():
        first = int(differs_OI[row].nonzero()[0])
        assert abs(float(levels_OI[row, first] % 1) - 0.5) < 1e-3
    assert int(differs_OI.any(dim=1).sum()) <= 1
    torch.testing.assert_close(got.scale_GO, want.scale_GO, rtol=0.02, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_output_error_is_below_that_of_rtn(seed: int) -> None:
    weight_OI, x_TI = random_weights(seed, 32, 128), correlated_inputs(seed + 10, 1000, 128)
    wanted_TO = x_TI @ weight_OI.T

    def output_error(quantized: GroupwiseWeight) -> float:
        return float((x_TI @ quantized.dequantize().T - wanted_TO).square().mean())

    rtn_error = output_error(quantize_groupwise(weight_OI, 32))
    assert output_error(gptq_quantize_weight(weight_OI, x_TI.T @ x_TI, 32)) < 0.5 * rtn_error


def test_zero_hessian_gives_rtn() -> None:
    weight_OI = random_weights(0, 8, 64)
    got = gptq_quantize_weight(weight_OI, torch.zeros(64, 64), 32)
    want = quantize_groupwise(weight_OI, 32)
    assert torch.equal(got.ints_OI, want.ints_OI)
    assert torch.equal(got.zero_GO, want.zero_GO)


def test_fewer_examples_than_inputs_are_enough() -> None:
    weight_OI, x_TI = random_weights(0, 8, 128), correlated_inputs(1, 5, 128)
    quantized = gptq_quantize_weight(weight_OI, x_TI.T @ x_TI, 64)
    wanted_TO = x_TI @ weight_OI.T
    got_TO = x_TI @ quantized.dequantize().T
    rtn_TO = x_TI @ quantize_groupwise(weight_OI, 64).dequantize().T
    assert float((got_TO - wanted_TO).norm()) < 0.5 * float((rtn_TO - wanted_TO).norm())


def test_nan_hessian_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"Hessian cannot be inverted, in 4 tries .*; look for NaN"
    ):
        gptq_quantize_weight(random_weights(0, 8, 64), torch.full((64, 64), float("nan")), 32)


def example(seed: int, tokens: int = 20) -> Callable[[Qwen2VL], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(0, 200, (tokens,), generator=generator)
    patches_NP = torch.randint(0, 256, (16, 1176), dtype=torch.uint8, generator=generator)

    def run(model: Qwen2VL) -> Tensor:
        return model(
            ids_T,
            torch.arange(tokens).expand(3, -1),
            AttnMeta.build([tokens]),
            patches_NP=patches_NP,
            vision_meta=VisionMeta.build([Grid(1, 4, 4)]),
            placeholder_index_M=torch.arange(4),
        )

    return run


def test_hessians_equal_those_of_a_plain_forward() -> None:
    """Block by block, and by hooks on a forward of the whole model."""
    model = tiny_model()
    schemes = {n: k for n, k in layer_schemes(model, "int4").items() if k.bits == 4}
    forwards = [example(seed) for seed in range(4)]
    want: dict[str, Tensor] = {}

    def add_hook(name: str) -> None:
        def accumulate(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            want[name] = want.get(name, torch.zeros(())) + args[0].T @ args[0]

        model.get_submodule(name).register_forward_pre_hook(accumulate)

    before = {name: p.clone() for name, p in model.named_parameters()}
    quantized = dict(gptq_quantize_decoder(model, schemes, forwards))
    for name in schemes:
        add_hook(name)
    with torch.inference_mode():
        for run in forwards:
            run(model)
    assert list(quantized) == list(schemes)
    for name, weight in quantized.items():
        weight_OI = model.get_parameter(f"{name}.weight").detach()
        reference = gptq_quantize_weight(weight_OI, want[name], schemes[name].group_size)
        assert float((weight.ints_OI != reference.ints_OI).float().mean()) < 0.005
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.model.layers)
