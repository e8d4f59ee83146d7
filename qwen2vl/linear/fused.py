"""Layers that read the same input become one, computed once: q, k, v; gate, up.

In decode a layer costs its weights' way through the processor, and on top its call and, where it is
quantized, some operations on a single row. Seven layers a block become four. The model
goes on calling each by its name: the first caller computes all outputs, every caller gets its
share, and with the last caller the rest is forgotten. Outputs do not depend on each other: those of
a quantized layer stay what they were, to the bit. Next room: packed.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

__all__ = ["Joined", "Quantized", "Share", "share_out", "siblings"]

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

K = TypeVar("K")


@runtime_checkable
class Quantized(Protocol):
    """A layer that returns its quantized weights, and what they stand for."""

    def integers(self) -> Tensor:
        """Return the quantized weights, (O, I)."""
        ...

    def dequantized(self) -> Tensor:
        """Return the dequantized weights, (O, I), float32."""
        ...


def siblings(kinds: Mapping[str, K]) -> list[tuple[tuple[str, ...], K]]:
    """Put together the names of layers that read the same input and are of the same kind."""
    groups: dict[tuple[str, K], list[str]] = {}
    for name, kind in kinds.items():
        parent, _, leaf = name.rpartition(".")
        family = next((names[0] for names in SIBLINGS if leaf in names), leaf)
        groups.setdefault((f"{parent}.{family}", kind), []).append(name)
    return [(tuple(names), kind) for (_, kind), names in groups.items()]


def share_out(
    model: nn.Module, names: Sequence[str], layer: nn.Module, sizes: Sequence[int]
) -> None:
    """Put shares of a layer in the places of several, which have so many outputs each."""
    joined = Joined(layer)
    for name, (start, stop) in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True):
        model.set_submodule(name, Share(joined, start, stop))


class Joined:
    """One layer in place of several, and what it last computed, until all have had their share."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.out_features = cast("int", layer.out_features)
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
        is_last = self.stop == self._joined.out_features
        return self._joined.outputs(x_TI, is_last=is_last)[:, self.start : self.stop]

    def integers(self) -> Tensor:
        """Give this layer's own weights as they were rounded."""
        assert isinstance(self.layer, Quantized)
        return self.layer.integers()[self.start : self.stop]

    def dequantized(self) -> Tensor:
        """Compute the matrix this layer stands for, in float32."""
        assert isinstance(self.layer, Quantized)
        return self.layer.dequantized()[self.start : self.stop]
