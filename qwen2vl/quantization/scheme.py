"""Quantization schemes: which linear layer of a model becomes which int8 or int4 layer.

`layer_schemes` is the table for the CPU:

    mode    decoder                      head    vision tower
    int8    8 bits                       8 bits  8 bits
    int4    4 bits in groups of inputs   8 bits  8 bits

The head stays at 8 bits: 4 would cost accuracy and save no time. On a GPU the layers are torchao's
(`gpu_layer_schemes`). Embeddings, norms, biases and the patch embedding are not quantized; a tied
head gets a layer of its own. q, k, v and gate, up are fused (linear/fused.py). A quantized model
can neither be trained nor saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from qwen2vl.errors import InputError
from qwen2vl.linear.cpu.operators import GROUP_SIZES
from qwen2vl.linear.fused import FusedLinearSlice, fusion_groups, replace_with_fused
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import Int4Linear, PackedInt4Weight
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.rtn import quantize_groupwise, quantize_per_channel
from qwen2vl.quantization.torchao import TorchaoLinear, torchao_linear

__all__ = [
    "CPU_MODES",
    "GPU_MODES",
    "LM_HEAD",
    "CpuQuantizationMode",
    "LayerScheme",
    "QuantizationMode",
    "QuantizedLinear",
    "describe_quantization",
    "gpu_layer_schemes",
    "is_decoder_layer",
    "layer_schemes",
    "linear_weights",
    "quantize",
    "quantize_layers",
    "replace_layers",
]

CpuQuantizationMode = Literal["int8", "int4"]
CPU_MODES: tuple[CpuQuantizationMode, ...] = ("int8", "int4")
QuantizationMode = CpuQuantizationMode | Literal["fp8"]
GPU_MODES: tuple[QuantizationMode, ...] = (*CPU_MODES, "fp8")

LM_HEAD = "lm_head"

QuantizedLinear = Int8Linear | Int4Linear

GPU_PAD_TO = 1024  # torchao pads inputs of int4 layers to a multiple of this
FP8_ALIGNMENT = 16  # the fp8 kernel requires outputs and inputs to be multiples of this

# Narrow models lose more by quantization, so a row has at least this many groups, or the smallest.
MIN_GROUPS = 6


class LayerScheme(NamedTuple):
    """How one linear layer is quantized."""

    bits: int
    group_size: int = 0  # inputs that share a scale; 0: all of them
    gpu_mode: QuantizationMode | None = None  # a torchao layer of this mode; None: a CPU layer

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Return the bytes of such a layer's weights and scales."""
        if self.gpu_mode == "int4":
            padded = -(-num_inputs // GPU_PAD_TO) * GPU_PAD_TO
            return num_outputs * (padded // 2 + 4 * (padded // self.group_size))
        if self.bits == 8:
            return num_outputs * (num_inputs + 4)  # float32 scale
        # Of a group: 4 bits an input, a float16 scale, a byte of zero point.
        return num_outputs * (num_inputs // 2 + 3 * (num_inputs // self.group_size))


def layer_schemes(model: Qwen2VL, mode: CpuQuantizationMode) -> dict[str, LayerScheme]:
    """Return the CPU scheme of each linear layer, in model order; `model` may be on meta.

    Layers of the decoder whose number of inputs is not a multiple of 32, the smallest group, get 8
    bits in mode int4, too.

    Raises:
        InputError: unknown mode.
    """
    if mode not in CPU_MODES:
        raise InputError(f"quantize {mode!r} is unknown; use {' or '.join(CPU_MODES)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    schemes = dict.fromkeys(layers, LayerScheme(8)) | {LM_HEAD: LayerScheme(8)}
    if mode == "int4":
        groupable = [
            name
            for name, layer in layers.items()
            if is_decoder_layer(name) and layer.in_features % min(GROUP_SIZES) == 0
        ]
        size = _group_size([layers[name].in_features for name in groupable])
        schemes |= dict.fromkeys(groupable, LayerScheme(4, size))
    return schemes


def gpu_layer_schemes(model: Qwen2VL, mode: QuantizationMode) -> dict[str, LayerScheme]:
    """Return the GPU scheme (torchao) of each linear layer; others are not quantized.

        mode    decoder                      head    vision tower
        int8    8 bits                       8 bits  8 bits
        int4    4 bits in groups             none    none
        fp8     e4m3, activations as well    e4m3    e4m3

    In int4 the head and the tower are not quantized: dequantizing 8 bits costs a GPU more time than
    it saves.

    Raises:
        InputError: unknown mode.
    """
    if mode not in GPU_MODES:
        raise InputError(f"quantize {mode!r} is unknown; use {', '.join(CPU_MODES)} or fp8")
    if mode == "int4":
        schemes = layer_schemes(model, mode)
        return {n: s._replace(gpu_mode=mode) for n, s in schemes.items() if s.bits == 4}
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    } | {LM_HEAD: tuple(model.lm_head_weight.shape)}
    unit = FP8_ALIGNMENT if mode == "fp8" else 1
    aligned = (name for name, shape in shapes.items() if all(n % unit == 0 for n in shape))
    return dict.fromkeys(aligned, LayerScheme(8, gpu_mode=mode))


def quantize(model: Qwen2VL, mode: CpuQuantizationMode) -> None:
    """Quantize every layer of `layer_schemes` in place, by round-to-nearest.

    Raises:
        InputError: unknown mode.
    """
    for names, scheme in fusion_groups(layer_schemes(model, mode)):
        quantize_layers(model, names, scheme)


def quantize_layers(model: Qwen2VL, names: Sequence[str], scheme: LayerScheme) -> None:
    """Replace one linear layer, or a group to fuse, by a quantized one; weights must be loaded."""
    if scheme.gpu_mode is not None:
        for name in names:
            weight_OI, bias_O = linear_weights(model, name)
            weight_OI = weight_OI.to(model.device, model.dtype)
            bias_O = None if bias_O is None else bias_O.to(model.device, model.dtype)
            layer = torchao_linear(weight_OI, bias_O, scheme.gpu_mode, scheme.group_size)
            replace_layers(model, [name], layer)
        return
    weights, biases = zip(*(linear_weights(model, name) for name in names), strict=True)
    weight_OI, bias_O = weights[0], biases[0]
    if len(names) > 1:
        weight_OI = torch.cat(weights)
        bias_O = None if bias_O is None else torch.cat(biases)
    if scheme.bits == 8:
        layer = Int8Linear(quantize_per_channel(weight_OI), bias_O)
    else:
        weight = quantize_groupwise(weight_OI, scheme.group_size)
        layer = Int4Linear(PackedInt4Weight.from_groupwise(weight), bias_O)
    replace_layers(model, names, layer)


def linear_weights(model: Qwen2VL, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear layer, detached; of a tied head, the embedding's."""
    if name == LM_HEAD and model.lm_head is None:
        return model.lm_head_weight.detach(), None
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} is quantized already"
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def replace_layers(
    model: Qwen2VL, names: Sequence[str], layer: QuantizedLinear | TorchaoLinear
) -> None:
    """Replace linear layers, or the missing layer of a tied head, by one quantized layer."""
    if list(names) == [LM_HEAD]:
        # Not an nn.Linear, but the model only calls it.
        model.lm_head = cast("nn.Linear", layer)
        return
    if len(names) == 1:
        model.set_submodule(names[0], layer)
        return
    assert not isinstance(layer, TorchaoLinear), "GPU layers are not fused"
    replace_with_fused(model, names, layer, [len(linear_weights(model, name)[0]) for name in names])


def describe_quantization(model: Qwen2VL) -> str:
    """Summarize which parts are quantized and how; "" if none is.

    For people and for cache keys: the same arithmetic gives the same description, such as
    `visual: 18 int8, model: 28 int4/64, lm_head: 1 int8`, counting the model's own layers.
    """
    layers = {
        name: module.layer if isinstance(module, FusedLinearSlice) else module
        for name, module in model.named_modules()
    }
    # Not the children of slices, so that fusing layers does not change the description.
    counts = Counter(
        (name.partition(".")[0], layer.describe_quantization())
        for name, layer in layers.items()
        if isinstance(layer, QuantizedLinear | TorchaoLinear)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), FusedLinearSlice)
    )
    return ", ".join(f"{part}: {count} {how}" for (part, how), count in counts.items())


def is_decoder_layer(name: str) -> bool:
    """Return whether a layer belongs to the decoder, not to the vision tower or the head."""
    return name.startswith("model.")


def _group_size(widths: list[int]) -> int:
    """Choose the largest group size that divides all widths; checkpoints record one for a model."""
    divisors = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    least = min(GROUP_SIZES)
    return next((s for s in divisors if MIN_GROUPS * s <= min(widths, default=least)), least)
