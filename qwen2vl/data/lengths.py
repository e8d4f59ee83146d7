"""How large every sample of a source is, found out from headers once and kept on disk.

    sample   tokens  targets  vision   grids
    0           411       36   1,903   (1, 30, 46)
    1           102       80       0
    2             0        0       0   bad: missing

The schedule packs by these numbers before anything is decoded. A table is named by the source's
content and by all that decides sizes (tokenizer, pixel limits, preset), but not by the files that
media lie in: bad samples are measured again at each opening, and a good one whose files change
later is found out when it is prepared. It must not know bins. Next room: corpus.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from qwen2vl.config import VisionConfig
from qwen2vl.data.disk_cache import Arrays, keep
from qwen2vl.data.formats import Sample, SampleError
from qwen2vl.data.preprocess import Measurer
from qwen2vl.data.sources.packed_text import TokenStore
from qwen2vl.data.sources.source import Samples
from qwen2vl.geometry import Grid

__all__ = ["Lengths", "Progress", "Size", "measure", "size_of", "vision_cost"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what, how many are done, of how many

VERSION = 1  # of the table; another one makes old tables strangers
CHUNK = 128  # samples that a worker measures at a time


@dataclass(frozen=True, slots=True)
class Lengths:
    """One row a sample."""

    tokens: np.ndarray  # int32; 0 for a bad sample
    targets: np.ndarray  # int32, tokens that carry loss
    vision: np.ndarray  # float64, what the tower pays, in patches
    grids_K3: np.ndarray  # int32, of all items, sample after sample
    starts: np.ndarray  # int64, where each sample's grids begin, and where the last end
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)  # index -> (reason, text)

    def __len__(self) -> int:
        return len(self.tokens)

    def digest(self) -> str:
        """Name all sizes; why a bad sample is bad may be told in other words the next time."""
        whole = blake2b(digest_size=16)
        for array in (self.tokens, self.targets, self.vision, self.grids_K3, self.starts):
            whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()


class Size(NamedTuple):
    """One sample's row."""

    tokens: int
    targets: int
    grids: tuple[Grid, ...]
    bad: tuple[str, str] | None = None  # reason, text

    def vision(self, vision: VisionConfig) -> float:
        """Tell what the tower pays for it, in patches."""
        return float(vision_cost(_grids_of([self]), vision).sum())


