"""Checkpoint quantization: writes an int8 or int4 copy of a model folder as compressed-tensors.

    int8    decoder and vision tower int-quantized (W8A8: 8 bits, one scale for each output)
    int4    decoder pack-quantized (W4A16: 4 bits in groups), by GPTQ if there are examples, else
            RTN; vision tower int-quantized

The head is stored unquantized, where it is tied as the embedding; an additional key of
quantization_config, `head_and_vision`, makes this library quantize it to int8 while loading, and
the layers whose widths do not fit. Outputs are identical to those of the source loaded with
`quantize`, to the bit, unless GPTQ improved them. Each tensor is written as soon as it is made: in
memory is one layer, or with examples the vision tower and later one block with its Hessians
(gptq.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from qwen2vl.errors import CapacityError, CheckpointError
from qwen2vl.fill import loaded_parameters, read_parameter, release_layers
from qwen2vl.geometry import AttnMeta
from qwen2vl.linear.cpu.operators import GROUP_SIZES
from qwen2vl.loading import load_processor
from qwen2vl.memory import available_memory
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.quantization.gptq import CalibrationForward, gptq_bytes, gptq_quantize_decoder
from qwen2vl.quantization.int4 import PackedInt4Weight
from qwen2vl.quantization.rtn import PerChannelWeight, quantize_groupwise, quantize_per_channel
from qwen2vl.quantization.scheme import (
    LM_HEAD,
    CpuQuantizationMode,
    LayerScheme,
    is_decoder_layer,
    layer_schemes,
)
from qwen2vl.weights import (
    PackedFormat,
    QuantizationConfig,
    TensorFolder,
    check_output_folder,
    check_state_dict,
    open_tensors,
    read_generation_defaults,
    resolve_model,
    stream_folder,
)
from qwen2vl.weights.packing import compressed_tensors
from qwen2vl.weights.packing.config_groups import ConfigGroup

__all__ = ["ProgressCallback", "quantize_folder"]

# What was done last (a calibration example, a quantized layer), its number from 1, number of all.
ProgressCallback = Callable[[str, int, int], None]

_HALF_DTYPES = ("BF16", "F16")
_CPU = torch.device("cpu")

# Linear layers by the names that transformers and vLLM have for them: with a prefix or without,
# and with q, k, v and gate, up in one.
_DECODER_TARGET = r"re:.*layers\.\d+\.(self_attn|mlp)\.\w+_proj$"
_VISION_TARGET = r"re:.*visual\.(blocks\.\d+\.(attn|mlp)|merger\.mlp)\.\w+$"

# A layer's quantized weight, as the kernels read it and the folder stores it.
_Weight = PackedInt4Weight | PerChannelWeight


def quantize_folder(
    source: str | Path,
    target: str | Path,
    mode: CpuQuantizationMode,
    *,
    examples: Sequence[ModelInput] = (),
    on_progress: ProgressCallback = lambda what, done, total: None,
) -> QuantizationConfig:
    """Quantize the model of `source` into the folder `target`; return its quantization_config.

    Args:
        source: a folder, a repo id of the hub, or "nano".
        target: the folder to write; must not exist yet (or be empty).
        mode: int8 or int4.
        examples: calibration data for int4 by GPTQ: typical prompts with their answers.
        on_progress: called after each example and each layer.

    Raises:
        CheckpointError: the source cannot be used or is quantized already, the target exists, or
            there is too little space for it.
        CapacityError: too little memory is available to calibrate.
        InputError: unknown mode.
    """
    folder = resolve_model(source)
    check_output_folder(target)
    processor = load_processor(folder)
    config = processor.config
    tensors = open_tensors(folder)
    if tensors.quantization_config is not None:
        raise CheckpointError(
            f"{folder}: is quantized already ({tensors.quantization_config.describe()}); give the "
            "folder that it was made of"
        )
    check_state_dict(tensors, config)
    dtype = (
        torch.bfloat16 if tensors.info("model.norm.weight").dtype in _HALF_DTYPES else torch.float32
    )
    model = meta_model(config)
    schemes = _packable_layers(folder, model, mode)
    source_model = _SourceModel(model, tensors, dtype, schemes)
    quantization_config = _build_quantization_config(model, schemes)
    if examples and mode == "int4":
        _check_memory(source_model)
    else:
        examples = ()
    weights = _quantized_weights(source_model, examples, on_progress)
    stream_folder(
        target,
        config=config,
        layout=_layout(source_model),
        tensors=_tensors(source_model, weights),
        tokenizer_folder=folder,
        pixels=processor.pixels,
        generation=read_generation_defaults(folder),
        dtype=dtype,
        quantization_config=quantization_config,
    )
    return quantization_config


@dataclass(frozen=True, slots=True)
class _SourceModel:
    """The model to quantize, on meta, and its tensors in the folder."""

    model: Qwen2VL
    tensors: TensorFolder
    dtype: torch.dtype
    schemes: Mapping[str, LayerScheme]  # of the layers to quantize

    def shape(self, name: str) -> tuple[int, int]:
        """Return outputs and inputs of a layer to quantize."""
        outputs, inputs = self.model.get_parameter(f"{name}.weight").shape
        return outputs, inputs

    def read(self, name: str) -> Tensor:
        """Read a parameter in the model's dtype."""
        shape = self.model.get_parameter(name).shape
        return read_parameter(self.tensors, name, shape, _CPU, self.dtype)


