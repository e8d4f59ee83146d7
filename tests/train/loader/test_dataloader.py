"""Batches of data: the same samples a step for any workers and ranks, and what is bad is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.dataset import Corpus
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.synth import Mixture
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.dataloader import batches, workers_here
from tests.data.rows import conversation, data_of, good_rows, run_of, write_media, write_rows
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with one bad sample among 42, measured once for all tests here."""
    folder = tmp_path_factory.mktemp("data")
    write_media(folder)
    missing = conversation("<image>what?", "nothing", image="none.png")
    write_rows(folder / "rows.jsonl", [*good_rows(), missing])
    return folder


def config_of(folder: Path, *words: str) -> TrainConfig:
    data = data_of(folder, folder / "rows.jsonl", max_bad=0.1)
    return override(run_of(folder, data), words)


def conversations(batch: Batch) -> list[tuple[int, ...]]:
    """Cut a batch back into its conversations."""
    ids = batch.input_ids_T.split(list(batch.meta.lengths_q))
    return [tuple(own.tolist()) for own in ids] if batch.families else []


def samples_of_steps(config: TrainConfig, ranks: int) -> list[list[tuple[int, ...]]]:
    """List, sorted, what all ranks together see in each step."""
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(config.steps)]
    for rank in range(ranks):
        stream = batches(config, tiny_processor(), 0, rank=rank, ranks=ranks)
        for index, batch in enumerate(stream):
            steps[index // config.accumulate] += conversations(batch)
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["workers=1"]),
        (1, ["workers=4"]),  # as many as there are cores
        (2, []),
        (4, []),
        (1, ["accumulate=4"]),
        (2, ["accumulate=2"]),
    ],
)
def test_a_step_has_the_same_samples_for_any_workers_ranks_and_batches(
    folder: Path, ranks: int, words: list[str]
) -> None:
    whole = samples_of_steps(config_of(folder), 1)
    assert samples_of_steps(config_of(folder, *words), ranks) == whole
    assert len({tuple(step) for step in whole}) > 1


def test_workers_change_no_bit(folder: Path) -> None:
    alone, helped = (
        list(batches(config_of(folder, f"workers={n}"), tiny_processor(), 0)) for n in (0, 2)
    )
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.input_ids_T, two.input_ids_T)
        assert torch.equal(one.patches_NP, two.patches_NP)
        assert torch.equal(one.weights_R, two.weights_R)
        assert one.bad == two.bad


def test_a_pass_shows_every_sample_once(folder: Path) -> None:
    config = config_of(folder, "data.bins=1", "stages.0.steps=100")
    seen: list[tuple[int, ...]] = []
    num_bad = 0
    for batch in batches(config, tiny_processor(), 0):
        seen += conversations(batch)
        num_bad += len(batch.bad)
        if len(seen) + num_bad == len(good_rows()) + 1:
            break
    assert num_bad == 1
    assert len(seen) == len(good_rows())
    # Twice in a pass came nothing: the last conversations differ in the lengths of their answers.
    assert len(set(seen)) == len(good_rows())


def test_any_step_can_be_begun_with(folder: Path) -> None:
    config = config_of(folder)
    whole = list(batches(config, tiny_processor(), 0))
    late = list(batches(config, tiny_processor(), 5))
    assert [conversations(b) for b in late] == [conversations(b) for b in whole[5:]]


def test_every_rank_s_batch_has_a_picture_or_the_null_item(folder: Path) -> None:
    for rank in range(4):
        few = config_of(folder, "stages.0.steps=2")
        for batch in batches(few, tiny_processor(), 0, rank=rank, ranks=4):
            assert len(batch.patches_NP) >= 4
            assert len(batch.input_ids_T) <= 512
            assert torch.isfinite(batch.run(tiny_model())).all()


