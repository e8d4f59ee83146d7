"""NF4 (4-bit NormalFloat) frozen weights for QLoRA: 16 levels at quantiles of the normal curve.

Weights are divided into blocks of 64, each divided by its largest magnitude (bitsandbytes: absmax)
and rounded to the nearest level; two codes share a byte, the first in the high bits. That takes 4.5
bits a weight; with double quantization, which quantizes the magnitudes to 8 bits too, 4.13. The
layout is that of bitsandbytes, implemented in torch alone, so that it runs on any device.

    weight -> blocks of 64 -> magnitude + codes         double: magnitudes - mean -> blocks of 256

For training only: the int4 of inference has kernels, NF4 here has none. (Dettmers et al. 2023,
QLoRA, sec. 3 and App. E; Dettmers et al. 2022 for the 8-bit levels.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NF4_LEVELS", "BaseQuantization", "Nf4Weight", "dequantize_nf4"]

BaseQuantization = Literal["none", "nf4", "nf4_double"]

BLOCK_SIZE = 64  # weights that share a magnitude
NESTED_BLOCK_SIZE = 256  # magnitudes that share one, in double quantization

# Quantiles of the normal distribution, eight above zero and seven below, scaled to end at -1 and 1.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class Nf4Weight(nn.Module):
    """A frozen NF4 matrix (outputs, inputs); its buffers are all that is stored."""

    def __init__(self, weight_OI: Tensor, *, double: bool) -> None:
        super().__init__()
        self.shape = weight_OI.shape
        self._linear = _uncompiled_linear()
        flat = weight_OI.detach().float().flatten()
        blocks = F.pad(flat, (0, -len(flat) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
        magnitude_G = blocks.abs().amax(1)
        # A block of zeros has magnitude 0; it is divided by 1.
        unit = blocks / magnitude_G.where(magnitude_G > 0, 1.0)[:, None]
        codes = _nearest(unit, _levels(flat.device)).flatten()
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])
        if double:
            mean = magnitude_G.mean()
            rest = magnitude_G - mean
            outer = F.pad(rest, (0, -len(rest) % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
            outer_magnitude = outer.abs().amax(1)
            unit = outer / outer_magnitude.where(outer_magnitude > 0, 1.0)[:, None]
            magnitude_G = _nearest(unit, _dynamic_levels(flat.device)).flatten()[: len(rest)]
            self.register_buffer("outer_magnitude", outer_magnitude)
            self.register_buffer("mean", mean)
        self.register_buffer("magnitude_G", magnitude_G)

    @property
    def is_double_quantized(self) -> bool:
        """Whether the blocks' magnitudes are quantized too (double quantization)."""
        return "mean" in self._buffers

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix, in float32."""
        return dequantize_nf4(self._buffers, self.shape)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, inputs) into (T, outputs); the dequantized matrix is temporary."""
        device_type = x_TI.device.type
        if torch.is_autocast_enabled(device_type):
            x_TI = x_TI.to(torch.get_autocast_dtype(device_type))
        return self._linear(x_TI, self)


class _DequantizedLinear(torch.autograd.Function):
    """x W^T that saves the codes for the backward and dequantizes again, to save memory."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight: Nf4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x_TI, weight.dequantize().to(x_TI.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_TO,) = gradients
        return gradient_TO @ ctx.weight.dequantize().to(gradient_TO.dtype), None


@cache
def _uncompiled_linear() -> Callable[[Tensor, Nf4Weight], Tensor]:
    """Return the product as a graph break of torch.compile: cached tables, a custom backward.

    Not at import: torch.compiler.disable imports torch._dynamo, which takes more than a second.
    """
    return cast(
        "Callable[[Tensor, Nf4Weight], Tensor]", torch.compiler.disable(_DequantizedLinear.apply)
    )


def dequantize_nf4(buffers: Mapping[str, Tensor | None], shape: torch.Size) -> Tensor:
    """Compute the float32 matrix of `shape` from the buffers of an Nf4Weight."""
    codes, magnitude_G = buffers["codes"], buffers["magnitude_G"]
    assert codes is not None and magnitude_G is not None
    if "mean" in buffers:
        outer, mean = buffers["outer_magnitude"], buffers["mean"]
        assert outer is not None and mean is not None
        levels = _dynamic_levels(codes.device)[magnitude_G.int()]
        magnitude_G = levels * outer.repeat_interleave(NESTED_BLOCK_SIZE)[: len(levels)] + mean
    blocks = _pairs(codes.device)[codes.int()].view(-1, BLOCK_SIZE) * magnitude_G[:, None]
    return blocks.flatten()[: shape.numel()].view(shape)


def _nearest(unit: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the nearest of ascending levels, as uint8."""
    return torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


@lru_cache(maxsize=8)
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each of the 256 byte values, (256, 2)."""
    levels = _levels(device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


@lru_cache(maxsize=8)
def _dynamic_levels(device: torch.device) -> Tensor:
    """Return the 256 levels of dynamic 8-bit quantization, ascending.

    Both signs of seven decades, each split twice as fine as the one below.
    """
    above: list[Tensor] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        above.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    half = torch.cat(above)
    return torch.cat([-half, half, torch.tensor([0.0, 1.0])]).sort().values.to(device)
