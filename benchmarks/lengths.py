"""Bin packing: fill, balance and speed on two million synthetic lengths; one line for results.md.

    python benchmarks/lengths.py [--samples 2000000]

A random table of lengths (seed 0): text is log-normal, median 220 tokens, sigma 0.9; a quarter of
the samples is text only, 60 % has one image of 64 to 1,600 tokens (log-uniform), 10 % two to six
such images, 5 % a video of 1,000 to 6,000 tokens (uniform, 144 tokens per pair of frames). The
baseline fills bins in the order of the table, by first fit over the last 64 bins.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import format_result

from qwen2vl.config import VisionConfig
from qwen2vl.data.array_cache import load_or_create
from qwen2vl.data.bin_packing import BinPlan, pack_bins
from qwen2vl.data.lengths import vision_cost
from qwen2vl.train.loader.data_order import bins_of_step

MAX_TOKENS = 8192
WORLD_SIZE = 8
PATCHES_PER_TOKEN = 4
TOKENS_PER_FRAME_PAIR = 144


def random_lengths(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw (tokens, vision cost) of random samples."""
    rng = np.random.default_rng(seed)
    tokens = np.maximum(1, np.rint(rng.lognormal(np.log(220), 0.9, num_samples))).astype(np.int64)
    kind = rng.random(num_samples)
    num_images = np.where(kind < 0.25, 0, np.where(kind < 0.85, 1, rng.integers(2, 7, num_samples)))
    num_images[kind >= 0.95] = 0
    sample_of_item = np.repeat(np.arange(num_samples), num_images)
    sizes = np.rint(np.exp(rng.uniform(np.log(64), np.log(1600), len(sample_of_item)))).astype(
        np.int64
    )
    videos = np.flatnonzero(kind >= 0.95)
    num_frame_pairs = np.rint(rng.uniform(1000, 6000, len(videos)) / TOKENS_PER_FRAME_PAIR).astype(
        np.int64
    )
    sample_of_item, sizes = (
        np.concatenate((sample_of_item, videos)),
        np.concatenate((sizes, num_frame_pairs * TOKENS_PER_FRAME_PAIR)),
    )
    frames = np.concatenate((np.ones(len(sizes) - len(num_frame_pairs), np.int64), num_frame_pairs))
    grids_K3 = np.stack(
        (frames, np.full(len(sizes), 2), PATCHES_PER_TOKEN * sizes // frames // 2), axis=1
    )
    cost = vision_cost(grids_K3, VisionConfig())
    tokens += np.bincount(sample_of_item, sizes, minlength=num_samples).astype(np.int64)
    return tokens, np.bincount(sample_of_item, cost, minlength=num_samples)


def first_fit(tokens: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """Fill bins in the order of the samples; returns fill ratio and imbalance over ranks."""
    costs_of_full: list[float] = []
    bins: list[list[float]] = []
    for size, sample_cost in zip(tokens.tolist(), cost.tolist(), strict=True):
        for open_bin in bins:
            if open_bin[0] + size <= MAX_TOKENS:
                open_bin[0] += size
                open_bin[1] += sample_cost
                break
        else:
            if len(bins) == 64:
                costs_of_full.append(bins.pop(0)[1])
            bins.append([size, sample_cost])
    costs_of_full += [open_bin[1] for open_bin in bins]
    costs = np.array(costs_of_full[: len(costs_of_full) // WORLD_SIZE * WORLD_SIZE]).reshape(
        -1, WORLD_SIZE
    )
    imbalance = costs.max(axis=1).sum() / costs.mean(axis=1).sum()
    return float(tokens.sum()) / (len(costs_of_full) * MAX_TOKENS), float(imbalance)


def fastest_of(num_rounds: int, function: Callable[[], object]) -> float:
    """Return the seconds of the fastest of some calls."""
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2_000_000)
    num_samples = parser.parse_args().samples
    tokens, cost = random_lengths(num_samples)
    fits = tokens <= MAX_TOKENS
    entries = np.flatnonzero(fits)

    def pack() -> BinPlan:
        return pack_bins(
            tokens, cost, entries=entries, max_tokens=MAX_TOKENS, group_size=WORLD_SIZE
        )

    start, cpu_start = time.perf_counter(), time.process_time()
    plan = pack()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    assert sorted(plan.entries.tolist()) == entries.tolist(), "every sample once"
    assert plan.tokens.max() <= MAX_TOKENS, "no bin above its capacity"
    shuffled_costs = np.random.default_rng(0).permutation(plan.vision)
    usable = shuffled_costs[: len(shuffled_costs) // WORLD_SIZE * WORLD_SIZE].reshape(
        -1, WORLD_SIZE
    )
    first_step = 1_000_000
    # A different step each time, so that every call permutes an epoch of its own.
    steps = iter(range(first_step, first_step + 10**6, 10**5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.npz"
        arrays = {name: getattr(plan, name) for name in ("entries", "starts", "tokens", "vision")}
        load_or_create(path, lambda: arrays)
        reopened = fastest_of(3, lambda: load_or_create(path, dict))
    num_first = min(num_samples, 200_000)
    fill, imbalance = first_fit(
        tokens[:num_first][fits[:num_first]], cost[:num_first][fits[:num_first]]
    )
    numbers = {
        "samples": num_samples,
        "too_large": int(num_samples - len(entries)),
        "bins": len(plan),
        "fill": round(100 * plan.fill_ratio(MAX_TOKENS), 2),
        "imbalance": round(plan.imbalance(WORLD_SIZE), 4),
        "imbalance_of_shuffled_bins": round(
            float(usable.max(axis=1).sum() / usable.mean(axis=1).sum()), 4
        ),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "seek_ms": round(
            1e3
            * fastest_of(5, lambda: bins_of_step(plan, next(steps), num_bins=WORLD_SIZE, seed=0)),
            2,
        ),
        "reopen_ms": round(1e3 * reopened, 1),
        "in_order": {"fill": round(100 * fill, 2), "imbalance": round(imbalance, 3)},
    }
    print(format_result(numbers))


if __name__ == "__main__":
    main()