def _packable_layers(
    folder: Path, model: Qwen2VL, mode: CpuQuantizationMode
) -> dict[str, LayerScheme]:
    """Return the layers that are stored quantized; others are quantized while loading.

    Not the head, which is the embedding where it is tied, and which other programs expect as it
    was; nor, in int4, layers of the decoder that no group size divides.

    Raises:
        CheckpointError: there is none of 4 bits.
    """
    schemes = layer_schemes(model, mode)
    del schemes[LM_HEAD]
    if mode == "int8":
        return schemes
    schemes = {n: s for n, s in schemes.items() if s.bits == 4 or not is_decoder_layer(n)}
    if not any(scheme.bits == 4 for scheme in schemes.values()):
        text = model.config.text
        raise CheckpointError(
            f"{folder}: no layer of the decoder can be packed in 4 bits: its widths, "
            f"{text.hidden_size} and {text.intermediate_size}, are no multiples of "
            f"{min(GROUP_SIZES)}; use int8, which takes any width"
        )
    return schemes


def _build_quantization_config(
    model: Qwen2VL, schemes: Mapping[str, LayerScheme]
) -> QuantizationConfig:
    int8 = PackedFormat(packing="int-quantized", bits=8, group_size=-1, is_symmetric=True)
    sizes = {scheme.group_size for scheme in schemes.values() if scheme.bits == 4}
    if not sizes:
        groups = (ConfigGroup(format=int8),)
    else:
        (size,) = sizes
        int4 = PackedFormat(packing="pack-quantized", bits=4, group_size=size)
        groups = (
            ConfigGroup(format=int4, targets=(_DECODER_TARGET,)),
            ConfigGroup(format=int8, targets=(_VISION_TARGET,)),
        )
    unfit = {
        "re:.*" + re.escape(name.partition(".layers.")[2].partition(".")[2]) + "$"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_decoder_layer(name) and name not in schemes
    }
    return QuantizationConfig(
        method="compressed-tensors",
        groups=groups,
        ignore=(LM_HEAD, *sorted(unfit)),
        head_and_vision="int8",
    )


def _check_memory(source: _SourceModel) -> None:
    """Check that the largest Hessian, or the vision tower, fits into memory.

    Raises:
        CapacityError: it does not.
    """
    widest = max(source.shape(name)[1] for name, s in source.schemes.items() if s.bits == 4)
    tower = sum(p.numel() for p in source.model.visual.parameters()) * source.dtype.itemsize
    need, available = max(gptq_bytes(widest), tower), available_memory(_CPU)
    if available is not None and need > available:
        raise CapacityError(
            f"calibrating layers of {widest:,} inputs needs {need / 2**30:.1f} GiB of memory, but "
            f"{available / 2**30:.1f} GiB are available; quantize without examples "
            "(--num-calibration-samples 0)"
        )


