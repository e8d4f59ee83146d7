"""Weights -> small integers: where the grids lie.

Two grids. `round_channels`: whole numbers from -127 to 127, one scale for each output of a layer.
`round_groups`: 0 to 15, a scale and a zero for each group of inputs of each output. Both take the
whole range of the weights: cutting off the largest, tried by search, gained nothing on nano
(docs/quantization.md); what does gain is calibrate.py. Scales have float16's precision, because
that is what folders store. Letters of this room: O outputs and I inputs of a linear layer, G
groups of inputs. Next room: int8.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEVELS", "Channels", "Groups", "grid_of", "round_channels", "round_groups"]

LEVELS = 15  # steps of a grid of 4 bits

# A group of equal weights has no range; steps below this are zero in float16.
SMALLEST_STEP = 2.0**-24

# Numbers rounded at once: in float32 they stay in a core's own cache, five times faster than
# through fresh memory, and the head of the 7B in one piece would take gigabytes.
PIECE = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """W[o, i] = ints_OI[o, i] * scale_O[o], int8 from -127 to 127."""

    ints_OI: Tensor
    scale_O: Tensor

    def dequantized(self) -> Tensor:
        """Compute the matrix these integers stand for, in float32."""
        return self.ints_OI.float() * self.scale_O.float()[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """W[o, i] = (ints_OI[o, i] - zero_GO[g, o]) * scale_GO[g, o], g = i // (I / G).

    Integers and zeros are uint8 from 0 to 15.
    """

    ints_OI: Tensor
    scale_GO: Tensor
    zero_GO: Tensor

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.ints_OI.shape[1] // self.scale_GO.shape[0]

    def dequantized(self) -> Tensor:
        """Compute the matrix these integers stand for, in float32."""
        scale_OI, zero_OI = (
            part.T.float().repeat_interleave(self.group_size, 1)
            for part in (self.scale_GO, self.zero_GO)
        )
        return (self.ints_OI.float() - zero_OI) * scale_OI


def round_channels(weight_OI: Tensor) -> Channels:
    """Round to 8 bits, one scale for each output."""
    ints, scales = zip(*map(_channels, _pieces(weight_OI)), strict=True)
    return Channels(ints_OI=torch.cat(ints), scale_O=torch.cat(scales))


def round_groups(weight_OI: Tensor, group_size: int) -> Groups:
    """Round to 4 bits, a scale and a zero for each `group_size` inputs, which must divide I."""
    pieces = [_groups(piece, group_size) for piece in _pieces(weight_OI)]
    ints, scales, zeros = zip(*pieces, strict=True)
    return Groups(
        ints_OI=torch.cat(ints),
        scale_GO=torch.cat(scales).T.contiguous(),
        zero_GO=torch.cat(zeros).T.contiguous(),
    )


def grid_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Lay a grid of 16 levels over the last axis, zero on it; return scale and zero, float32."""
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    scale = _storable((high - low) / LEVELS)
    return scale, (-low / scale).round().clamp(0, LEVELS)


def _pieces(weight_OI: Tensor) -> tuple[Tensor, ...]:
    return weight_OI.split(max(1, PIECE // weight_OI.shape[1]))


def _channels(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    wide_OI = weight_OI.float()
    scale_O1 = _storable(wide_OI.abs().amax(1, keepdim=True) / 127)
    ints_OI = (wide_OI / scale_O1).round_().clamp_(-127, 127).to(torch.int8)
    return ints_OI, scale_O1[:, 0]


def _groups(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    values = weight_OI.float().unflatten(1, (-1, group_size))  # (O, G, inputs of one group)
    scale, zero = grid_of(values)
    ints = (values / scale).round_().add_(zero).clamp_(0, LEVELS)
    return ints.flatten(1).to(torch.uint8), scale[..., 0], zero[..., 0].to(torch.uint8)


def _storable(scale: Tensor) -> Tensor:
    """Round scales as a folder would, so that a model is the same before and after one."""
    return scale.to(torch.float16).float().clamp_(min=SMALLEST_STEP)
