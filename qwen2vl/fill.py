"""The tensors of a folder -> the parameters and layers of a model, one at a time.

A layer is filled whole, or stays the small integers that the folder stores for it, or is filled
and rounded to small integers by quantization/scheme.py. So a second copy of a model never exists, and
of a rounded one not even the first. Next room: load.py, which says in which order.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import torch
from torch import nn

from qwen2vl.errors import InputError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.prequantized import stored_kind, stored_layer
from qwen2vl.quantization.scheme import HEAD, MODES, AnyMode, Kind, gpu_recipe, put_layers, recipe
from qwen2vl.quantization.torchao import check_gpu
from qwen2vl.weights import TensorFolder

__all__ = ["fill", "fill_layer", "put_stored", "rounded_kinds", "stored_kinds"]

logger = logging.getLogger(__name__)


def stored_kinds(tensors: TensorFolder, device: torch.device) -> dict[str, Kind]:
    """Say which layers stay the integers that they are stored as; the others are widened."""
    packing = tensors.packing
    if packing is None:
        return {}
    kinds: dict[str, Kind] = {}
    for name, (_, num_inputs) in tensors.packed.items():
        kind = stored_kind(
            packing.bits,
            packing.group_size,
            num_inputs,
            is_symmetric=packing.is_symmetric,
            is_ordered=packing.is_ordered,
        )
        if kind is not None and device.type == "cpu":
            kinds[name] = kind
    if widened := len(tensors.packed) - len(kinds):
        logger.warning(
            "%d layers are stored as %s of %d bits in groups of %d%s, for which there is no kernel "
            "on %s: they are widened, and take more memory",
            widened,
            packing.method.upper(),
            packing.bits,
            packing.group_size,
            "" if packing.is_ordered else ", out of order",
            device.type,
        )
    return kinds


def rounded_kinds(
    model: Qwen2VL,
    quantize: AnyMode | None,
    tensors: TensorFolder,
    stored: Collection[str],
    device: torch.device,
) -> dict[str, Kind]:
    """Say which layers are rounded as they are read: on demand, or because the folder says so.

    Raises:
        InputError: no such mode, or not on this device.
    """
    if quantize is not None:
        if device.type == "cuda":
            kinds = gpu_recipe(model, quantize)
            check_gpu(quantize, device)
            return kinds
        if quantize == "fp8":
            raise InputError(
                f"quantize 'fp8' computes on NVIDIA GPUs only; use {' or '.join(MODES)} on {device}"
            )
        kinds = recipe(model, quantize)
        if device.type != "cpu":
            raise InputError(
                f"quantize {quantize!r} computes on the CPU and on NVIDIA GPUs only; leave it out "
                f"on {device}, or use device cpu"
            )
        return {name: kind for name, kind in kinds.items() if name not in stored}
    packing = tensors.packing
    if packing is None or packing.rest is None or device.type != "cpu":
        return {}
    return {n: k for n, k in recipe(model, packing.rest).items() if n not in tensors.packed}


def fill(
    model: Qwen2VL,
    tensors: TensorFolder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    later: Collection[str],
) -> None:
    """Move and cast tensor by tensor; layers named in `later` are left empty."""
    state = {
        # A patch embedding stored as a matrix takes the Conv3d shape here.
        name: tensors[name].view(parameter.shape).to(device).to(dtype)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in later
    }
    model.load_state_dict(state, strict=not later, assign=True)


def fill_layer(model: Qwen2VL, tensors: TensorFolder, name: str) -> None:
    """Give one layer its weights as they are stored; a tied head has none of its own."""
    if name == HEAD and model.lm_head is None:
        return
    layer = model.get_submodule(name)
    state = {leaf: tensors[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters()}
    layer.load_state_dict(state, strict=True, assign=True)


def put_stored(model: Qwen2VL, tensors: TensorFolder, names: Sequence[str], kind: Kind) -> None:
    """Replace a layer, or siblings, by one of the integers that are stored for them.

    Raises:
        CheckpointError: zeros or groups are not what config.json says of them.
    """
    matrices = [tensors.matrix(name) for name in names]
    biases = [tensors[f"{name}.bias"] for name in names if _has_bias(model, name)]
    layer = stored_layer(
        torch.cat([matrix.ints_OI for matrix in matrices]),
        torch.cat([matrix.scale_GO for matrix in matrices], 1),
        torch.cat([matrix.zero_GO for matrix in matrices], 1),
        [matrix.group_I for matrix in matrices],
        torch.cat(biases) if biases else None,
        kind,
    )
    put_layers(model, names, layer)


def _has_bias(model: Qwen2VL, name: str) -> bool:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.bias is not None
