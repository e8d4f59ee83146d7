"""What one stage reads: sources opened, measured, mixed and packed into bins; any bin at any time.

    sources --lengths.py--> tables --plan.py--> bins of a pass
    samples of bin 17 --prepare.py--> examples, and the bad ones by name

The bins of a pass stay the same in every pass, their order does not (train/loader/data_order.py).
Everything here is a function of the sources' content, the config and the seed, and has one
fingerprint. It must not know steps or ranks. Next rooms: train/loader/dataloader.py, train/dry_run/report.py.
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

from qwen2vl.data.config import DataConfig
from qwen2vl.data.disk_cache import cache_folder, keep, trim
from qwen2vl.data.formats import Sample, SampleError
from qwen2vl.data.frame_cache import FrameCache
from qwen2vl.data.lengths import Lengths, Progress, measure
from qwen2vl.data.mixture import Planner, plan_of
from qwen2vl.data.packing import Plan
from qwen2vl.data.preprocess import BadSample, Example, Measurer, Preparer
from qwen2vl.data.sources.source import Samples, open_source
from qwen2vl.processor.processor import Processor

__all__ = ["Corpus"]

# Folders below the cache, and bytes that each may hold of what no run has opened for a month:
# copies of text from elsewhere, which runs go on reading, and what was measured and packed.
KEPT = {"text": 50 * 10**9, "lengths": 5 * 10**9, "plans": 5 * 10**9}
IDLE = 30 * 86400.0


@dataclass(frozen=True)
class Corpus:
    """A stage's samples, numbered through: entry e is sample e - first[s] of source s."""

    data: DataConfig
    processor: Processor
    sources: tuple[Samples, ...]
    labels: tuple[str, ...]
    lengths: tuple[Lengths, ...]
    first: np.ndarray  # where each source's entries begin, and where the last ends
    tokens: np.ndarray  # of every sample, as it will be read
    targets: np.ndarray
    shrunk: Mapping[int, int]  # entry -> pixels of its pictures at most, to fit into a bin
    plan: Plan
    fingerprint: str
    cache: Path
    _preparers: dict[tuple[int, int, int], Preparer] = field(default_factory=dict, repr=False)

    @classmethod
    def open(
        cls,
        data: DataConfig,
        processor: Processor,
        *,
        seed: int,
        default_system: float = 0.0,
        workers: int = 0,
        progress: Progress = lambda what, done, total: None,
    ) -> Corpus:
        """Open what a stage reads.

        Args:
            default_system: share of the world's conversations with the default system sentence.

        Raises:
            InputError: a source is missing or damaged, too many of its samples are bad, or some
                are larger than a bin.
            ConfigError: nothing can read a source, or there is too little for a step.
        """
        cache = cache_folder(data.cache)
        opened = [
            open_source(
                source,
                data,
                tokenizer=processor.tokenizer,
                cache=cache,
                seed=seed,
                default_system=default_system,
            )
            for source in data.sources
        ]
        labels = tuple(source.label for source in data.sources)
        measured = [
            measure(
                source,
                Measurer(processor, data, base=source.base),
                cache=cache,
                label=label,
                workers=workers,
                progress=progress,
            )
            for source, label in zip(opened, labels, strict=True)
        ]
        lengths = tuple(table for table, _ in measured)
        planner = Planner(data, processor, opened, lengths, seed)
        planner.check_bad()
        key = _fingerprint(data, [(key, table.digest()) for table, key in measured], seed)
        arrays = keep(cache / "plans" / f"{key}.npz", planner.arrays)
        # Only now, when what this stage reads, however old, is noted as used.
        for folder, limit in KEPT.items():
            trim(cache / folder, limit, idle=IDLE)
        return cls(
            data=data,
            processor=processor,
            sources=tuple(opened),
            labels=labels,
            lengths=lengths,
            first=planner.first,
            tokens=arrays["tokens"],
            targets=arrays["targets"],
            shrunk=dict(zip(arrays["shrunk"].tolist(), arrays["pixels"].tolist(), strict=True)),
            plan=plan_of(arrays, data),
            fingerprint=key,
            cache=cache,
        )

    def read(self, entries: Iterable[int]) -> tuple[list[Example], list[BadSample]]:
        """Prepare samples; what cannot be used is told, and nothing takes its place."""
        examples: list[Example] = []
        bad: list[BadSample] = []
        for number, group in self._by_source(entries).items():
            found: list[tuple[int, Sample]] = []
            for entry in group:
                with self._told(entry, bad):
                    found.append((entry, self._sample(entry)))
            # Media from elsewhere come for all of the bin at a time.
            self._preparer(number).fetch(sample for _, sample in found)
            for entry, sample in found:
                with self._told(entry, bad):
                    examples.append(self._example(number, entry, sample))
        return examples, bad

    def grids(self, entry: int) -> np.ndarray:
        """Give a sample's grids (K, 3) as they were measured, before any shrinking."""
        number, index = self._place(entry)
        table = self.lengths[number]
        return table.grids_K3[table.starts[index] : table.starts[index + 1]]

    def _place(self, entry: int) -> tuple[int, int]:
        """Find (number of the source, index of the sample in it) of an entry."""
        number = int(np.searchsorted(self.first, entry, side="right")) - 1
        return number, int(entry) - int(self.first[number])

    def _by_source(self, entries: Iterable[int]) -> dict[int, list[int]]:
        """Sort entries by source, in their order: media of one source are fetched together."""
        groups: dict[int, list[int]] = {}
        for entry in entries:
            number, _ = self._place(entry)
            groups.setdefault(number, []).append(int(entry))
        return groups

    @contextmanager
    def _told(self, entry: int, bad: list[BadSample]) -> Iterator[None]:
        """Note a sample that cannot be used, and go on."""
        try:
            yield
        except SampleError as error:
            number, index = self._place(entry)
            name = self.sources[number].name(index)
            known = not self.tokens[entry]
            bad.append(BadSample(name, self.labels[number], error.reason, str(error), known))

    def _sample(self, entry: int) -> Sample:
        """Read a sample, unless it is known to be bad or too large."""
        number, index = self._place(entry)
        table = self.lengths[number]
        if index in table.bad:
            raise SampleError(*table.bad[index])
        if not self.tokens[entry]:
            limit = f"the limit of a bin is {self.data.max_tokens:,}"
            raise SampleError("oversize", f"{table.tokens[index]:,} tokens, {limit}")
        return self.sources[number].read(index)

    def _example(self, number: int, entry: int, sample: Sample) -> Example:
        made = self._preparer(number, self.shrunk.get(entry, 0)).prepare(sample)
        if len(made.input_ids) != self.tokens[entry]:
            raise SampleError(
                "length",
                f"{len(made.input_ids)} tokens, where its headers promised {self.tokens[entry]}; "
                "its files are damaged, or have changed since they were measured",
            )
        return Example(made, self.labels[number])

    def _preparer(self, number: int, pixels: int = 0) -> Preparer:
        """Make what prepares a source, once in each process, for the sake of its connections."""
        key = (os.getpid(), number, pixels)
        if key not in self._preparers:
            limit = int(self.data.cache_gb * 1e9)
            self._preparers[key] = Preparer(
                self.processor,
                self.data,
                base=self.sources[number].base,
                frames=FrameCache(self.cache / "frames", limit=limit) if limit else None,
                max_pixels=pixels,
            )
        return self._preparers[key]


def _fingerprint(data: DataConfig, tables: Sequence[tuple[str, str]], seed: int) -> str:
    """Name all that decides what a step sees; config.MANNERS do not."""
    shares = [(source.repeats, source.weight) for source in data.sources]
    sizes = (data.max_tokens, data.max_vision, data.bins, data.oversize)
    about = json.dumps([tables, shares, sizes, seed])
    return blake2b(about.encode(), digest_size=16).hexdigest()
