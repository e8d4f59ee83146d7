"""Samples into bins that are nearly full and nearly alike: packing under two capacities.

A bin is what one rank reads in one forward. Its tokens must not exceed one capacity, its vision
cost (lengths.py) another, and bins that ranks read at the same time should cost the same, or all
wait for one. Largest samples go first, to the emptiest bins, and those rich in pictures to bins
that are poor in them; small texts fill up what is left. All bins are handled at once, in numpy:
seconds for millions. It must not know files, pictures or ranks. Next: train/loader/data_order.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from qwen2vl.errors import ConfigError

__all__ = ["Plan", "plan_bins", "shuffled"]

FILL = 0.994  # share of the token capacity that is aimed at; the rest is room for what is left
FINE = 1 / 20  # of the capacity: texts up to this size wait until all else is placed
CHUNKS = 10  # bins are served in so many turns for each round of samples
STRATA = 16  # the larger, the more the kind of a sample decides its bin, and not its size


@dataclass(frozen=True, slots=True)
class Plan:
    """Which entries share a bin; bins in the order of their vision cost, dearest first."""

    entries: np.ndarray  # int64, indices of samples, bin after bin
    starts: np.ndarray  # int64, where each bin begins in `entries`, and where the last ends
    tokens: np.ndarray  # int64, of each bin
    vision: np.ndarray  # float64, vision cost of each bin
    group: int  # neighboring bins that are read at the same time; divides the number of bins

    def __len__(self) -> int:
        return len(self.tokens)

    def members(self, number: int) -> np.ndarray:
        """List the samples of one bin."""
        return self.entries[self.starts[number] : self.starts[number + 1]]

    def fill(self, max_tokens: int) -> float:
        """Tell which share of the capacity holds tokens."""
        return float(self.tokens.sum()) / (len(self) * max_tokens)

    def imbalance(self, ranks: int) -> float:
        """Tell how much longer the tower works than it would on equal shares.

        The bins of `ranks` neighbors are read at the same time, and the dearest is waited for:
        the sum of the dearest over the sum of the means.
        """
        usable = len(self) // ranks * ranks
        costs_GR = self.vision[:usable].reshape(-1, ranks)
        whole = costs_GR.mean(axis=1).sum()
        return float(costs_GR.max(axis=1).sum() / whole) if whole else 1.0


def plan_bins(
    tokens: np.ndarray,
    vision: np.ndarray,
    *,
    entries: np.ndarray,
    max_tokens: int,
    max_vision: float = 0.0,
    group: int = 8,
    seed: int = 0,
) -> Plan:
    """Pack `entries` (indices into `tokens` and `vision`; one may come twice).

    A pure function of its arguments. `max_vision` 0 leaves tokens the only capacity.

    Raises:
        ConfigError: an entry exceeds a capacity by itself.
    """
    limit = max_vision or np.inf
    sizes, costs = tokens[entries].astype(np.float64), vision[entries].astype(np.float64)
    if (sizes > max_tokens).any() or (costs > limit).any():
        raise ConfigError("a sample is larger than a bin; leave it out before packing")
    order = shuffled(len(entries), "bins", seed)  # samples of one size share bins by chance
    owner = np.empty(len(entries), np.int64)
    first, left = 0, order
    while len(left):
        bins = _Bins(sizes[left], costs[left], max_tokens, limit)
        own = bins.pack()
        placed = own >= 0
        owner[left[placed]] = own[placed] + first
        first, left = first + bins.count, left[~placed]
    owner, count = _whole_groups(owner, group)
    tokens_of, vision_of = (np.bincount(owner, each, count) for each in (sizes, costs))
    ranked = np.lexsort((-tokens_of, -vision_of))
    number = np.empty(count, np.int64)
    number[ranked] = np.arange(count)
    owner = number[owner]
    return Plan(
        entries=entries[np.argsort(owner, kind="stable")],
        starts=np.concatenate(([0], np.cumsum(np.bincount(owner, minlength=count)))),
        tokens=np.rint(tokens_of[ranked]).astype(np.int64),
        vision=vision_of[ranked],
        group=group,
    )


class _Bins:
    """One set of bins, and the loads that samples leave on them."""

    def __init__(self, sizes: np.ndarray, costs: np.ndarray, cap: float, limit: float) -> None:
        need = max(sizes.sum() / (cap * FILL), costs.sum() / (limit * FILL))
        self.count = max(1, int(np.ceil(need)))
        self.sizes, self.costs, self.cap, self.limit = sizes, costs, cap, limit
        self.tokens, self.vision = np.zeros(self.count), np.zeros(self.count)
        self.owner = np.full(len(sizes), -1, np.int64)
        # In shares of an average bin, tokens and costs can be compared.
        self.one_token = self.count / (sizes.sum() or 1.0)
        self.one_cost = self.count / (costs.sum() or 1.0)

    def pack(self) -> np.ndarray:
        """Place what fits; gives each sample's bin, or -1."""
        fine = (self.costs == 0) & (self.sizes <= FINE * self.cap)
        coarse = np.flatnonzero(~fine)
        share = np.maximum(self.sizes * self.one_token, self.costs * self.one_cost)
        turn = max(1, self.count // CHUNKS)
        coarse = coarse[np.argsort(-share[coarse], kind="stable")]
        for start in range(0, len(coarse), turn):
            self._serve(coarse[start : start + turn], by_kind=True)
        texts = np.flatnonzero(fine)
        texts = texts[np.argsort(-self.sizes[texts], kind="stable")]
        for start in range(0, len(texts), turn):
            self._serve(texts[start : start + turn], by_kind=False)
        self._settle()
        return self.owner

    def _serve(self, ids: np.ndarray, *, by_kind: bool) -> None:
        """Give each of `ids`, largest first, one of the emptiest bins."""
        load = self.tokens * self.one_token
        if by_kind:
            load = np.maximum(load, self.vision * self.one_cost)
        bins = _smallest(load, len(ids))
        if by_kind:
            # Within a stratum of like sizes: dear samples to bins that are short of vision cost.
            strata = 4.0 * (np.arange(len(ids)) * _num_strata(len(ids)) // len(ids))
            lacking = (self.tokens * self.one_token - self.vision * self.one_cost)[bins]
            dear = self.costs[ids] * self.one_cost - self.sizes[ids] * self.one_token
            bins = bins[np.argsort(strata + _bounded(lacking), kind="stable")]
            ids = ids[np.argsort(strata + _bounded(dear), kind="stable")]
        self._put(ids, bins)

    def _settle(self) -> None:
        """Look for room for what did not fit: the largest beside the emptiest, until none fits."""
        while True:
            left = np.flatnonzero(self.owner < 0)
            left = left[np.argsort(-self.sizes[left], kind="stable")]
            bins = _smallest(self.tokens, len(left))
            if not self._put(left[: len(bins)], bins):
                return

    def _put(self, ids: np.ndarray, bins: np.ndarray) -> int:
        """Place `ids` one each into `bins` where they fit; gives how many did."""
        fits = self.tokens[bins] + self.sizes[ids] <= self.cap
        fits &= self.vision[bins] + self.costs[ids] <= self.limit
        ids, bins = ids[fits], bins[fits]
        self.owner[ids] = bins
        self.tokens[bins] += self.sizes[ids]
        self.vision[bins] += self.costs[ids]
        return len(ids)


def shuffled(count: int, *key: object) -> np.ndarray:
    """Permute range(count) by `key`: the same on every machine and with every numpy."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # SplitMix64 wraps by design
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(int.from_bytes(digest, "little"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _smallest(load: np.ndarray, count: int) -> np.ndarray:
    """Find the `count` smallest loads (or all), smallest first."""
    if count < len(load):
        chosen = np.sort(np.argpartition(load, count)[:count])
    else:
        chosen = np.arange(len(load))
    return chosen[np.argsort(load[chosen], kind="stable")]


def _num_strata(count: int) -> int:
    return max(1, int(count**0.5) // STRATA)


def _bounded(values: np.ndarray) -> np.ndarray:
    """Keep an order within (-1, 1), so that no value leaves its stratum."""
    return values / (1 + np.abs(values))


def _whole_groups(owner: np.ndarray, group: int) -> tuple[np.ndarray, int]:
    """Split bins in two until their number is a multiple of `group`, those of most samples first.

    Returns:
        Each sample's bin, and the number of bins; the last are empty where nothing can be split.
    """
    _, owner = np.unique(owner, return_inverse=True)
    counts = np.bincount(owner)
    while (missing := -len(counts) % group) and counts.max() > 1:
        widest = np.argsort(-counts, kind="stable")[:missing]
        for number in widest[counts[widest] > 1]:
            half = np.flatnonzero(owner == number)[: counts[number] // 2]
            owner[half] = len(counts)
            counts[number] -= len(half)
            counts = np.append(counts, len(half))
    return owner, len(counts) + missing
