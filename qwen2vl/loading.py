"""Folder -> running model and its processor: the one place where the rooms meet.

In visible order: find the folder, read what it is, refuse what cannot work (another model's
tensors, too little memory), build the model on the meta device, fill it from disk. Layers of
small integers follow one by one, or with their siblings: those that are stored so are replaced,
those that shall become so are filled, merged with an adapter, rounded, replaced. Nothing large is
read before everything small has been checked. Next rooms: engine/, train/.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CapacityError, CheckpointError, InputError
from qwen2vl.fill import fill, fill_layer, put_stored, rounded_kinds, stored_kinds
from qwen2vl.linear.fused import siblings
from qwen2vl.linear.gemv import multiply_single_rows
from qwen2vl.linear.prepacked import can_pack, pack_layers
from qwen2vl.lora.layers import LoraFactors, merge_lora
from qwen2vl.lora.multi import Adapter
from qwen2vl.lora.peft import read_lora
from qwen2vl.memory import MemoryNeed, memory_available, memory_needed
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.quantization.scheme import AnyMode, Kind, quantize_layers
from qwen2vl.weights import (
    check_fit,
    find,
    note_chat_template,
    open_tensors,
    read_adapter,
    read_config,
    read_preprocessor,
)

__all__ = [
    "DTypeName",
    "load",
    "load_adapters",
    "load_model",
    "load_processor",
    "preferred_dtypes",
]

logger = logging.getLogger(__name__)

DTypeName = Literal["auto", "float32", "bfloat16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Words of /proc/cpuinfo for processors that multiply bfloat16 themselves: x86, then ARM.
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: DTypeName = "auto",
    quantize: AnyMode | None = None,
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_preset: str = "paper",
    limits: MediaLimits | None = None,
) -> tuple[Qwen2VL, Processor]:
    """Load a model and the processor that feeds it.

    Args:
        model: a folder, a repo id of the hub, or "nano".
        device: where the weights go: cpu, cuda, cuda:1, mps.
        dtype: of the weights and the arithmetic. auto: bfloat16 where the hardware has it, else
            float32 if it fits, else bfloat16.
        quantize: round the linear layers to int8 or int4 as they are read; on a GPU also fp8, by
            torchao.
        adapter: a folder with a LoRA adapter of PEFT, merged into the weights.
        max_model_len: longest prompt and answer to reserve memory for; None: the model's own.
        min_pixels: smallest size a picture is shown at; None: the folder's.
        max_pixels: largest size a picture is shown at; None: the folder's.
        video_preset: which frames of a video are used, and at which size.
        limits: on the media that are opened.

    Raises:
        CheckpointError: a folder is missing, damaged, or does not fit together.
        ConfigError: config.json describes another or an impossible model.
        CapacityError: the memory available is too small, with the numbers and the way out.
        InputError: an argument is wrong.
    """
    folder = find(model)
    processor = load_processor(
        folder,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_preset=video_preset,
        limits=limits,
    )
    network = load_model(
        folder,
        processor.config,
        device=device,
        dtype=dtype,
        quantize=quantize,
        adapter=adapter,
        max_model_len=max_model_len,
        max_pixels=processor.pixels.max_pixels,
    )
    return network, processor


def load_processor(
    model: str | Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    video_preset: str = "paper",
    limits: MediaLimits | None = None,
) -> Processor:
    """Load only what feeds the model, which needs no weights; arguments and errors as `load`."""
    folder = find(model)
    note_chat_template(folder)
    return Processor(
        read_config(folder),
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
    quantize: AnyMode | None = None,
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    max_pixels: int = 0,
    pack: bool = True,
) -> Qwen2VL:
    """Fill the network alone from a folder, in eval mode; raises as `load` does.

    On the CPU, weights stored in the dtype asked for stay memory-mapped: they are read when first
    used, and shared with other processes. Not so the large layers that are packed in bfloat16
    (linear/prepacked.py); without `pack` they stay parameters. `max_pixels` 0 reserves no memory for
    pictures.
    """
    place = _device(device)
    length = _context_length(config, max_model_len)
    tensors = open_tensors(folder)
    check_fit(tensors, config)
    with torch.device("meta"):
        model = Qwen2VL(config)
    stored = stored_kinds(tensors, place)
    rounded = rounded_kinds(model, quantize, tensors, stored, place)
    chosen = _choose_dtype(config, place, dtype, length, max_pixels, stored | rounded)
    factors = {} if adapter is None else _read_lora(adapter, model, stored)
    fill(model, tensors, place, chosen, later=stored | rounded)
    merge_lora(model, {name: f for name, f in factors.items() if name not in rounded})
    for names, kind in siblings(stored):
        put_stored(model, tensors, names, kind)
    for names, kind in siblings(rounded):
        for name in names:
            fill_layer(model, tensors, name)
        merge_lora(model, {name: factors[name] for name in names if name in factors})
        quantize_layers(model, names, kind)
    is_changed = bool(stored or rounded)
    if place.type == "cpu" and chosen == torch.bfloat16:
        if pack and can_pack():
            is_changed |= pack_layers(model) > 0
        multiply_single_rows(model)
    if is_changed and place.type == "cpu":
        _open_anew(model, folder, merged=factors)
    return model.eval()


def _open_anew(model: Qwen2VL, folder: Path, merged: Collection[str]) -> None:
    """Map the plain weights that are left once more, so that the file is let go of.

    What was packed or rounded has been read, and its pages stay in memory while anything lies in
    the same mapping; of the new one only what is used is read.
    """
    tensors = open_tensors(folder)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in merged:
            continue  # no longer what is stored
        stored = tensors[name]
        if stored.dtype == parameter.dtype:  # else it is a copy already
            parameter.data = stored.view(parameter.shape)


def load_adapters(model: Qwen2VL, folders: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Read adapters that stay unmerged, so that each request may ask for one by its name.

    Unlike a merged one they may stand on small integers, also on those that a folder stores.

    Raises:
        CheckpointError: an adapter is missing, damaged, or of another model.
    """
    with torch.device("meta"):
        plain = Qwen2VL(model.config)  # with the layers that an adapter names
    adapters: dict[str, Adapter] = {}
    for name, folder in folders.items():
        settings, tensors = read_adapter(folder)
        factors = read_lora(settings, tensors, plain, where=str(tensors.folder))
        adapters[name] = Adapter.of(factors, model)
    return adapters


