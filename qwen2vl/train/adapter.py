"""Adapters as a run has them: put on the model it begins with, and taken out of its checkpoints.

A run with `adapter` trains low-rank factors beside weights that its rules freeze. Its checkpoints
hold both; an export makes of them an ordinary model, merged, and a folder in PEFT's format. Over
4-bit weights the model is filled layer by layer, so that whole ones never exist together. It must
not know steps or optimizers. Next rooms: begin.py and export.py, which use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import ConfigError
from qwen2vl.fill import fill, fill_layer
from qwen2vl.lora.layers import (
    LoraConfig,
    LoraFactors,
    factors_of,
    fresh_factors,
    merged_state,
    put_lora,
    target_names,
)
from qwen2vl.lora.peft import peft_settings, peft_tensors, read_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import check_fit, open_tensors, read_adapter, save_adapter

__all__ = [
    "adapter_in",
    "factors_to_train",
    "load_quantized",
    "merged",
    "put_adapter",
    "room_for",
    "write_adapter",
]

_A = ".lora_A"


def put_adapter(model: Qwen2VL, adapter: LoraConfig, seed: int) -> None:
    """Let layers of a model learn, from fresh factors or from those of `adapter.init`.

    Raises:
        ConfigError: the layers or sizes asked for are impossible, or not those of `adapter.init`.
        CheckpointError: `adapter.init` is no adapter of this model.
    """
    factors = factors_to_train(model, adapter, seed)
    put_lora(model, factors, dropout=adapter.dropout, quantize=adapter.quantize_base)
    model.train()  # only the factors' dropout asks


def load_quantized(
    folder: Path, config: Qwen2VLConfig, adapter: LoraConfig, *, device: str, seed: int
) -> Qwen2VL:
    """Fill a model whose adapted layers have 4-bit weights, one layer at a time; else as above.

    Raises:
        CheckpointError: the folder's tensors do not fit.
        ConfigError: as `put_adapter`.
    """
    tensors = open_tensors(folder)
    check_fit(tensors, config)
    with torch.device("meta"):
        model = Qwen2VL(config)
    factors = factors_to_train(model, adapter, seed)
    place = torch.device(device)
    fill(model, tensors, place, torch.float32, later=factors)
    for name, found in factors.items():
        fill_layer(model, tensors, name)
        model.get_submodule(name).to(place, torch.float32)
        one = {name: found}
        put_lora(model, one, dropout=adapter.dropout, quantize=adapter.quantize_base)
    model.train()  # only the factors' dropout asks
    return model


def factors_to_train(model: Qwen2VL, adapter: LoraConfig, seed: int) -> dict[str, LoraFactors]:
    """Draw the factors of the layers that `adapter` names, or read those of `adapter.init`.

    Raises:
        ConfigError: as `put_adapter`.
        CheckpointError: as `put_adapter`.
    """
    if not adapter.init:
        return fresh_factors(model, adapter, seed)
    settings, tensors = read_adapter(adapter.init)
    factors = read_lora(settings, tensors, model, where=adapter.init)
    if other := factors.keys() ^ set(target_names(model, adapter.targets)):
        raise ConfigError(
            f"adapter.init {adapter.init} and adapter.targets {list(adapter.targets)} differ in "
            f"{len(other)} layers, such as {min(other)}; give the targets that it was trained with"
        )
    for name, found in factors.items():
        if len(found.a_RX) != adapter.rank or found.scale != adapter.scale:
            raise ConfigError(
                f"adapter.init {adapter.init}: {name} has rank {len(found.a_RX)} and scale "
                f"{found.scale:g}, adapter.rank {adapter.rank} and adapter.alpha {adapter.alpha:g} "
                f"mean scale {adapter.scale:g}; give those that it was trained with"
            )
    return factors


def adapter_in(facts: Mapping[str, Any]) -> LoraConfig | None:
    """Find the adapter of a run in the manifest of its checkpoint."""
    found = facts.get("config", {}).get("adapter")
    if found is None:
        return None
    known = {f.name for f in fields(LoraConfig)}
    given = {name: value for name, value in found.items() if name in known}
    return LoraConfig(**{**given, "targets": tuple(given.get("targets", ()))})


def room_for(stored: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Make empty tensors for the weights, factors and codes among a checkpoint's tensors."""
    names = [name for name in stored if "|" not in name]  # others are moments and the like
    return {name: torch.empty(stored[name], dtype=_dtype(name, stored)) for name in names}


def merged(state: Mapping[str, Tensor], adapter: LoraConfig) -> dict[str, Tensor]:
    """Turn the state of an adapted model into an ordinary one's."""
    return merged_state(state, _scales(state, adapter))


def write_adapter(
    target: Path,
    state: Mapping[str, Tensor],
    adapter: LoraConfig,
    config: Qwen2VLConfig,
    *,
    base: str,
) -> None:
    """Write the factors of an adapted model's state as PEFT does.

    Raises:
        CheckpointError: `target` cannot be made.
    """
    factors = factors_of(state, _scales(state, adapter))
    with torch.device("meta"):
        plain = Qwen2VL(config)
    save_adapter(target, peft_settings(adapter, factors, plain, base=base), peft_tensors(factors))


def _scales(state: Mapping[str, Tensor], adapter: LoraConfig) -> dict[str, float]:
    layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
    return dict.fromkeys(layers, adapter.scale)


def _dtype(name: str, stored: Mapping[str, torch.Size]) -> torch.dtype:
    """Codes are bytes, and so are magnitudes that are quantized once more."""
    layer, _, leaf = name.rpartition(".")
    is_code = layer.endswith(".nf4") and (
        leaf == "codes" or (leaf == "magnitude_G" and f"{layer}.mean" in stored)
    )
    return torch.uint8 if is_code else torch.float32
