"""Bin planning: oversized samples, dataset mixing by repeats or weights, and bin packing.

    length tables --oversize--> sizes --mixing--> entries of an epoch --bin packing--> BinPlan

An epoch contains every sample as often as the config specifies. The samples of all sources are
numbered consecutively; a bad sample has size 0 and keeps its number, so that it is counted when its
bin comes. Media are opened only to compute the size of a resized sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import gcd

import numpy as np

from qwen2vl.data.array_cache import Arrays
from qwen2vl.data.bin_packing import BinPlan, pack_bins, seeded_permutation
from qwen2vl.data.config import DataConfig
from qwen2vl.data.formats import describe_reasons
from qwen2vl.data.lengths import LengthTable, measure_sample
from qwen2vl.data.preprocess import HeaderPreprocessor, padded_length
from qwen2vl.data.sources.source import SampleSource
from qwen2vl.data.validation_split import held_out_samples, interleave
from qwen2vl.errors import InputError
from qwen2vl.processor.processor import Processor

__all__ = ["BinPlanner", "describe_remedy", "mix_sources", "plan_from_arrays"]

MAX_GROUP_SIZE = 8  # bins of similar vision cost that stay together, for up to so many ranks
MAX_NAMED_SAMPLES = 3  # that an error lists


def mix_sources(counts: Sequence[int], data: DataConfig, seed: int) -> np.ndarray:
    """List the entries of one epoch.

    With weights an epoch is the shortest one that contains every sample of every source. The
    fraction of a repetition is a fixed subset of the source, chosen by the seed.
    """
    weights = np.array([source.weight for source in data.sources])
    if weights.any():
        shares = weights / weights.sum()
        length = max(count / share for count, share in zip(counts, shares, strict=True))
        num_entries = np.rint(length * shares)
    else:
        num_entries = np.rint([n * s.repeats for n, s in zip(counts, data.sources, strict=True)])
    parts, offset = [np.empty(0, np.int64)], 0
    for source_index, (count, total) in enumerate(
        zip(counts, num_entries.astype(np.int64), strict=True)
    ):
        num_repeats, remainder = divmod(int(total), count)
        parts += [np.arange(count) + offset] * num_repeats
        parts.append(
            np.sort(seeded_permutation(count, "mix", seed, source_index)[:remainder]) + offset
        )
        offset += count
    return np.concatenate(parts)


def plan_from_arrays(arrays: Arrays, data: DataConfig) -> BinPlan:
    """Restore a plan from its cached arrays."""
    return BinPlan(
        entries=arrays["entries"],
        starts=arrays["starts"],
        tokens=arrays["bin_tokens"],
        vision=arrays["bin_vision"],
        group_size=gcd(data.global_batch_size, MAX_GROUP_SIZE),
    )


def describe_remedy(num_bad: int, num_samples: int) -> str:
    """Say how to train in spite of bad samples; there is no way if all are bad."""
    if num_bad >= num_samples:
        return "fix them"
    percent = -(-100 * num_bad // num_samples)
    return f"fix them, or train without them: data.max_bad_fraction={percent / 100:g}"


class BinPlanner:
    """The sizes of all samples of a stage, and their assignment to bins."""

    def __init__(
        self,
        data: DataConfig,
        processor: Processor,
        sources: Sequence[SampleSource],
        lengths: Sequence[LengthTable],
        seed: int,
    ) -> None:
        self.data, self.processor, self.sources = data, processor, sources
        self.lengths, self.seed = lengths, seed
        self.offsets = np.cumsum([0, *map(len, lengths)])
        self.tokens = np.concatenate([table.tokens for table in lengths])
        self.targets = np.concatenate([table.targets for table in lengths])
        self.vision = np.concatenate([table.vision for table in lengths])

    def locate(self, entry: int) -> tuple[int, int]:
        """Return (source index, sample index in it) of an entry."""
        source_index = int(np.searchsorted(self.offsets, entry, side="right")) - 1
        return source_index, entry - int(self.offsets[source_index])

    def build_arrays(self) -> Arrays:
        """Compute the plan as arrays, for the disk cache.

        Raises:
            InputError: some samples are larger than a bin.
            ConfigError: there are too few samples for a step, or to hold some out.
        """
        resized = self._handle_oversize()
        entries = mix_sources([len(table) for table in self.lengths], self.data, self.seed)
        held_out = self._held_out_entries()
        entries = entries[~np.isin(entries, held_out)]
        plan = pack_bins(
            _padded_lengths(self.tokens),
            self.vision,
            entries=entries,
            max_tokens=self.data.max_tokens,
            max_vision_cost=self.data.max_vision_cost,
            group_size=gcd(self.data.global_batch_size, MAX_GROUP_SIZE),
            seed=self.seed,
        )
        return {
            "tokens": self.tokens,
            "targets": self.targets,
            "held_out": held_out,
            "entries": plan.entries,
            "starts": plan.starts,
            "bin_tokens": plan.tokens,
            "bin_vision": plan.vision,
            "shrunk": np.array(sorted(resized), np.int64),
            "pixels": np.array([resized[entry] for entry in sorted(resized)], np.int64),
        }

    def raise_if_too_many_bad(self) -> None:
        """Refuse a run whose media headers show too many bad samples.

        Raises:
            InputError: too many; counted by reason, with the first few named.
        """
        bad = [
            (source_index, index, why)
            for source_index, table in enumerate(self.lengths)
            for index, why in table.bad.items()
        ]
        num_samples = len(self.tokens)
        if len(bad) < num_samples and self.data.tolerates(len(bad), num_samples, num_samples):
            return
        counts = Counter(reason for _, _, (reason, _) in bad)
        names = [
            f"{self.sources[source_index].name(index)}: {text}"
            for source_index, index, (_, text) in bad[:MAX_NAMED_SAMPLES]
        ]
        raise InputError(
            f"{len(bad):,} of {num_samples:,} samples are bad ({describe_reasons(counts)}), the "
            f"limit is {self.data.max_bad_fraction:.2%}; {'; '.join(names)}; "
            f"{describe_remedy(len(bad), num_samples)}"
        )

    def _held_out_entries(self) -> np.ndarray:
        """Return the entries of the validation split, in a fixed random order."""
        if not self.data.validation_size:
            return np.empty(0, np.int64)
        bounds = self.offsets.tolist()
        chosen = held_out_samples(
            self.sources,
            [source.label for source in self.data.sources],
            [self.tokens[first:last] > 0 for first, last in pairwise(bounds)],
            self.data.validation_size,
        )
        entries = [indices + first for indices, first in zip(chosen, bounds[:-1], strict=True)]
        return interleave(entries)

    def _handle_oversize(self) -> dict[int, int]:
        """Apply data.oversize; returns the pixel limits of the entries that are resized."""
        oversized = np.flatnonzero(self._too_large())
        if not len(oversized):
            return {}
        if self.data.oversize == "drop":
            self.tokens[oversized] = self.targets[oversized] = self.vision[oversized] = 0
            if not self.tokens.any():
                raise InputError(self._oversize_error(oversized))
            return {}
        resized = {}
        if self.data.oversize == "resize":
            resized = {
                entry: pixels
                for entry in oversized.tolist()
                if (pixels := self._max_pixels_to_fit(entry))
            }
        oversized = np.flatnonzero(self._too_large())
        if len(oversized):
            raise InputError(self._oversize_error(oversized))
        return resized

    def _too_large(self) -> np.ndarray:
        limit = self.data.max_vision_cost or np.inf
        return (_padded_lengths(self.tokens) > self.data.max_tokens) | (self.vision > limit)

    def _max_pixels_to_fit(self, entry: int) -> int:
        """Halve the pixel limit until the sample fits; 0 if it never does."""
        source_index, index = self.locate(entry)
        source, limits = self.sources[source_index], self.processor.pixels
        sample = source.read(index, pixels=False)
        pixels = limits.max_pixels // 2
        while pixels >= limits.min_pixels:
            preprocessor = HeaderPreprocessor(
                self.processor, self.data, media_root=source.media_root, max_pixels=pixels
            )
            size = measure_sample(sample, preprocessor)
            self.tokens[entry], self.targets[entry] = size.tokens, size.targets
            self.vision[entry] = size.vision_cost(self.processor.config.vision)
            if not self._too_large()[entry]:
                return pixels
            pixels //= 2
        return 0

    def _oversize_error(self, oversized: np.ndarray) -> str:
        named = []
        for entry in oversized[:MAX_NAMED_SAMPLES].tolist():
            source_index, index = self.locate(entry)
            tokens = self.lengths[source_index].tokens[index]
            named.append(f"{self.sources[source_index].name(index)} has {tokens:,} tokens")
        more = (
            f" and {len(oversized) - MAX_NAMED_SAMPLES:,} more are too large"
            if len(oversized) > MAX_NAMED_SAMPLES
            else ""
        )
        remedy = (
            "data.oversize=resize or drop" if self.data.oversize == "refuse" else "shorten them"
        )
        limit = f"{self.data.max_tokens:,} tokens"
        if self.data.max_vision_cost:
            limit += f" and a vision cost of {self.data.max_vision_cost:,.0f}"
        return (
            f"{', '.join(named)}{more}; the limit of a bin is {limit}: raise data.max_tokens, or "
            f"{remedy}"
        )


def _padded_lengths(tokens: np.ndarray) -> np.ndarray:
    """Round up as a batch does: `preprocess.padded_length` of many lengths at once."""
    multiple = padded_length(1)
    return -(-tokens.astype(np.int64) // multiple) * multiple
