"""GPTQ: 4-bit weight quantization with calibration data.

Round-to-nearest weighs all inputs equally. GPTQ first runs calibration examples and accumulates for
each layer the Hessian of the squared output error, H = X^T X of its inputs (up to a factor). Then
it quantizes the matrix column by column and compensates each column's error in the columns that are
not yet quantized, according to H. On nano that removes three quarters of the loss
(docs/quantization.md).

The decoder is processed block by block, so only the examples' hidden states and the Hessians of one
block are in memory: I * I numbers for each distinct input. Letters: O outputs, I inputs, G groups.
(Frantar et al. 2022, GPTQ, Algorithm 1; AutoGPTQ.) convert.py writes the result to a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.rtn import QMAX, GroupwiseWeight, choose_qparams
from qwen2vl.quantization.scheme import LayerScheme

__all__ = ["CalibrationForward", "gptq_quantize_decoder", "gptq_quantize_weight"]

CalibrationForward = Callable[[Qwen2VL], object]  # runs the model on one example

# Columns quantized before their errors are applied to the rest of the matrix; a multiple of groups.
BLOCK_SIZE = 128

# Added to the diagonal, as a share of its mean, so that H can be inverted (GPTQ's percdamp).
DAMPING = 0.01
MAX_DAMPING_TRIES = 4  # each with ten times the damping of the one before


class _InputsCapturedError(Exception):
    """Stops a forward at the first block of the decoder, whose arguments have been captured."""


@torch.inference_mode()
def gptq_quantize_decoder(
    model: Qwen2VL, schemes: Mapping[str, LayerScheme], examples: Iterable[CalibrationForward]
) -> Iterator[tuple[str, GroupwiseWeight]]:
    """Quantize the decoder's 4-bit layers with GPTQ, in model order; the model is not changed.

    Costs one forward of all examples, and then some seconds a layer: about I * I * (O + I)
    multiplications.

    Yields:
        The layer's name and its quantized weight.
    """
    block_inputs = [_capture_decoder_inputs(model, run) for run in examples]
    assert block_inputs, "no examples to calibrate on"
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        layers = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and schemes.get(prefix + name, LayerScheme(8)).bits == 4
        }
        hessians = _accumulate_hessians(block, layers, block_inputs)
        for name, layer in layers.items():
            size = schemes[prefix + name].group_size
            yield prefix + name, gptq_quantize_weight(layer.weight, hessians[name], size)


def gptq_quantize_weight(weight_OI: Tensor, hessian_II: Tensor, group_size: int) -> GroupwiseWeight:
    """Quantize a matrix to 4 bits so that its outputs, not its weights, change least.

    Args:
        weight_OI: the matrix.
        hessian_II: X^T X of its inputs on the calibration examples, float32.
        group_size: inputs that share a scale; divides I and BLOCK_SIZE.

    Raises:
        CheckpointError: the Hessian cannot be inverted.
    """
    assert BLOCK_SIZE % group_size == 0
    assert weight_OI.shape[1] % group_size == 0
    remaining_OI = weight_OI.float().clone()
    factor_II = _inverse_factor(hessian_II)
    ints_OI = torch.empty_like(remaining_OI, dtype=torch.uint8)
    qparams: list[tuple[Tensor, Tensor]] = []
    for start in range(0, remaining_OI.shape[1], BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, remaining_OI.shape[1])
        block_factor = factor_II[start:end, start:end]
        errors = torch.empty_like(remaining_OI[:, start:end])
        for first in range(start, end, group_size):
            qparams.append(choose_qparams(remaining_OI[:, first : first + group_size]))
            for i in range(first, first + group_size):
                ints_OI[:, i : i + 1], errors[:, i - start] = _quantize_column(
                    remaining_OI[:, i:end], block_factor[i - start, i - start :], qparams[-1]
                )
        remaining_OI[:, end:] -= errors @ factor_II[start:end, end:]
    scales, zeros = zip(*qparams, strict=True)
    return GroupwiseWeight(
        ints_OI=ints_OI,
        scale_GO=torch.cat(scales, 1).T.contiguous(),
        zero_GO=torch.cat(zeros, 1).T.to(torch.uint8).contiguous(),
    )


def _quantize_column(
    remaining: Tensor, factor: Tensor, qparams: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Quantize the first column of `remaining`; compensate its error in the others, in place."""
    scale, zero = qparams
    column = remaining[:, :1]
    ints = (column / scale).round_().add_(zero).clamp_(0, QMAX)
    error = (column - (ints - zero) * scale) / factor[0]
    remaining[:, 1:] -= error * factor[1:]
    return ints.to(torch.uint8), error[:, 0]


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """Compute the upper Cholesky factor of the inverse of H, damped."""
    diagonal = hessian_II.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    for power in range(MAX_DAMPING_TRIES):
        damped = hessian_II.clone()
        # A diagonal of 0 is an input that was always zero: its columns do not affect the outputs.
        damped.diagonal().copy_(torch.where(diagonal == 0, damping, diagonal + damping * 10**power))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise CheckpointError(
        "the examples make a layer's inputs so large or so alike that its Hessian cannot be "
        "inverted: look for NaN with `qwen2vl doctor`, or quantize without examples"
    )


def _capture_decoder_inputs(model: Qwen2VL, run: CalibrationForward) -> list[Any]:
    """Run one example up to the decoder's first block; return the block's arguments."""
    captured: list[Any] = []

    def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
        captured.extend(args)
        raise _InputsCapturedError

    hook = model.model.layers[0].register_forward_pre_hook(capture)
    try:
        run(model)
    except _InputsCapturedError:
        pass
    finally:
        hook.remove()
    return captured


def _accumulate_hessians(
    block: nn.Module, layers: Mapping[str, nn.Linear], block_inputs: list[list[Any]]
) -> dict[str, Tensor]:
    """Run a block on every example and sum X^T X of its layers' inputs.

    The first argument of each example is replaced by the block's output. Layers that read the same
    tensor share one Hessian.
    """
    hessians: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []  # the newest input, and the first layer that read it
    shared: dict[str, str] = {}  # layer -> the layer whose Hessian it shares

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def accumulate(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x_TI,) = args
            if last and last[0][0] is x_TI:
                shared[name] = last[0][1]
                return
            last[:] = [(x_TI, name)]
            float_TI = x_TI.float()
            if name not in hessians:
                hessians[name] = float_TI.new_zeros(float_TI.shape[1], float_TI.shape[1])
            hessians[name].addmm_(float_TI.T, float_TI)

        return accumulate

    hooks = [m.register_forward_pre_hook(make_hook(name)) for name, m in layers.items()]
    for inputs in block_inputs:
        inputs[0] = block(*inputs)
    for hook in hooks:
        hook.remove()
    return {name: hessians[shared.get(name, name)] for name in layers}
