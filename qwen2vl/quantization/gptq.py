"""Rounding to 4 bits with an eye on what the layers are shown: GPTQ.

Rounding to the nearest treats all inputs alike. Here examples are run first, and for each layer
the squares of its inputs are added up, H = X^T X. Then a matrix is rounded column by column, and
each column's error is made up for by those not yet rounded, as H says how they go together. On nano
that takes away three quarters of the damage (docs/quantization.md).

The decoder is walked block by block, so only the examples' hidden states and one block's squares
are held: I * I numbers for each width of inputs. Letters: O outputs, I inputs, G groups.
(Frantar et al. 2022, GPTQ, Algorithm 1.) Next room: convert.py, which writes a folder of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.rtn import LEVELS, Groups, grid_of
from qwen2vl.quantization.scheme import Kind

__all__ = ["Show", "round_by_examples", "round_by_squares"]

Show = Callable[[Qwen2VL], object]  # runs the model on one example

COLUMNS = 128  # rounded before the rest of the matrix hears of their errors; a multiple of groups

# Added to the diagonal, as a share of its mean, so that H can be inverted; more where needed.
DAMPING = 0.01
MAX_DAMPINGS = 4  # each ten times the one before


class _ReachedError(Exception):
    """The decoder was reached; what its first block was given is here."""


@torch.inference_mode()
def round_by_examples(
    model: Qwen2VL, kinds: Mapping[str, Kind], examples: Iterable[Show]
) -> Iterator[tuple[str, Groups]]:
    """Round the decoder's layers of 4 bits, in their order; the model stays as it is.

    Costs one run of all examples, and then some seconds a layer: about I * I * (O + I)
    multiplications.
    """
    flows = [_inputs_of_decoder(model, show) for show in examples]
    assert flows, "no examples to calibrate on"
    for index, block in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        layers = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and kinds.get(prefix + name, Kind(8)).bits == 4
        }
        squares = _squares_of(block, layers, flows)
        for name, layer in layers.items():
            size = kinds[prefix + name].group_size
            yield prefix + name, round_by_squares(layer.weight, squares[name], size)


def round_by_squares(weight_OI: Tensor, squares_II: Tensor, group_size: int) -> Groups:
    """Round to 4 bits so that the outputs, not the weights, change least.

    Args:
        weight_OI: the matrix.
        squares_II: X^T X of the inputs that it was shown, float32.
        group_size: inputs that share a scale; divides I and COLUMNS.
    """
    assert COLUMNS % group_size == 0
    assert weight_OI.shape[1] % group_size == 0
    rest_OI = weight_OI.float().clone()
    factor_II = _inverse_factor(squares_II)
    ints_OI = torch.empty_like(rest_OI, dtype=torch.uint8)
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, rest_OI.shape[1], COLUMNS):
        end = min(start + COLUMNS, rest_OI.shape[1])
        own = factor_II[start:end, start:end]
        errors = torch.empty_like(rest_OI[:, start:end])
        for first in range(start, end, group_size):
            grids.append(grid_of(rest_OI[:, first : first + group_size]))
            for i in range(first, first + group_size):
                ints_OI[:, i : i + 1], errors[:, i - start] = _round_column(
                    rest_OI[:, i:end], own[i - start, i - start :], grids[-1]
                )
        rest_OI[:, end:] -= errors @ factor_II[start:end, end:]
    scales, zeros = zip(*grids, strict=True)
    return Groups(
        ints_OI=ints_OI,
        scale_GO=torch.cat(scales, 1).T.contiguous(),
        zero_GO=torch.cat(zeros, 1).T.to(torch.uint8).contiguous(),
    )


def _round_column(
    rest: Tensor, factor: Tensor, grid: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Round the first column of `rest`, and let the others, in place, make up for its error."""
    scale, zero = grid
    column = rest[:, :1]
    ints = (column / scale).round_().add_(zero).clamp_(0, LEVELS)
    error = (column - (ints - zero) * scale) / factor[0]
    rest[:, 1:] -= error * factor[1:]
    return ints.to(torch.uint8), error[:, 0]


def _inverse_factor(squares_II: Tensor) -> Tensor:
    """Compute the upper Cholesky factor of the inverse of H, damped."""
    diagonal = squares_II.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    for more in range(MAX_DAMPINGS):
        damped = squares_II.clone()
        # An input that is always zero: nothing is known of it, and nothing depends on it.
        damped.diagonal().copy_(torch.where(diagonal == 0, damping, diagonal + damping * 10**more))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise CheckpointError(
        "the examples make a layer's inputs so large or so alike that its weights cannot be "
        "rounded by them: look for NaN with `qwen2vl doctor`, or quantize without examples"
    )


def _inputs_of_decoder(model: Qwen2VL, show: Show) -> list[Any]:
    """Run one example up to the first block; return the arguments that it was called with."""
    arguments: list[Any] = []

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        arguments.extend(given)
        raise _ReachedError

    hook = model.model.layers[0].register_forward_pre_hook(stop)
    try:
        show(model)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return arguments


def _squares_of(
    block: nn.Module, layers: Mapping[str, nn.Linear], flows: list[list[Any]]
) -> dict[str, Tensor]:
    """Run a block on every flow, in place, and add up the squares of its layers' inputs.

    Layers that are given the same tensor share their squares.
    """
    squares: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []  # the newest input, and who was given it first
    owners: dict[str, str] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            (x_TI,) = given
            if last and last[0][0] is x_TI:
                owners[name] = last[0][1]
                return
            last[:] = [(x_TI, name)]
            wide_TI = x_TI.float()
            if name not in squares:
                squares[name] = wide_TI.new_zeros(wide_TI.shape[1], wide_TI.shape[1])
            squares[name].addmm_(wide_TI.T, wide_TI)

        return take

    hooks = [m.register_forward_pre_hook(listen(name)) for name, m in layers.items()]
    for flow in flows:
        flow[0] = block(*flow)
    for hook in hooks:
        hook.remove()
    return {name: squares[owners.get(name, name)] for name in layers}
