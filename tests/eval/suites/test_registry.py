"""Suites by name, former names, and the selection of parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.cli.commands.eval import SUITES
from qwen2vl.errors import InputError, Qwen2VLError
from qwen2vl.eval.suites.registry import (
    ALIASES,
    DEFAULT_SUITE,
    SUITE_NAMES,
    open_suite,
    select_suite_parts,
)


def test_the_command_lists_all_names_in_order_and_the_default_first() -> None:
    assert (*SUITE_NAMES, *ALIASES) == SUITES
    assert SUITES[0] == DEFAULT_SUITE


def test_mini_is_the_former_name_of_synthetic() -> None:
    assert open_suite("mini").name == open_suite("synthetic").name == "synthetic"
    with pytest.raises(InputError, match="no suite is called maxi: synthetic, easy-vqa"):
        open_suite("maxi")


def test_a_suite_that_was_not_fetched_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    with pytest.raises(Qwen2VLError, match="qwen2vl fetch-data easy-vqa"):
        open_suite("easy-vqa")


def test_parts_are_selected_by_patterns_in_the_order_of_the_suite() -> None:
    suite = open_suite("synthetic")
    assert select_suite_parts(suite) == list(suite.parts)
    assert select_suite_parts(suite, ["relations", "text*"]) == [
        *("text", "text_2x", "text_3x", "text_odd_aspect", "relations")
    ]
    assert select_suite_parts(suite, ["text*"], blind=True) == ["text"]


def test_unknown_parts_are_refused_with_the_known_ones() -> None:
    suite = open_suite("synthetic")
    with pytest.raises(InputError, match="no part of the suite synthetic is called letters: text"):
        select_suite_parts(suite, ["letters"])
    with pytest.raises(InputError, match="--blind --task counting"):
        select_suite_parts(suite, ["wrong_counting"])
    with pytest.raises(InputError, match="with a blind control is called text_2x"):
        select_suite_parts(suite, ["text_2x"], blind=True)