def _read_lora(
    adapter: str | Path, model: Qwen2VL, stored: Collection[str]
) -> dict[str, LoraFactors]:
    settings, tensors = read_adapter(adapter)
    factors = read_lora(settings, tensors, model, where=str(tensors.folder))
    if packed := [name for name in factors if name in stored]:
        raise CheckpointError(
            f"{tensors.folder}: cannot be merged into {packed[0]}, which the model's folder stores "
            "as small integers; merge it into the unquantized model, and quantize that"
        )
    return factors


def _pixel_limits(folder: Path, min_pixels: int | None, max_pixels: int | None) -> PixelLimits:
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    limits = PixelLimits.from_dict(read_preprocessor(folder))
    return replace(limits, **{name: n for name, n in given.items() if n is not None})


def _context_length(config: Qwen2VLConfig, given: int | None) -> int:
    longest = config.text.max_position_embeddings
    if given is not None and not 2 <= given <= longest:
        raise InputError(
            f"max_model_len: got {given}, must be from 2 to {longest}, the context of this model "
            "(max_position_embeddings)"
        )
    return given or longest


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use cpu, cuda, cuda:1 or mps") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available()}
    present["mps"] = torch.backends.mps.is_available()
    if not present.get(device.type, False):
        raise InputError(f"device {name!r}: there is none here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r}: there are {torch.cuda.device_count()} here, from 0")
    return device


def _choose_dtype(
    config: Qwen2VLConfig,
    device: torch.device,
    name: str,
    max_model_len: int,
    max_pixels: int,
    kinds: Mapping[str, Kind] | None = None,
) -> torch.dtype:
    """Take the first dtype of those allowed whose memory is there.

    Raises:
        CapacityError: none fits.
    """
    if name != "auto" and name not in _DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use auto, {' or '.join(_DTYPES)}")
    allowed = [_DTYPES[name]] if name != "auto" else preferred_dtypes(device)
    available = memory_available(device)
    packs = device.type == "cpu" and can_pack()
    needs = [
        memory_needed(config, d, max_model_len, max_pixels, kinds, packs=packs) for d in allowed
    ]
    for chosen, need in zip(allowed, needs, strict=True):
        if available is None or need.total <= available:
            if chosen is not allowed[0]:
                logger.warning(
                    "dtype auto: float32 needs %s and %s are available: taking bfloat16, which "
                    "this processor computes slowly",
                    _gib(needs[0].total),
                    _gib(available or 0),
                )
            return chosen
    assert available is not None
    ways = [f"lower max_model_len ({max_model_len:,}) or max_pixels ({max_pixels:,})"]
    if needs[-1].weights >= available:
        ways.clear()  # these would not do
    if allowed[-1] == torch.float32:
        ways.append("use dtype bfloat16")
    if device.type == "cpu" and not kinds:
        ways.append("quantize to int8 or int4")
    raise CapacityError(
        _too_small(needs[-1], allowed[-1], available, [*ways, "use a smaller model"])
    )


def preferred_dtypes(device: torch.device) -> list[torch.dtype]:
    """List what dtype "auto" tries on `device`; the first that fits into memory is taken."""
    if device.type == "cuda" or (device.type == "cpu" and _has_native_bf16()):
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16]


def _has_native_bf16() -> bool:
    """Linux says so; elsewhere float32 is the safe choice."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not _NATIVE_BF16.isdisjoint(cpuinfo.read_text().split())


def _too_small(need: MemoryNeed, dtype: torch.dtype, available: int, ways: list[str]) -> str:
    return (
        f"the model needs {_gib(need.total)} in {str(dtype).removeprefix('torch.')} = "
        f"{_gib(need.weights)} weights + {_gib(need.cache)} cache + {_gib(need.activation)} "
        f"largest activation, but {_gib(available)} are available; {', or '.join(ways)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
