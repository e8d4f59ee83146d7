"""From sizes to a plan: what comes how often, what is too large, and which samples share a bin.

    tables of lengths --fit--> sizes --mix--> entries of a pass --bins--> plan

A pass shows every sample as often as the config says. All samples of all sources are numbered
through; a bad one has size 0 and keeps its place, so that it is counted when its turn comes. It
must not open media beyond what shrinking a sample needs. Next rooms: bins.py, corpus.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import gcd

import numpy as np

from qwen2vl.data.config import DataConfig
from qwen2vl.data.disk_cache import Arrays
from qwen2vl.data.lengths import Lengths, size_of
from qwen2vl.data.packing import Plan, plan_bins, shuffled
from qwen2vl.data.preprocess import Measurer, rounded
from qwen2vl.data.sources.source import Samples
from qwen2vl.errors import InputError
from qwen2vl.processor.processor import Processor

__all__ = ["Planner", "mix", "plan_of"]

TOGETHER = 8  # ranks that bins of like vision cost are kept for
NAMED = 3  # samples that an error names


def mix(counts: Sequence[int], data: DataConfig, seed: int) -> np.ndarray:
    """List the entries of one pass.

    With weights a pass is just long enough for every sample of every source to come. What is less
    than a whole repetition is a fixed part of the source, chosen by the seed.
    """
    weights = np.array([source.weight for source in data.sources])
    if weights.any():
        shares = weights / weights.sum()
        length = max(count / share for count, share in zip(counts, shares, strict=True))
        wanted = np.rint(length * shares)
    else:
        wanted = np.rint([n * s.repeats for n, s in zip(counts, data.sources, strict=True)])
    parts, first = [np.empty(0, np.int64)], 0
    for number, (count, total) in enumerate(zip(counts, wanted.astype(np.int64), strict=True)):
        whole, rest = divmod(int(total), count)
        parts += [np.arange(count) + first] * whole
        parts.append(np.sort(shuffled(count, "mix", seed, number)[:rest]) + first)
        first += count
    return np.concatenate(parts)


def plan_of(arrays: Arrays, data: DataConfig) -> Plan:
    """Put a plan together from what was kept of it."""
    return Plan(
        entries=arrays["entries"],
        starts=arrays["starts"],
        tokens=arrays["bin_tokens"],
        vision=arrays["bin_vision"],
        group=gcd(data.bins, TOGETHER),
    )


class Planner:
    """The sizes of all samples of a stage, and what is made of them."""

    def __init__(
        self,
        data: DataConfig,
        processor: Processor,
        sources: Sequence[Samples],
        lengths: Sequence[Lengths],
        seed: int,
    ) -> None:
        self.data, self.processor, self.sources = data, processor, sources
        self.lengths, self.seed = lengths, seed
        self.first = np.cumsum([0, *map(len, lengths)])
        self.tokens = np.concatenate([table.tokens for table in lengths])
        self.targets = np.concatenate([table.targets for table in lengths])
        self.vision = np.concatenate([table.vision for table in lengths])

    def place(self, entry: int) -> tuple[int, int]:
        """Find an entry's source, and its number there."""
        number = int(np.searchsorted(self.first, entry, side="right")) - 1
        return number, entry - int(self.first[number])

    def arrays(self) -> Arrays:
        """Make the plan, in a form that can be kept.

        Raises:
            InputError: some samples are larger than a bin.
            ConfigError: there is too little for a step.
        """
        shrunk = self._fit()
        entries = mix([len(table) for table in self.lengths], self.data, self.seed)
        plan = plan_bins(
            _rounded(self.tokens),
            self.vision,
            entries=entries,
            max_tokens=self.data.max_tokens,
            max_vision=self.data.max_vision,
            group=gcd(self.data.bins, TOGETHER),
            seed=self.seed,
        )
        return {
            "tokens": self.tokens,
            "targets": self.targets,
            "entries": plan.entries,
            "starts": plan.starts,
            "bin_tokens": plan.tokens,
            "bin_vision": plan.vision,
            "shrunk": np.array(sorted(shrunk), np.int64),
            "pixels": np.array([shrunk[entry] for entry in sorted(shrunk)], np.int64),
        }

    def check_bad(self) -> None:
        """Stop before the run where headers alone show too many bad samples.

        Raises:
            InputError: they are counted by reason, and the first are named.
        """
        told = [(n, i, why) for n, t in enumerate(self.lengths) for i, why in t.bad.items()]
        total = len(self.tokens)
        if len(told) < total and self.data.tolerates(len(told), total, total):
            return
        counts = Counter(reason for _, _, (reason, _) in told)
        names = [f"{self.sources[n].name(i)}: {text}" for n, i, (_, text) in told[:NAMED]]
        kinds = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        raise InputError(
            f"{len(told):,} of {total:,} samples are bad ({kinds}), the limit is "
            f"{self.data.max_bad:.2%}; {'; '.join(names)}; mend them, or raise data.max_bad"
        )

    def _fit(self) -> dict[int, int]:
        """Deal with samples larger than a bin; gives the pixels of those that were shrunk."""
        large = np.flatnonzero(self._too_large())
        if not len(large):
            return {}
        if self.data.oversize == "drop":
            self.tokens[large] = self.targets[large] = self.vision[large] = 0
            if not self.tokens.any():
                raise InputError(self._refusal(large))
            return {}
        shrunk = {}
        if self.data.oversize == "resize":
            shrunk = {e: pixels for e in large.tolist() if (pixels := self._shrink(e))}
        large = np.flatnonzero(self._too_large())
        if len(large):
            raise InputError(self._refusal(large))
        return shrunk

    def _too_large(self) -> np.ndarray:
        limit = self.data.max_vision or np.inf
        return (_rounded(self.tokens) > self.data.max_tokens) | (self.vision > limit)

    def _shrink(self, entry: int) -> int:
        """Halve the limit of a sample's pictures until it fits; 0 where that does not help."""
        number, index = self.place(entry)
        source, limits = self.sources[number], self.processor.pixels
        sample = source.read(index, pixels=False)
        pixels = limits.max_pixels // 2
        while pixels >= limits.min_pixels:
            measurer = Measurer(self.processor, self.data, base=source.base, max_pixels=pixels)
            size = size_of(sample, measurer)
            self.tokens[entry], self.targets[entry] = size.tokens, size.targets
            self.vision[entry] = size.vision(self.processor.config.vision)
            if not self._too_large()[entry]:
                return pixels
            pixels //= 2
        return 0

    def _refusal(self, large: np.ndarray) -> str:
        named = []
        for entry in large[:NAMED].tolist():
            number, index = self.place(entry)
            tokens = self.lengths[number].tokens[index]
            named.append(f"{self.sources[number].name(index)} has {tokens:,} tokens")
        more = f" and {len(large) - NAMED:,} more are too large" if len(large) > NAMED else ""
        remedy = (
            "data.oversize=resize or drop" if self.data.oversize == "refuse" else "shorten them"
        )
        limit = f"{self.data.max_tokens:,} tokens"
        if self.data.max_vision:
            limit += f" and a vision cost of {self.data.max_vision:,.0f}"
        return (
            f"{', '.join(named)}{more}; the limit of a bin is {limit}: raise data.max_tokens, or "
            f"{remedy}"
        )


def _rounded(tokens: np.ndarray) -> np.ndarray:
    """Round as a batch will: `example.rounded`, of many at a time."""
    step = rounded(1)
    return -(-tokens.astype(np.int64) // step) * step
