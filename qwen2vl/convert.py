"""Checkpoint quantization: writes an int8 or int4 copy of a model folder in GPTQ or AWQ format.

    int4   the decoder in AWQ's format (4 bits in groups); by GPTQ if there are examples, else RTN
    int8   the decoder in GPTQ's format (8 bits, one scale for each output); by RTN

Head and vision tower are stored unquantized, as in the official quantized repositories; an
additional key of quantization_config, `head_and_vision`, makes this library quantize them to int8
while loading. Outputs are identical to those of the source loaded with `quantize`, to the bit,
unless GPTQ improved them. Each tensor is written as soon as it is made: in memory is one layer, or
with examples the vision tower and later one block with its Hessians (gptq.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.errors import CapacityError, CheckpointError
from qwen2vl.fill import loaded_parameters, read_parameter, release_layers
from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load_processor
from qwen2vl.memory import available_memory
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.quantization.gptq import CalibrationForward, gptq_bytes, gptq_quantize_decoder
from qwen2vl.quantization.rtn import (
    GroupwiseWeight,
    PerChannelWeight,
    quantize_groupwise,
    quantize_per_channel,
)
from qwen2vl.quantization.scheme import (
    CpuQuantizationMode,
    LayerScheme,
    is_decoder_layer,
    layer_schemes,
)
from qwen2vl.weights import (
    QuantizationConfig,
    QuantizedMatrix,
    TensorFolder,
    check_output_folder,
    check_state_dict,
    open_tensors,
    packing_module,
    read_generation_defaults,
    resolve_model,
    stream_folder,
)

__all__ = ["ProgressCallback", "quantize_folder"]

# What was done last (a calibration example, a quantized layer), its number from 1, number of all.
ProgressCallback = Callable[[str, int, int], None]

_HALF_DTYPES = ("BF16", "F16")
_CPU = torch.device("cpu")

ZERO_POINT = 128  # of GPTQ's symmetric 8-bit integers


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
            f"{folder}: is quantized already ({tensors.quantization_config.method.upper()} of "
            f"{tensors.quantization_config.bits} bits); give the folder that it was made of"
        )
    check_state_dict(tensors, config)
    dtype = (
        torch.bfloat16 if tensors.info("model.norm.weight").dtype in _HALF_DTYPES else torch.float32
    )
    model = meta_model(config)
    schemes = _packable_layers(folder, model, mode)
    source_model = _SourceModel(model, tensors, dtype, schemes)
    quantization_config = _build_quantization_config(mode, schemes)
    if examples and mode == "int4":
        _check_memory(source_model)
        matrices = _gptq(source_model, examples, on_progress)
    else:
        matrices = _round_to_nearest(source_model, on_progress)
    stream_folder(
        target,
        config=config,
        layout=_layout(source_model, quantization_config),
        tensors=_tensors(source_model, matrices, quantization_config),
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
    """Return the decoder layers that the format can hold; others are quantized while loading.

    Raises:
        CheckpointError: there is none.
    """
    bits = 4 if mode == "int4" else 8
    per_int32 = 32 // bits
    schemes: dict[str, LayerScheme] = {}
    for name, scheme in layer_schemes(model, mode).items():
        if not is_decoder_layer(name) or scheme.bits != bits:
            continue
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        if outputs % per_int32 == 0 == inputs % per_int32:
            schemes[name] = scheme
    if not schemes:
        text = model.config.text
        raise CheckpointError(
            f"{folder}: no layer of the decoder can be packed in {bits} bits: its widths, "
            f"{text.hidden_size} and {text.intermediate_size}, are no multiples of "
            f"{32 if mode == 'int4' else per_int32}; load the folder with --quantize {mode}, which "
            "takes any width"
        )
    return schemes


def _build_quantization_config(
    mode: CpuQuantizationMode, schemes: Mapping[str, LayerScheme]
) -> QuantizationConfig:
    if mode == "int8":
        int8 = QuantizationConfig(
            method="gptq", bits=8, group_size=-1, is_symmetric=True, head_and_vision="int8"
        )
        return replace(int8, stores_zero_minus_one=True)
    (size,) = {scheme.group_size for scheme in schemes.values()}
    return QuantizationConfig(method="awq", bits=4, group_size=size, head_and_vision="int8")


def _check_memory(source: _SourceModel) -> None:
    """Check that the largest Hessian, or the vision tower, fits into memory.

    Raises:
        CapacityError: it does not.
    """
    widest = max(source.shape(name)[1] for name in source.schemes)
    tower = sum(p.numel() for p in source.model.visual.parameters()) * source.dtype.itemsize
    need, available = max(gptq_bytes(widest), tower), available_memory(_CPU)
    if available is not None and need > available:
        raise CapacityError(
            f"calibrating layers of {widest:,} inputs needs {need / 2**30:.1f} GiB of memory, but "
            f"{available / 2**30:.1f} GiB are available; quantize without examples "
            "(--num-calibration-samples 0)"
        )


def _layout(source: _SourceModel, config: QuantizationConfig) -> dict[str, Tensor]:
    """Return all tensors of the quantized folder, on meta."""
    layout = dict(source.model.state_dict())
    for name, scheme in source.schemes.items():
        del layout[f"{name}.weight"]
        outputs, inputs = source.shape(name)
        groups = inputs // scheme.group_size if scheme.group_size else 1
        with torch.device("meta"):
            matrix = QuantizedMatrix(
                ints_OI=torch.empty(outputs, inputs, dtype=torch.uint8),
                scale_GO=torch.empty(groups, outputs),
                zero_GO=torch.empty(groups, outputs, dtype=torch.int16),
                group_I=torch.empty(inputs, dtype=torch.int64),
            )
        parts = packing_module(config).pack(matrix, config)
        layout |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return layout


def _tensors(
    source: _SourceModel,
    matrices: Iterator[tuple[str, QuantizedMatrix]],
    config: QuantizationConfig,
) -> Iterator[tuple[str, Tensor]]:
    """Make the tensors of the quantized folder, one layer at a time."""
    for name, matrix in matrices:
        for part, tensor in packing_module(config).pack(matrix, config).items():
            yield f"{name}.{part}", tensor
    for name in source.model.state_dict():
        if name.removesuffix(".weight") not in source.schemes:
            yield name, source.read(name)
            source.tensors.release([name])


def _round_to_nearest(
    source: _SourceModel, on_progress: ProgressCallback
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantize the layers one by one, in model order."""
    for number, (name, scheme) in enumerate(source.schemes.items(), 1):
        weight_OI = source.read(f"{name}.weight")
        if scheme.bits == 8:
            yield name, _from_per_channel(quantize_per_channel(weight_OI))
        else:
            yield name, _from_groupwise(quantize_groupwise(weight_OI, scheme.group_size))
        release_layers(source.tensors, [name])
        on_progress(name, number, len(source.schemes))


