"""Linear layers of a finished model become layers of small integers; the model never knows.

Which layer becomes what is one table, `recipe`:

    mode    decoder                      head    vision tower
    int8    8 bits                       8 bits  8 bits
    int4    4 bits in groups of inputs   8 bits  8 bits

The head stays at 8 bits, as 4 would cost accuracy and save no time. A GPU's layers are torchao's,
by `gpu_recipe`. Embeddings, norms, biases and the patch embedding stay whole; a tied head gets a
layer of its own. Layers that read the same input are joined (join.py). A model so changed can
neither be trained nor saved. Next room: calibrate.py, which rounds with more care.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from qwen2vl.errors import InputError
from qwen2vl.linear.fused import share_out, siblings
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import GROUP_SIZES, PAD_TO, Int4Linear
from qwen2vl.quantization.int8 import Int8Linear, WideInt8Linear, int8_linear
from qwen2vl.quantization.rtn import round_channels, round_groups
from qwen2vl.quantization.torchao import NarrowLinear, narrow_linear

__all__ = [
    "GPU_MODES",
    "HEAD",
    "MODES",
    "AnyMode",
    "Kind",
    "Mode",
    "QuantizedLinear",
    "describe",
    "gpu_recipe",
    "is_of_decoder",
    "put_layers",
    "quantize",
    "quantize_layers",
    "recipe",
    "weights_of",
]

Mode = Literal["int8", "int4"]
MODES: tuple[Mode, ...] = ("int8", "int4")
AnyMode = Mode | Literal["fp8"]
GPU_MODES: tuple[AnyMode, ...] = (*MODES, "fp8")

HEAD = "lm_head"

QuantizedLinear = Int8Linear | WideInt8Linear | Int4Linear

GPU_PAD_TO = 1024  # inputs, by torchao, for the 4-bit kernel
FP8_UNIT = 16  # divides outputs and inputs of what that kernel takes

# Narrow models feel rounding more: a row has at least so many groups, or the smallest.
MIN_GROUPS = 6


class Kind(NamedTuple):
    """How a layer is quantized."""

    bits: int
    group_size: int = 0  # inputs that share a scale; 0: all of them
    gpu_mode: AnyMode | None = None  # which of torchao's layers; None: those of the CPU

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Count the bytes of such a layer's weights and scales."""
        if self.gpu_mode == "int4":
            num_inputs = -(-num_inputs // GPU_PAD_TO) * GPU_PAD_TO
        if self.bits == 8:
            return num_outputs * (num_inputs + 12)  # a scale and oneDNN's zero
        padded = -(-num_outputs // PAD_TO) * PAD_TO
        return padded * (num_inputs // 2 + 4 * (num_inputs // self.group_size))


def recipe(model: Qwen2VL, mode: Mode) -> dict[str, Kind]:
    """Say what becomes of each linear layer, in the order of the model; a meta model will do.

    Layers of the decoder whose inputs are no multiple of 32, which no group divides, get 8 bits
    also in mode int4.

    Raises:
        InputError: no such mode.
    """
    if mode not in MODES:
        raise InputError(f"quantize {mode!r} is unknown; use {' or '.join(MODES)}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    kinds = dict.fromkeys(layers, Kind(8)) | {HEAD: Kind(8)}
    if mode == "int4":
        fitting = [
            name
            for name, layer in layers.items()
            if is_of_decoder(name) and layer.in_features % min(GROUP_SIZES) == 0
        ]
        size = _group_size([layers[name].in_features for name in fitting])
        kinds |= dict.fromkeys(fitting, Kind(4, size))
    return kinds


def gpu_recipe(model: Qwen2VL, mode: AnyMode) -> dict[str, Kind]:
    """Say what becomes of each linear layer on a GPU; those that are not named stay whole.

        mode    decoder               head    vision tower
        int8    8 bits                8 bits  8 bits
        int4    4 bits in groups      whole   whole
        fp8     e4m3, rows as well    e4m3    e4m3

    In int4 the head and the tower stay: widening 8 bits costs a GPU more time than it saves.

    Raises:
        InputError: no such mode.
    """
    if mode not in GPU_MODES:
        raise InputError(f"quantize {mode!r} is unknown; use {', '.join(MODES)} or fp8")
    if mode == "int4":
        kinds = recipe(model, mode)
        return {n: kind._replace(gpu_mode=mode) for n, kind in kinds.items() if kind.bits == 4}
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    } | {HEAD: tuple(model.head_weight.shape)}
    unit = FP8_UNIT if mode == "fp8" else 1
    fitting = (name for name, shape in shapes.items() if all(n % unit == 0 for n in shape))
    return dict.fromkeys(fitting, Kind(8, gpu_mode=mode))


def quantize(model: Qwen2VL, mode: Mode) -> None:
    """Quantize every layer of `recipe` in place, each rounded to the nearest.

    Raises:
        InputError: no such mode.
    """
    for names, kind in siblings(recipe(model, mode)):
        quantize_layers(model, names, kind)


def quantize_layers(model: Qwen2VL, names: Sequence[str], kind: Kind) -> None:
    """Replace one linear layer, or siblings, whose weights are there, by a quantized one."""
    if kind.gpu_mode is not None:
        for name in names:
            weight_OI, bias_O = weights_of(model, name)
            weight_OI = weight_OI.to(model.device, model.dtype)
            bias_O = None if bias_O is None else bias_O.to(model.device, model.dtype)
            layer = narrow_linear(weight_OI, bias_O, kind.gpu_mode, kind.group_size)
            put_layers(model, [name], layer)
        return
    weights, biases = zip(*(weights_of(model, name) for name in names), strict=True)
    weight_OI, bias_O = weights[0], biases[0]
    if len(names) > 1:
        weight_OI = torch.cat(weights)
        bias_O = None if bias_O is None else torch.cat(biases)
    if kind.bits == 8:
        layer = int8_linear(round_channels(weight_OI), bias_O)
    else:
        layer = Int4Linear(round_groups(weight_OI, kind.group_size), bias_O)
    put_layers(model, names, layer)


def weights_of(model: Qwen2VL, name: str) -> tuple[Tensor, Tensor | None]:
    """Take weight and bias of a linear layer, detached; a tied head has the embedding's."""
    if name == HEAD and model.lm_head is None:
        return model.head_weight.detach(), None
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} is quantized already"
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def put_layers(model: Qwen2VL, names: Sequence[str], layer: QuantizedLinear | NarrowLinear) -> None:
    """Put a layer where linear ones were, or where a tied head has none."""
    if list(names) == [HEAD]:
        # The model only ever calls it, as every module.
        model.lm_head = cast("nn.Linear", layer)
        return
    if len(names) == 1:
        model.set_submodule(names[0], layer)
        return
    assert not isinstance(layer, NarrowLinear), "layers of a GPU are not joined"
    share_out(model, names, layer, [len(weights_of(model, name)[0]) for name in names])


def describe(model: Qwen2VL) -> str:
    """Say what is quantized and how, the same for the same arithmetic; "" where nothing is.

    Meant for people and for keys of caches: `visual: 18 int8, model: 28 int4/64, lm_head: 1 int8`.
    """
    found = Counter(
        (name.partition(".")[0], module.describe())
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | NarrowLinear)
    )
    return ", ".join(f"{room}: {count} {how}" for (room, how), count in found.items())


def is_of_decoder(name: str) -> bool:
    """Tell the decoder's layers from the tower's and the head."""
    return name.startswith("model.")


def _group_size(widths: list[int]) -> int:
    """Find the largest group that divides all; one size for a model, as folders record it."""
    fitting = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    few = min(GROUP_SIZES)
    return next((size for size in fitting if MIN_GROUPS * size <= min(widths, default=few)), few)
