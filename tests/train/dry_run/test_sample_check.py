"""Sample checks: which samples are decoded, what is bad when decoded, and when that is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.errors import InputError
from qwen2vl.train.dry_run.sample_check import check_samples, choose_entries, raise_if_bad
from tests.data.rows import conversation, create_data_config, write_media, write_rows
from tests.media import encoded, noise
from tests.tiny import tiny_processor


def test_the_first_some_between_the_last_and_the_costliest_are_chosen() -> None:
    tokens, cost = np.full(1000, 9), np.zeros(1000)
    tokens[0], cost[17], cost[18], cost[19] = 0, 5.0, 7.0, 6.0
    chosen = choose_entries(tokens, cost)
    assert chosen[0] == 1 and chosen[-1] == 999
    assert chosen == sorted({*chosen[:1], 18, 19, *chosen})
    assert len(chosen) == 10
    assert choose_entries(np.full(3, 9), np.zeros(3)) == [0, 1, 2]
    assert choose_entries(np.zeros(3), np.zeros(3)) == []


def open_with_damage(folder: Path, **fields: float) -> PackedDataset:
    """Open two sources; of the second, the costliest image is cut in its pixels."""
    write_media(folder)
    whole = encoded(noise(300, 300))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [conversation("<image>q", f"answer {i}", image="0.png") for i in range(40)]
    first = write_rows(folder / "first.jsonl", rows)
    rows[11] = conversation("<image>q", "a", image="cut.png")
    second = write_rows(folder / "second.jsonl", rows)
    data = create_data_config(folder, first, second, global_batch_size=1, **fields)
    return PackedDataset.open(data, tiny_processor(), seed=0)


def test_damage_that_headers_do_not_show_is_found_and_named(tmp_path: Path) -> None:
    dataset = open_with_damage(tmp_path)
    assert not any(table.bad for table in dataset.lengths)
    check = check_samples(dataset, 2)
    assert [(sample.id, sample.source, sample.reason) for sample in check.bad] == [
        ("second.jsonl:12", "second", "image")
    ]
    assert [name for name, _ in check.shown] == [
        *("first.jsonl:1", "first.jsonl:40"),
        *("second.jsonl:1", "second.jsonl:40"),
    ]
    text = r"1 of 1\d samples that were decoded are bad, the limit is 1.00%; second.jsonl:12: cut"
    with pytest.raises(InputError, match=text):
        raise_if_bad(check)


def test_damage_within_the_limit_is_no_error(tmp_path: Path) -> None:
    check = check_samples(open_with_damage(tmp_path, max_bad_fraction=0.2), 2)
    assert len(check.bad) == 1
    raise_if_bad(check)


def test_a_file_that_changed_after_it_was_measured_is_bad(tmp_path: Path) -> None:
    dataset = open_with_damage(tmp_path)
    (tmp_path / "0.png").write_bytes((tmp_path / "4.png").read_bytes())
    reasons = {sample.reason for sample in check_samples(dataset, 2).bad}
    assert reasons == {"length", "image"}
