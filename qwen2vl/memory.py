"""How much memory a model takes at work, and how much is there.

Arithmetic on a config, and what the system says about itself; nothing is allocated. It must not
know files of weights. Next room: load.py, which compares the two before it reads anything large.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from qwen2vl.config import Qwen2VLConfig, TextConfig, VisionConfig
from qwen2vl.linear import prepacked
from qwen2vl.quantization.scheme import HEAD, Kind
from qwen2vl.weights import expected_shapes

__all__ = ["MemoryNeed", "memory_available", "memory_needed"]


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


def memory_needed(
    config: Qwen2VLConfig,
    dtype: torch.dtype,
    max_model_len: int,
    max_pixels: int,
    kinds: Mapping[str, Kind] | None = None,
    *,
    packs: bool = False,
) -> MemoryNeed:
    """Estimate the memory of one sequence at work, closely and from above.

    `kinds` are the layers that are quantized. With `packs` large layers are packed, where that is
    done in this dtype: a tied head is then a matrix beside the embedding.
    """
    text = config.text
    weights = _bytes_of_weights(config, dtype, kinds or {})
    in_head = text.vocab_size * text.hidden_size
    is_packed = packs and dtype == torch.bfloat16 and in_head >= prepacked.LARGE
    if text.tie_word_embeddings and is_packed and HEAD not in (kinds or {}):
        weights += in_head * dtype.itemsize
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize
    num_patches = max_pixels // config.vision.patch_size**2
    in_tower = num_patches * _bytes_per_patch(config.vision, dtype.itemsize)
    is_joined = bool(kinds) or (packs and dtype == torch.bfloat16)
    in_decoder = max_model_len * _bytes_per_token(text, dtype.itemsize, is_joined=is_joined)
    return MemoryNeed(weights, cache * max_model_len, max(in_tower, in_decoder))


def memory_available(device: torch.device) -> int | None:
    """Count the bytes that may still be taken on `device`; None where that cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    found = [n for n in (_meminfo_available(), _cgroup_available()) if n is not None]
    return min(found, default=None)


def _bytes_of_weights(config: Qwen2VLConfig, dtype: torch.dtype, kinds: Mapping[str, Kind]) -> int:
    shapes = expected_shapes(config)
    if HEAD in kinds:  # beside the embedding, also where it is tied
        shapes[f"{HEAD}.weight"] = (config.text.vocab_size, config.text.hidden_size)
    total = 0
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        is_quantized = layer in kinds and leaf == "weight"
        total += kinds[layer].num_bytes(*shape) if is_quantized else prod(shape) * dtype.itemsize
    return total


def _bytes_per_patch(vision: VisionConfig, size: int) -> int:
    """Bytes alive for one patch in the widest moment of the tower.

    Embedding: the patch in uint8, float32 and bfloat16. A block: uint8 and float32 patch, then
    either the MLP (input, residual, normed; its width before, within and after the activation) or
    the rotation (six vectors, and a query in float32 being taken apart).
    """
    mlp = size * (3 + 3 * vision.mlp_ratio)
    rotation = 6 * size + 12
    in_block = 5 * vision.patch_dim + vision.embed_dim * max(mlp, rotation)
    embedding = 7 * vision.patch_dim + size * vision.embed_dim
    return int(max(embedding, in_block + 4 * vision.head_dim)) + 96


def _bytes_per_token(text: TextConfig, size: int, *, is_joined: bool) -> int:
    """Bytes alive for one token inside SwiGLU: five vectors, gate, up and product, the rotation.

    Joined (linear/fused.py), the outputs of gate and up stay until the product is there.
    """
    parts = 4 if is_joined else 3
    vectors = size * (5 * text.hidden_size + parts * text.intermediate_size)
    return vectors + 4 * text.head_dim + 64


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
