"""Folder -> running model and its processor: the one place where the rooms meet.

In visible order: find the folder, read what it is, refuse what cannot work (another model's
tensors, too little memory), build the model on the meta device, fill it from disk, merge an
adapter into it. Nothing large is read before everything small has been checked. Next rooms:
engine/, train/.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

import torch

from qwen2vl.adapt.lora import LoraFactors, merge_lora, read_lora
from qwen2vl.adapt.rows import multiply_single_rows
from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.errors import CapacityError, InputError
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.media import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.weights import (
    TensorFolder,
    check_fit,
    expected_shapes,
    find,
    note_chat_template,
    open_tensors,
    read_adapter,
    read_config,
    read_preprocessor,
)

__all__ = [
    "DTypeName",
    "MemoryNeed",
    "load",
    "load_model",
    "load_processor",
    "memory_available",
    "memory_needed",
    "preferred_dtypes",
]

logger = logging.getLogger(__name__)

DTypeName = Literal["auto", "float32", "bfloat16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Words of /proc/cpuinfo for processors that multiply bfloat16 themselves: x86, then ARM.
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a model takes at work, by cause."""

    weights: int
    cache: int  # keys and values of one sequence of max_model_len tokens
    activation: int  # the largest moment: a picture in the tower, or a prompt in the decoder

    @property
    def total(self) -> int:
        """All of them at once."""
        return self.weights + self.cache + self.activation


def load(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: DTypeName = "auto",
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
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
    max_pixels: int = 0,
) -> Qwen2VL:
    """Fill the network alone from a folder, in eval mode; raises as `load` does.

    On the CPU, weights stored in the dtype asked for stay memory-mapped: they are read when first
    used, and shared with other processes. `max_pixels` 0 reserves no memory for pictures.
    """
    place = _device(device)
    length = _context_length(config, max_model_len)
    tensors = open_tensors(folder)
    check_fit(tensors, config)
    chosen = _choose_dtype(config, place, dtype, length, max_pixels)
    with torch.device("meta"):
        model = Qwen2VL(config)
    factors = {} if adapter is None else _read_lora(adapter, model)
    _fill(model, tensors, place, chosen)
    merge_lora(model, factors)
    if place.type == "cpu" and chosen == torch.bfloat16:
        multiply_single_rows(model)
    return model.eval()


def memory_needed(
    config: Qwen2VLConfig, dtype: torch.dtype, max_model_len: int, max_pixels: int
) -> MemoryNeed:
    """Estimate the memory of one sequence at work, closely and from above."""
    text = config.text
    weights = sum(prod(shape) for shape in expected_shapes(config).values()) * dtype.itemsize
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize
    num_patches = max_pixels // config.vision.patch_size**2
    in_tower = num_patches * _bytes_per_patch(config.vision, dtype.itemsize)
    in_decoder = max_model_len * _bytes_per_token(text, dtype.itemsize)
    return MemoryNeed(weights, cache * max_model_len, max(in_tower, in_decoder))


def _bytes_per_patch(vision: VisionConfig, size: int) -> int:
    """Bytes alive for one patch in the widest moment of the tower.

    Normalising pixels: the uint8 patch and three float32 ones. A block: uint8 and float32 patch,
    then either the MLP (input, residual, normed; its width before, within and after the
    activation) or the rotation (six vectors, and a query in float32 being taken apart).
    """
    mlp = size * (3 + 3 * vision.mlp_ratio)
    rotation = 6 * size + 12
    in_block = 5 * vision.patch_dim + vision.embed_dim * max(mlp, rotation)
    return int(max(13 * vision.patch_dim, in_block + 4 * vision.head_dim)) + 64


def _bytes_per_token(text: TextConfig, size: int) -> int:
    """Bytes alive for one token inside SwiGLU: five vectors, gate, up and product, the rotation."""
    vectors = size * (5 * text.hidden_size + 3 * text.intermediate_size)
    return vectors + 4 * text.head_dim + 64


def memory_available(device: torch.device) -> int | None:
    """Count the bytes that may still be taken on `device`; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    found = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    return min(found, default=None)


def _read_lora(adapter: str | Path, model: Qwen2VL) -> dict[str, LoraFactors]:
    settings, tensors = read_adapter(adapter)
    return read_lora(settings, tensors, model, where=str(tensors.folder))


def _fill(model: Qwen2VL, tensors: TensorFolder, device: torch.device, dtype: torch.dtype) -> None:
    """Move and cast tensor by tensor; a second full copy never exists."""
    state = {
        # A patch embedding stored as a matrix takes the Conv3d shape here.
        name: tensors[name].view(parameter.shape).to(device).to(dtype)
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(state, strict=True, assign=True)


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
    config: Qwen2VLConfig, device: torch.device, name: str, max_model_len: int, max_pixels: int
) -> torch.dtype:
    """Take the first dtype of those allowed whose memory is there.

    Raises:
        CapacityError: none fits.
    """
    if name != "auto" and name not in _DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use auto, {' or '.join(_DTYPES)}")
    allowed = [_DTYPES[name]] if name != "auto" else preferred_dtypes(device)
    available = memory_available(device)
    needs = [memory_needed(config, d, max_model_len, max_pixels) for d in allowed]
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
    raise CapacityError(_too_small(needs[-1], allowed[-1], available, max_model_len, max_pixels))


def preferred_dtypes(device: torch.device) -> list[torch.dtype]:
    """List what dtype "auto" tries on `device`; the first that fits into memory is taken."""
    if device.type == "cuda" or (device.type == "cpu" and _has_native_bf16()):
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16]


def _has_native_bf16() -> bool:
    """Linux says so; elsewhere float32 is the safe choice."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not _NATIVE_BF16.isdisjoint(cpuinfo.read_text().split())


def _too_small(
    need: MemoryNeed, dtype: torch.dtype, available: int, max_model_len: int, max_pixels: int
) -> str:
    ways = ["use a smaller model"]
    if dtype == torch.float32:
        ways.insert(0, "use dtype bfloat16")
    if need.weights < available:
        ways.insert(0, f"lower max_model_len ({max_model_len:,}) or max_pixels ({max_pixels:,})")
    return (
        f"the model needs {_gib(need.total)} in {str(dtype).removeprefix('torch.')} = "
        f"{_gib(need.weights)} weights + {_gib(need.cache)} cache + {_gib(need.activation)} "
        f"largest activation, but {_gib(available)} are available; {', or '.join(ways)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _meminfo_available() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages else None
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container (cgroup v2) may still take; its page cache can be given back."""
    limit = root / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    used = int((root / "memory.current").read_text())
    stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    return max(0, int(limit.read_text()) - used + int(stat.get("file", 0)))
