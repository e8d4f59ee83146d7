"""Data loader: the same samples of a step for any workers and ranks; bad samples are reported."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch

from qwen2vl.data import workers
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.errors import ConfigError, InputError
from qwen2vl.synth import Mixture
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.dataloader import iterate_batches, num_local_workers
from tests.data.rows import (
    conversation,
    create_data_config,
    create_run_config,
    good_rows,
    write_media,
    write_rows,
)
from tests.media import uncollected_decoder
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with one bad sample among 42, measured once for all tests of this module."""
    folder = tmp_path_factory.mktemp("data")
    write_media(folder)
    missing = conversation("<image>what?", "nothing", image="none.png")
    write_rows(folder / "rows.jsonl", [*good_rows(), missing])
    return folder


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    data = create_data_config(folder, folder / "rows.jsonl", max_bad_fraction=0.1)
    return override(create_run_config(folder, data), overrides)


def conversations(batch: Batch) -> list[tuple[int, ...]]:
    """Split a batch into its conversations."""
    ids = batch.input_ids_T.split(list(batch.meta.lengths_q))
    return [tuple(conversation_ids.tolist()) for conversation_ids in ids] if batch.families else []


def samples_of_steps(config: TrainConfig, world_size: int) -> list[list[tuple[int, ...]]]:
    """Return the sorted samples of all ranks in each step."""
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(config.steps)]
    for rank in range(world_size):
        stream = iterate_batches(config, tiny_processor(), 0, rank=rank, world_size=world_size)
        for index, batch in enumerate(stream):
            steps[index // config.gradient_accumulation_steps] += conversations(batch)
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ["num_workers=1"]),
        (1, ["num_workers=4"]),  # limited by the number of cores
        (2, []),
        (4, []),
        (1, ["gradient_accumulation_steps=4"]),
        (2, ["gradient_accumulation_steps=2"]),
    ],
)
def test_the_samples_of_a_step_depend_on_no_workers_ranks_or_microbatches(
    folder: Path, world_size: int, overrides: list[str]
) -> None:
    expected = samples_of_steps(config_of(folder), 1)
    assert samples_of_steps(config_of(folder, *overrides), world_size) == expected
    assert len({tuple(step) for step in expected}) > 1


def test_workers_give_bitwise_the_same_batches(folder: Path) -> None:
    in_process, in_workers = (
        list(iterate_batches(config_of(folder, f"num_workers={n}"), tiny_processor(), 0))
        for n in (0, 2)
    )
    for one, two in zip(in_process, in_workers, strict=True):
        assert torch.equal(one.input_ids_T, two.input_ids_T)
        assert torch.equal(one.patches_NP, two.patches_NP)
        assert torch.equal(one.weights_R, two.weights_R)
        assert one.bad_samples == two.bad_samples


@pytest.mark.timeout(60)
def test_workers_do_not_free_video_decoders_of_the_parent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_limit_threads", lambda _: gc.collect())
    with uncollected_decoder():
        assert next(iterate_batches(config_of(folder, "num_workers=1"), tiny_processor(), 0))


def test_an_epoch_has_every_sample_once(folder: Path) -> None:
    config = config_of(folder, "data.global_batch_size=1", "stages.0.steps=100")
    samples: list[tuple[int, ...]] = []
    num_bad = 0
    for batch in iterate_batches(config, tiny_processor(), 0):
        samples += conversations(batch)
        num_bad += len(batch.bad_samples)
        if len(samples) + num_bad == len(good_rows()) + 1:
            break
    assert num_bad == 1
    assert len(samples) == len(good_rows())
    # No sample occurred twice: the last conversations differ in the lengths of their answers.
    assert len(set(samples)) == len(good_rows())


def test_iteration_can_start_at_any_step(folder: Path) -> None:
    config = config_of(folder)
    from_start = list(iterate_batches(config, tiny_processor(), 0))
    from_step_5 = list(iterate_batches(config, tiny_processor(), 5))
    assert [conversations(b) for b in from_step_5] == [conversations(b) for b in from_start[5:]]


def test_every_rank_s_batch_has_an_image_or_a_dummy_image(folder: Path) -> None:
    for rank in range(4):
        few = config_of(folder, "stages.0.steps=2")
        for batch in iterate_batches(few, tiny_processor(), 0, rank=rank, world_size=4):
            assert len(batch.patches_NP) >= 4
            assert len(batch.input_ids_T) <= 512
            assert torch.isfinite(batch.forward(tiny_model())).all()


