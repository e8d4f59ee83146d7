"""LoRA and QLoRA adapters in training: injection into the base model, export from checkpoints.

A run with `adapter` trains low-rank factors while its rules freeze the base weights. Checkpoints
hold both; the export writes a model with merged weights, and the factors in PEFT's format. For
QLoRA (4-bit NF4 base weights) the model is loaded and quantized layer by layer, so that the
full-precision weights of the adapted layers never exist all at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import ConfigError
from qwen2vl.fill import fill_layer, fill_parameters
from qwen2vl.lora.layers import (
    LoraConfig,
    LoraFactors,
    extract_factors,
    init_factors,
    inject_lora,
    match_target_modules,
    merge_state_dict,
)
from qwen2vl.lora.peft import (
    adapter_digest,
    parse_peft_adapter,
    to_peft_config,
    to_peft_state_dict,
)
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.weights import check_state_dict, open_tensors, read_adapter, save_adapter

__all__ = [
    "adapter_config_of",
    "digest_of_adapter",
    "empty_tensors",
    "initial_factors",
    "inject_adapter",
    "load_qlora_model",
    "merge_adapter",
    "write_adapter",
]

_LORA_A = ".lora_A"


def inject_adapter(model: Qwen2VL, adapter: LoraConfig, seed: int) -> None:
    """Inject LoRA layers, with freshly drawn factors or those of `adapter.init`.

    Raises:
        ConfigError: the target modules or sizes are impossible, or differ from `adapter.init`.
        CheckpointError: `adapter.init` is no adapter of this model.
    """
    factors = initial_factors(model, adapter, seed)
    inject_lora(model, factors, dropout=adapter.dropout, quantize=adapter.quantize_base)
    model.train()  # enables LoRA dropout, and changes nothing else


def load_qlora_model(
    folder: Path, config: Qwen2VLConfig, adapter: LoraConfig, *, device: str, seed: int
) -> Qwen2VL:
    """Load a model and inject LoRA layers with quantized (NF4) base weights, layer by layer.

    Raises:
        CheckpointError: the folder's tensors do not fit.
        ConfigError: as `inject_adapter`.
    """
    tensors = open_tensors(folder)
    check_state_dict(tensors, config)
    model = meta_model(config)
    factors = initial_factors(model, adapter, seed)
    target_device = torch.device(device)
    fill_parameters(model, tensors, target_device, torch.float32, skip_layers=factors)
    for name, lora_factors in factors.items():
        fill_layer(model, tensors, name)
        model.get_submodule(name).to(target_device, torch.float32)
        layer_factors = {name: lora_factors}
        inject_lora(model, layer_factors, dropout=adapter.dropout, quantize=adapter.quantize_base)
        tensors.release([f"{name}.weight"])  # its quantized copy is what stays
    model.train()  # enables LoRA dropout, and changes nothing else
    return model


def initial_factors(model: Qwen2VL, adapter: LoraConfig, seed: int) -> dict[str, LoraFactors]:
    """Draw the factors of the target modules, or read those of `adapter.init`.

    Raises:
        ConfigError: as `inject_adapter`.
        CheckpointError: as `inject_adapter`.
    """
    if not adapter.init:
        return init_factors(model, adapter, seed)
    settings, tensors = read_adapter(adapter.init)
    factors = parse_peft_adapter(settings, tensors, model, where=adapter.init)
    if unknown := factors.keys() - set(match_target_modules(model, (".*",))):
        raise ConfigError(
            f"adapter.init {adapter.init}: it adapts {min(unknown)}, which is not trained here; "
            "start from another adapter, or without one"
        )
    if differing := factors.keys() ^ set(match_target_modules(model, adapter.target_modules)):
        raise ConfigError(
            f"adapter.init {adapter.init} and adapter.target_modules "
            f"{list(adapter.target_modules)} differ in {len(differing)} layers, such as "
            f"{min(differing)}; write 'adapter.target_modules={_patterns_of(model, factors)}'"
        )
    for name, lora_factors in factors.items():
        if len(lora_factors.a_RX) != adapter.rank or lora_factors.scale != adapter.scale:
            rank = len(lora_factors.a_RX)
            alpha = lora_factors.scale * (math.sqrt(rank) if adapter.use_rslora else rank)
            raise ConfigError(
                f"adapter.init {adapter.init}: {name} has rank {rank} and scale "
                f"{lora_factors.scale:g}, adapter.rank {adapter.rank} and "
                f"adapter.alpha {adapter.alpha:g} mean scale {adapter.scale:g}; write "
                f"adapter.rank={rank} adapter.alpha={alpha:g}"
            )
    return factors


def _patterns_of(model: Qwen2VL, factors: Mapping[str, LoraFactors]) -> str:
    """Return target_modules, as JSON, that match the layers of an adapter and no others."""
    suffixes = to_peft_config(LoraConfig(), factors, model, base="")["target_modules"]
    # The short form where it is exact: `.*q_proj`; else with the dot before the suffix.
    for start in (".*", "(.*[.])?"):
        patterns = tuple(start + suffix for suffix in suffixes)
        if set(match_target_modules(model, patterns)) == factors.keys():
            break
    return json.dumps(list(patterns))


def adapter_config_of(metadata: Mapping[str, Any]) -> LoraConfig | None:
    """Return the adapter config in the manifest of a checkpoint; None for a run without adapter."""
    saved = metadata.get("config", {}).get("adapter")
    if saved is None:
        return None
    field_names = {f.name for f in fields(LoraConfig)}
    settings = {name: value for name, value in saved.items() if name in field_names}
    return LoraConfig(**{**settings, "target_modules": tuple(settings.get("target_modules", ()))})


def empty_tensors(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Allocate the weights, factors and NF4 buffers among the tensors of a checkpoint."""
    names = [name for name in shapes if "|" not in name]  # not optimizer states etc.
    return {name: torch.empty(shapes[name], dtype=_stored_dtype(name, shapes)) for name in names}


