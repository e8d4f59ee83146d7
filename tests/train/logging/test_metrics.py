"""Metrics: means over targets, not over batches, of all ranks; no device sync while adding."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.preprocess import BadSample, TrainingExample
from qwen2vl.flops import FlopCounter, UnitCost
from qwen2vl.parallel.mesh import DistributedContext
from qwen2vl.recipes import tiny
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.logging import metrics as metrics_module
from qwen2vl.train.logging.metrics import Metrics, metric_families
from qwen2vl.train.loss import LossOutput
from tests.tiny import tiny_processor
from tests.train.loader.test_batch import conversations

FREE_COST = UnitCost(1)
COSTS = FlopCounter(
    patch=FREE_COST,
    patch_pair=FREE_COST,
    token=FREE_COST,
    token_pair=FREE_COST,
    target=UnitCost(0, 0, 1),
)


def create_output(batch: Batch, is_correct: torch.Tensor) -> LossOutput:
    losses = torch.arange(1.0, 1.0 + len(batch.targets_R))
    return LossOutput(losses.sum(), losses, is_correct)


def random_output(batch: Batch, seed: int) -> LossOutput:
    draw = torch.Generator().manual_seed(seed)
    losses_R = torch.rand(len(batch.targets_R), generator=draw)
    return LossOutput(losses_R.sum(), losses_R, torch.rand(len(losses_R), generator=draw) < 0.7)


def create_batch(*answers: tuple[str, str]) -> Batch:
    processor = tiny_processor()
    examples = [
        TrainingExample(
            processor(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}],
                for_training=True,
            ),
            family,
        )
        for family, answer in answers
    ]
    return pack_batch(examples, pad_id=0)


def add_batch(metrics: Metrics, batch: Batch, seed: int) -> None:
    metrics.add(batch, random_output(batch, seed), torch.tensor(1.0 + seed), 0.25)


def set_clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(clock))


def test_a_record_has_each_family_and_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    batch = create_batch(("a", "x"), ("b", "yz"))  # with the end token: 2 and 3 targets
    is_correct = torch.tensor([True, True, True, False, True])
    metrics.add(batch, create_output(batch, is_correct), torch.tensor(2.0), 0.0)
    metrics.add(batch, create_output(batch, is_correct), torch.tensor(4.0), 0.0)
    record = metrics.report(step=2, stage="s")
    assert record["loss"] == 3.0
    assert record["grad_norm"] == 3.0
    assert record["families"]["a"] == {
        "loss": 1.5,
        "token_accuracy": 1.0,
        "exact_match": 1.0,
        "examples": 2,
    }
    assert record["families"]["b"]["loss"] == 4.0
    assert record["families"]["b"]["exact_match"] == 0.0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == record


def test_a_report_resets_the_sums(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    batch = create_batch(("a", "x"))
    for _ in range(2):
        metrics.add(
            batch, create_output(batch, torch.tensor([True, False])), torch.tensor(1.0), 0.0
        )
        assert metrics.report()["families"]["a"]["examples"] == 1


def test_sums_by_family_equal_a_plain_loop(tmp_path: Path) -> None:
    metrics, batch = Metrics(tmp_path / "metrics.jsonl"), pack_batch(conversations(), pad_id=0)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for seed in range(3):
        add_batch(metrics, batch, seed)
        output = random_output(batch, seed)
        for example_index, family in enumerate(batch.families):
            is_of_example = batch.example_index_R == example_index
            correct, count = int(output.is_correct_R[is_of_example].sum()), int(is_of_example.sum())
            loss = float(output.losses_R[is_of_example].double().sum())
            values = (loss, count, correct, 1, correct == count)
            sums[family] = [a + b for a, b in zip(sums[family], values, strict=True)]
    record = metrics.report()
    assert list(record["families"]) == sorted(sums)
    for family, (loss, targets, correct, num_examples, exact_matches) in sums.items():
        metrics_of_family = record["families"][family]
        assert metrics_of_family["loss"] == pytest.approx(loss / targets, rel=1e-6)
        assert metrics_of_family["token_accuracy"] == correct / targets
        assert (metrics_of_family["exact_match"], metrics_of_family["examples"]) == (
            exact_matches / num_examples,
            num_examples,
        )
    total = [sum(values) for values in zip(*sums.values(), strict=True)]
    assert record["loss"] == pytest.approx(total[0] / total[1], rel=1e-6)
    assert record["grad_norm"] == pytest.approx(2.0)


def test_add_does_not_sync_with_the_device(tmp_path: Path) -> None:
    batch = pack_batch(conversations(), pad_id=0).to("meta")  # has no data to read
    losses_R = torch.empty(len(batch.targets_R), device="meta")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.flop_counter = COSTS
    metrics.add(batch, LossOutput(losses_R.sum(), losses_R, losses_R > 0), losses_R.sum(), 0.0)
    with pytest.raises(Exception, match="meta"):
        metrics.report()


def test_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 2.0, 2.0)
    metrics, batch = Metrics(tmp_path / "metrics.jsonl"), pack_batch(conversations(), pad_id=0)
    add_batch(metrics, batch, 0)
    record = metrics.report()
    assert record["seconds"] == 2.0
    assert record["examples_per_second"] == 2.5
    assert record["tokens_per_second"] == len(batch.input_ids_T) / 2
    assert record["patches_per_second"] == len(batch.patches_NP) / 2
    assert record["images_per_second"] == 3.0  # four images, and a video of two frame pairs
    assert record["data_wait"] == 0.125


def test_a_dummy_image_is_not_counted(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    add_batch(metrics, create_batch(("a", "x")), 0)
    record = metrics.report()
    assert record["images_per_second"] == record["patches_per_second"] == 0


def test_bad_samples_are_counted_over_the_run(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    bad = [BadSample(name, "s", "missing", "no such file") for name in "1213"]
    for samples, total in ((bad[:2], 2), (bad[2:], 3), (bad, 3)):  # in epochs: again
        add_batch(metrics, replace(create_batch(("a", "x")), bad_samples=tuple(samples)), 0)
        assert metrics.report()["bad_samples"] == total


def test_the_loss_is_null_if_every_sample_was_bad(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    add_batch(metrics, pack_batch([], pad_id=0), 0)
    record = metrics.report()
    assert record["loss"] is None
    assert record["families"] == {}
    assert json.loads(metrics.path.read_text()) == record


def test_mfu_needs_flops_and_a_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pack_batch(conversations(), pad_id=0)
    cost = COSTS.count(batch.flop_counts())
    assert cost.model > 0 and cost.recompute == len(batch.targets_R)
    for flop_counter, peak, keys in (
        (None, 1e9, set()),
        (COSTS, None, {"flops_per_second"}),
        (COSTS, 1e9, {"flops_per_second", "mfu", "hfu"}),
    ):
        set_clock(monkeypatch, 0.0, 2.0, 2.0)
        metrics = Metrics(tmp_path / "metrics.jsonl", peak_flops=peak)
        metrics.flop_counter = flop_counter
        add_batch(metrics, batch, 0)
        record = metrics.report()
        assert record.keys() & {"flops_per_second", "mfu", "hfu"} == keys
        if "mfu" in keys:
            assert record["mfu"] == cost.model / 2e9
            assert record["hfu"] == (cost.model + cost.recompute) / 2e9


def test_phases_are_shares_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by one second at each reading."""
    monkeypatch.setattr("time.perf_counter", count(0.0).__next__)
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.start_phase("data")
    metrics.start_phase("forward")
    metrics.start_phase("other")
    add_batch(metrics, create_batch(("a", "x")), 0)
    record = metrics.report()
    assert set(record["phases"]) == {"data", "forward", "backward", "optimizer", "other"}
    assert record["phases"]["forward"] > 0 and record["phases"]["backward"] == 0
    assert 0.5 < sum(record["phases"].values()) <= 1.0
    assert "slowest" not in record


