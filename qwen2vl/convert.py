"""Checkpoint quantization: writes an int8 or int4 copy of a model folder in GPTQ or AWQ format.

    int4   the decoder in AWQ's format (4 bits in groups); by GPTQ if there are examples, else RTN
    int8   the decoder in GPTQ's format (8 bits, one scale for each output); by RTN

Other programs read both formats. Head and vision tower are stored unquantized, as in the official
quantized repositories; an additional key of quantization_config, `head_and_vision`, makes this
library quantize them to int8 while loading. Outputs are identical to those of the source loaded
with `quantize`, to the bit, unless GPTQ improved them. The folder loads without options
(loading.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.geometry import AttnMeta
from qwen2vl.loading import load_model, load_processor
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.quantization.gptq import CalibrationForward, gptq_quantize_decoder
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
    linear_weights,
)
from qwen2vl.weights import (
    QuantizationConfig,
    QuantizedMatrix,
    check_output_folder,
    expected_shapes,
    open_tensors,
    packing_module,
    read_generation_defaults,
    resolve_model,
    save_folder,
)

__all__ = ["LayerCallback", "quantize_folder"]

LayerCallback = Callable[[str, int, int], None]  # layer, its number from 1, number of layers

_HALF_DTYPES = ("BF16", "F16")

ZERO_POINT = 128  # of GPTQ's symmetric 8-bit integers


def quantize_folder(
    source: str | Path,
    target: str | Path,
    mode: CpuQuantizationMode,
    *,
    examples: Iterable[ModelInput] = (),
    on_layer: LayerCallback | None = None,
) -> QuantizationConfig:
    """Quantize the model of `source` into the folder `target`; return its quantization_config.

    Args:
        source: a folder, a repo id of the hub, or "nano".
        target: the folder to write; must not exist yet (or be empty).
        mode: int8 or int4.
        examples: calibration data for int4 by GPTQ: typical prompts with their answers.
        on_layer: called after each layer.

    Raises:
        CheckpointError: the source cannot be used or is quantized already, or the target exists.
        CapacityError: too little memory is available for the source.
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
    dtype = "bfloat16" if tensors.info("model.norm.weight").dtype in _HALF_DTYPES else "float32"
    # Not prepacked: what is quantized and written must be parameters.
    model = load_model(folder, config, dtype=dtype, max_model_len=2, prepack=False)
    schemes = _packable_layers(model, mode)
    quantization_config = _build_quantization_config(mode, schemes)
    state = {n: t for n, t in model.state_dict().items() if n in expected_shapes(config)}
    for number, (name, matrix) in enumerate(_quantize(model, schemes, examples), 1):
        del state[f"{name}.weight"]
        parts = packing_module(quantization_config).pack(matrix, quantization_config)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if on_layer:
            on_layer(name, number, len(schemes))
    save_folder(
        target,
        config=config,
        state_dict=state,
        tokenizer_folder=folder,
        pixels=processor.pixels,
        generation=read_generation_defaults(folder),
        dtype=model.dtype,
        quantization_config=quantization_config,
    )
    return quantization_config


def _packable_layers(model: Qwen2VL, mode: CpuQuantizationMode) -> dict[str, LayerScheme]:
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
        outputs, inputs = linear_weights(model, name)[0].shape
        if outputs % per_int32 == 0 == inputs % per_int32:
            schemes[name] = scheme
    if not schemes:
        raise CheckpointError(
            f"no layer of this model's decoder can be packed in {bits} bits: their widths are no "
            f"multiples of {32 if mode == 'int4' else per_int32}"
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


def _quantize(
    model: Qwen2VL, schemes: Mapping[str, LayerScheme], examples: Iterable[ModelInput]
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantize the layers one by one, in model order."""
    forwards = [_calibration_forward(example) for example in examples]
    if forwards and all(scheme.bits == 4 for scheme in schemes.values()):
        for name, weight in gptq_quantize_decoder(model, schemes, forwards):
            yield name, _from_groupwise(weight)
        return
    for name, scheme in schemes.items():
        weight_OI, _ = linear_weights(model, name)
        if scheme.bits == 8:
            yield name, _from_per_channel(quantize_per_channel(weight_OI))
        else:
            yield name, _from_groupwise(quantize_groupwise(weight_OI, scheme.group_size))


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
