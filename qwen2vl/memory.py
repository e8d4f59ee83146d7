"""Memory estimates: bytes for weights, KV cache and activations, bytes available, and the dtype.

Computed from a config and from what the system reports; nothing is allocated. `choose_dtype` is
called before weights are read, and refuses a model that does not fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Literal

import torch

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.errors import CapacityError, InputError, abbreviate
from qwen2vl.linear import prepacked
from qwen2vl.linear.cpu.library import load_kernels
from qwen2vl.model import Int8KVCache, KVCache
from qwen2vl.quantization.scheme import LM_HEAD, LayerScheme
from qwen2vl.weights import expected_shapes

__all__ = [
    "DTypeName",
    "KVCacheDTypeName",
    "MemoryEstimate",
    "available_memory",
    "choose_dtype",
    "estimate_memory",
    "kv_cache_class",
    "matmul_dtype",
    "preferred_dtypes",
]

logger = logging.getLogger(__name__)

DTypeName = Literal["auto", "float32", "bfloat16"]
KVCacheDTypeName = Literal["auto", "int8"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_CACHES = {"auto": KVCache, "int8": Int8KVCache}  # by kv_cache_dtype; auto: the model's dtype

# Flags in /proc/cpuinfo of processors with bfloat16 instructions: x86, then ARM.
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that inference with a model needs, by purpose."""

    weights: int
    kv_cache: int  # of one request of max_model_len tokens
    activation: int  # the peak: of an image in the vision tower, or of a prompt in the decoder

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.weights + self.kv_cache + self.activation


def estimate_memory(
    config: Qwen2VLConfig,
    dtype: torch.dtype,
    max_model_len: int,
    max_pixels: int,
    schemes: Mapping[str, LayerScheme] | None = None,
    *,
    prepack: bool = False,
    kv_cache: type[KVCache] = KVCache,
) -> MemoryEstimate:
    """Estimate the memory of inference with one request: a tight upper bound.

    `schemes` are those of the quantized layers. With `prepack` large bfloat16 layers are prepacked;
    a tied head is then a matrix beside the embedding. `kv_cache` is the class of its KV cache.
    """
    text = config.text
    weights = _bytes_of_weights(config, dtype, schemes or {})
    head_numel = text.vocab_size * text.hidden_size
    is_prepacked = prepack and dtype == torch.bfloat16 and head_numel >= prepacked.MIN_PREPACK_NUMEL
    if text.tie_word_embeddings and is_prepacked and LM_HEAD not in (schemes or {}):
        weights += head_numel * dtype.itemsize
    kv_bytes = kv_cache.bytes_per_token(text, dtype)
    num_patches = max_pixels // config.vision.patch_size**2
    in_tower = num_patches * _bytes_per_patch(config.vision, dtype.itemsize)
    in_decoder = max_model_len * _bytes_per_token(text, dtype.itemsize)
    return MemoryEstimate(weights, kv_bytes * max_model_len, max(in_tower, in_decoder))


def kv_cache_class(kv_cache_dtype: str, device: torch.device) -> type[KVCache]:
    """Return the class of the KV caches of a `kv_cache_dtype`.

    Raises:
        InputError: there is no such dtype, or not on this device.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in _KV_CACHES:
        raise InputError(
            f"kv_cache_dtype: got {abbreviate(kv_cache_dtype)}, must be {' or '.join(_KV_CACHES)}"
        )
    if kv_cache_dtype != "auto" and device.type != "cpu":
        raise InputError(
            f"kv_cache_dtype: got {kv_cache_dtype} on {device}, but the int8 KV cache is for the "
            "CPU; use auto, or device cpu"
        )
    return _KV_CACHES[kv_cache_dtype]


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on `device`; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    limits = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    return min(limits, default=None)


def _bytes_of_weights(
    config: Qwen2VLConfig, dtype: torch.dtype, schemes: Mapping[str, LayerScheme]
) -> int:
    shapes = expected_shapes(config)
    if LM_HEAD in schemes:  # beside the embedding, also where it is tied
        shapes[f"{LM_HEAD}.weight"] = (config.text.vocab_size, config.text.hidden_size)
    total = 0
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        is_quantized = layer in schemes and leaf == "weight"
        total += schemes[layer].num_bytes(*shape) if is_quantized else prod(shape) * dtype.itemsize
    return total


def _bytes_per_patch(vision: VisionConfig, size: int) -> int:
    """Return the bytes allocated for one patch at the vision tower's peak.

    Embedding: the patch in uint8, float32 and bfloat16. A block: uint8 and float32 patch, then
    either the MLP (input, residual, normed; its width before, within and after the activation,
    which overwrites them on a CPU only) or the rotation (six vectors, and a query in float32 being
    split).
    """
    mlp = size * (3 + 3 * vision.mlp_ratio)
    rotation = 6 * size + 12
    in_block = 5 * vision.patch_dim + vision.embed_dim * max(mlp, rotation)
    embedding = 7 * vision.patch_dim + size * vision.embed_dim
    return int(max(embedding, in_block + 4 * vision.head_dim)) + 96


def _bytes_per_token(text: TextConfig, size: int) -> int:
    """Return the bytes allocated for one token at the decoder's peak, inside SwiGLU.

    Five vectors; gate, up and their product; the rotation.
    """
    vectors = size * (5 * text.hidden_size + 3 * text.intermediate_size)
    return vectors + 4 * text.head_dim + 64


def _meminfo_available() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * os.sysconf("SC_PAGE_SIZE") if pages else None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes a container (cgroup v2) can still allocate; page cache is reclaimable."""
    limit = root / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None
    used = int((root / "memory.current").read_text())
    stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    return max(0, int(limit.read_text()) - used + int(stat.get("file", 0)))


