"""What every test stands on: one thread, fixed draws, and the large data that may be absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The repository's neighbor; too large to keep here.
TOKENIZER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tokenizer"

# Two cores are shared by what runs beside the tests, and tiny tensors gain nothing from threads.
torch.set_num_threads(1)

# The same draws in every run, on every machine; no failing because a machine is busy.
settings.register_profile("qwen2vl", derandomize=True, deadline=None, database=None)
settings.load_profile("qwen2vl")


@pytest.fixture(scope="session")
def official_tokenizer_dir() -> Path:
    """Give the folder of the official tokenizer: 151,643 ranks and fourteen special tokens."""
    if not (TOKENIZER / "tokenizer.json").is_file():
        reason = "the official tokenizer is not beside the repository, in ../shared/data/tokenizer"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return TOKENIZER