def test_reduced_ranks_equal_one_rank_on_all_batches(tmp_path: Path) -> None:
    """Ranks with other families, more batches, or none at all, as in a real reduction."""
    names = ["a", "b", "family0", "family1", "never"]
    batches_by_rank: list[list[Batch]] = [
        [create_batch(("a", "x"), ("b", "yz")), pack_batch(conversations()[:2], pad_id=0)],
        [pack_batch(conversations(), pad_id=0), create_batch(("a", "longer"))],
        [pack_batch([], pad_id=0), pack_batch([], pad_id=0)],
    ]
    single = Metrics(tmp_path / "alone.jsonl")
    single.flop_counter = COSTS
    sums, all_metrics = [], []
    for rank, batches in enumerate(batches_by_rank):
        ranks = DistributedContext(torch.device("cpu"), rank, len(batches_by_rank))
        metrics = Metrics(tmp_path / "metrics.jsonl", distributed=ranks, families=names)
        metrics.flop_counter = COSTS
        for seed, batch in enumerate(batches):
            add_batch(metrics, batch, seed)
            add_batch(single, batch, seed)
        sums.append(metrics.sums())
        all_metrics.append(metrics)
    expected = single.summarize(single.sums())
    for metrics in all_metrics:
        record = metrics.summarize(torch.stack(sums).sum(0))
        for key in ("loss", "grad_norm", "bad_samples"):
            assert record[key] == pytest.approx(expected[key], rel=1e-12)
        assert record["families"].keys() == expected["families"].keys()
        for family, row in record["families"].items():
            assert row == pytest.approx(expected["families"][family], rel=1e-12)
    flops = [
        sum(COSTS.count(b.flop_counts()).model + COSTS.count(b.flop_counts()).recompute for b in s)
        for s in batches_by_rank
    ]
    assert record["slowest"]["flops"] == {
        "rank": 1,
        "over_mean": pytest.approx(max(flops) / (sum(flops) / 3)),
    }


