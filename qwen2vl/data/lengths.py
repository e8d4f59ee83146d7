"""Sample lengths: tokens, supervised tokens and grids of every sample of a source, from headers.

    sample   tokens  targets  vision   grids
    0           411       36   1,903   (1, 30, 46)
    1           102       80       0
    2             0        0       0   bad: missing

Bins are packed by these numbers before any media are decoded; columns of the rows that nothing is
made of are counted by name, and so are the notes about rows. A table is cached on disk under a key
of the source's content and of all settings that decide sizes (tokenizer, pixel limits, preset), but
not of the media files: bad samples are measured again whenever a source is opened, and a good
sample whose media change later is detected when it is prepared.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from qwen2vl.config import VisionConfig
from qwen2vl.data.array_cache import Arrays, load_or_create
from qwen2vl.data.formats import Sample, SampleError, TextTokens
from qwen2vl.data.preprocess import HeaderPreprocessor
from qwen2vl.data.sources.packed_text import TokenStore
from qwen2vl.data.sources.source import SampleSource
from qwen2vl.data.workers import iterate_in_workers
from qwen2vl.geometry import Grid

__all__ = [
    "LengthTable",
    "ProgressCallback",
    "SampleSize",
    "measure_lengths",
    "measure_sample",
    "vision_cost",
]

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]  # label, number done, total

# Versions of what a table is computed from and of its file: the first is part of the key, and so of
# the fingerprint of a run's data; the second invalidates cached tables only.
KEY_VERSION = 1
TABLE_VERSION = 4
_COUNTS = ("unused", "notes")  # arrays of counts by name
CHUNK_SIZE = 128  # samples per item of the DataLoader that measures


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Sizes of all samples of a source, one row per sample."""

    tokens: np.ndarray  # int32; 0 for a bad sample
    targets: np.ndarray  # int32, supervised tokens
    vision: np.ndarray  # float64, cost in the vision tower, in patches
    grids_K3: np.ndarray  # int32, of all items, in the order of the samples
    starts: np.ndarray  # int64, index of each sample's first grid, and the number of all grids
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # index -> (reason, text)
    unused: Mapping[str, int] = field(default_factory=dict)  # column -> good samples that have it
    notes: Mapping[str, int] = field(default_factory=dict)  # note -> good samples that it is about

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Hash all sizes, not the texts of bad samples, which may differ from run to run."""
        digest = blake2b(digest_size=16)
        for array in (self.tokens, self.targets, self.vision, self.grids_K3, self.starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class SampleSize(NamedTuple):
    """Sizes of one sample: a row of a LengthTable."""

    tokens: int
    targets: int
    grids: tuple[Grid, ...]
    bad: tuple[str, str] | None = None  # reason, text
    unused: tuple[str, ...] = ()  # columns
    notes: tuple[str, ...] = ()

    def vision_cost(self, vision: VisionConfig) -> float:
        """Return the cost of the sample in the vision tower, in patches."""
        return float(vision_cost(_stack_grids([self]), vision).sum())


def vision_cost(grids_K3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Estimate the vision tower's compute per item: patches, plus attention within each frame.

    A block multiplies a patch of width d by 8 d^2 + 4 d f numbers, and by 4 d n for the n patches
    of its frame: the n patches of one frame cost n (1 + n / (2 d + f)).
    """
    width = vision.embed_dim
    patches_per_frame = (grids_K3[:, 1] * grids_K3[:, 2]).astype(np.float64)
    return (
        grids_K3[:, 0]
        * patches_per_frame
        * (1 + patches_per_frame / (2 * width + width * vision.mlp_ratio))
    )


def measure_lengths(
    source: SampleSource,
    preprocessor: HeaderPreprocessor,
    *,
    cache_dir: Path,
    label: str,
    num_workers: int = 0,
    progress: ProgressCallback = lambda what, done, total: None,
) -> tuple[LengthTable, str]:
    """Measure a source, of a cached table only the bad samples; returns the table and its key."""
    key = _table_key(source, preprocessor)
    if isinstance(source, TokenStore):
        return _text_lengths(source), key

    def measure(indices: Sequence[int]) -> Arrays:
        sizes = _measure_samples(source, indices, preprocessor, label, num_workers, progress)
        return _to_arrays(sizes, preprocessor.config.vision)

    def refresh(stored: Arrays) -> Callable[[], Arrays] | None:
        bad = [index for index, *_ in _bad_samples(stored)]
        return (lambda: _merge_remeasured(stored, bad, measure(bad))) if bad else None

    path = cache_dir / "lengths" / f"{key}-{TABLE_VERSION}.npz"
    arrays = dict(load_or_create(path, lambda: measure(range(len(source))), refresh=refresh))
    bad = {i: (reason, text) for i, reason, text in _bad_samples(arrays)}
    unused, notes = (_read_counts(arrays, name) for name in _COUNTS)
    del arrays["bad"], arrays["unused"], arrays["notes"]
    return LengthTable(**arrays, bad=bad, unused=unused, notes=notes), key


def _table_key(source: SampleSource, preprocessor: HeaderPreprocessor) -> str:
    settings = [
        KEY_VERSION,
        source.fingerprint(),
        source.media_root,
        preprocessor.tokenizer.digest(),
        asdict(preprocessor.pixels),
        asdict(preprocessor.config.vision),
        preprocessor.video_preset,
        preprocessor.limits.max_frames,
    ]
    return blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


