"""Bin packing under two capacities: samples to bins of nearly equal token count and vision cost.

A bin is the input of one forward pass on one rank (a packed sequence). Its tokens must not exceed
one capacity, its vision cost (lengths.py) another, and bins that ranks process at the same time
should cost the same, since all ranks wait for the slowest. The largest samples are placed first, in
the emptiest bins, and samples with high vision cost in bins with low vision cost; small text
samples fill what is left. All bins are handled at once in numpy, which packs millions of samples in
seconds. train/loader/data_order.py assigns the bins to steps and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from qwen2vl.errors import ConfigError

__all__ = ["BinPlan", "pack_bins", "seeded_permutation"]

TARGET_FILL = 0.994  # of the token capacity; the rest is slack for the samples placed last
SMALL_SAMPLE = 1 / 20  # of the capacity: text samples up to this size are placed last
CHUNKS_PER_ROUND = 10  # samples are placed in chunks of a tenth of the bins, emptiest bins first
STRATUM_DIVISOR = 16  # a larger one gives fewer strata: kind decides a sample's bin more than size


@dataclass(frozen=True, slots=True)
class BinPlan:
    """An assignment of entries to bins; bins are in descending order of their vision cost."""

    entries: np.ndarray  # int64, indices of samples, bin after bin
    starts: np.ndarray  # int64, index in `entries` of each bin's first, and the number of entries
    tokens: np.ndarray  # int64, of each bin
    vision: np.ndarray  # float64, vision cost of each bin
    group_size: int  # adjacent bins that are processed at the same time; divides the bin count

    def __len__(self) -> int:
        return len(self.tokens)

    def members(self, bin_number: int) -> np.ndarray:
        """Return the samples of one bin."""
        return self.entries[self.starts[bin_number] : self.starts[bin_number + 1]]

    def fill_ratio(self, max_tokens: int) -> float:
        """Return the share of the token capacity that is used."""
        return float(self.tokens.sum()) / (len(self) * max_tokens)

    def imbalance(self, world_size: int) -> float:
        """Return the factor by which vision compute takes longer than with equal shares.

        `world_size` adjacent bins are processed at the same time, and all ranks wait for the most
        expensive: the sum of the maxima over the sum of the means.
        """
        usable = len(self) // world_size * world_size
        costs_GR = self.vision[:usable].reshape(-1, world_size)
        total_mean = costs_GR.mean(axis=1).sum()
        return float(costs_GR.max(axis=1).sum() / total_mean) if total_mean else 1.0


def pack_bins(
    tokens: np.ndarray,
    vision: np.ndarray,
    *,
    entries: np.ndarray,
    max_tokens: int,
    max_vision_cost: float = 0.0,
    group_size: int = 8,
    seed: int = 0,
) -> BinPlan:
    """Pack `entries` (indices into `tokens` and `vision`; an index may occur twice) into bins.

    A pure function of its arguments. With `max_vision_cost` 0, tokens are the only capacity.

    Raises:
        ConfigError: an entry exceeds a capacity by itself.
    """
    max_cost = max_vision_cost or np.inf
    sizes, costs = tokens[entries].astype(np.float64), vision[entries].astype(np.float64)
    if (sizes > max_tokens).any() or (costs > max_cost).any():
        raise ConfigError("a sample is larger than a bin; leave it out before packing")
    # Samples of equal size are assigned to bins in random order.
    order = seeded_permutation(len(entries), "bins", seed)
    bin_of = np.empty(len(entries), np.int64)
    first_bin, remaining = 0, order
    while len(remaining):
        bins = _BinSet(sizes[remaining], costs[remaining], max_tokens, max_cost)
        bin_in_set = bins.pack()
        placed = bin_in_set >= 0
        bin_of[remaining[placed]] = bin_in_set[placed] + first_bin
        first_bin, remaining = first_bin + bins.num_bins, remaining[~placed]
    bin_of, num_bins = _split_to_multiple(bin_of, group_size)
    tokens_of, vision_of = (np.bincount(bin_of, weights, num_bins) for weights in (sizes, costs))
    ranked = np.lexsort((-tokens_of, -vision_of))
    new_number = np.empty(num_bins, np.int64)
    new_number[ranked] = np.arange(num_bins)
    bin_of = new_number[bin_of]
    return BinPlan(
        entries=entries[np.argsort(bin_of, kind="stable")],
        starts=np.concatenate(([0], np.cumsum(np.bincount(bin_of, minlength=num_bins)))),
        tokens=np.rint(tokens_of[ranked]).astype(np.int64),
        vision=vision_of[ranked],
        group_size=group_size,
    )


class _BinSet:
    """One set of bins and the tokens and vision cost that are placed in each."""

    def __init__(
        self, sizes: np.ndarray, costs: np.ndarray, max_tokens: float, max_cost: float
    ) -> None:
        needed = max(
            sizes.sum() / (max_tokens * TARGET_FILL), costs.sum() / (max_cost * TARGET_FILL)
        )
        self.num_bins = max(1, int(np.ceil(needed)))
        self.sizes, self.costs, self.max_tokens, self.max_cost = sizes, costs, max_tokens, max_cost
        self.tokens, self.vision = np.zeros(self.num_bins), np.zeros(self.num_bins)
        self.bin_of = np.full(len(sizes), -1, np.int64)
        # Normalized by an average bin, tokens and costs can be compared.
        self.token_share = self.num_bins / (sizes.sum() or 1.0)
        self.cost_share = self.num_bins / (costs.sum() or 1.0)

    def pack(self) -> np.ndarray:
        """Place the samples that fit; returns each sample's bin, or -1."""
        is_small = (self.costs == 0) & (self.sizes <= SMALL_SAMPLE * self.max_tokens)
        large = np.flatnonzero(~is_small)
        load = np.maximum(self.sizes * self.token_share, self.costs * self.cost_share)
        chunk_size = max(1, self.num_bins // CHUNKS_PER_ROUND)
        large = large[np.argsort(-load[large], kind="stable")]
        for start in range(0, len(large), chunk_size):
            self._assign_to_emptiest(large[start : start + chunk_size], by_kind=True)
        small = np.flatnonzero(is_small)
        small = small[np.argsort(-self.sizes[small], kind="stable")]
        for start in range(0, len(small), chunk_size):
            self._assign_to_emptiest(small[start : start + chunk_size], by_kind=False)
        self._place_remaining()
        return self.bin_of

    def _assign_to_emptiest(self, ids: np.ndarray, *, by_kind: bool) -> None:
        """Place each of `ids`, in descending order of size, in one of the emptiest bins."""
        load = self.tokens * self.token_share
        if by_kind:
            load = np.maximum(load, self.vision * self.cost_share)
        bins = _argsmallest(load, len(ids))
        if by_kind:
            # Within a stratum of similar sizes: costly samples to bins with little vision cost.
            strata = 4.0 * (np.arange(len(ids)) * _num_strata(len(ids)) // len(ids))
            lacking = (self.tokens * self.token_share - self.vision * self.cost_share)[bins]
            surplus = self.costs[ids] * self.cost_share - self.sizes[ids] * self.token_share
            bins = bins[np.argsort(strata + _map_to_unit_interval(lacking), kind="stable")]
            ids = ids[np.argsort(strata + _map_to_unit_interval(surplus), kind="stable")]
        self._place_where_fits(ids, bins)

    def _place_remaining(self) -> None:
        """Retry the samples that did not fit: the largest in the emptiest bin, until none fits."""
        while True:
            remaining = np.flatnonzero(self.bin_of < 0)
            remaining = remaining[np.argsort(-self.sizes[remaining], kind="stable")]
            bins = _argsmallest(self.tokens, len(remaining))
            if not self._place_where_fits(remaining[: len(bins)], bins):
                return

    def _place_where_fits(self, ids: np.ndarray, bins: np.ndarray) -> int:
        """Place `ids` one each into `bins` where they fit; returns how many did."""
        fits = self.tokens[bins] + self.sizes[ids] <= self.max_tokens
        fits &= self.vision[bins] + self.costs[ids] <= self.max_cost
        ids, bins = ids[fits], bins[fits]
        self.bin_of[ids] = bins
        self.tokens[bins] += self.sizes[ids]
        self.vision[bins] += self.costs[ids]
        return len(ids)


def seeded_permutation(count: int, *key: object) -> np.ndarray:
    """Permute range(count) by `key`, identically on every machine and numpy version."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # SplitMix64 wraps by design
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(int.from_bytes(digest, "little"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _argsmallest(load: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` smallest loads (or all), smallest first."""
    if count < len(load):
        chosen = np.sort(np.argpartition(load, count)[:count])
    else:
        chosen = np.arange(len(load))
    return chosen[np.argsort(load[chosen], kind="stable")]


def _num_strata(count: int) -> int:
    return max(1, int(count**0.5) // STRATUM_DIVISOR)


def _map_to_unit_interval(values: np.ndarray) -> np.ndarray:
    """Map values monotonically into (-1, 1), so that no value leaves its stratum."""
    return values / (1 + np.abs(values))


def _split_to_multiple(bin_of: np.ndarray, group_size: int) -> tuple[np.ndarray, int]:
    """Split bins in two, largest first, until their number is a multiple of `group_size`.

    Returns:
        Each sample's bin, and the number of bins; the last are empty if no bin can be split.
    """
    _, bin_of = np.unique(bin_of, return_inverse=True)
    counts = np.bincount(bin_of)
    while (num_missing := -len(counts) % group_size) and counts.max() > 1:
        largest = np.argsort(-counts, kind="stable")[:num_missing]
        for bin_number in largest[counts[largest] > 1]:
            half = np.flatnonzero(bin_of == bin_number)[: counts[bin_number] // 2]
            bin_of[half] = len(counts)
            counts[bin_number] -= len(half)
            counts = np.append(counts, len(half))
    return bin_of, len(counts) + num_missing
