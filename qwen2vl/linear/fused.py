"""Fused QKV and gate-up projections: linear layers with the same input, computed as one layer.

In decode a linear layer costs the reading of its weights, plus its call and, where it is quantized,
some operations on a single row. Fusing q, k, v and gate, up leaves four of seven layers a block.
The model still calls each layer by its name: the first call computes all outputs, every call
returns its slice, and the last call releases the cached output. Outputs of a linear layer are
independent, so those of a quantized layer are identical to the bit. (vLLM: QKVParallelLinear,
MergedColumnParallelLinear, packed_modules_mapping.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "DequantizableLinear",
    "FusedLinear",
    "FusedLinearSlice",
    "fusion_groups",
    "replace_with_fused",
]

FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

K = TypeVar("K")


@runtime_checkable
class DequantizableLinear(Protocol):
    """A quantized linear layer of O outputs and I inputs."""

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I)."""
        ...

    def dequantize(self) -> Tensor:
        """Compute the dequantized weights, (O, I), float32."""
        ...


def fusion_groups(schemes: Mapping[str, K]) -> list[tuple[tuple[str, ...], K]]:
    """Group the names of layers that read the same input and have equal schemes."""
    groups: dict[tuple[str, K], list[str]] = {}
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        family = next((names[0] for names in FUSED_LAYERS if leaf in names), leaf)
        groups.setdefault((f"{parent}.{family}", scheme), []).append(name)
    return [(tuple(names), scheme) for (_, scheme), names in groups.items()]


def replace_with_fused(
    model: nn.Module, names: Sequence[str], layer: nn.Module, sizes: Sequence[int]
) -> None:
    """Replace several layers of `sizes` outputs each by slices of one fused layer."""
    fused = FusedLinear(layer)
    for name, (start, stop) in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True):
        model.set_submodule(name, FusedLinearSlice(fused, start, stop))


class FusedLinear:
    """One layer in place of several; caches its output until the last slice is read."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.out_features = cast("int", layer.out_features)
        self._cached: tuple[Tensor, Tensor] | None = None  # input, output

    def outputs(self, x_TI: Tensor, *, is_last: bool) -> Tensor:
        """Compute all outputs, or return the cached ones if they are of this very tensor."""
        cached = self._cached
        if cached is None or cached[0] is not x_TI:
            cached = (x_TI, self.layer(x_TI))
        self._cached = None if is_last else cached
        return cached[1]


class FusedLinearSlice(nn.Module):
    """Outputs `start` to `stop` of a fused layer, under the name of the layer it replaces."""

    def __init__(self, fused: FusedLinear, start: int, stop: int) -> None:
        super().__init__()
        # A child of every slice; `modules()`, `parameters()` and `buffers()` list it once.
        self.layer = fused.layer
        self.start, self.stop = start, stop
        self._fused = fused

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into this layer's own outputs."""
        is_last = self.stop == self._fused.out_features
        return self._fused.outputs(x_TI, is_last=is_last)[:, self.start : self.stop]

    def quantized_weight(self) -> Tensor:
        """Return this layer's own quantized weights, (outputs, I)."""
        assert isinstance(self.layer, DequantizableLinear)
        return self.layer.quantized_weight()[self.start : self.stop]

    def dequantize(self) -> Tensor:
        """Compute this layer's own dequantized weights, (outputs, I), float32."""
        assert isinstance(self.layer, DequantizableLinear)
        return self.layer.dequantize()[self.start : self.stop]