def test_the_slowest_rank_of_a_phase_is_named(tmp_path: Path) -> None:
    sums = []
    for rank, data_wait in enumerate((1.0, 5.0, 3.0)):
        ranks = DistributedContext(torch.device("cpu"), rank, 3)
        metrics = Metrics(tmp_path / "metrics.jsonl", distributed=ranks, families=["a"])
        batch = create_batch(("a", "x"))
        metrics.add(batch, random_output(batch, 0), torch.tensor(1.0), data_wait)
        sums.append(metrics.sums())
    record = metrics.summarize(torch.stack(sums).sum(0))
    assert record["slowest"]["data_wait"] == {"rank": 1, "over_mean": pytest.approx(5 / 3)}


def test_only_rank_0_writes(tmp_path: Path) -> None:
    records: list[Any] = []
    for rank in (0, 1):
        path = tmp_path / f"{rank}.jsonl"
        ranks = DistributedContext(torch.device("cpu"), rank, 2)
        metrics = Metrics(path, distributed=ranks, families=["a"], loggers=[records.append])
        add_batch(metrics, create_batch(("a", "x")), 0)
        record = metrics.report(step=1)
        assert path.exists() == (rank == 0)
    assert len(records) == 1
    assert records[0]["step"] == record["step"] == 1


def test_an_evaluation_is_a_record_and_its_time_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[Any] = []
    # Start at 0, evaluate from 1 to 11, report at 12.
    set_clock(monkeypatch, 0.0, 1.0, 11.0, 12.0, 12.0)
    metrics = Metrics(tmp_path / "metrics.jsonl", loggers=[records.append])
    add_batch(metrics, create_batch(("a", "x")), 0)
    record = metrics.log_evaluation(7, lambda: {"held_out": {"loss": 1.0}})
    assert record == records[0] == {"step": 7, "held_out": {"loss": 1.0}}
    assert metrics.report(step=8)["seconds"] == 2.0
    lines = [json.loads(record) for record in metrics.path.read_text().splitlines()]
    assert [record["step"] for record in lines] == [7, 8]


def test_the_families_of_a_run_are_synthetic_families_and_sources() -> None:
    config = tiny.recipe()
    data = DataConfig(
        sources=(SourceConfig(path="a/pages.jsonl"), SourceConfig(path="b.jsonl", name="mine"))
    )
    stages = (*config.stages, replace(config.stages[0], mixture=None, data=data))
    names = metric_families(replace(config, stages=stages))
    assert {"pages", "mine", "shapes", "text"} <= set(names)
    assert names == sorted(names)