def _layout(source: _SourceModel) -> dict[str, Tensor]:
    """Return all tensors of the quantized folder, on meta."""
    layout = dict(source.model.state_dict())
    for name, scheme in source.schemes.items():
        del layout[f"{name}.weight"]
        with torch.device("meta"):
            parts = compressed_tensors.pack(_empty_weight(source.shape(name), scheme))
        layout |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return layout


def _empty_weight(shape: tuple[int, int], scheme: LayerScheme) -> _Weight:
    outputs, inputs = shape
    if scheme.bits == 8:
        ints_OI = torch.empty(outputs, inputs, dtype=torch.int8)
        return PerChannelWeight(ints_OI=ints_OI, scale_O=torch.empty(outputs))
    groups = inputs // scheme.group_size
    return PackedInt4Weight(
        packed=torch.empty(outputs, inputs // 2, dtype=torch.uint8),
        scale_OG=torch.empty(outputs, groups, dtype=torch.float16),
        zero_OG=torch.empty(outputs, groups, dtype=torch.uint8),
    )


def _tensors(
    source: _SourceModel, weights: Iterator[tuple[str, _Weight]]
) -> Iterator[tuple[str, Tensor]]:
    """Make the tensors of the quantized folder, one layer at a time."""
    for name, weight in weights:
        for part, tensor in compressed_tensors.pack(weight).items():
            yield f"{name}.{part}", tensor
    for name in source.model.state_dict():
        if name.removesuffix(".weight") not in source.schemes:
            yield name, source.read(name)
            source.tensors.release([name])


def _quantized_weights(
    source: _SourceModel, examples: Sequence[ModelInput], on_progress: ProgressCallback
) -> Iterator[tuple[str, _Weight]]:
    """Quantize the layers one by one: those of 4 bits by GPTQ if there are examples."""
    by_gptq = {n: s for n, s in source.schemes.items() if s.bits == 4} if examples else {}
    by_rounding = {n: s for n, s in source.schemes.items() if n not in by_gptq}
    total = len(examples) + len(source.schemes)

    def forwards() -> Iterator[CalibrationForward]:
        for number, example in enumerate(examples, 1):
            yield _calibration_forward(example)
            on_progress("calibration", number, total)

    weights = _round_to_nearest(source, by_rounding)
    if by_gptq:
        weights = chain(_gptq(source, by_gptq, forwards()), weights)
    for number, (name, weight) in enumerate(weights, len(examples) + 1):
        yield name, weight
        on_progress(name, number, total)


def _round_to_nearest(
    source: _SourceModel, schemes: Mapping[str, LayerScheme]
) -> Iterator[tuple[str, _Weight]]:
    """Quantize layers one by one, in model order."""
    for name, scheme in schemes.items():
        weight_OI = source.read(f"{name}.weight")
        if scheme.bits == 8:
            yield name, quantize_per_channel(weight_OI)
        else:
            weight = quantize_groupwise(weight_OI, scheme.group_size)
            yield name, PackedInt4Weight.from_groupwise(weight)
        release_layers(source.tensors, [name])


def _gptq(
    source: _SourceModel,
    schemes: Mapping[str, LayerScheme],
    forwards: Iterator[CalibrationForward],
) -> Iterator[tuple[str, _Weight]]:
    """Quantize layers of the decoder block by block with GPTQ, in model order."""
    load_parameters = partial(loaded_parameters, source.model, source.tensors, source.dtype)
    quantized = gptq_quantize_decoder(source.model, schemes, forwards, load_parameters)
    for name, weight in quantized:
        yield name, PackedInt4Weight.from_groupwise(weight)


def _calibration_forward(example: ModelInput) -> CalibrationForward:
    def run(model: Qwen2VL) -> Tensor:
        return model(
            torch.tensor(example.input_ids),
            example.position_ids_3T,
            AttnMeta.build([len(example.input_ids)]),
            patches_NP=example.patches_NP,
            vision_meta=example.vision_meta,
            placeholder_index_M=example.placeholder_index_M if example.items else None,
        )

    return run
