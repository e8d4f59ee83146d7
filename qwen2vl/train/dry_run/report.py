"""Dry-run reports of a training config, without loading a model: `qwen2vl train RECIPE --dry-run`.

Data are opened, measured and packed as for the run itself, so a dry run also fills the caches of a
real one. Per stage it reports how often each source is read, bad samples, packing efficiency, load
balance, the length of an epoch and the estimated memory of a step; it also decodes samples of each
source (`sample_check.py`), of which `text_spans` marks the supervised tokens. Printed by
`cli/dry_run.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.lengths import ProgressCallback
from qwen2vl.data.preprocess import padded_length
from qwen2vl.model import meta_model
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.train.adapter import initial_factors
from qwen2vl.train.checkpoint import read_resume_step
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.dry_run.activation_memory import BatchShape
from qwen2vl.train.dry_run.memory import StepMemory, estimate_step_memory, wrapped_meta_model
from qwen2vl.train.dry_run.sample_check import SampleCheck, check_samples
from qwen2vl.train.loader.data_order import check_global_batch_sizes
from qwen2vl.train.loader.data_summary import DataSummary, summarize_data
from qwen2vl.train.loader.dataloader import BatchDataset, check_fingerprints, open_dataset
from qwen2vl.train.optim.optimizers import check_trainable, num_trainable

__all__ = [
    "ParameterCounts",
    "StageReport",
    "TextSpan",
    "check_config",
    "estimate_duration",
    "estimate_synthetic_stage_memory",
    "report_stages",
    "text_spans",
]

IMBALANCE_WORLD_SIZES = (2, 4, 8)  # for which load balance is reported
# Samples that are returned, of those that were prepared.
SHOWN_PER_SOURCE = 2
SHOWN_OF_ONE_SOURCE = 4  # of a stage that has no other
MEMORY_WORLD_SIZES = (1, 8)  # for which memory is estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """The numbers of parameters of a run."""

    total: int  # of the model, without an adapter
    trainable: Sequence[int]  # in each stage; of an adapter its factors


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """One stage that reads data from files."""

    data: DataSummary
    imbalance: Mapping[int, float]  # world size -> vision tower time relative to equal shares
    memory: Mapping[int, StepMemory]  # world size -> memory of a step on a rank
    check: SampleCheck  # of samples of each source


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Consecutive tokens that are all supervised or all not, decoded."""

    text: str
    is_supervised: bool


def check_config(config: TrainConfig, processor: Processor) -> ParameterCounts:
    """Check rules, adapter and batch sizes, before any data are measured; count parameters.

    Raises:
        ConfigError: a rule or target module matches nothing, the rules of a stage freeze every
            parameter, `adapter.init` was trained with other settings, or a step cannot be
            divided among the ranks.
        CheckpointError: `adapter.init` is no adapter of this model.
    """
    model = wrapped_meta_model(config, processor.config)
    for stage in config.stages:
        check_trainable(model, stage)
    check_global_batch_sizes(config, int(os.environ.get("WORLD_SIZE", "1")))
    base_model = meta_model(processor.config)
    if config.adapter is not None and config.adapter.init:
        initial_factors(base_model, config.adapter, config.seed)  # as the run reads them
    return ParameterCounts(
        total=sum(parameter.numel() for parameter in base_model.parameters()),
        trainable=[num_trainable(model, stage) for stage in config.stages],
    )


def report_stages(
    config: TrainConfig,
    processor: Processor,
    *,
    progress: ProgressCallback = lambda what, done, total: None,
) -> Iterator[StageReport]:
    """Prepare the data of each stage that reads from files, and yield its report.

    Raises:
        InputError: data are missing, damaged, too large for a bin, or too many are bad.
        ConfigError: the run resumes, and its data are not those that it began with.
        CheckpointError: as `read_resume_step`.
    """
    for stage_index, stage in enumerate(config.stages):
        if stage.data is None:
            continue
        dataset = open_dataset(config, stage_index, processor, progress=progress)
        check_fingerprints(config, {stage_index: dataset}, read_resume_step(config))
        is_one = len(stage.data.sources) == 1
        yield StageReport(
            data=summarize_data(config, stage_index, dataset),
            imbalance=_imbalance(dataset),
            memory=_stage_memory(config, processor, stage, dataset),
            check=check_samples(dataset, SHOWN_OF_ONE_SOURCE if is_one else SHOWN_PER_SOURCE),
        )


