"""Validation split: which samples are held out, and that no bin has one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.formats import Conversation, parse_row
from qwen2vl.data.validation_split import interleave, sample_digest
from qwen2vl.errors import ConfigError
from tests.data.rows import conversation, create_data_config, good_rows, write_media, write_rows
from tests.tiny import tiny_processor

ROWS = [conversation(f"question {i}", f"answer {i}") for i in range(40)]


def open_rows(folder: Path, rows: list[Any], *, seed: int = 0, **fields: Any) -> PackedDataset:
    path = write_rows(folder / "rows.jsonl", rows)
    return PackedDataset.open(
        create_data_config(folder, path, **fields), tiny_processor(), seed=seed
    )


def questions(dataset: PackedDataset, entries: np.ndarray) -> set[str]:
    """Return the first question of each entry, by which rows are told apart."""
    samples = [dataset._read_sample(entry) for entry in entries.tolist()]
    return {sample.messages[0]["content"] for sample in samples}  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "expected"), [(0.1, 4), (0.001, 1), (1, 1), (7, 7), (0.5, 20)])
def test_a_share_or_a_number_is_held_out_of_every_bin(
    tmp_path: Path, size: float, expected: int
) -> None:
    dataset = open_rows(tmp_path, ROWS, validation_size=size)
    assert len(dataset.held_out) == expected
    assert sorted([*dataset.held_out, *dataset.plan.entries]) == list(range(40))


def test_without_a_split_nothing_is_held_out_and_the_fingerprint_is_the_one_before(
    tmp_path: Path,
) -> None:
    whole = open_rows(tmp_path, ROWS)
    split, other = (open_rows(tmp_path, ROWS, validation_size=n) for n in (4, 5))
    assert not len(whole.held_out)
    assert len({whole.fingerprint, split.fingerprint, other.fingerprint}) == 3


def test_the_split_depends_on_the_content_alone(tmp_path: Path) -> None:
    first = open_rows(tmp_path / "a", ROWS, validation_size=8)
    chosen = questions(first, first.held_out)
    for folder, seed, rows in (
        ("seed", 5, ROWS),
        ("order", 0, ROWS[::-1]),
        ("ids", 0, [{**row, "id": i} for i, row in enumerate(ROWS)]),
    ):
        dataset = open_rows(tmp_path / folder, rows, seed=seed, validation_size=8)
        assert questions(dataset, dataset.held_out) == chosen
    # A larger split contains the smaller; rows that are added move few to the other side.
    larger = open_rows(tmp_path / "b", ROWS, validation_size=12)
    assert chosen < questions(larger, larger.held_out)
    more = [*ROWS, *(conversation(f"new {i}", "a") for i in range(8))]
    longer = open_rows(tmp_path / "c", more, validation_size=8)
    trained = questions(longer, longer.plan.entries)
    assert questions(longer, longer.held_out) <= chosen | {f"new {i}" for i in range(8)}
    assert trained >= {f"question {i}" for i in range(40)} - chosen


def test_arrays_of_pixels_are_digested_whole() -> None:
    pixels = np.zeros((28, 28, 3), np.uint8)
    other = pixels.copy()
    other[14, 14] = 1  # repr of such an array shows only its corners

    def digest(image: np.ndarray) -> bytes:
        content = [{"type": "image", "image": image}]
        return sample_digest(Conversation("id", [{"role": "user", "content": content}]))

    assert digest(pixels) == digest(pixels.copy())
    assert len({digest(a) for a in (pixels, other, pixels.reshape(14, 56, 3))}) == 3


def test_copies_of_a_held_out_sample_are_held_out(tmp_path: Path) -> None:
    rows = [{**row, "id": 2 * i + n} for i, row in enumerate(ROWS) for n in (0, 1)]
    dataset = open_rows(tmp_path, rows, validation_size=3)
    held_out, trained = (questions(dataset, e) for e in (dataset.held_out, dataset.plan.entries))
    assert len(dataset.held_out) == 2 * len(held_out) >= 4
    assert not held_out & trained


def test_copies_in_another_source_are_held_out(tmp_path: Path) -> None:
    paths = [
        write_rows(tmp_path / "all.jsonl", ROWS),
        write_rows(tmp_path / "again.jsonl", [*ROWS[:25], conversation("only here", "a")]),
    ]
    data = create_data_config(tmp_path, *paths, validation_size=5)
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    held_out, trained = (questions(dataset, e) for e in (dataset.held_out, dataset.plan.entries))
    assert not held_out & trained
    assert sorted([*dataset.held_out, *dataset.plan.entries]) == list(range(66))


def test_each_source_is_split(tmp_path: Path) -> None:
    write_media(tmp_path)
    paths = [
        write_rows(tmp_path / "large.jsonl", ROWS),
        write_rows(tmp_path / "media.jsonl", good_rows()[:20]),
    ]
    data = create_data_config(tmp_path, *paths, validation_size=0.1)
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    assert [int(n) for n in np.histogram(dataset.held_out, [0, 40, 60])[0]] == [4, 2]
    examples, bad = dataset.read(dataset.held_out)
    assert (len(examples), bad) == (6, [])
    repeated = replace(data, sources=tuple(replace(s, repeats=2.0) for s in data.sources))
    dataset = PackedDataset.open(repeated, tiny_processor(), seed=0)
    assert len(dataset.plan.entries) == 2 * (60 - 6)


def test_bad_samples_are_not_held_out(tmp_path: Path) -> None:
    bad = [conversation("<image>?", "a", image=f"none{i}.png") for i in range(40)]
    dataset = open_rows(tmp_path, [*ROWS, *bad], validation_size=0.5, max_bad_fraction=1.0)
    assert len(dataset.held_out) == 20
    assert (dataset.tokens[dataset.held_out] > 0).all()


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        (ROWS[:8], 5, "validation=5: rows has 8 usable conversations, of which at most 4 may be"),
        (
            ROWS[:1],
            0.05,
            "rows has 1 usable conversations, of which at most 0 may be held out; give",
        ),
        (ROWS[:10], 0.6, "validation=0.6: rows has 10 usable"),
        ([ROWS[0]] * 9 + ROWS, 0.01, None),
        ([ROWS[0]] * 9, 1, "with their copies 9 of the 9 usable conversations of rows would be"),
    ],
)
def test_training_keeps_at_least_half(
    tmp_path: Path, rows: list[Any], size: float, message: str | None
) -> None:
    if message is None:
        assert len(open_rows(tmp_path, rows, validation_size=size).held_out) >= 1
        return
    with pytest.raises(ConfigError, match=message):
        open_rows(tmp_path, rows, validation_size=size)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_every_prefix_of_interleaved_groups_has_a_share_of_each(sizes: list[int]) -> None:
    groups = [100 * i + np.arange(size) for i, size in enumerate(sizes)]
    merged = interleave(groups)
    assert sorted(merged) == sorted(np.concatenate(groups))
    for length in range(len(merged)):
        for i, size in enumerate(sizes):
            expected = length * size / sum(sizes)
            assert abs(np.sum(merged[:length] // 100 == i) - expected) <= len(sizes)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"text": "a"}, {"text": "a", "id": 5}, True),
        ({"text": "a"}, {"text": "b"}, False),
        ({"text": "a", "image": "x.png"}, {"text": "a", "image": "y.png"}, False),
        ({"text": "a", "image": {"bytes": b"1"}}, {"text": "a", "image": {"bytes": b"1"}}, True),
        ({"text": "a", "image": {"bytes": b"1"}}, {"text": "a", "image": {"bytes": b"2"}}, False),
        (conversation("q", "a"), conversation("q", "b"), False),
        (conversation("q", "a"), {**conversation("q", "a"), "tools": [{"name": "f"}]}, False),
        (conversation("q", "a"), {"texts": [{"user": "q", "assistant": "a"}]}, True),
    ],
)
def test_the_digest_is_of_what_a_sample_teaches(one: Any, other: Any, is_same: bool) -> None:
    digests = [sample_digest(parse_row(row, f"name{i}")) for i, row in enumerate((one, other))]
    assert (digests[0] == digests[1]) == is_same
