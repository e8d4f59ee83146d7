"""A model folder -> a smaller one, of small integers, that opens again without a word.

    int4   the decoder as AWQ packs it (4 bits in groups); rounded by examples where there are any
    int8   the decoder as GPTQ packs it (8 bits, one scale for each output)

Both are layouts that other programs read. Head and vision tower are stored whole, as in the
official quantized repositories; quantization_config says in a key of our own that they are rounded
to 8 bits as they are read. Answers are those of the source opened with `quantize`, to the bit,
unless examples made them better. Back down: load.py.
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
from qwen2vl.quantization.gptq import Show, round_by_examples
from qwen2vl.quantization.rtn import Channels, Groups, round_channels, round_groups
from qwen2vl.quantization.scheme import Kind, Mode, is_of_decoder, recipe, weights_of
from qwen2vl.weights import (
    PackedMatrix,
    Packing,
    check_target,
    expected_shapes,
    find,
    layout_of,
    open_tensors,
    read_generation_defaults,
    save_folder,
)

__all__ = ["OnLayer", "quantize_folder"]

OnLayer = Callable[[str, int, int], None]  # layer, its number from 1, how many there are

_SHORT = ("BF16", "F16")

MIDDLE = 128  # where GPTQ's 8 bits have their zero


def quantize_folder(
    source: str | Path,
    target: str | Path,
    mode: Mode,
    *,
    examples: Iterable[ModelInput] = (),
    on_layer: OnLayer | None = None,
) -> Packing:
    """Write the model of `source` to `target` in small integers; returns how it is packed.

    Args:
        source: a folder, a repo id of the hub, or "nano".
        target: the folder to make; must not exist yet (or be empty).
        mode: int8, or int4.
        examples: for int4: what the model is likely to be shown, answers included.
        on_layer: hears of each layer that is done.

    Raises:
        CheckpointError: the source cannot be used or is quantized already, the target is there.
        CapacityError: the memory available is too small for the source.
        InputError: no such mode.
    """
    folder = find(source)
    check_target(target)
    processor = load_processor(folder)
    config = processor.config
    tensors = open_tensors(folder)
    if tensors.packing is not None:
        raise CheckpointError(
            f"{folder}: is quantized already ({tensors.packing.method.upper()} of "
            f"{tensors.packing.bits} bits); give the folder that it was made of"
        )
    dtype = "bfloat16" if tensors.info("model.norm.weight").dtype in _SHORT else "float32"
    # Unpacked: what is rounded and written are parameters.
    model = load_model(folder, config, dtype=dtype, max_model_len=2, pack=False)
    kinds = _packable(model, mode)
    packing = _packing(mode, kinds)
    state = {n: t for n, t in model.state_dict().items() if n in expected_shapes(config)}
    for number, (name, matrix) in enumerate(_rounded(model, kinds, examples), 1):
        del state[f"{name}.weight"]
        parts = layout_of(packing).pack(matrix, packing)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if on_layer:
            on_layer(name, number, len(kinds))
    save_folder(
        target,
        config=config,
        state_dict=state,
        tokenizer_folder=folder,
        pixels=processor.pixels,
        generation=read_generation_defaults(folder),
        dtype=model.dtype,
        packing=packing,
    )
    return packing


def _packable(model: Qwen2VL, mode: Mode) -> dict[str, Kind]:
    """List the layers of the decoder that the layout takes; others are rounded when they are read.

    Raises:
        CheckpointError: there is none.
    """
    bits = 4 if mode == "int4" else 8
    words = 32 // bits
    kinds: dict[str, Kind] = {}
    for name, kind in recipe(model, mode).items():
        if not is_of_decoder(name) or kind.bits != bits:
            continue
        outputs, inputs = weights_of(model, name)[0].shape
        if outputs % words == 0 == inputs % words:
            kinds[name] = kind
    if not kinds:
        raise CheckpointError(
            f"no layer of this model's decoder can be packed in {bits} bits: their widths are no "
            f"multiples of {32 if mode == 'int4' else words}"
        )
    return kinds


def _packing(mode: Mode, kinds: Mapping[str, Kind]) -> Packing:
    if mode == "int8":
        eight = Packing(method="gptq", bits=8, group_size=-1, is_symmetric=True, rest="int8")
        return replace(eight, stores_zero_less_one=True)
    (size,) = {kind.group_size for kind in kinds.values()}
    return Packing(method="awq", bits=4, group_size=size, rest="int8")


def _rounded(
    model: Qwen2VL, kinds: Mapping[str, Kind], examples: Iterable[ModelInput]
) -> Iterator[tuple[str, PackedMatrix]]:
    """Round the layers one by one, in the order of the model."""
    shows = [_show(example) for example in examples]
    if shows and all(kind.bits == 4 for kind in kinds.values()):
        for name, groups in round_by_examples(model, kinds, shows):
            yield name, _of_groups(groups)
        return
    for name, kind in kinds.items():
        weight_OI, _ = weights_of(model, name)
        if kind.bits == 8:
            yield name, _of_channels(round_channels(weight_OI))
        else:
            yield name, _of_groups(round_groups(weight_OI, kind.group_size))


def _show(example: ModelInput) -> Show:
    def run(model: Qwen2VL) -> Tensor:
        return model(
            torch.tensor(example.input_ids),
            example.position_ids_3T,
            AttnMeta.build([len(example.input_ids)]),
            patches_NP=example.patches_NP,
            vision_meta=example.vision_meta,
            pad_index_M=example.pad_index_M if example.items else None,
        )

    return run


def _of_groups(groups: Groups) -> PackedMatrix:
    return PackedMatrix(
        ints_OI=groups.ints_OI,
        scale_GO=groups.scale_GO,
        zero_GO=groups.zero_GO.to(torch.int16),
        group_I=torch.arange(groups.ints_OI.shape[1]) // groups.group_size,
    )


def _of_channels(channels: Channels) -> PackedMatrix:
    num_outputs, num_inputs = channels.ints_OI.shape
    return PackedMatrix(
        ints_OI=(channels.ints_OI.to(torch.int16) + MIDDLE).to(torch.uint8),
        scale_GO=channels.scale_O[None],
        zero_GO=torch.full((1, num_outputs), MIDDLE, dtype=torch.int16),
        group_I=torch.zeros(num_inputs, dtype=torch.int64),
    )
