"""Round-to-nearest (RTN) weight quantization: int8 per channel, int4 per group of inputs.

`quantize_per_channel`: symmetric int8, -127 to 127, one scale for each output of a layer.
`quantize_groupwise`: asymmetric 4 bits, 0 to 15, a scale and a zero point for each group of inputs
of each output. Both cover the whole range of the weights (min-max): clipping the largest weights,
by search, gained nothing on nano (dev/log.md); GPTQ does gain (gptq.py). Scales are
rounded to float16, because that is what model folders store. Letters: O outputs and I inputs of a
linear layer, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "QMAX",
    "GroupwiseWeight",
    "PerChannelWeight",
    "choose_qparams",
    "quantize_groupwise",
    "quantize_per_channel",
]

QMAX = 15  # the largest 4-bit integer

# A group of equal weights has no range; scales below this are zero in float16.
MIN_SCALE = 2.0**-24

# Elements quantized at once: in float32 they stay in a core's own cache, five times faster than
# through fresh memory, and the head of the 7B in one chunk would take gigabytes.
CHUNK_NUMEL = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class PerChannelWeight:
    """Per-channel int8 weights: W[o, i] = ints_OI[o, i] * scale_O[o], from -127 to 127."""

    ints_OI: Tensor
    scale_O: Tensor

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix (O, I), in float32."""
        return self.ints_OI.float() * self.scale_O.float()[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupwiseWeight:
    """Group-wise 4-bit weights: W[o, i] = (ints_OI[o, i] - zero_GO[g, o]) * scale_GO[g, o].

    g = i // (I / G). Integers and zero points are uint8 from 0 to 15.
    """

    ints_OI: Tensor
    scale_GO: Tensor
    zero_GO: Tensor

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.ints_OI.shape[1] // self.scale_GO.shape[0]

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix (O, I), in float32."""
        scale_OI, zero_OI = (
            part.T.float().repeat_interleave(self.group_size, 1)
            for part in (self.scale_GO, self.zero_GO)
        )
        return (self.ints_OI.float() - zero_OI) * scale_OI


def quantize_per_channel(weight_OI: Tensor) -> PerChannelWeight:
    """Quantize to int8, symmetric, one scale for each output."""
    ints_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    scale_O = torch.empty(len(weight_OI), device=weight_OI.device)
    # In place: a list of chunks and their concatenation would be two matrices.
    step = _chunk_rows(weight_OI)
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        ints_OI[rows], scale_O[rows] = _quantize_rows(weight_OI[rows])
    return PerChannelWeight(ints_OI=ints_OI, scale_O=scale_O)


def quantize_groupwise(weight_OI: Tensor, group_size: int) -> GroupwiseWeight:
    """Quantize to 4 bits, a scale and a zero point for each `group_size` inputs, a divisor of I."""
    chunks = weight_OI.split(_chunk_rows(weight_OI))
    parts = [_quantize_groups(chunk, group_size) for chunk in chunks]
    ints, scales, zeros = zip(*parts, strict=True)
    return GroupwiseWeight(
        ints_OI=torch.cat(ints),
        scale_GO=torch.cat(scales).T.contiguous(),
        zero_GO=torch.cat(zeros).T.contiguous(),
    )


def choose_qparams(values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute scale and zero point (float32) of 16 levels over the last axis; 0 is exact."""
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    scale = _round_to_float16((high - low) / QMAX)
    return scale, (-low / scale).round().clamp(0, QMAX)


def _chunk_rows(weight_OI: Tensor) -> int:
    return max(1, CHUNK_NUMEL // weight_OI.shape[1])


def _quantize_rows(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    wide_OI = weight_OI.float()
    scale_O1 = _round_to_float16(wide_OI.abs().amax(1, keepdim=True) / 127)
    ints_OI = (wide_OI / scale_O1).round_().clamp_(-127, 127).to(torch.int8)
    return ints_OI, scale_O1[:, 0]


def _quantize_groups(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    values = weight_OI.float().unflatten(1, (-1, group_size))  # (O, G, inputs of one group)
    scale, zero = choose_qparams(values)
    ints = (values / scale).round_().add_(zero).clamp_(0, QMAX)
    return ints.flatten(1).to(torch.uint8), scale[..., 0], zero[..., 0].to(torch.uint8)


def _round_to_float16(scale: Tensor) -> Tensor:
    """Round scales as a saved folder does, so that saving and loading does not change a model."""
    return scale.to(torch.float16).float().clamp_(min=MIN_SCALE)
