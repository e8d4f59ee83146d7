"""Model loading: a Hugging Face folder becomes a Qwen2VL on a device and its processor.

In this order: resolve the folder; build the processor from its config files; check the names and
shapes of the tensors; build the model on the meta device; choose which layers are quantized and the
dtype that fits into memory; parse a LoRA adapter. Then weights are read: plain ones, merged with
the adapter; layers to be quantized online, one fused group at a time, loaded, merged, quantized;
prequantized layers, built from their integers (GPTQ, AWQ), or used where those are mapped
(compressed-tensors). Last, on a CPU, bfloat16 layers are
prepacked or computed by kernels. Except for zero points and groups of prequantized layers, nothing
is checked after the first weight is read. (HF: from_pretrained.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, InputError, abbreviate
from qwen2vl.fill import fill_model, online_schemes, prequantized_schemes, release_layers
from qwen2vl.linear.kernel_linear import use_kernels
from qwen2vl.linear.prepacked import prepack_without_kernels
from qwen2vl.lora.full_weights import describe_parameters
from qwen2vl.lora.multi import LoraAdapter
from qwen2vl.lora.peft import PeftAdapter, parse_mergeable_adapter, parse_peft_adapter
from qwen2vl.memory import DTypeName, KVCacheDTypeName, choose_dtype
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.quantization.scheme import GPU_MODES, QuantizationMode
from qwen2vl.weights import (
    TensorFolder,
    check_state_dict,
    log_foreign_chat_template,
    open_tensors,
    read_adapter,
    read_config,
    read_preprocessor_config,
    resolve_model,
)

__all__ = ["load", "load_adapters", "load_model", "load_processor", "resolve_max_model_len"]

logger = logging.getLogger(__name__)


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: DTypeName | torch.dtype = "auto",
    quantize: QuantizationMode | None = None,
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    kv_cache_dtype: KVCacheDTypeName = "auto",
    hf_overrides: Mapping[str, Any] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_preset: str = "paper",
    limits: MediaLimits | None = None,
) -> tuple[Qwen2VL, Processor]:
    """Load a model and its processor.

    Args:
        model: a folder, a repo id of the hub, or "nano".
        device: of the weights: cpu, cuda, cuda:1, mps.
        dtype: of weights and computation. auto: bfloat16 if the hardware supports it, else float32
            if that fits into memory, else bfloat16.
        quantize: quantize the linear layers to int8 or int4 while loading (online quantization);
            on a GPU also fp8, by torchao.
        adapter: a folder with a PEFT LoRA adapter, which is merged into the weights; weights that
            the folder holds in full replace the model's.
        max_model_len: prompt and output tokens to reserve memory for; None: the model's maximum.
        kv_cache_dtype: of their keys and values, auto or int8; stored by `LLM`, not by the model.
        hf_overrides: values in place of those in config.json, such as max_position_embeddings: an
            image of many tokens takes few positions, so that more tokens than that may be served.
            Nested mappings, such as vision_config, are merged with those of the file.
        min_pixels: smallest size images are resized to; None: the folder's, or less if max_pixels
            is below it.
        max_pixels: largest size images are resized to; None: the folder's, or more if min_pixels
            is above it.
        video_preset: how frames of a video are sampled and resized.
        limits: of media files.

    Raises:
        CheckpointError: a folder is missing or damaged, or its files do not belong together.
        ConfigError: config.json, or config.json with `hf_overrides`, describes another or an
            impossible model; or `hf_overrides` have a name that no field of it has.
        CapacityError: too little memory is available; the message has the sizes and remedies.
        InputError: an argument is invalid.
    """
    if isinstance(dtype, torch.dtype):
        dtype = cast(DTypeName, str(dtype).removeprefix("torch."))
    _check_options(
        {"device": device, "dtype": dtype, "quantize": quantize, "adapter": adapter},
        pixels={"min_pixels": min_pixels, "max_pixels": max_pixels},
        video_preset=video_preset,
        limits=limits,
        hf_overrides=hf_overrides,
    )
    folder = resolve_model(model)
    processor = load_processor(
        folder,
        hf_overrides=hf_overrides,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_preset=video_preset,
        limits=limits,
    )
    if adapter is not None:
        processor.tokenizer.check_adapter(adapter)
    network = load_model(
        folder,
        processor.config,
        device=device,
        dtype=dtype,
        quantize=quantize,
        adapter=adapter,
        max_model_len=max_model_len,
        kv_cache_dtype=kv_cache_dtype,
        max_pixels=processor.pixels.max_pixels,
    )
    return network, processor


def _check_options(
    options: Mapping[str, Any],
    *,
    pixels: Mapping[str, Any],
    video_preset: Any,
    limits: Any,
    hf_overrides: Any,
) -> None:
    """Check the types of the arguments of `load`, before anything is read."""

    def refuse(name: str, value: object, rule: str) -> None:
        raise InputError(f"{name}: got {abbreviate(value)}, must be {rule}")

    if not isinstance(options["device"], str):
        refuse("device", options["device"], "a name such as 'cpu' or 'cuda:1'")
    names = get_args(DTypeName)
    if not isinstance(options["dtype"], str) or options["dtype"] not in names:
        remark = "; activations overflow in float16" if options["dtype"] == "float16" else ""
        refuse("dtype", options["dtype"], f"auto, float32 or bfloat16{remark}")
    quantize = options["quantize"]
    if quantize is not None and not (isinstance(quantize, str) and quantize in GPU_MODES):
        refuse("quantize", quantize, "int8, int4, or on an NVIDIA GPU fp8")
    if not isinstance(options["adapter"], (str, os.PathLike, type(None))):
        refuse("adapter", options["adapter"], "the folder of a PEFT adapter")
    for name, value in pixels.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            refuse(name, value, "a whole number of pixels, such as 1003520")
    kinds = {
        "video_preset": (video_preset, str, "the name of a preset, such as 'paper'"),
        "limits": (
            limits,
            MediaLimits | None,
            "MediaLimits(...) of qwen2vl.processor.media.source",
        ),
        "hf_overrides": (hf_overrides, Mapping | None, "a dict of values of config.json"),
    }
    for name, (value, kind, rule) in kinds.items():
        if not isinstance(value, kind):
            refuse(name, value, rule)


def load_processor(
    model: str | Path,
    *,
    hf_overrides: Mapping[str, Any] | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_preset: str = "paper",
    limits: MediaLimits | None = None,
) -> Processor:
    """Load the processor alone, which needs no weights; arguments and errors as for `load`."""
    folder = resolve_model(model)
    log_foreign_chat_template(folder)
    return Processor(
        read_config(folder, hf_overrides),
        Tokenizer.from_folder(folder),
        pixels=_pixel_limits(folder, min_pixels, max_pixels),
        video_preset=video_preset,
        limits=limits,
    )


def load_model(
    folder: Path,
    config: Qwen2VLConfig,
    *,
    device: str = "cpu",
    dtype: DTypeName = "auto",
    quantize: QuantizationMode | None = None,
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    kv_cache_dtype: KVCacheDTypeName = "auto",
    max_pixels: int = 0,
) -> Qwen2VL:
    """Load the model alone from a folder, in eval mode; raises as `load` does.

    On the CPU, weights stored in the requested dtype stay memory-mapped: they are read when first
    used, and shared with other processes. On processors without AMX large bfloat16 layers of the
    vision tower are not: they are prepacked (linear/prepacked.py). `max_pixels` 0 reserves no
    memory for images.
    """
    target_device = _resolve_device(device)
    model_len = resolve_max_model_len(config, max_model_len)
    tensors = open_tensors(folder)
    check_state_dict(tensors, config)
    model = meta_model(config)
    prequantized = prequantized_schemes(tensors, target_device)
    online = online_schemes(model, quantize, tensors, prequantized, target_device)
    schemes = prequantized | online
    resolved_dtype = choose_dtype(
        config, target_device, dtype, model_len, max_pixels, schemes, kv_cache_dtype
    )
    merged = PeftAdapter(factors={}, full_weights={})
    if adapter is not None:
        merged, adapter_tensors = _read_merged_adapter(adapter, model, tensors, prequantized)
        tensors = tensors.with_replaced(adapter_tensors, merged.full_weights)
    fill_model(
        model,
        tensors,
        target_device,
        resolved_dtype,
        prequantized=prequantized,
        online=online,
        factors=merged.factors,
    )
    if target_device.type == "cpu" and resolved_dtype == torch.bfloat16:
        prepack_without_kernels(model, partial(release_layers, tensors))
        use_kernels(model)
    return model.eval()


def load_adapters(model: Qwen2VL, folders: Mapping[str, str | Path]) -> dict[str, LoraAdapter]:
    """Load unmerged adapters for multi-LoRA, by the names that requests select them with.

    Unlike a merged adapter they may be applied to quantized layers, also to prequantized ones.

    Raises:
        CheckpointError: an adapter is missing, damaged, or of another model.
    """
    plain = meta_model(model.config)  # without replaced layers, so under the names of adapters
    adapters: dict[str, LoraAdapter] = {}
    for name, folder in folders.items():
        settings, tensors = read_adapter(folder)
        factors = parse_peft_adapter(settings, tensors, plain, where=str(tensors.folder))
        adapters[name] = LoraAdapter.from_factors(factors, model)
    return adapters


def _read_merged_adapter(
    folder: str | Path, model: Qwen2VL, base: TensorFolder, prequantized: Collection[str]
) -> tuple[PeftAdapter, TensorFolder]:
    """Read an adapter to merge into the weights `base`; logs which ones it replaces."""
    settings, tensors = read_adapter(folder)
    adapter = parse_mergeable_adapter(settings, tensors, model, where=str(tensors.folder))
    stored_weights = (f"{layer}.weight" for layer in base.packed_layers)
    refused = [name for name in adapter.factors if name in prequantized]
    refused += [name for name in stored_weights if name in adapter.full_weights]
    if refused:
        raise CheckpointError(
            f"{tensors.folder}: cannot be merged into {refused[0]}, which the model's folder "
            "stores quantized; merge it into the unquantized model, and quantize that"
        )
    by_file: dict[str, list[str]] = {}
    for name, key in adapter.full_weights.items():
        by_file.setdefault(tensors.path(key).name, []).append(name)
    for file, names in by_file.items():
        logger.warning("%s: %s replaced by %s", tensors.folder, describe_parameters(names), file)
    return adapter, tensors


def _pixel_limits(folder: Path, min_pixels: int | None, max_pixels: int | None) -> PixelLimits:
    limits = PixelLimits.from_dict(read_preprocessor_config(folder))
    return limits.override(min_pixels, max_pixels)


def resolve_max_model_len(config: Qwen2VLConfig, requested: int | None) -> int:
    """Return the context length to reserve memory for: as requested, or the model's.

    Raises:
        InputError: the model's context is shorter than requested.
    """
    limit = config.text.max_position_embeddings
    is_number = isinstance(requested, int) and not isinstance(requested, bool)
    if requested is not None and not (is_number and 2 <= requested <= limit):
        raise InputError(
            f"max_model_len: got {abbreviate(requested)}, must be from 2 to {limit}, the context "
            "of this model (max_position_embeddings)"
        )
    return requested or limit


def _resolve_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda, cuda:1 or mps") from None
    is_available = {"cpu": True, "cuda": torch.cuda.is_available()}
    is_available["mps"] = torch.backends.mps.is_available()
    if not is_available.get(device.type, False):
        raise InputError(f"device {name!r}: there is none here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} here, from 0")
    return device
