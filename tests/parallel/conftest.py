"""One gang of four processes serves all distributed tests; two ranks are the first two of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.gang import Gang


class LazyGang:
    """Starts when it is first needed, and anew after a job that failed."""

    def __init__(self) -> None:
        self.gang: Gang | None = None

    def __call__(self) -> Gang:
        if self.gang is None or not all(p.is_alive() for p in self.gang.processes):
            self.gang = Gang(4)
        return self.gang


@pytest.fixture(scope="session")
def gangs() -> Iterator[LazyGang]:
    lazy = LazyGang()
    yield lazy
    if lazy.gang is not None:
        lazy.gang.close()


@pytest.fixture
def gang(gangs: LazyGang) -> Gang:
    return gangs()
