"""EngineConfig: every field is checked, with its name, value and range in the message."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.engine.config import RANGES, EngineConfig
from qwen2vl.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("max_num_seqs", 0, "got 0, must be a whole number from 1 to 65,536"),
        ("max_num_seqs", True, "got True"),
        ("max_num_batched_tokens", 31, "got 31, must be a whole number from 32 to"),
        ("max_num_batched_tokens", 1e3, "got 1000.0"),
        ("max_num_encoder_patches", 3, "got 3, must be a whole number from 4"),
        ("num_speculative_tokens", -1, "got -1, must be a whole number from 0 to 1,024"),
        ("kv_cache_tokens", 0, "got 0, must be a whole number from 2"),
        ("kv_cache_tokens", 10**30, "must be a whole number from 2 to"),
        ("encoder_cache_bytes", None, "got None"),
        ("encoder_cache_disk_bytes", "1 GB", "got '1 GB'"),
        ("item_cache_bytes", -1, "got -1"),
        ("encoder_cache_dir", 3, "got 3, must be a folder, or None for no cache on disk"),
        ("cuda_graphs", 1, "got 1, must be True or False"),
    ],
)
def test_wrong_values_are_refused(field: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})
    assert str(caught.value).startswith(f"{field}: ") and text in str(caught.value)


def test_every_number_has_a_range_that_contains_its_default() -> None:
    others = {"cuda_graphs", "encoder_cache_dir"}
    assert {f.name for f in fields(EngineConfig)} == set(RANGES) | others
    for name, (minimum, maximum) in RANGES.items():
        EngineConfig(**{name: minimum})
        EngineConfig(**{name: maximum})


def test_the_folder_of_the_disk_cache_is_text_or_a_path() -> None:
    assert EngineConfig(encoder_cache_dir=Path("cache")).encoder_cache_dir == Path("cache")
    assert EngineConfig(encoder_cache_dir="cache").encoder_cache_dir == "cache"
