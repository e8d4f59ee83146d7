"""Prepacked bfloat16 linear layers: weights reordered once into oneDNN's blocked layout, on a CPU.

oneDNN's GEMM reads weights in tiles. From a plain matrix it makes the tiles in every forward; with
prepacked weights it only multiplies: a sixth faster for images and prompts. Single tokens gain
nothing, so where there are kernels (linear/cpu) only the vision tower is prepacked, and with AMX,
where the kernels need no order of their own, nothing. Where there are none the decoder is, too, but
for layers with more inputs than outputs, in which single tokens lose, and small ones. Prepacking
costs a copy of the weights in memory that is not shared with other processes. Results may differ in
the last bit. A model changed by `prepack_layers` is for inference only, not for saving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qwen2vl.linear.cpu.library import load_kernels
from qwen2vl.linear.custom_ops import custom_op
from qwen2vl.linear.fused import fusion_groups, replace_with_fused
from qwen2vl.model import Qwen2VL

__all__ = ["PrepackedLinear", "can_prepack", "prepack_layers", "prepack_without_kernels"]

MIN_PREPACK_NUMEL = 2**20  # elements of a matrix; smaller ones gained nothing when measured

# The batch size that oneDNN chooses the layout for; as fast for one row and for thousands
# (docs/performance.md).
PREPACK_ROWS = 512


def can_prepack() -> bool:
    """Return whether this processor has the kernels that were measured: x86 with AVX-512."""
    return (
        torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    )


def _fake_linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], packed.shape[0])


@custom_op(_fake_linear)
def _prepacked_linear(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    # "none", [], "": no fused post-operation.
    return torch.ops.mkldnn._linear_pointwise.default(x_TI, packed, bias_O, "none", [], "")


class PrepackedLinear(nn.Module):
    """y = x W^T + b in bfloat16; the prepacked weights are the only copy, and cannot be trained."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), PREPACK_ROWS)
        self.register_buffer("packed", packed)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().clone())

    def dense_weight(self) -> Tensor:
        """Return the weights as a plain matrix, (O, I)."""
        return self.packed.to_dense()

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O)."""
        return _prepacked_linear(x_TI, self.packed, self.bias)


def prepack_without_kernels(
    model: Qwen2VL, on_packed: Callable[[Sequence[str]], None] = lambda names: None
) -> None:
    """Prepack the layers that the kernels of this processor do not compute, if it gains anything.

    `on_packed` is that of `prepack_layers`.
    """
    kernels = load_kernels()
    if can_prepack() and not (kernels and kernels.has_tiles):
        prepack_layers(model, on_packed, only_vision=kernels is not None)


def prepack_layers(
    model: Qwen2VL,
    on_packed: Callable[[Sequence[str]], None] = lambda names: None,
    *,
    only_vision: bool = False,
) -> int:
    """Prepack the large linear layers of the vision tower and the decoder, and the head, in place.

    With `only_vision` the decoder and the head stay as they are (for kernel_linear.py). Layers of
    the decoder that read the same input are fused into one (fused.py). A tied head becomes a layer
    of its own; the embedding keeps its matrix, which lookups need. `on_packed` gets the names of
    the layers after each that was prepacked: their plain weights are then unused.

    Returns:
        The number of prepacked layers.
    """
    prefix = "visual." if only_vision else ""
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name.startswith(prefix)
    }
    groups = [names for names, _ in fusion_groups(dict.fromkeys(layers, "bfloat16"))]
    count = 0
    for names in groups:
        group = [layers.pop(name) for name in names]  # popped, so that plain weights are freed
        if not _is_worth_prepacking(names[0], group):
            continue
        sizes = [m.out_features for m in group]
        if len(group) == 1:
            model.set_submodule(names[0], PrepackedLinear(group[0].weight, group[0].bias))
        else:
            bias_O = None if group[0].bias is None else torch.cat([m.bias for m in group])
            fused = PrepackedLinear(torch.cat([m.weight for m in group]), bias_O)
            replace_with_fused(model, names, fused, sizes)
        on_packed(names)
        count += 1
    if only_vision or model.lm_head is not None:
        return count
    if model.lm_head_weight.numel() >= MIN_PREPACK_NUMEL:
        # Not an nn.Linear, but the model only calls it.
        model.lm_head = PrepackedLinear(model.lm_head_weight, None)  # type: ignore[assignment]
        on_packed(["lm_head"])
        count += 1
    return count


def _is_worth_prepacking(name: str, group: Sequence[nn.Linear]) -> bool:
    """Return whether layers are large, and no slower for single tokens (the tower has none)."""
    outputs, inputs = sum(layer.out_features for layer in group), group[0].in_features
    return outputs * inputs >= MIN_PREPACK_NUMEL and (
        outputs >= inputs or name.startswith("visual.")
    )
