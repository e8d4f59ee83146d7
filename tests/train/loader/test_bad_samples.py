"""Bad samples: listed all, counted where they were not known, and too many end the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl.data.config import FEWEST, DataConfig, Source
from qwen2vl.data.preprocess import BadSample
from qwen2vl.errors import InputError
from qwen2vl.train.loader.bad_samples import BadSamples
from qwen2vl.train.loader.batch import Batch, pack

DATA = DataConfig(sources=(Source(path="x"),), max_bad=0.01)


EMPTY = pack([], pad_id=0)


def batch_with(*bad: BadSample, good: int = 0) -> Batch:
    return replace(EMPTY, families=("x",) * good, bad=bad)


def sample(number: int, *, known: bool = False, reason: str = "missing") -> BadSample:
    return BadSample(f"rows.jsonl:{number}", "rows", reason, f"{number}.png is gone", known)


def test_every_bad_sample_is_a_line(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path / "run")
    bad.take(batch_with(sample(1), sample(2, known=True)), 3, DATA, FEWEST)
    bad.take(batch_with(good=5), 4, DATA, FEWEST)
    lines = [json.loads(line) for line in bad.path.read_text().splitlines()]
    assert [(line["step"], line["id"], line["known"]) for line in lines] == [
        (3, "rows.jsonl:1", False),
        (3, "rows.jsonl:2", True),
    ]
    assert set(lines[0]) == {"step", "id", "source", "reason", "text", "known"}


def test_without_a_bad_one_there_is_no_file_and_each_rank_has_its_own(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path / "run")
    bad.take(batch_with(good=5), 1, DATA, FEWEST)
    assert not bad.path.exists()
    names = [BadSamples(tmp_path, rank=rank).path.name for rank in (0, 12)]
    assert names == ["bad_samples.jsonl", "bad_samples-00012.jsonl"]


def test_what_was_known_is_not_counted(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path)
    for step in range(100):
        bad.take(batch_with(sample(step, known=True)), step, DATA, 10)
    assert (bad.seen, bad.reasons.total()) == (0, 0)


def test_too_many_are_told_by_reason_with_the_first_of_the_last(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path)
    bad.take(batch_with(*(sample(n) for n in range(8)), good=92), 1, DATA, 10**6)
    last = [sample(n, reason="video") for n in range(8, 13)]
    with pytest.raises(InputError) as told:
        bad.take(batch_with(*last), 2, DATA, 10**6)
    text = str(told.value)
    assert text.startswith(
        "step 2: 13 of 105 samples are bad (8 missing, 5 video), the limit is 1.00%; "
        "rows.jsonl:8: 8.png is gone; rows.jsonl:9: 9.png is gone; rows.jsonl:10: 10.png"
    )
    assert text.endswith(f"all are in {bad.path}: mend them, or raise data.max_bad")
    assert len(bad.path.read_text().splitlines()) == 13


@pytest.mark.parametrize(
    ("bad", "seen", "total", "may_be"),
    [
        (10, 20, 10**6, True),  # of the first few, a thousandth of a large set
        (11, 20, 10**6, False),
        (30, 3000, 10**6, True),
        (31, 3000, 10**6, False),
        (1, 1, 100, True),  # of a small set, the share of all of it
        (2, 1, 100, False),
        (0, 0, 40, True),
        (1, 40, 40, False),
        (2, 200, 40, True),  # in its fifth pass
    ],
)
def test_there_is_one_rule(bad: int, seen: int, total: int, may_be: bool) -> None:
    assert DATA.tolerates(bad, seen, total) == may_be
