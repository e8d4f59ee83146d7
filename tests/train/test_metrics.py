"""Metrics: means over targets, not over batches; exact means the whole answer."""

import json
from pathlib import Path

import torch

from qwen2vl.train.metrics import Metrics
from qwen2vl.train.objective import Outcome
from qwen2vl.train.pack import Batch, Example, pack
from tests.tiny import tiny_processor


def outcome(batch: Batch, right: torch.Tensor) -> Outcome:
    losses = torch.arange(1.0, 1.0 + len(batch.targets_R))
    return Outcome(losses.sum(), losses, right)


def batch_of(*answers: tuple[str, str]) -> None:
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
