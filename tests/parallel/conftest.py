"""One pool of four processes serves all distributed tests; jobs of two ranks use the first two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.process_pool import ProcessPool


class LazyProcessPool:
    """Starts the pool on first use, and again after a job that failed."""

    def __init__(self) -> None:
        self.process_pool: ProcessPool | None = None

    def __call__(self) -> ProcessPool:
        if self.process_pool is None or not all(p.is_alive() for p in self.process_pool.processes):
            self.process_pool = ProcessPool(4)
        return self.process_pool


@pytest.fixture(scope="session")
def process_pools() -> Iterator[LazyProcessPool]:
    lazy_pool = LazyProcessPool()
    yield lazy_pool
    if lazy_pool.process_pool is not None:
        lazy_pool.process_pool.close()


@pytest.fixture
def process_pool(process_pools: LazyProcessPool) -> ProcessPool:
    return process_pools()
