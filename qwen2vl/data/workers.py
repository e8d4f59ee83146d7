"""Worker processes of torch's DataLoader, started so that they neither hang nor change results.

`iterate_in_workers` is used to measure sample lengths and to prepare training batches. The workers
are forked: they inherit the objects of this process, but none of its threads.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["iterate_in_workers"]

T = TypeVar("T")


def iterate_in_workers(dataset: Dataset[T], *, num_workers: int, **options: Any) -> Iterator[T]:
    """Start the workers and return an iterator over the items of `dataset`, in order.

    Args:
        dataset: its items are not batched further.
        num_workers: 0 reads in this process.
        options: further arguments of DataLoader.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_limit_threads,
        generator=torch.Generator(),  # does not touch the global RNG, whose state checkpoints save
        **options,
    )
    gc.freeze()  # a worker that frees an inherited video decoder waits for threads that it lacks
    try:
        return iter(loader)  # starts the workers
    finally:
        gc.unfreeze()


def _limit_threads(_worker: int) -> None:
    torch.set_num_threads(1)  # the other cores are for the training step