def choose_dtype(
    config: Qwen2VLConfig,
    device: torch.device,
    name: str,
    max_model_len: int,
    max_pixels: int,
    schemes: Mapping[str, LayerScheme] | None = None,
    kv_cache_dtype: str = "auto",
) -> torch.dtype:
    """Return the first allowed dtype whose memory estimate fits into the available memory.

    Raises:
        CapacityError: none fits.
        InputError: `name` or `kv_cache_dtype` is unknown, or the latter not for this device.
    """
    kv_cache = kv_cache_class(kv_cache_dtype, device)
    if name != "auto" and name not in _DTYPES:
        raise InputError(f"dtype {name!r} is unknown; use auto, {' or '.join(_DTYPES)}")
    allowed = [_DTYPES[name]] if name != "auto" else preferred_dtypes(device)
    available = available_memory(device)
    prepack = device.type == "cpu" and prepacked.can_prepack() and load_kernels() is None
    needs = [
        estimate_memory(
            config, d, max_model_len, max_pixels, schemes, prepack=prepack, kv_cache=kv_cache
        )
        for d in allowed
    ]
    for candidate, need in zip(allowed, needs, strict=True):
        if available is None or need.total <= available:
            if candidate is not allowed[0]:
                logger.warning(
                    "dtype auto: float32 needs %s and %s are available: taking bfloat16, which "
                    "this processor computes slowly",
                    _gib(needs[0].total),
                    _gib(available or 0),
                )
            return candidate
    assert available is not None
    remedies = [f"lower max_model_len ({max_model_len:,}) or max_pixels ({max_pixels:,})"]
    if needs[-1].weights >= available:
        remedies.clear()  # the weights alone are too large
    if device.type == "cpu" and kv_cache is KVCache:
        int8_bytes = max_model_len * Int8KVCache.bytes_per_token(config.text, allowed[-1])
        if needs[-1].total - needs[-1].kv_cache + int8_bytes <= available:
            remedies.append("use kv_cache_dtype int8")
    if allowed[-1] == torch.float32:
        remedies.append("use dtype bfloat16")
    if device.type == "cpu" and not schemes:
        remedies.append("quantize to int8 or int4")
    raise CapacityError(
        _out_of_memory_message(
            needs[-1], allowed[-1], available, [*remedies, "use a smaller model"]
        )
    )


def preferred_dtypes(device: torch.device) -> list[torch.dtype]:
    """Return the dtypes that "auto" tries on `device`, in this order."""
    if device.type == "cuda" or (device.type == "cpu" and _has_native_bf16()):
        return [torch.bfloat16]
    return [torch.float32, torch.bfloat16]


def matmul_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of training's matrix products; auto: bfloat16 where the device has it.

    Without bfloat16 instructions a product takes ten times as long as in float32 (AVX2).
    """
    return preferred_dtypes(device)[0] if name == "auto" else _DTYPES[name]


@cache
def _has_native_bf16() -> bool:
    """Return whether the processor has bfloat16 instructions; False if not on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not _NATIVE_BF16.isdisjoint(cpuinfo.read_text().split())


def _out_of_memory_message(
    need: MemoryEstimate, dtype: torch.dtype, available: int, remedies: list[str]
) -> str:
    return (
        f"the model needs {_gib(need.total)} in {str(dtype).removeprefix('torch.')} = "
        f"{_gib(need.weights)} weights + {_gib(need.kv_cache)} cache + {_gib(need.activation)} "
        f"largest activation, but {_gib(available)} are available; {', or '.join(remedies)}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
