"""What is read: sources of samples, and how they become bins; set by a recipe or `data.KEY=VALUE`.

It must not know steps, ranks or rates. (Qwen2-VL sec. 2.2: mixtures of families of data.) Next
rooms: sources.py, plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen2vl.errors import ConfigError
from qwen2vl.synth import Mixture

__all__ = ["MANNERS", "DataConfig", "Source"]

FEWEST = 1000  # samples that a share is taken of at least, where there are so many

# How samples are fetched, kept and given up, not which: they may change in the course of a run.
MANNERS = frozenset(
    ("max_bad", "decode_seconds", "fetch_seconds", "retries", "concurrency", "cache", "cache_gb")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One body of samples: a file of conversations, packed text, or a piece of the world.

    Raises:
        ConfigError: neither a path nor a mixture, or a share that means nothing.
    """

    path: str = ""  # JSON lines, parquet, packed text; a pattern; here or at any fsspec address
    name: str = ""  # in metrics and reports; default: of the file, or "world"
    media: str = ""  # where relative names of media begin; default: beside the file
    mixture: Mixture | None = None  # the procedural world, instead of a path
    samples: int = 0  # of the world: how many make a pass
    repeats: float = 1.0  # how often a sample comes in a pass; 0.1: a fixed tenth of them comes
    weight: float = 0.0  # share of a pass, whatever the source's size; then repeats must stay 1

    def __post_init__(self) -> None:
        what = f"source {self.name or self.path or 'world'}"
        if bool(self.path) == (self.mixture is not None):
            raise ConfigError(f"{what}: give either a path or a mixture of the world")
        if self.mixture is not None and self.samples < 1:
            raise ConfigError(f"{what}: samples is {self.samples}; say how many make a pass")
        if self.repeats <= 0 or self.weight < 0 or (self.weight and self.repeats != 1):
            raise ConfigError(
                f"{what}: repeats is {self.repeats:g} and weight {self.weight:g}; repeats must be "
                "positive, weight not negative, and only one of them given"
            )

    @property
    def label(self) -> str:
        """What reports call it."""
        bare = self.path.rstrip("/").rpartition("/")[2].partition(".")[0]
        return self.name or ("world" if self.mixture else bare.replace("*", "") or "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What a stage reads instead of the endless world: sources, and how they become steps.

    Raises:
        ConfigError: no source, two of one name, some with a weight and some without, or a number
            that means nothing.
    """

    sources: tuple[Source, ...]
    max_tokens: int = 8192  # of a bin: what one forward reads
    max_vision: float = 0.0  # vision cost of a bin, in patches (lengths.vision_cost); 0 = no limit
    bins: int = 8  # in one optimizer step, over all ranks and batches
    oversize: Literal["refuse", "resize", "drop"] = "refuse"  # of samples larger than a bin
    max_bad: float = 0.01  # share of samples that may be bad before the run stops
    max_frames: int = 20_000  # of one video file, before frames are chosen
    decode_seconds: float = 60.0  # for one video
    fetch_seconds: float = 30.0  # for one object from elsewhere, each try
    retries: int = 4  # after a failed fetch, waiting longer each time
    concurrency: int = 16  # objects fetched at a time, in each worker
    video_preset: str = "paper"  # which frames of a video are taken
    cache: str = ""  # folder of length tables, plans and frames; default: in the user's cache
    cache_gb: float = 20.0  # of decoded frames; 0 = keep none

    def __post_init__(self) -> None:
        names = [source.label for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"data: sources are {names}; give at least one, each its own name")
        if len({source.weight > 0 for source in self.sources}) > 1:
            raise ConfigError(f"data: give all of {', '.join(names)} a weight, or none of them")
        for name, least in (("max_tokens", 64), ("bins", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} is {getattr(self, name)}, must be {least} or more")

    def tolerates(self, bad: int, seen: int, total: int) -> bool:
        """Say whether so many of the samples `seen` so far, of `total`, may be bad.

        Of the first few a share says little: it is taken of FEWEST at least, or of all there are.
        """
        return bad <= self.max_bad * max(seen, min(FEWEST, total))