def vision_cost(grids_K3: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Weigh items by what the tower computes: patches, each frame's attention on top.

    A block multiplies a patch of width d by 8 d^2 + 4 d f numbers, and by 4 d n of the n patches
    in its frame: n patches of one frame cost n (1 + n / (2 d + f)).
    """
    width = vision.embed_dim
    frame = (grids_K3[:, 1] * grids_K3[:, 2]).astype(np.float64)
    return grids_K3[:, 0] * frame * (1 + frame / (2 * width + width * vision.mlp_ratio))


def measure(
    source: Samples,
    measurer: Measurer,
    *,
    cache: Path,
    label: str,
    workers: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Lengths, str]:
    """Measure a source, of a table that is on disk only what is bad; gives table and its name."""
    key = _key(source, measurer)
    if isinstance(source, TokenStore):
        return _of_text(source), key

    def make(indices: Sequence[int]) -> Arrays:
        rows = _rows(source, indices, measurer, label, workers, progress)
        return _arrays(rows, measurer.config.vision)

    def mender(held: Arrays) -> Callable[[], Arrays] | None:
        bad = [index for index, *_ in _bad_of(held)]
        return (lambda: _mended(held, bad, make(bad))) if bad else None

    path = cache / "lengths" / f"{key}.npz"
    arrays = dict(keep(path, lambda: make(range(len(source))), mender=mender))
    told = _bad_of(arrays)
    del arrays["bad"]
    return Lengths(**arrays, bad={i: (reason, text) for i, reason, text in told}), key


def _key(source: Samples, measurer: Measurer) -> str:
    about = [
        VERSION,
        source.fingerprint(),
        source.base,
        measurer.tokenizer.digest(),
        asdict(measurer.pixels),
        asdict(measurer.config.vision),
        measurer.video_preset,
        measurer.limits.max_frames,
    ]
    return blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()


class _Chunks(Dataset[list[Size]]):
    """Samples of a source by their numbers, so many of them measured in one go."""

    def __init__(self, source: Samples, indices: Sequence[int], measurer: Measurer) -> None:
        self.source, self.indices, self.measurer = source, indices, measurer

    def __len__(self) -> int:
        return -(-len(self.indices) // CHUNK)

    def __getitem__(self, number: int) -> list[Size]:
        samples: list[Sample | SampleError] = []
        for index in self.indices[number * CHUNK : (number + 1) * CHUNK]:
            try:
                samples.append(self.source.read(index, pixels=False))
            except SampleError as error:
                samples.append(error)
        self.measurer.fetch(s for s in samples if not isinstance(s, SampleError))
        return [size_of(sample, self.measurer) for sample in samples]


def size_of(sample: Sample | SampleError, measurer: Measurer) -> Size:
    """Measure one sample; one that could not even be read is bad."""
    try:
        if isinstance(sample, SampleError):
            raise sample
        made = measurer.prepare(sample)
    except SampleError as error:
        return Size(0, 0, (), (error.reason, str(error)))
    assert made.loss_mask is not None
    return Size(len(made.input_ids), sum(made.loss_mask[1:]), tuple(made.grids))


def _rows(
    source: Samples,
    indices: Sequence[int],
    measurer: Measurer,
    label: str,
    workers: int,
    progress: Progress,
) -> list[Size]:
    logger.info("measuring %s samples of %s", f"{len(indices):,}", label)
    rows: list[Size] = []
    loader = DataLoader(
        _Chunks(source, indices, measurer),
        batch_size=None,
        num_workers=workers if len(indices) > CHUNK else 0,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # the global one is a checkpoint's
    )
    for chunk in loader:
        rows += chunk
        progress(f"measuring {label}", len(rows), len(indices))
    return rows


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


def _arrays(rows: Sequence[Size], vision: VisionConfig) -> Arrays:
    grids_K3 = _grids_of(rows)
    starts = np.cumsum([0, *(len(row.grids) for row in rows)])
    owner = np.repeat(np.arange(len(rows)), np.diff(starts))
    bad = [[i, *row.bad] for i, row in enumerate(rows) if row.bad]
    return {
        "tokens": np.array([row.tokens for row in rows], np.int32),
        "targets": np.array([row.targets for row in rows], np.int32),
        "vision": np.bincount(owner, vision_cost(grids_K3, vision), minlength=len(rows)),
        "grids_K3": grids_K3,
        "starts": starts,
        "bad": _bad_array(bad),
    }


def _mended(held: Arrays, bad: Sequence[int], fresh: Arrays) -> Arrays:
    """Put rows that were measured again into the places of the bad ones, which had no grids."""
    made = {name: held[name].copy() for name in ("tokens", "targets", "vision")}
    for name, column in made.items():
        column[bad] = fresh[name]
    more, counts = np.diff(fresh["starts"]), np.diff(held["starts"])
    counts[bad] = more
    places = np.repeat(held["starts"][bad], more)
    return {
        **made,
        "grids_K3": np.insert(held["grids_K3"], places, fresh["grids_K3"], axis=0),
        "starts": np.cumsum([0, *counts]),
        "bad": _bad_array([[bad[i], *why] for i, *why in _bad_of(fresh)]),
    }


def _bad_array(bad: Sequence[Sequence[int | str]]) -> np.ndarray:
    return np.frombuffer(json.dumps(bad).encode(), np.uint8)


def _bad_of(arrays: Arrays) -> list[tuple[int, str, str]]:
    """List index, reason and text of each bad sample."""
    return [(i, reason, text) for i, reason, text in json.loads(arrays["bad"].tobytes())]


def _grids_of(rows: Sequence[Size]) -> np.ndarray:
    return np.array([grid for row in rows for grid in row.grids], np.int32).reshape(-1, 3)


def _of_text(store: TokenStore) -> Lengths:
    tokens = store.lengths().astype(np.int32)
    return Lengths(
        tokens=tokens,
        targets=tokens - 1,
        vision=np.zeros(len(tokens)),
        grids_K3=np.zeros((0, 3), np.int32),
        starts=np.zeros(len(tokens) + 1, np.int64),
    )
