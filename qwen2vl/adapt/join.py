"""Layers that read the same input become one, computed once: q, k, v; gate, up.

In decode a layer costs its weights' way through the processor, and on top some operations on a
single row, whose time does not depend on the row. Seven layers a block become four. The model
goes on calling each by its name: the first caller computes all outputs, every caller gets its
share, and with the last caller the rest is forgotten. Outputs of a quantised layer do not depend
on each other, so nothing changes in the answers, to the bit. Back up: quantise.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qwen2vl.adapt.int4 import PAD_TO, Int4Linear
from qwen2vl.adapt.int8 import Int8Linear, WideInt8Linear
from qwen2vl.adapt.quantise import QuantisedLinear
from qwen2vl.adapt.rounding import Channels
from qwen2vl.model import Qwen2VL

__all__ = ["Share", "join_siblings"]

SIBLINGS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


class Joined:
    """One layer in place of several, and what it last computed, until all have had their share."""

    def __init__(self, layer: QuantisedLinear) -> None:
        self.layer = layer
        self._newest: tuple[Tensor, Tensor] | None = None  # input, output

    def outputs(self, x_TI: Tensor, *, is_last: bool) -> Tensor:
        """Compute all outputs, or recall them for the very tensor they were computed of."""
        newest = self._newest
        if newest is None or newest[0] is not x_TI:
            newest = (x_TI, self.layer(x_TI))
        self._newest = None if is_last else newest
        return newest[1]


class Share(nn.Module):
    """Outputs `start` to `stop` of a joined layer, under the name of the layer that had them."""

    def __init__(self, joined: Joined, start: int, stop: int) -> None:
        super().__init__()
        # Each share has the layer as a child: a walk over the modules meets it once.
        self.layer = joined.layer
        self.start, self.stop = start, stop
        self._joined = joined

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into this layer's own outputs."""
        is_last = self.stop == self.layer.out_features
        return self._joined.outputs(x_TI, is_last=is_last)[:, self.start : self.stop]

    def integers(self) -> Tensor:
        """Give this layer's own weights as they were rounded."""
        return self.layer.integers()[self.start : self.stop]

    def dequantised(self) -> Tensor:
        """Compute the matrix this layer stands for, in float32."""
        return self.layer.dequantised()[self.start : self.stop]


def join_siblings(model: Qwen2VL) -> None:
    """Join the quantised layers of each block that read the same input, where they are alike."""
    for block in model.model.layers:
        for room, names in SIBLINGS:
            owner = block.get_submodule(room)
            layers = [owner.get_submodule(name) for name in names]
            joined = _join(layers)
            if joined is None:
                continue
            start = 0
            for name, layer in zip(names, layers, strict=True):
                assert isinstance(layer, QuantisedLinear)
                stop = start + layer.out_features
                setattr(owner, name, Share(joined, start, stop))
                start = stop


def _join(layers: Sequence[nn.Module]) -> Joined | None:
    """Build one layer with the outputs of all, or none where they are not of one kind."""
    if all(isinstance(layer, Int4Linear) for layer in layers):
        fours = cast("Sequence[Int4Linear]", layers)
        is_padded = any(layer.out_features % PAD_TO for layer in fours)
        if is_padded or len({layer.group_size for layer in fours}) > 1:
            return None
        return Joined(Int4Linear.joined(fours, _biases(fours)))
    if all(isinstance(layer, Int8Linear | WideInt8Linear) for layer in layers):
        eights = cast("Sequence[Int8Linear | WideInt8Linear]", layers)
        rounded = Channels(
            ints_OI=torch.cat([layer.integers() for layer in eights]),
            scale_O=torch.cat([layer.scale_O for layer in eights]),
        )
        return Joined(type(eights[0])(rounded, _biases(eights)))
    return None


def _biases(layers: Sequence[QuantisedLinear]) -> Tensor | None:
    """Put the biases side by side; layers that read the same input all have one, or none."""
    biases = [layer.bias_O for layer in layers if layer.bias_O is not None]
    assert len(biases) in (0, len(layers))
    return torch.cat(biases) if biases else None
