"""Large bfloat16 layers in oneDNN's own order: on a CPU, weights are put in order once, not always.

A matrix kernel wants weights in tiles. Handed a plain matrix it makes them in every forward; handed
one that lies in tiles already it only multiplies: a sixth faster for pictures and prompts. Single
tokens gain nothing, and where a layer has more inputs than outputs they lose, so in the decoder
such layers stay plain, as do small ones. The price: a copy, in memory that is not shared with
other processes. Results may differ in the last bit. A model so changed answers; it is not meant to
be saved. Next room: rows.py, for what stays plain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qwen2vl.linear.custom_ops import opaque
from qwen2vl.linear.fused import share_out, siblings
from qwen2vl.model import Qwen2VL

__all__ = ["PackedLinear", "can_pack", "pack_layers"]

LARGE = 2**20  # numbers of a matrix; below, packing was not seen to pay

# Rows that the order is chosen for: as good for one row and for thousands (docs/performance.md).
ROWS = 512


def can_pack() -> bool:
    """Tell whether this processor's kernels are those that were measured: x86 with AVX-512."""
    return (
        torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


def _shape(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], packed.shape[0])


@opaque(_shape)
def _multiply_packed(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    # Without an operation after it.
    return torch.ops.mkldnn._linear_pointwise.default(x_TI, packed, bias_O, "none", [], "")


class PackedLinear(nn.Module):
    """y = x W^T + b in bfloat16; the packed weights are the only copy, and cannot be trained."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), ROWS)
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().clone())

    def unpacked(self) -> Tensor:
        """Give the weights back, (O, I)."""
        return self.packed.to_dense()

    def extra_repr(self) -> str:
        """Say the widths, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O)."""
        return _multiply_packed(x_TI, self.packed, self.bias)


def pack_layers(model: Qwen2VL) -> int:
    """Pack the large linear layers of both towers, and the head, one after the other.

    Layers of the decoder that read the same input are packed as one (join.py). A tied head becomes
    a layer; the embedding stays as it is, for it is looked up.

    Returns:
        How many layers are packed.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups = [names for names, _ in siblings(dict.fromkeys(layers, "bfloat16"))]
    count = 0
    for names in groups:
        group = [layers.pop(name) for name in names]  # whose plain weights are kept no longer
        if not _pays(names[0], group):
            continue
        sizes = [m.out_features for m in group]
        if len(group) == 1:
            model.set_submodule(names[0], PackedLinear(group[0].weight, group[0].bias))
        else:
            bias_O = None if group[0].bias is None else torch.cat([m.bias for m in group])
            packed = PackedLinear(torch.cat([m.weight for m in group]), bias_O)
            share_out(model, names, packed, sizes)
        count += 1
    if model.lm_head is None and model.head_weight.numel() >= LARGE:
        # The model only ever calls it, as every module.
        model.lm_head = PackedLinear(model.head_weight, None)  # type: ignore[assignment]
        count += 1
    return count


def _pays(name: str, group: Sequence[nn.Linear]) -> bool:
    """Tell whether layers are large, and no slower for single tokens, which the tower never has."""
    outputs, inputs = sum(layer.out_features for layer in group), group[0].in_features
    return outputs * inputs >= LARGE and (outputs >= inputs or name.startswith("visual."))
