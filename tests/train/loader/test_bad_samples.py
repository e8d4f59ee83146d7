"""Bad samples: all are listed, those not known before are counted, too many end the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl.data.config import MIN_BAD_FRACTION_BASE, DataConfig, SourceConfig
from qwen2vl.data.preprocess import BadSample
from qwen2vl.errors import InputError
from qwen2vl.train.loader.bad_samples import BadSampleTracker
from qwen2vl.train.loader.batch import Batch, pack_batch

DATA = DataConfig(sources=(SourceConfig(path="x"),), max_bad_fraction=0.01)


EMPTY = pack_batch([], pad_id=0)


def create_batch(*bad: BadSample, num_good: int = 0) -> Batch:
    return replace(EMPTY, families=("x",) * num_good, bad_samples=bad)


def bad_sample(number: int, *, known: bool = False, reason: str = "missing") -> BadSample:
    return BadSample(f"rows.jsonl:{number}", "rows", reason, f"{number}.png is gone", known)


def test_every_bad_sample_is_listed(tmp_path: Path) -> None:
    tracker = BadSampleTracker(tmp_path / "run")
    tracker.record(
        create_batch(bad_sample(1), bad_sample(2, known=True)), 3, DATA, MIN_BAD_FRACTION_BASE
    )
    tracker.record(create_batch(num_good=5), 4, DATA, MIN_BAD_FRACTION_BASE)
    lines = [json.loads(line) for line in tracker.path.read_text().splitlines()]
    assert [(line["step"], line["id"], line["known"]) for line in lines] == [
        (3, "rows.jsonl:1", False),
        (3, "rows.jsonl:2", True),
    ]
    assert set(lines[0]) == {"step", "id", "source", "reason", "text", "known"}


def test_the_file_is_created_on_demand_and_per_rank(tmp_path: Path) -> None:
    tracker = BadSampleTracker(tmp_path / "run")
    tracker.record(create_batch(num_good=5), 1, DATA, MIN_BAD_FRACTION_BASE)
    assert not tracker.path.exists()
    names = [BadSampleTracker(tmp_path, rank=rank).path.name for rank in (0, 12)]
    assert names == ["bad_samples.jsonl", "bad_samples-00012.jsonl"]


def test_known_bad_samples_are_not_counted(tmp_path: Path) -> None:
    tracker = BadSampleTracker(tmp_path)
    for step in range(100):
        tracker.record(create_batch(bad_sample(step, known=True)), step, DATA, 10)
    assert (tracker.num_seen, tracker.reasons.total()) == (0, 0)


def test_the_error_has_counts_by_reason_and_names_of_the_last(tmp_path: Path) -> None:
    tracker = BadSampleTracker(tmp_path)
    tracker.record(create_batch(*(bad_sample(n) for n in range(8)), num_good=92), 1, DATA, 10**6)
    last_bad = [bad_sample(n, reason="video") for n in range(8, 13)]
    with pytest.raises(InputError) as caught:
        tracker.record(create_batch(*last_bad), 2, DATA, 10**6)
    text = str(caught.value)
    assert text.startswith(
        "step 2: 13 of 105 samples are bad (8 with a missing media file, 5 with an unreadable "
        "video), the limit is 1.00%; "
        "rows.jsonl:8: 8.png is gone; rows.jsonl:9: 9.png is gone; rows.jsonl:10: 10.png"
    )
    assert text.endswith(
        f"all are in {tracker.path}: fix them, or train without them: data.max_bad_fraction=0.13"
    )
    assert replace(DATA, max_bad_fraction=0.13).tolerates(13, 105, 10**6)
    assert len(tracker.path.read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("num_bad", "num_seen", "num_total", "expected"),
    [
        (10, 20, 10**6, True),  # early on, a fraction of the first thousand of a large set
        (11, 20, 10**6, False),
        (30, 3000, 10**6, True),
        (31, 3000, 10**6, False),
        (1, 1, 100, True),  # of a small set, a fraction of all samples
        (2, 1, 100, False),
        (0, 0, 40, True),
        (1, 40, 40, False),
        (2, 200, 40, True),  # in its fifth epoch
    ],
)
def test_tolerated_numbers_of_bad_samples(
    num_bad: int, num_seen: int, num_total: int, expected: bool
) -> None:
    assert DATA.tolerates(num_bad, num_seen, num_total) == expected
