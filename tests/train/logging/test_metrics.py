"""Metrics: means over targets, not over batches, of all ranks; nothing waits for the device."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.preprocess import BadSample, Example
from qwen2vl.parallel.mesh import Ranks
from qwen2vl.recipes import tiny
from qwen2vl.train.flops import Costs, Price
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.logging import metrics as room
from qwen2vl.train.logging.metrics import Metrics, families_of
from qwen2vl.train.loss import Outcome
from tests.tiny import tiny_processor
from tests.train.loader.test_batch import conversations

FREE = Price(1)
COSTS = Costs(patch=FREE, patch_pair=FREE, token=FREE, token_pair=FREE, target=Price(0, 0, 1))


def outcome(batch: Batch, right: torch.Tensor) -> Outcome:
    losses = torch.arange(1.0, 1.0 + len(batch.targets_R))
    return Outcome(losses.sum(), losses, right)


def random_outcome(batch: Batch, seed: int) -> Outcome:
    draw = torch.Generator().manual_seed(seed)
    losses_R = torch.rand(len(batch.targets_R), generator=draw)
    return Outcome(losses_R.sum(), losses_R, torch.rand(len(losses_R), generator=draw) < 0.7)


def batch_of(*answers: tuple[str, str]) -> Batch:
    processor = tiny_processor()
    examples = [
        Example(
            processor(
                [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}],
                for_training=True,
            ),
            family,
        )
        for family, answer in answers
    ]
    return pack(examples, pad_id=0)


def step_of(metrics: Metrics, batch: Batch, seed: int) -> None:
    metrics.add(batch, random_outcome(batch, seed), torch.tensor(1.0 + seed), 0.25)


def freeze_time(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr(room.time, "perf_counter", lambda: next(clock))


def test_a_line_holds_each_family_and_the_file_holds_the_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    batch = batch_of(("a", "x"), ("b", "yz"))  # with the end mark: 2 and 3 targets
    right = torch.tensor([True, True, True, False, True])
    metrics.add(batch, outcome(batch, right), torch.tensor(2.0), 0.0)
    metrics.add(batch, outcome(batch, right), torch.tensor(4.0), 0.0)
    line = metrics.report(step=2, stage="s")
    assert line["loss"] == 3.0
    assert line["grad_norm"] == 3.0
    assert line["families"]["a"] == {
        "loss": 1.5,
        "token_accuracy": 1.0,
        "exact": 1.0,
        "examples": 2,
    }
    assert line["families"]["b"]["loss"] == 4.0
    assert line["families"]["b"]["exact"] == 0.0
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == line


def test_a_report_forgets_what_it_told(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    batch = batch_of(("a", "x"))
    for _ in range(2):
        metrics.add(batch, outcome(batch, torch.tensor([True, False])), torch.tensor(1.0), 0.0)
        assert metrics.report()["families"]["a"]["examples"] == 1


def test_families_are_summed_as_by_hand(tmp_path: Path) -> None:
    metrics, batch = Metrics(tmp_path / "metrics.jsonl"), pack(conversations(), pad_id=0)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for seed in range(3):
        step_of(metrics, batch, seed)
        found = random_outcome(batch, seed)
        for owner, family in enumerate(batch.families):
            mine = batch.owner_R == owner
            hits, count = int(found.right_R[mine].sum()), int(mine.sum())
            loss = float(found.losses_R[mine].double().sum())
            values = (loss, count, hits, 1, hits == count)
            sums[family] = [a + b for a, b in zip(sums[family], values, strict=True)]
    line = metrics.report()
    assert list(line["families"]) == sorted(sums)
    for family, (loss, targets, hits, answers, whole) in sums.items():
        got = line["families"][family]
        assert got["loss"] == pytest.approx(loss / targets, rel=1e-6)
        assert got["token_accuracy"] == hits / targets
        assert (got["exact"], got["examples"]) == (whole / answers, answers)
    total = [sum(values) for values in zip(*sums.values(), strict=True)]
    assert line["loss"] == pytest.approx(total[0] / total[1], rel=1e-6)
    assert line["grad_norm"] == pytest.approx(2.0)


def test_adding_reads_nothing_from_the_device(tmp_path: Path) -> None:
    batch = pack(conversations(), pad_id=0).to("meta")  # has no numbers to read
    losses_R = torch.empty(len(batch.targets_R), device="meta")
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.costs = COSTS
    metrics.add(batch, Outcome(losses_R.sum(), losses_R, losses_R > 0), losses_R.sum(), 0.0)
    with pytest.raises(Exception, match="meta"):
        metrics.report()


def test_speeds_count_what_was_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze_time(monkeypatch, 0.0, 2.0, 2.0)
    metrics, batch = Metrics(tmp_path / "metrics.jsonl"), pack(conversations(), pad_id=0)
    step_of(metrics, batch, 0)
    line = metrics.report()
    assert line["seconds"] == 2.0
    assert line["examples_per_second"] == 2.5
    assert line["tokens_per_second"] == len(batch.input_ids_T) / 2
    assert line["patches_per_second"] == len(batch.patches_NP) / 2
    assert line["pictures_per_second"] == 3.0  # four pictures, and a clip of two pairs of frames
    assert line["data_wait"] == 0.125


def test_a_null_item_is_no_picture(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    step_of(metrics, batch_of(("a", "x")), 0)
    line = metrics.report()
    assert line["pictures_per_second"] == line["patches_per_second"] == 0


def test_bad_samples_are_counted_over_the_run(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    bad = (BadSample("1", "s", "missing", "no such file"),) * 2
    for total in (2, 4):
        step_of(metrics, replace(batch_of(("a", "x")), bad=bad), 0)
        assert metrics.report()["bad_samples"] == total


def test_where_every_sample_was_bad_there_is_no_loss(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    step_of(metrics, pack([], pad_id=0), 0)
    line = metrics.report()
    assert line["loss"] is None
    assert line["families"] == {}
    assert json.loads(metrics.path.read_text()) == line


def test_shares_of_the_peak_need_costs_and_a_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pack(conversations(), pad_id=0)
    cost = COSTS.of_batch(batch)
    assert cost.model > 0 and cost.again == len(batch.targets_R)
    for costs, peak, keys in (
        (None, 1e9, set()),
        (COSTS, None, {"flops_per_second"}),
        (COSTS, 1e9, {"flops_per_second", "mfu", "hfu"}),
    ):
        freeze_time(monkeypatch, 0.0, 2.0, 2.0)
        metrics = Metrics(tmp_path / "metrics.jsonl", peak=peak)
        metrics.costs = costs
        step_of(metrics, batch, 0)
        line = metrics.report()
        assert line.keys() & {"flops_per_second", "mfu", "hfu"} == keys
        if "mfu" in keys:
            assert line["mfu"] == cost.model / 2e9
            assert line["hfu"] == (cost.model + cost.again) / 2e9


def test_phases_are_shares_of_the_time(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.enter("data")
    metrics.enter("forward")
    torch.randn(300, 300) @ torch.randn(300, 300)
    metrics.enter("other")
    step_of(metrics, batch_of(("a", "x")), 0)
    line = metrics.report()
    assert set(line["phases"]) == {"data", "forward", "backward", "optimizer", "other"}
    assert line["phases"]["forward"] > 0 and line["phases"]["backward"] == 0
    assert 0.5 < sum(line["phases"].values()) <= 1.0
    assert "slowest" not in line


def test_ranks_added_up_are_one_rank_on_the_union(tmp_path: Path) -> None:
    """Ranks with other families, more batches, or none at all, as over a real reduction."""
    names = ["a", "b", "family0", "family1", "never"]
    shares: list[list[Batch]] = [
        [batch_of(("a", "x"), ("b", "yz")), pack(conversations()[:2], pad_id=0)],
        [pack(conversations(), pad_id=0), batch_of(("a", "longer"))],
        [pack([], pad_id=0), pack([], pad_id=0)],
    ]
    alone = Metrics(tmp_path / "alone.jsonl")
    alone.costs = COSTS
    sums, all_metrics = [], []
    for rank, share in enumerate(shares):
        ranks = Ranks(torch.device("cpu"), rank, len(shares))
        metrics = Metrics(tmp_path / "metrics.jsonl", ranks=ranks, families=names)
        metrics.costs = COSTS
        for seed, batch in enumerate(share):
            step_of(metrics, batch, seed)
            step_of(alone, batch, seed)
        sums.append(metrics.sums())
        all_metrics.append(metrics)
    wanted = alone.line(alone.sums())
    for metrics in all_metrics:
        line = metrics.line(torch.stack(sums).sum(0))
        for key in ("loss", "grad_norm", "bad_samples"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-12)
        assert line["families"].keys() == wanted["families"].keys()
        for family, row in line["families"].items():
            assert row == pytest.approx(wanted["families"][family], rel=1e-12)
    work = [sum(COSTS.of_batch(b).model + COSTS.of_batch(b).again for b in s) for s in shares]
    assert line["slowest"]["operations"] == {
        "rank": 1,
        "over_mean": pytest.approx(max(work) / (sum(work) / 3)),
    }


def test_the_slowest_rank_of_a_phase_is_named(tmp_path: Path) -> None:
    sums = []
    for rank, waited in enumerate((1.0, 5.0, 3.0)):
        ranks = Ranks(torch.device("cpu"), rank, 3)
        metrics = Metrics(tmp_path / "metrics.jsonl", ranks=ranks, families=["a"])
        batch = batch_of(("a", "x"))
        metrics.add(batch, random_outcome(batch, 0), torch.tensor(1.0), waited)
        sums.append(metrics.sums())
    line = metrics.line(torch.stack(sums).sum(0))
    assert line["slowest"]["waited"] == {"rank": 1, "over_mean": pytest.approx(5 / 3)}


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    heard: list[Any] = []
    for rank in (0, 1):
        path = tmp_path / f"{rank}.jsonl"
        ranks = Ranks(torch.device("cpu"), rank, 2)
        metrics = Metrics(path, ranks=ranks, families=["a"], sinks=[heard.append])
        step_of(metrics, batch_of(("a", "x")), 0)
        line = metrics.report(step=1)
        assert path.exists() == (rank == 0)
    assert len(heard) == 1
    assert heard[0]["step"] == line["step"] == 1


def test_what_a_probe_finds_is_a_line_and_its_time_counts_for_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    # Begin at 0, look from 1 to 11, report at 12.
    freeze_time(monkeypatch, 0.0, 1.0, 11.0, 12.0, 12.0)
    metrics = Metrics(tmp_path / "metrics.jsonl", sinks=[heard.append])
    step_of(metrics, batch_of(("a", "x")), 0)
    found = metrics.look(7, lambda: {"held_out": {"loss": 1.0}})
    assert found == heard[0] == {"step": 7, "held_out": {"loss": 1.0}}
    assert metrics.report(step=8)["seconds"] == 2.0
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [7, 8]


def test_families_of_a_run_are_those_of_the_world_and_its_sources() -> None:
    config = tiny.recipe()
    data = DataConfig(sources=(Source(path="a/pages.jsonl"), Source(path="b.jsonl", name="mine")))
    stages = (*config.stages, replace(config.stages[0], mixture=None, data=data))
    names = families_of(replace(config, stages=stages))
    assert {"pages", "mine", "shapes", "text"} <= set(names)
    assert names == sorted(names)