def estimate_synthetic_stage_memory(
    config: TrainConfig, processor: Processor, stage_index: int
) -> dict[int, StepMemory]:
    """Estimate the memory of a stage of synthetic data, by its first batch; by world size.

    Raises:
        ConfigError: as `estimate_step_memory`.
        FontError: a font of the synthetic world is not installed.
    """
    stage = config.stages[stage_index]
    first = (
        sum(earlier.steps for earlier in config.stages[:stage_index])
        * config.gradient_accumulation_steps
    )
    estimates: dict[int, StepMemory] = {}
    for world_size in _memory_world_sizes(config):
        if (
            stage.steps
            and stage.global_batch_size >= world_size * config.gradient_accumulation_steps
        ):
            batch = BatchDataset(config, processor, {}, world_size=world_size)[first]
            shape = BatchShape.from_batch(batch)
            estimates[world_size] = estimate_step_memory(
                config, processor.config, stage, shape, world_size=world_size
            )
    return estimates


def estimate_duration(config: TrainConfig, tokens: float) -> float | None:
    """Estimate the seconds for `tokens` from the run's last log line; None if it has none."""
    path = Path(config.folder) / "metrics.jsonl"
    try:
        lines = map(json.loads, reversed(path.read_text(encoding="utf-8").splitlines()))
        # Lines of evaluations lie between those of training.
        return tokens / next(speed for line in lines if (speed := line.get("tokens_per_second")))
    except (OSError, ValueError, StopIteration):
        return None


def text_spans(
    sample: ModelInput, tokenizer: Tokenizer, placeholder_ids: tuple[int, ...]
) -> Iterator[TextSpan]:
    """Decode a sample into supervised and other spans; runs of placeholders are abbreviated."""
    assert sample.loss_mask is not None
    tokens = zip(sample.input_ids, sample.loss_mask, strict=True)
    for (is_supervised, placeholder_id), group in groupby(
        tokens, lambda t: (t[1], t[0] if t[0] in placeholder_ids else 0)
    ):
        ids = [token for token, _ in group]
        text = tokenizer.decode(ids[:1] if placeholder_id else ids, keep_special="all")
        yield TextSpan(f"{text} x {len(ids)} " if placeholder_id else text, is_supervised)


def _memory_world_sizes(config: TrainConfig) -> list[int]:
    """Return the world sizes for memory estimates: common ones, and that of torchrun."""
    world_sizes = {*MEMORY_WORLD_SIZES, int(os.environ.get("WORLD_SIZE", "1"))}
    return sorted(
        world_size for world_size in world_sizes if world_size % config.mesh.dp_replicate == 0
    )


def _stage_memory(
    config: TrainConfig, processor: Processor, stage: Stage, dataset: PackedDataset
) -> dict[int, StepMemory]:
    estimates: dict[int, StepMemory] = {}
    for world_size in _memory_world_sizes(config):
        bins_per_batch, remainder = divmod(
            dataset.data.global_batch_size, world_size * config.gradient_accumulation_steps
        )
        if not remainder and bins_per_batch <= len(dataset.plan):
            shape = _largest_batch_shape(dataset, bins_per_batch)
            estimates[world_size] = estimate_step_memory(
                config, processor.config, stage, shape, world_size=world_size
            )
    return estimates


def _largest_batch_shape(dataset: PackedDataset, bins_per_batch: int) -> BatchShape:
    """Return the sizes of a batch of the most expensive bins of the plan."""
    patch_size = dataset.processor.config.vision.patch_size
    lengths: list[int] = []
    frames: list[int] = []
    targets = 0
    for entry in dataset.plan.entries[: dataset.plan.starts[bins_per_batch]].tolist():
        if not dataset.tokens[entry]:
            continue
        lengths.append(padded_length(int(dataset.tokens[entry])))
        targets += int(dataset.targets[entry])
        max_patches = dataset.resized.get(entry, 0) // patch_size**2
        for t, h, w in dataset.grids(entry).tolist():
            frames += [min(h * w, max_patches) if max_patches else h * w] * t
    return BatchShape(tuple(sorted(lengths)), tuple(sorted(frames)), targets)


def _imbalance(dataset: PackedDataset) -> dict[int, float]:
    plan, num_bins_per_step = dataset.plan, dataset.data.global_batch_size
    return {
        n: plan.imbalance(n)
        for n in IMBALANCE_WORLD_SIZES
        if num_bins_per_step % n == 0 and n <= len(plan)
    }
