"""What every test stands on: one thread, fixed draws, and the large data that may be absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.requirements import (
    TOKENIZER,
    check_requirements,
    missing_tokenizer,
    required_resources,
    skip_or_fail,
)
from tests.status import write_status

# Tiny tensors gain nothing from threads, and several workers run tests at once. The variable is for
# the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The same draws in every run, on every machine; no failing because a machine is busy.
settings.register_profile("qwen2vl", derandomize=True, deadline=None, database=None)
settings.load_profile("qwen2vl")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --write-status (tests/status.py)."""
    help_text = "write the commit into this row of docs/status.md if all tests pass"
    parser.addoption("--write-status", metavar="ROW", help=help_text)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write docs/status.md after a passing run."""
    row = session.config.getoption("--write-status")
    if row and exitstatus == 0 and not hasattr(session.config, "workerinput"):
        write_status(row)


def pytest_configure() -> None:
    """Refuse a misspelled QWEN2VL_REQUIRE before any test runs."""
    required_resources()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip or fail tests whose resources are absent (tests/requirements.py)."""
    check_requirements(item)


@pytest.fixture(scope="session")
def official_tokenizer_dir() -> Path:
    """Give the folder of the official tokenizer: 151,643 ranks and fourteen special tokens."""
    reason = missing_tokenizer()
    if reason:
        skip_or_fail("tokenizer", reason)
    return TOKENIZER
