"""Engine configuration: step limits, KV cache and encoder cache sizes, speculative decoding.

The defaults fit any machine. The model's own configuration is in qwen2vl/config.py, the parameters
of a request in engine/sampling/params.py. (vLLM: SchedulerConfig, CacheConfig, SpeculativeConfig.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from qwen2vl.errors import ConfigError

__all__ = ["EngineConfig"]

MIB = 1024**2
MINIMUMS = {
    "max_num_batched_tokens": 32,
    "max_num_encoder_patches": 4,
    "max_num_seqs": 1,
    "num_speculative_tokens": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one engine step, and sizes of the caches that persist between requests.

    Raises:
        ConfigError: a value is too small or of the wrong type.
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
    cuda_graphs: bool = True  # on a GPU, capture decode steps as CUDA graphs and replay them

    def __post_init__(self) -> None:
        if not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs: got {self.cuda_graphs!r}, must be True or False")
        for f in fields(self):
            value = getattr(self, f.name)
            is_unset = f.name == "kv_cache_tokens" and value is None
            if is_unset or f.name in ("cuda_graphs", "encoder_cache_dir"):
                continue
            minimum = MINIMUMS.get(f.name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ConfigError(f"{f.name}: got {value!r}, must be a whole number from {minimum}")
