"""How full and how even the schedule makes its bins, and how fast: one line for results.md.

    python benchmarks/lengths.py [--samples 2000000]

A made-up table of lengths (seed 0): text is log-normal, median 220 tokens, sigma 0.9; a quarter
of the samples is text alone, 60 % has one picture of 64 to 1,600 tokens (log-uniform), 10 % two
to six such pictures, 5 % a video of 1,000 to 6,000 (uniform, 144 tokens a pair of frames).
Beside the plan stands what rank after rank would wait for if bins were filled in the order of the
table, by first fit over the last 64.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import line

from qwen2vl.config import VisionConfig
from qwen2vl.data.disk_cache import keep
from qwen2vl.data.lengths import vision_cost
from qwen2vl.data.packing import Plan, plan_bins
from qwen2vl.train.loader.data_order import bins_of

MAX_TOKENS = 8192
RANKS = 8
MERGE = 4  # patches that become one token
PAIR = 144  # tokens of a pair of frames


def table(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw (tokens, vision cost) of `count` samples."""
    rng = np.random.default_rng(seed)
    tokens = np.maximum(1, np.rint(rng.lognormal(np.log(220), 0.9, count))).astype(np.int64)
    kind = rng.random(count)
    pictures = np.where(kind < 0.25, 0, np.where(kind < 0.85, 1, rng.integers(2, 7, count)))
    pictures[kind >= 0.95] = 0
    owner = np.repeat(np.arange(count), pictures)
    sizes = np.rint(np.exp(rng.uniform(np.log(64), np.log(1600), len(owner)))).astype(np.int64)
    films = np.flatnonzero(kind >= 0.95)
    pairs = np.rint(rng.uniform(1000, 6000, len(films)) / PAIR).astype(np.int64)
    owner, sizes = np.concatenate((owner, films)), np.concatenate((sizes, pairs * PAIR))
    frames = np.concatenate((np.ones(len(sizes) - len(pairs), np.int64), pairs))
    grids_K3 = np.stack((frames, np.full(len(sizes), 2), MERGE * sizes // frames // 2), axis=1)
    cost = vision_cost(grids_K3, VisionConfig())
    tokens += np.bincount(owner, sizes, minlength=count).astype(np.int64)
    return tokens, np.bincount(owner, cost, minlength=count)


def in_order(tokens: np.ndarray, cost: np.ndarray) -> tuple[float, float]:
    """Fill bins as samples come; gives fill and imbalance over ranks."""
    done: list[float] = []
    bins: list[list[float]] = []
    for size, own in zip(tokens.tolist(), cost.tolist(), strict=True):
        for place in bins:
            if place[0] + size <= MAX_TOKENS:
                place[0] += size
                place[1] += own
                break
        else:
            if len(bins) == 64:
                done.append(bins.pop(0)[1])
            bins.append([size, own])
    done += [place[1] for place in bins]
    costs = np.array(done[: len(done) // RANKS * RANKS]).reshape(-1, RANKS)
    imbalance = costs.max(axis=1).sum() / costs.mean(axis=1).sum()
    return float(tokens.sum()) / (len(done) * MAX_TOKENS), float(imbalance)


def best_of(rounds: int, act: Callable[[], object]) -> float:
    """Time the fastest of some calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2_000_000)
    count = parser.parse_args().samples
    tokens, cost = table(count)
    fits = tokens <= MAX_TOKENS
    entries = np.flatnonzero(fits)

    def make() -> Plan:
        return plan_bins(tokens, cost, entries=entries, max_tokens=MAX_TOKENS, group=RANKS)

    began, worked = time.perf_counter(), time.process_time()
    plan = make()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    assert sorted(plan.entries.tolist()) == entries.tolist(), "every sample once"
    assert plan.tokens.max() <= MAX_TOKENS, "no bin above its capacity"
    spread = np.random.default_rng(0).permutation(plan.vision)
    usable = spread[: len(spread) // RANKS * RANKS].reshape(-1, RANKS)
    far = 1_000_000
    # Each time another step, so that every call shuffles a pass of its own.
    steps = iter(range(far, far + 10**6, 10**5))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.npz"
        arrays = {name: getattr(plan, name) for name in ("entries", "starts", "tokens", "vision")}
        keep(path, lambda: arrays)
        reopened = best_of(3, lambda: keep(path, dict))
    few = min(count, 200_000)
    fill, imbalance = in_order(tokens[:few][fits[:few]], cost[:few][fits[:few]])
    numbers = {
        "samples": count,
        "too_large": int(count - len(entries)),
        "bins": len(plan),
        "fill": round(100 * plan.fill(MAX_TOKENS), 2),
        "imbalance": round(plan.imbalance(RANKS), 4),
        "imbalance_of_shuffled_bins": round(
            float(usable.max(axis=1).sum() / usable.mean(axis=1).sum()), 4
        ),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(worked, 2),
        "seek_ms": round(
            1e3 * best_of(5, lambda: bins_of(plan, next(steps), bins=RANKS, seed=0)), 2
        ),
        "reopen_ms": round(1e3 * reopened, 1),
        "in_order": {"fill": round(100 * fill, 2), "imbalance": round(imbalance, 3)},
    }
    print(line(numbers))


if __name__ == "__main__":
    main()
