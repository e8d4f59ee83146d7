"""GPTQ: 4-bit weight quantization with calibration data.

Round-to-nearest weighs all inputs equally. GPTQ first runs calibration examples and accumulates for
each layer the Hessian of the squared output error, H = X^T X of its inputs (up to a factor). Then
it quantizes the matrix column by column and compensates each column's error in the columns that are
not yet quantized, according to H. On nano that removes three quarters of the loss
(docs/quantization.md).

The decoder is processed block by block, so only the examples' hidden states, the weights of one
block and its Hessians are in memory: I * I numbers for each distinct input, and twice as many again
for the factor of the largest. Letters: O outputs, I inputs, G groups. (Frantar et al. 2022, GPTQ,
Algorithm 1; AutoGPTQ.) convert.py writes the result to a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.rtn import QMAX, GroupwiseWeight, choose_qparams
from qwen2vl.quantization.scheme import LayerScheme

__all__ = ["CalibrationForward", "gptq_bytes", "gptq_quantize_decoder", "gptq_quantize_weight"]

CalibrationForward = Callable[[Qwen2VL], object]  # runs the model on one example

# Holds the parameters of these prefixes while it is entered.
LoadParameters = Callable[[Sequence[str]], AbstractContextManager[None]]

# What calibration needs before the decoder: the inputs of its first block.
_BEFORE_DECODER = ("visual.", "model.embed_tokens.")

# Columns quantized before their errors are applied to the rest of the matrix; a multiple of groups.
BLOCK_SIZE = 128

# Added to the diagonal, as a share of its mean, so that H can be inverted (GPTQ's percdamp).
DAMPING = 0.01
MAX_DAMPING_TRIES = 4  # each with ten times the damping of the one before


class _InputsCapturedError(Exception):
    """Stops a forward at the first block of the decoder, whose arguments have been captured."""


def gptq_bytes(num_inputs: int) -> int:
    """Return the bytes of a layer's Hessian and of the two copies that its factor takes."""
    return 3 * 4 * num_inputs**2


@torch.inference_mode()
def gptq_quantize_decoder(
    model: Qwen2VL,
    schemes: Mapping[str, LayerScheme],
    examples: Iterable[CalibrationForward],
    load_parameters: LoadParameters = lambda prefixes: nullcontext(),
) -> Iterator[tuple[str, GroupwiseWeight]]:
    """Quantize the decoder's 4-bit layers with GPTQ, in model order; the model is not changed.

    Costs one forward of all examples, and then some seconds a layer: about I * I * (O + I)
    multiplications.

    Args:
        model: with its parameters, or on meta if `load_parameters` loads them.
        schemes: of the layers; those of 4 bits are quantized.
        examples: the forwards to calibrate on, each called once.
        load_parameters: a context in which the parameters of these prefixes are loaded: vision
            tower and embedding, then one block after another.

    Yields:
        The layer's name and its quantized weight.
    """
    with load_parameters(_BEFORE_DECODER):
        block_inputs = [_capture_decoder_inputs(model, run) for run in examples]
    assert block_inputs, "no examples to calibrate on"
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        sizes = {
            name: schemes[prefix + name].group_size
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
            and schemes.get(prefix + name, LayerScheme(8)).bits == 4
        }
        with load_parameters([prefix]):
            yield from _quantize_block(prefix, block, sizes, block_inputs)


def _quantize_block(
    prefix: str,
    block: nn.Module,
    group_sizes: Mapping[str, int],
    block_inputs: list[list[Any]],
) -> Iterator[tuple[str, GroupwiseWeight]]:
    """Quantize the layers of one block; `block_inputs` become the inputs of the next one."""
    layers = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name in group_sizes
    }
    hessians = _accumulate_hessians(block, layers, block_inputs)
    while hessians:
        names, hessian_II = hessians.pop(0)
        factor_II = _inverse_factor(hessian_II, where=f"{prefix}{names[0]}")
        del hessian_II  # of the widest layer as large as all other memory
        for name in names:
            yield (
                prefix + name,
                _quantize_with_factor(layers[name].weight, factor_II, group_sizes[name]),
            )


@torch.inference_mode()
def gptq_quantize_weight(weight_OI: Tensor, hessian_II: Tensor, group_size: int) -> GroupwiseWeight:
    """Quantize a matrix to 4 bits so that its outputs, not its weights, change least.

    Args:
        weight_OI: the matrix.
        hessian_II: X^T X of its inputs on the calibration examples, float32.
        group_size: inputs that share a scale; divides I and BLOCK_SIZE.

    Raises:
        CheckpointError: the Hessian cannot be inverted.
    """
    return _quantize_with_factor(weight_OI, _inverse_factor(hessian_II, "a layer"), group_size)


def _quantize_with_factor(weight_OI: Tensor, factor_II: Tensor, group_size: int) -> GroupwiseWeight:
    """Quantize a matrix column by column, given the factor of its inputs' Hessian."""
    assert BLOCK_SIZE % group_size == 0
    assert weight_OI.shape[1] % group_size == 0
    remaining_OI = weight_OI.to(torch.float32, copy=True)
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


def _inverse_factor(hessian_II: Tensor, where: str) -> Tensor:
    """Compute the upper Cholesky factor of the inverse of H, damped.

    H is damped in place, and is as before afterwards: a copy would be one of four such matrices.
    """
    damping = DAMPING * float(hessian_II.diagonal().mean()) or 1.0
    diagonal = hessian_II.diagonal().clone()
    try:
        for power in range(MAX_DAMPING_TRIES):
            # A diagonal of 0 is an input that was always zero: its columns do not affect the
            # outputs.
            damped = torch.where(diagonal == 0, damping, diagonal + damping * 10**power)
            hessian_II.diagonal().copy_(damped)
            if (upper := _invert(hessian_II)) is not None:
                return upper
    finally:
        hessian_II.diagonal().copy_(diagonal)
    raise CheckpointError(
        f"{where}: its inputs on the examples are so large or so alike that their Hessian cannot "
        f"be inverted, in {MAX_DAMPING_TRIES} tries with more damping; look for NaN in the weights "
        "with `qwen2vl doctor`, or quantize without examples"
    )


def _invert(damped_II: Tensor) -> Tensor | None:
    """Compute the upper Cholesky factor of the inverse; None if it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(damped_II)
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed else upper


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
) -> list[tuple[list[str], Tensor]]:
    """Run a block on every example and sum X^T X of its layers' inputs.

    The first argument of each example is replaced by the block's output.

    Returns:
        The Hessians, in model order, each with the layers that read the same tensor.
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
    readers: dict[str, list[str]] = {}
    for name in layers:
        readers.setdefault(shared.get(name, name), []).append(name)
    return [(names, hessians[first]) for first, names in readers.items()]
