"""Data summary: how often a stage reads each of its sources, in what bins, and what is held out.

Printed before a run begins and by a dry run, from an opened dataset; nothing is read for it. An
epoch is one pass over the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.train.config import Stage, TrainConfig

__all__ = [
    "HELD_OUT_FILE",
    "MAX_BAD_SAMPLES",
    "DataSummary",
    "SourceSummary",
    "summarize_data",
    "write_held_out",
]

MAX_NAMED_SAMPLES = 3  # held-out ones, of each source
MAX_BAD_SAMPLES = 20  # of each source
HELD_OUT_FILE = "held_out.jsonl"  # in the run's folder: the samples of the validation splits


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """One data source of a stage."""

    name: str
    num_samples: int
    num_entries: int  # samples of an epoch, with repeats
    num_tokens: int  # of an epoch
    num_targets: int  # of an epoch
    bad: Mapping[str, int]  # reason -> samples
    bad_samples: Sequence[str]  # the first of them: file, line, what is wrong
    num_held_out: int  # samples of the validation split
    held_out_samples: Sequence[str]  # the first of them: file, line
    unused: Mapping[str, int] = field(default_factory=dict)  # column -> samples that have it
    notes: Mapping[str, int] = field(default_factory=dict)  # note -> samples that it is about


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """The data of one stage that reads files."""

    stage_index: int
    name: str  # of the stage
    steps: int
    sources: Sequence[SourceSummary]
    num_bins: int  # of an epoch
    num_bins_per_step: int
    max_tokens: int
    packing_efficiency: float  # share of the bins' capacity that holds tokens
    num_resized: int  # samples whose images are downscaled to fit into a bin
    tokens_per_step: float
    epochs: float  # of the whole stage

    @property
    def num_samples(self) -> int:
        """The number of samples of all sources."""
        return sum(source.num_samples for source in self.sources)

    @property
    def num_held_out(self) -> int:
        """The number of samples in the validation split."""
        return sum(source.num_held_out for source in self.sources)

    def steps_of(self, epochs: float) -> int:
        """Return the number of steps of so many epochs, one at least."""
        return max(1, int(epochs * self.num_bins / self.num_bins_per_step))


def summarize_data(config: TrainConfig, stage_index: int, dataset: PackedDataset) -> DataSummary:
    """Summarize the dataset of a stage."""
    stage: Stage = config.stages[stage_index]
    plan, data = dataset.plan, dataset.data
    tokens = int(dataset.tokens[plan.entries].sum(dtype=np.int64))
    return DataSummary(
        stage_index=stage_index,
        name=stage.name,
        steps=stage.steps,
        sources=[_summarize_source(index, dataset) for index in range(len(dataset.sources))],
        num_bins=len(plan),
        num_bins_per_step=data.global_batch_size,
        max_tokens=data.max_tokens,
        packing_efficiency=tokens / (len(plan) * data.max_tokens),
        num_resized=len(dataset.resized),
        tokens_per_step=tokens * data.global_batch_size / len(plan),
        epochs=dataset.epochs(stage.steps),
    )


def write_held_out(config: TrainConfig, datasets: Mapping[int, PackedDataset]) -> None:
    """List the samples of the validation splits in the run's folder, a JSON object a line.

    Args:
        config: of the run, whose folder exists.
        datasets: by stage index.
    """
    lines = [
        json.dumps({"stage": config.stages[stage_index].name, "source": label, "sample": name})
        for stage_index, dataset in datasets.items()
        for label, name in map(dataset.name_of, np.sort(dataset.held_out).tolist())
    ]
    path = Path(config.folder) / HELD_OUT_FILE
    if lines:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _summarize_source(source_index: int, dataset: PackedDataset) -> SourceSummary:
    first, last = dataset.offsets[source_index : source_index + 2].tolist()
    entries, held_out = (
        entries[(entries >= first) & (entries < last)]
        for entries in (dataset.plan.entries, dataset.held_out)
    )
    table, source = dataset.lengths[source_index], dataset.sources[source_index]
    return SourceSummary(
        name=dataset.labels[source_index],
        num_samples=len(table),
        num_entries=len(entries),
        num_tokens=int(dataset.tokens[entries].sum(dtype=np.int64)),
        num_targets=int(dataset.targets[entries].sum(dtype=np.int64)),
        bad=Counter(reason for reason, _ in table.bad.values()),
        bad_samples=[
            f"{source.name(index)}: {text}"
            for index, (_, text) in sorted(table.bad.items())[:MAX_BAD_SAMPLES]
        ],
        num_held_out=len(held_out),
        held_out_samples=[
            source.name(entry - first) for entry in np.sort(held_out)[:MAX_NAMED_SAMPLES].tolist()
        ],
        unused=table.unused,
        notes=table.notes,
    )
