"""Engine configuration: step limits, KV cache and encoder cache sizes, speculative decoding.

The defaults fit any machine. The model's own configuration is in qwen2vl/config.py, the parameters
of a request in engine/sampling/params.py. (vLLM: SchedulerConfig, CacheConfig, SpeculativeConfig.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from qwen2vl.errors import ConfigError, abbreviate

__all__ = ["EngineConfig"]

MIB = 1024**2
# Field -> smallest and largest value; the largest catch typing errors, and fit into an int64.
RANGES = {
    "max_num_seqs": (1, 65_536),
    "max_num_batched_tokens": (32, 2**31),
    "max_num_encoder_patches": (4, 2**31),
    "num_speculative_tokens": (0, 1024),
    "kv_cache_tokens": (2, 2**40),
    "encoder_cache_bytes": (0, 2**60),
    "encoder_cache_disk_bytes": (0, 2**60),
    "item_cache_bytes": (0, 2**60),
    "streamed_video_bytes": (0, 2**60),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine step, and sizes of the caches that persist between requests.

    Raises:
        ConfigError: a value is out of its range or of the wrong type.
    """

    max_num_seqs: int = 16  # requests that run at the same time; others wait
    max_num_batched_tokens: int = 2048  # per step; longer prompts are prefilled in chunks
    max_num_encoder_patches: int = 4096  # per step; one larger frame is encoded alone
    num_speculative_tokens: int = 0  # draft tokens per request and step; 0: none
    kv_cache_tokens: int | None = None  # capacity of the KV cache; None: by available memory
    encoder_cache_bytes: int = 512 * MIB  # vision embeddings kept in memory
    encoder_cache_dir: str | Path | None = None  # vision embeddings on disk; None: none
    encoder_cache_disk_bytes: int = 4096 * MIB  # limit of that folder; oldest are evicted
    item_cache_bytes: int = 256 * MIB  # preprocessed images and videos
    streamed_video_bytes: int = 64 * MIB  # a larger video is decoded while it is prefilled
    cuda_graphs: bool = True  # on a GPU, capture decode steps as CUDA graphs and replay them

    def __post_init__(self) -> None:
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(
                f"cuda_graphs: got {abbreviate(self.cuda_graphs)}, must be True or False"
            )
        if not isinstance(self.encoder_cache_dir, (str, os.PathLike, type(None))):
            raise ConfigError(
                f"encoder_cache_dir: got {abbreviate(self.encoder_cache_dir)}, must be a folder, "
                "or None for no cache on disk"
            )
        for name, (minimum, maximum) in RANGES.items():
            value = getattr(self, name)
            if name == "kv_cache_tokens" and value is None:
                continue
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_number or not minimum <= value <= maximum:
                raise ConfigError(
                    f"{name}: got {abbreviate(value)}, must be a whole number from {minimum:,} to "
                    f"{maximum:,}"
                )