def test_bad_samples_are_listed_by_id_and_never_replaced(folder: Path) -> None:
    config = config_of(folder, f"out={folder / 'listed'}")
    told = [bad for batch in batches(config, tiny_processor(), 0) for bad in batch.bad]
    lines = (folder / "listed" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == len(told) > 0
    line = json.loads(lines[0])
    assert line["id"] == "rows.jsonl:42"
    assert line["reason"] == "missing"
    assert line["step"] >= 1
    assert "none.png is missing in" in line["text"]


def test_too_many_bad_samples_stop_the_run_before_it_begins(folder: Path) -> None:
    with pytest.raises(InputError, match=r"1 of 42 samples are bad \(1 missing\).*rows.jsonl:42"):
        batches(config_of(folder, "data.max_bad=0.01"), tiny_processor(), 0)


def test_samples_that_turn_bad_stop_the_run_above_the_limit(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("<image>what?", "x" * 50, image=f"{i % 5}.png") for i in range(40)]
    data = data_of(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), max_bad=0.02)
    config = run_of(tmp_path, data, steps=50)
    stream = batches(config, tiny_processor(), 0)
    for i in range(5):  # whole headers, broken pixels
        path = tmp_path / f"{i}.png"
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        InputError, match=r"step 1: 1\d of 1\d samples are bad \(1\d picture\).*2.00%.* damaged"
    ):
        list(stream)


def test_dropped_samples_are_listed_and_do_not_stop_the_run(tmp_path: Path) -> None:
    rows = [conversation("q", "a"), *(conversation("q", "a" * 600) for _ in range(30))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = data_of(tmp_path, path, oversize="drop", bins=1)
    config = run_of(tmp_path, data, steps=50)
    told = [bad.reason for batch in batches(config, tiny_processor(), 0) for bad in batch.bad]
    assert told == ["oversize"] * 30 * 50
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == len(told)


def test_media_that_changed_since_they_were_measured_are_bad(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("<image>what?", "x", image="0.png"), conversation("q", "a")]
    data = data_of(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), bins=1, max_bad=0.5)
    config = run_of(tmp_path, data, steps=1)
    list(batches(config, tiny_processor(), 0))
    (tmp_path / "0.png").write_bytes((tmp_path / "4.png").read_bytes())
    (batch,) = batches(config, tiny_processor(), 0)
    assert [bad.reason for bad in batch.bad] == ["length"]
    assert batch.families == ("rows",)


def test_going_on_with_other_data_is_refused(tmp_path: Path) -> None:
    rows = [conversation("q", "a" * i) for i in range(1, 9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = run_of(tmp_path, data_of(tmp_path, path))
    list(batches(config, tiny_processor(), 0))
    list(batches(config, tiny_processor(), 3))
    write_rows(path, rows[1:])
    with pytest.raises(ConfigError, match="the data of read are not those that this run began"):
        batches(config, tiny_processor(), 3)


def test_bins_that_cannot_be_shared_evenly_are_refused_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Corpus, "open", lambda *_, **__: pytest.fail("measured"))
    text = r"stage read: data.bins is 4, which 3 ranks x 1 batches cannot share evenly; .* of 3"
    with pytest.raises(ConfigError, match=text):
        batches(config_of(folder), tiny_processor(), 0, ranks=3)


def test_no_more_workers_than_cores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "workers=4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert workers_here(config) == 4
    assert workers_here(override(config, ["workers=0"])) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank has half of the cores
    assert workers_here(config) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert workers_here(config) == 1


def test_the_world_may_be_one_source_of_several(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [conversation("q", "a" * i) for i in range(1, 30)])
    shapes = Mixture(weights={"shapes": 1.0}, canvas=(56, 84), num_shapes=(1, 2))
    data = DataConfig(
        sources=(Source(path=str(path), weight=1), Source(mixture=shapes, samples=30, weight=3)),
        max_tokens=512,
        bins=2,
        cache=str(tmp_path / "cache"),
    )
    families = [f for b in batches(run_of(tmp_path, data), tiny_processor(), 0) for f in b.families]
    assert set(families) == {"rows", "world"}
    assert 2 < families.count("world") / families.count("rows") < 4