def _gptq(
    source: _SourceModel, examples: Sequence[ModelInput], on_progress: ProgressCallback
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantize the layers block by block with GPTQ, in model order."""
    total = len(examples) + len(source.schemes)

    def forwards() -> Iterator[CalibrationForward]:
        for number, example in enumerate(examples, 1):
            yield _calibration_forward(example)
            on_progress("calibration", number, total)

    load_parameters = partial(loaded_parameters, source.model, source.tensors, source.dtype)
    quantized = gptq_quantize_decoder(source.model, source.schemes, forwards(), load_parameters)
    for number, (name, weight) in enumerate(quantized, len(examples) + 1):
        yield name, _from_groupwise(weight)
        on_progress(name, number, total)


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


def _from_groupwise(weight: GroupwiseWeight) -> QuantizedMatrix:
    return QuantizedMatrix(
        ints_OI=weight.ints_OI,
        scale_GO=weight.scale_GO,
        zero_GO=weight.zero_GO.to(torch.int16),
        group_I=torch.arange(weight.ints_OI.shape[1]) // weight.group_size,
    )


def _from_per_channel(weight: PerChannelWeight) -> QuantizedMatrix:
    num_outputs, num_inputs = weight.ints_OI.shape
    return QuantizedMatrix(
        ints_OI=(weight.ints_OI.to(torch.int16) + ZERO_POINT).to(torch.uint8),
        scale_GO=weight.scale_O[None],
        zero_GO=torch.full((1, num_outputs), ZERO_POINT, dtype=torch.int16),
        group_I=torch.zeros(num_inputs, dtype=torch.int64),
    )
