"""How a process answers: the sizes of steps and caches, with defaults that are safe anywhere.

What the model is stands in qwen2vl.config; what one request wants in params.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from qwen2vl.errors import ConfigError

__all__ = ["EngineConfig"]

MIB = 1024**2
LEAST = {"max_step_tokens": 32, "max_step_patches": 4, "max_sequences": 1, "num_drafts": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Budgets of a step, and room for what is kept between requests.

    Raises:
        ConfigError: a number is too small, or is none.
    """

    max_sequences: int = 16  # answered at the same time; the others wait
    max_step_tokens: int = 2048  # of all sequences in one step; longer prompts take several
    max_step_patches: int = 4096  # encoded in one step; a single larger frame goes alone
    num_drafts: int = 0  # guesses at the next tokens, verified together; 0: none
    cache_tokens: int | None = None  # keys and values kept, in tokens; None: by memory
    vision_cache_bytes: int = 512 * MIB  # vision rows kept in memory
    vision_cache_dir: str | Path | None = None  # and on disk; None: not on disk
    vision_disk_bytes: int = 4096 * MIB
    item_cache_bytes: int = 256 * MIB  # patches of pictures and clips that may be shown again
    graphs: bool = True  # on a GPU, record steps of decode and replay them

    def __post_init__(self) -> None:
        if not isinstance(self.graphs, bool):
            raise ConfigError(f"graphs: got {self.graphs!r}, must be True or False")
        for f in fields(self):
            value = getattr(self, f.name)
            is_free = f.name == "cache_tokens" and value is None
            if is_free or f.name in ("graphs", "vision_cache_dir"):
                continue
            least = LEAST.get(f.name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{f.name}: got {value!r}, must be a whole number from {least}")