def test_bad_samples_are_listed_by_id_and_never_replaced(folder: Path) -> None:
    config = config_of(folder, f"output_dir={folder / 'listed'}")
    bad_samples = [
        bad for batch in iterate_batches(config, tiny_processor(), 0) for bad in batch.bad_samples
    ]
    lines = (folder / "listed" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == len(bad_samples) > 0
    line = json.loads(lines[0])
    assert line["id"] == "rows.jsonl:42"
    assert line["reason"] == "missing"
    assert line["step"] >= 1
    assert "none.png is missing in /" in line["text"]


def test_too_many_bad_samples_are_refused_before_the_run(folder: Path) -> None:
    match = r"1 of 42 samples are bad \(1 with a missing media file\).*rows.jsonl:42"
    with pytest.raises(InputError, match=match):
        iterate_batches(config_of(folder, "data.max_bad_fraction=0.01"), tiny_processor(), 0)


def test_samples_that_become_bad_end_the_run_above_the_limit(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("<image>what?", "x" * 50, image=f"{i % 5}.png") for i in range(40)]
    data = create_data_config(
        tmp_path, write_rows(tmp_path / "rows.jsonl", rows), max_bad_fraction=0.02
    )
    config = create_run_config(tmp_path, data, steps=50)
    stream = iterate_batches(config, tiny_processor(), 0)
    for i in range(5):  # complete headers, damaged pixels
        path = tmp_path / f"{i}.png"
        path.write_bytes(path.read_bytes()[:200])
    match = r"step 1: 1\d of 1\d samples are bad \(1\d with an unreadable image\).*2.00%.* damaged"
    with pytest.raises(InputError, match=match):
        list(stream)


def test_dropped_samples_are_listed_and_do_not_end_the_run(tmp_path: Path) -> None:
    rows = [conversation("q", "a"), *(conversation("q", "a" * 600) for _ in range(30))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = create_data_config(tmp_path, path, oversize="drop", global_batch_size=1)
    config = create_run_config(tmp_path, data, steps=50)
    reasons = [
        bad.reason
        for batch in iterate_batches(config, tiny_processor(), 0)
        for bad in batch.bad_samples
    ]
    assert reasons == ["oversize"] * 30 * 50
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert len(lines) == len(reasons)


def test_media_that_changed_since_they_were_measured_are_bad(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("<image>what?", "x", image="0.png"), conversation("q", "a")]
    data = create_data_config(
        tmp_path,
        write_rows(tmp_path / "rows.jsonl", rows),
        global_batch_size=1,
        max_bad_fraction=0.5,
    )
    config = create_run_config(tmp_path, data, steps=1)
    list(iterate_batches(config, tiny_processor(), 0))
    (tmp_path / "0.png").write_bytes((tmp_path / "4.png").read_bytes())
    (batch,) = iterate_batches(config, tiny_processor(), 0)
    assert [bad.reason for bad in batch.bad_samples] == ["length"]
    assert batch.families == ("rows",)


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    rows = [conversation("q", "a" * i) for i in range(1, 9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = create_run_config(tmp_path, create_data_config(tmp_path, path))
    list(iterate_batches(config, tiny_processor(), 0))
    list(iterate_batches(config, tiny_processor(), 3))
    write_rows(path, rows[1:])
    with pytest.raises(ConfigError, match="the data of read are not those that this run began"):
        iterate_batches(config, tiny_processor(), 3)


def test_an_indivisible_batch_size_is_refused_before_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedDataset, "open", lambda *_, **__: pytest.fail("measured"))
    text = (
        r"stage read: data.global_batch_size is 4, "
        r"which 3 batches \(3 ranks x gradient_accumulation_steps=1\) cannot share evenly; .* of 3"
    )
    with pytest.raises(ConfigError, match=text):
        iterate_batches(config_of(folder), tiny_processor(), 0, world_size=3)


def test_the_number_of_workers_is_limited_by_the_cores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, "num_workers=4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert num_local_workers(config) == 4
    assert num_local_workers(override(config, ["num_workers=0"])) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank has half of the cores
    assert num_local_workers(config) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_local_workers(config) == 1


def test_the_synthetic_world_can_be_one_of_several_sources(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [conversation("q", "a" * i) for i in range(1, 30)])
    shapes = Mixture(weights={"shapes": 1.0}, canvas=(56, 84), num_shapes=(1, 2))
    data = DataConfig(
        sources=(
            SourceConfig(path=str(path), weight=1),
            SourceConfig(mixture=shapes, num_samples=30, weight=3),
        ),
        max_tokens=512,
        global_batch_size=2,
        cache_dir=str(tmp_path / "cache"),
    )
    families = [
        f
        for b in iterate_batches(create_run_config(tmp_path, data), tiny_processor(), 0)
        for f in b.families
    ]
    assert set(families) == {"rows", "world"}
    assert 2 < families.count("world") / families.count("rows") < 4
