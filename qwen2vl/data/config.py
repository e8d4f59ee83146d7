"""Data configuration: the sources of a training stage and how their samples become packed bins.

Set by a recipe, or on the command line as `data.KEY=VALUE`. Steps, ranks and learning rates are in
train/config.py. (Qwen2-VL sec. 2.2: mixtures of dataset families.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen2vl.errors import ConfigError
from qwen2vl.synth import Mixture

__all__ = ["IO_OPTIONS", "DataConfig", "SourceConfig", "parse_sources"]

MIN_BAD_FRACTION_BASE = 1000  # samples; max_bad_fraction is a fraction of at least so many

# What an override may set of a source of files, and the types.
_SOURCE_FIELDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "name", "media_root"), (str,)),
    **dict.fromkeys(("repeats", "weight"), (int, float)),
}

# How samples are fetched, cached and given up, not which ones: may change when a run is resumed.
IO_OPTIONS = frozenset(
    (
        "max_bad_fraction",
        "decode_timeout",
        "fetch_timeout",
        "max_retries",
        "concurrency",
        "cache_dir",
        "frame_cache_gb",
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One data source: a file of conversations, packed text, or the synthetic world.

    Raises:
        ConfigError: neither a path nor a mixture, or repeats or weight out of range.
    """

    # JSON lines, parquet, packed text; a glob pattern; local or any fsspec address; or the name of
    # a training set of `qwen2vl fetch-data`: easy-vqa, fashion-mnist
    path: str = ""
    name: str = ""  # in metrics and reports; default: from the file name, or "world"
    media_root: str = ""  # base of relative media paths; default: the folder of the file
    mixture: Mixture | None = None  # of the synthetic world, instead of a path
    num_samples: int = 0  # of the synthetic world, in one epoch
    repeats: float = 1.0  # of each sample in an epoch; 0.1: a fixed tenth of the samples is used
    weight: float = 0.0  # share of an epoch, whatever the source's size; then repeats must stay 1

    def __post_init__(self) -> None:
        what = f"source {self.name or self.path or 'world'}"
        if bool(self.path) == (self.mixture is not None):
            raise ConfigError(f"{what}: give either a path or a mixture of the synthetic world")
        if self.mixture is not None and self.num_samples < 1:
            raise ConfigError(
                f"{what}: num_samples is {self.num_samples}; give the samples of one epoch"
            )
        if self.repeats <= 0 or self.weight < 0 or (self.weight and self.repeats != 1):
            raise ConfigError(
                f"{what}: repeats is {self.repeats:g} and weight {self.weight:g}; repeats must be "
                "positive, weight not negative, and only one of them given"
            )

    @property
    def label(self) -> str:
        """Name of the source in metrics and reports."""
        bare = self.path.rstrip("/").rpartition("/")[2].partition(".")[0]
        return self.name or ("world" if self.mixture else bare.replace("*", "") or "data")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Data of a training stage: its sources, bin capacities, error limits, fetching and caching.

    Raises:
        ConfigError: no source, two of one name, some with a weight and some without, or a number
            out of range.
    """

    sources: tuple[SourceConfig, ...]
    max_tokens: int = 8192  # of a bin, which is the input of one forward pass
    max_vision_cost: float = 0.0  # of a bin, in patches (lengths.vision_cost); 0 = no limit
    global_batch_size: int = 8  # bins per optimizer step, over all ranks and microbatches
    oversize: Literal["refuse", "resize", "drop"] = "refuse"  # of samples larger than a bin
    # Conversations of each file source that are held out of training, for evaluation: a share below
    # 1, or a number. Chosen by their content, so that equal ones are on the same side.
    validation_size: float = 0.0
    max_bad_fraction: float = 0.01  # of the samples; the run stops when more are bad
    max_frames: int = 20_000  # of one video file, before frame sampling
    decode_timeout: float = 60.0  # seconds, for one video
    fetch_timeout: float = 30.0  # seconds, for one remote object, each attempt
    max_retries: int = 4  # of a failed fetch, with exponential backoff
    concurrency: int = 16  # simultaneous fetches in each worker process
    video_preset: str = "paper"  # frame sampling rules
    cache_dir: str = ""  # for length tables, bin plans and frames; default: in the user's cache
    frame_cache_gb: float = 20.0  # limit of decoded frames on disk; 0 = no frame cache

    def __post_init__(self) -> None:
        names = [source.label for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"data: sources are {names}; give at least one, each its own name, as "
                'data.sources=[{"path": "a/rows.jsonl", "name": "a"}]'
            )
        if len({source.weight > 0 for source in self.sources}) > 1:
            raise ConfigError(f"data: give all of {', '.join(names)} a weight, or none of them")
        if not 0 <= self.validation_size < math.inf or (
            self.validation_size > 1 and self.validation_size % 1
        ):
            raise ConfigError(
                f"validation={self.validation_size:g}: give a share of the conversations below 1, "
                "a whole number of them, or a file of others"
            )
        for name, least in (
            ("max_tokens", 64),
            ("global_batch_size", 1),
            ("concurrency", 1),
            ("max_retries", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name} is {getattr(self, name)}, must be {least} or more")

    def tolerates(self, num_bad: int, num_seen: int, num_total: int) -> bool:
        """Return whether `num_bad` of the `num_seen` samples so far, of `num_total`, is acceptable.

        A fraction of the first few samples means little: the base is at least
        MIN_BAD_FRACTION_BASE samples, or all samples if there are fewer.
        """
        return num_bad <= self.max_bad_fraction * max(
            num_seen, min(MIN_BAD_FRACTION_BASE, num_total)
        )


def parse_sources(value: str, key: str) -> tuple[SourceConfig, ...]:
    """Parse the sources of a command line.

    Args:
        value: a path, paths with commas between them, or a JSON list of paths or of objects with
            the fields of SourceConfig.
        key: of the override, for errors.

    Raises:
        ConfigError: it is an empty or malformed list, or an object has another field.
    """
    try:
        items = json.loads(value) if value.startswith("[") else None
    except ValueError:
        items = None  # a pattern such as [ab].jsonl
    if isinstance(items, list):
        return tuple(_parse_source(item, f"{key}[{i}]") for i, item in enumerate(items))
    paths = [path.strip() for path in value.split(",")]
    if "://" in value or not all(paths) or Path(value).expanduser().exists():
        paths = [value]  # addresses, and names of files, may have a comma
    return tuple(SourceConfig(path=path) for path in paths)


def _parse_source(item: Any, where: str) -> SourceConfig:
    fields: Any = {"path": item} if isinstance(item, str) else item
    if not isinstance(fields, Mapping):
        raise ConfigError(f'{where} is {item!r}; give a path, or an object such as {{"path": ...}}')
    for name, value in fields.items():
        kinds = _SOURCE_FIELDS.get(name)
        if kinds is None:
            raise ConfigError(
                f"{where}: unknown field {name!r}; known are {', '.join(_SOURCE_FIELDS)}"
            )
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "text" if kinds == (str,) else "a number"
            raise ConfigError(f"{where}.{name} is {value!r}, must be {kind}")
    return SourceConfig(**fields)
