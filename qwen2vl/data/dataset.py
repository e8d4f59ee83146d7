"""PackedDataset: the samples of a training stage, packed into bins, with random access to any bin.

    sources --lengths.py--> length tables --bin_planner.py--> bins of an epoch
    samples of a bin --preprocess.py--> examples, and a list of the bad ones

The bins are the same in every epoch, their order is not (train/loader/data_order.py). All results
are functions of the sources' content, the config and the seed, identified by one fingerprint.
train/loader/dataloader.py reads the bins of a step; train/dry_run/report.py reports statistics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from qwen2vl.data.array_cache import load_or_create, resolve_cache_dir
from qwen2vl.data.bin_packing import BinPlan
from qwen2vl.data.bin_planner import BinPlanner, plan_from_arrays
from qwen2vl.data.config import DataConfig
from qwen2vl.data.formats import Sample, SampleError
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.lengths import LengthTable, ProgressCallback, measure_lengths
from qwen2vl.data.preprocess import (
    BadSample,
    HeaderPreprocessor,
    SamplePreprocessor,
    TrainingExample,
)
from qwen2vl.data.sources.source import SampleSource, open_source
from qwen2vl.files import evict_lru
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor

__all__ = ["PackedDataset"]

# Cache folders, and the bytes that each may hold of files that no run has opened for a month:
# local copies of remote text files, which runs continue to read, length tables and bin plans.
CACHE_LIMITS = {"text": 50 * 10**9, "lengths": 5 * 10**9, "plans": 5 * 10**9}
MIN_IDLE_SECONDS = 30 * 86400.0


@dataclass(frozen=True)
class PackedDataset:
    """All samples of a stage, numbered: entry e is sample e - offsets[s] of source s."""

    data: DataConfig
    processor: Processor
    sources: tuple[SampleSource, ...]
    labels: tuple[str, ...]
    lengths: tuple[LengthTable, ...]
    offsets: np.ndarray  # first entry of each source, and the number of all entries
    tokens: np.ndarray  # of every sample, after resizing; 0 for a bad or dropped one
    targets: np.ndarray
    held_out: np.ndarray  # entries of the validation split, which are in no bin
    resized: Mapping[int, int]  # entry -> pixel limit of its images, which makes it fit into a bin
    plan: BinPlan
    fingerprint: str
    cache_dir: Path
    _preprocessors: dict[tuple[int, int, int], SamplePreprocessor] = field(
        default_factory=dict, repr=False
    )

    @classmethod
    def open(
        cls,
        data: DataConfig,
        processor: Processor,
        *,
        seed: int,
        default_system: float = 0.0,
        num_workers: int = 0,
        progress: ProgressCallback = lambda what, done, total: None,
    ) -> PackedDataset:
        """Open a stage's sources, measure them, and pack their samples into bins.

        Args:
            default_system: share of synthetic conversations with the default system prompt.

        Raises:
            InputError: a source is missing or damaged, too many of its samples are bad, or some
                are larger than a bin.
            ConfigError: a source has no supported format, or there are too few samples for a step.
        """
        cache_dir = resolve_cache_dir(data.cache_dir)
        sources = [
            open_source(
                source,
                data,
                tokenizer=processor.tokenizer,
                cache_dir=cache_dir,
                seed=seed,
                default_system=default_system,
            )
            for source in data.sources
        ]
        labels = tuple(source.label for source in data.sources)
        tables = [
            measure_lengths(
                source,
                HeaderPreprocessor(processor, data, media_root=source.media_root),
                cache_dir=cache_dir,
                label=label,
                num_workers=num_workers,
                progress=progress,
            )
            for source, label in zip(sources, labels, strict=True)
        ]
        lengths = tuple(table for table, _ in tables)
        planner = BinPlanner(data, processor, sources, lengths, seed)
        planner.raise_if_too_many_bad()
        key = _fingerprint(data, [(key, table.digest()) for table, key in tables], seed)
        arrays = load_or_create(cache_dir / "plans" / f"{key}.npz", planner.build_arrays)
        # Evict last: by now all files of this stage, however old, are marked as used.
        for folder, max_bytes in CACHE_LIMITS.items():
            evict_lru(cache_dir / folder, max_bytes, min_idle_seconds=MIN_IDLE_SECONDS)
        return cls(
            data=data,
            processor=processor,
            sources=tuple(sources),
            labels=labels,
            lengths=lengths,
            offsets=planner.offsets,
            tokens=arrays["tokens"],
            targets=arrays["targets"],
            held_out=arrays.get("held_out", np.empty(0, np.int64)),  # none in an older cache
            resized=dict(zip(arrays["shrunk"].tolist(), arrays["pixels"].tolist(), strict=True)),
            plan=plan_from_arrays(arrays, data),
            fingerprint=key,
            cache_dir=cache_dir,
        )

    def read(self, entries: Iterable[int]) -> tuple[list[TrainingExample], list[BadSample]]:
        """Prepare samples; bad ones are returned separately and not replaced."""
        examples: list[TrainingExample] = []
        bad: list[BadSample] = []
        for source_index, group in self._by_source(entries).items():
            samples: list[tuple[int, Sample]] = []
            for entry in group:
                with self._recording_bad(entry, bad):
                    samples.append((entry, self._read_sample(entry)))
            # Remote media of all samples of the bin are fetched concurrently.
            self._preprocessor_of(source_index).prefetch(sample for _, sample in samples)
            for entry, sample in samples:
                with self._recording_bad(entry, bad):
                    examples.append(self._prepare_example(source_index, entry, sample))
        return examples, bad

    def epochs(self, steps: int) -> float:
        """Return how often `steps` optimizer steps read the data."""
        return steps * self.data.global_batch_size / len(self.plan)

    def grids(self, entry: int) -> np.ndarray:
        """Return a sample's grids (K, 3) as they were measured, before any resizing."""
        source_index, index = self._locate(entry)
        table = self.lengths[source_index]
        return table.grids_K3[table.starts[index] : table.starts[index + 1]]

    def name_of(self, entry: int) -> tuple[str, str]:
        """Return the source of an entry, and the name of its sample: file and line."""
        source_index, index = self._locate(entry)
        return self.labels[source_index], self.sources[source_index].name(index)

    def _locate(self, entry: int) -> tuple[int, int]:
        """Return (source index, sample index in it) of an entry."""
        source_index = int(np.searchsorted(self.offsets, entry, side="right")) - 1
        return source_index, int(entry) - int(self.offsets[source_index])

    def _by_source(self, entries: Iterable[int]) -> dict[int, list[int]]:
        """Group entries by source, in order: media of one source are fetched together."""
        groups: dict[int, list[int]] = {}
        for entry in entries:
            source_index, _ = self._locate(entry)
            groups.setdefault(source_index, []).append(int(entry))
        return groups

    @contextmanager
    def _recording_bad(self, entry: int, bad: list[BadSample]) -> Iterator[None]:
        """Append a sample that raises SampleError to `bad`, and continue."""
        try:
            yield
        except SampleError as error:
            label, name = self.name_of(entry)
            known = not self.tokens[entry]
            bad.append(BadSample(name, label, error.reason, str(error), known))

    def _read_sample(self, entry: int) -> Sample:
        """Read a sample, unless it is known to be bad or too large."""
        source_index, index = self._locate(entry)
        table = self.lengths[source_index]
        if index in table.bad:
            raise SampleError(*table.bad[index])
        if not self.tokens[entry]:
            limit = f"the limit of a bin is {self.data.max_tokens:,}"
            raise SampleError("oversize", f"{table.tokens[index]:,} tokens, {limit}")
        return self.sources[source_index].read(index)

    def _prepare_example(self, source_index: int, entry: int, sample: Sample) -> TrainingExample:
        processed = self._preprocessor_of(source_index, self.resized.get(entry, 0)).prepare(sample)
        self._check_size(entry, processed)
        return TrainingExample(processed, self.labels[source_index])

    def _check_size(self, entry: int, processed: ModelInput) -> None:
        """Check that a sample has the sizes that its bin was planned with."""
        num_tokens, expected = len(processed.input_ids), self.tokens[entry]
        grids = [tuple(grid) for grid in processed.grids]
        expected_grids = [tuple(grid) for grid in self.grids(entry).tolist()]
        if num_tokens != expected:
            found = f"{num_tokens} tokens, its headers gave {expected}"
        elif grids != expected_grids and entry not in self.resized:
            found = f"media of {grids} patches (t, h, w), their headers gave {expected_grids}"
        else:
            return
        raise SampleError(
            "length",
            f"{found}; its files are damaged, or have changed since they were measured",
        )

    def _preprocessor_of(self, source_index: int, pixels: int = 0) -> SamplePreprocessor:
        """Return a source's preprocessor, one per process: connections cannot be shared."""
        key = (os.getpid(), source_index, pixels)
        if key not in self._preprocessors:
            max_bytes = int(self.data.frame_cache_gb * 1e9)
            self._preprocessors[key] = SamplePreprocessor(
                self.processor,
                self.data,
                media_root=self.sources[source_index].media_root,
                frame_cache=FrameCache(self.cache_dir / "frames", max_bytes=max_bytes)
                if max_bytes
                else None,
                max_pixels=pixels,
            )
        return self._preprocessors[key]


def _fingerprint(data: DataConfig, tables: Sequence[tuple[str, str]], seed: int) -> str:
    """Hash all settings that decide the samples of a step; config.IO_OPTIONS are not included."""
    # Without a split the fingerprint is that of runs before there was one.
    validation = [data.validation_size] if data.validation_size else []
    shares = [(source.repeats, source.weight) for source in data.sources]
    sizes = (data.max_tokens, data.max_vision_cost, data.global_batch_size, data.oversize)
    settings = json.dumps([tables, shares, sizes, seed, *validation])
    return blake2b(settings.encode(), digest_size=16).hexdigest()