def merge_adapter(state: Mapping[str, Tensor], adapter: LoraConfig) -> dict[str, Tensor]:
    """Return the state dict of the plain model, with the factors merged into the weights."""
    return merge_state_dict(state, _adapter_scales(state, adapter))


def digest_of_adapter(state: Mapping[str, Tensor], adapter: LoraConfig) -> str:
    """Return the digest of the factors in the state dict of a model with adapters."""
    return adapter_digest(extract_factors(state, _adapter_scales(state, adapter)))


def write_adapter(
    target: Path,
    state: Mapping[str, Tensor],
    adapter: LoraConfig,
    config: Qwen2VLConfig,
    *,
    base: str,
) -> None:
    """Write the factors in the state dict of a model with adapters, in PEFT's format.

    Raises:
        CheckpointError: `target` cannot be created.
    """
    factors = extract_factors(state, _adapter_scales(state, adapter))
    base_model = meta_model(config)
    save_adapter(
        target, to_peft_config(adapter, factors, base_model, base=base), to_peft_state_dict(factors)
    )


def _adapter_scales(state: Mapping[str, Tensor], adapter: LoraConfig) -> dict[str, float]:
    layers = [name.removesuffix(_LORA_A) for name in state if name.endswith(_LORA_A)]
    return dict.fromkeys(layers, adapter.scale)


def _stored_dtype(name: str, shapes: Mapping[str, torch.Size]) -> torch.dtype:
    """NF4 codes are uint8, and so are block scales under double quantization."""
    layer, _, leaf = name.rpartition(".")
    is_byte = layer.endswith(".nf4") and (
        leaf == "codes" or (leaf == "magnitude_G" and f"{layer}.mean" in shapes)
    )
    return torch.uint8 if is_byte else torch.float32