class _ChunkDataset(Dataset[list[SampleSize]]):
    """Samples of a source by index; an item of the dataset is a chunk of measured samples."""

    def __init__(
        self, source: SampleSource, indices: Sequence[int], preprocessor: HeaderPreprocessor
    ) -> None:
        self.source, self.indices, self.preprocessor = source, indices, preprocessor

    def __len__(self) -> int:
        return -(-len(self.indices) // CHUNK_SIZE)

    def __getitem__(self, chunk: int) -> list[SampleSize]:
        samples: list[Sample | SampleError] = []
        for index in self.indices[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]:
            try:
                samples.append(self.source.read(index, pixels=False))
            except SampleError as error:
                samples.append(error)
        self.preprocessor.prefetch(
            sample for sample in samples if not isinstance(sample, SampleError)
        )
        return [measure_sample(sample, self.preprocessor) for sample in samples]


def measure_sample(sample: Sample | SampleError, preprocessor: HeaderPreprocessor) -> SampleSize:
    """Measure one sample; a sample that cannot be read is bad too."""
    try:
        if isinstance(sample, SampleError):
            raise sample
        processed = preprocessor.prepare(sample)
    except SampleError as error:
        return SampleSize(0, 0, (), (error.reason, str(error)))
    assert processed.loss_mask is not None
    size = SampleSize(
        len(processed.input_ids), sum(processed.loss_mask[1:]), tuple(processed.grids)
    )
    if isinstance(sample, TextTokens):
        return size
    return size._replace(unused=sample.unused, notes=sample.notes)


def _measure_samples(
    source: SampleSource,
    indices: Sequence[int],
    preprocessor: HeaderPreprocessor,
    label: str,
    num_workers: int,
    progress: ProgressCallback,
) -> list[SampleSize]:
    logger.info("measuring %s samples of %s", f"{len(indices):,}", label)
    sizes: list[SampleSize] = []
    chunks = iterate_in_workers(
        _ChunkDataset(source, indices, preprocessor),
        num_workers=num_workers if len(indices) > CHUNK_SIZE else 0,
    )
    for chunk in chunks:
        sizes += chunk
        progress(f"measuring {label}", len(sizes), len(indices))
    return sizes


def _to_arrays(sizes: Sequence[SampleSize], vision: VisionConfig) -> Arrays:
    grids_K3 = _stack_grids(sizes)
    starts = np.cumsum([0, *(len(size.grids) for size in sizes)])
    sample_of_grid = np.repeat(np.arange(len(sizes)), np.diff(starts))
    bad = [[i, *size.bad] for i, size in enumerate(sizes) if size.bad]
    return {
        "tokens": np.array([size.tokens for size in sizes], np.int32),
        "targets": np.array([size.targets for size in sizes], np.int32),
        "vision": np.bincount(sample_of_grid, vision_cost(grids_K3, vision), minlength=len(sizes)),
        "grids_K3": grids_K3,
        "starts": starts,
        "bad": _encode_json(bad),
        "unused": _encode_json(Counter(name for size in sizes for name in size.unused)),
        "notes": _encode_json(Counter(note for size in sizes for note in size.notes)),
    }


def _merge_remeasured(stored: Arrays, bad: Sequence[int], fresh: Arrays) -> Arrays:
    """Replace the rows of bad samples, which have no grids, by their new measurements."""
    merged = {name: stored[name].copy() for name in ("tokens", "targets", "vision")}
    for name, column in merged.items():
        column[bad] = fresh[name]
    num_new, counts = np.diff(fresh["starts"]), np.diff(stored["starts"])
    counts[bad] = num_new
    positions = np.repeat(stored["starts"][bad], num_new)
    return {
        **merged,
        "grids_K3": np.insert(stored["grids_K3"], positions, fresh["grids_K3"], axis=0),
        "starts": np.cumsum([0, *counts]),
        "bad": _encode_json([[bad[i], *why] for i, *why in _bad_samples(fresh)]),
        **{
            name: _encode_json(_read_counts(stored, name) + _read_counts(fresh, name))
            for name in _COUNTS
        },
    }


def _encode_json(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _read_counts(arrays: Arrays, name: str) -> Counter[str]:
    """Return how many good samples have each unused column, or each note."""
    return Counter(json.loads(arrays[name].tobytes()))


def _bad_samples(arrays: Arrays) -> list[tuple[int, str, str]]:
    """Return (index, reason, text) of each bad sample."""
    return [(i, reason, text) for i, reason, text in json.loads(arrays["bad"].tobytes())]


def _stack_grids(sizes: Sequence[SampleSize]) -> np.ndarray:
    return np.array([grid for size in sizes for grid in size.grids], np.int32).reshape(-1, 3)


def _text_lengths(store: TokenStore) -> LengthTable:
    tokens = store.lengths().astype(np.int32)
    return LengthTable(
        tokens=tokens,
        targets=tokens - 1,
        vision=np.zeros(len(tokens)),
        grids_K3=np.zeros((0, 3), np.int32),
        starts=np.zeros(len(tokens) + 1, np.int64),
    )
