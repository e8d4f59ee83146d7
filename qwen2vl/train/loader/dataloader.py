"""Data loader: a step number to its batches, prepared in worker processes (torch DataLoader).

A stage renders samples of the synthetic world, or reads the bins of a PackedDataset. Examples are
prepared by the same Processor that inference uses. data_order.py selects the samples, batch.py
packs them, data/dataset.py reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.lengths import ProgressCallback
from qwen2vl.data.preprocess import BadSample, TrainingExample
from qwen2vl.data.sources.synthetic import with_default_system
from qwen2vl.data.workers import iterate_in_workers
from qwen2vl.errors import ConfigError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.synth import Spec, render, sample
from qwen2vl.synth.world import check_resources
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.bad_samples import BadSampleTracker
from qwen2vl.train.loader.balance import balanced_share, estimate_flops, rank_group
from qwen2vl.train.loader.batch import Batch, pack_batch
from qwen2vl.train.loader.data_order import (
    bins_of_rank,
    bins_of_step,
    check_global_batch_sizes,
    locate_step,
    samples_of_step,
    stage_seed,
)

__all__ = [
    "BatchDataset",
    "check_fingerprints",
    "iterate_batches",
    "num_local_workers",
    "open_dataset",
    "open_datasets",
    "read_batch",
    "stage_processor",
]

FINGERPRINTS_FILE = "data.json"  # in the run's folder: fingerprint of each stage's data


class BatchDataset(Dataset[Batch]):
    """The batches of one rank of a run by index, a pure function of the config.

    A step has `config.gradient_accumulation_steps` batches (microbatches) on each rank, which share
    its samples.
    """

    def __init__(
        self,
        config: TrainConfig,
        processor: Processor,
        datasets: dict[int, PackedDataset],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.config, self.processor, self.datasets = config, processor, datasets
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.config.steps * self.config.gradient_accumulation_steps

    def __getitem__(self, index: int) -> Batch:
        step, microbatch = divmod(index, self.config.gradient_accumulation_steps)
        stage_index, _ = locate_step(self.config, step)
        return (
            self._read_data(step, microbatch)
            if stage_index in self.datasets
            else self._render_synthetic(step, microbatch)
        )

    def _render_synthetic(self, step: int, microbatch: int) -> Batch:
        """Render a batch of the synthetic world: the share of a rank, or of its microbatch."""
        num_batches = self.world_size * self.config.gradient_accumulation_steps
        group = rank_group(microbatch * self.world_size + self.rank, num_batches)
        stage, seed, indices = samples_of_step(
            self.config, step, rank=group.number, world_size=group.num_groups
        )
        assert stage.mixture is not None
        processor = stage_processor(stage, self.processor)
        specs = [(index, sample(seed, index, stage.mixture)) for index in indices]
        if group.size > 1:
            costs = [estimate_flops(spec, processor) for _, spec in specs]
            specs = [specs[i] for i in balanced_share(costs, group.rank, group.size)]
        examples = [_synthetic_example(processor, stage, spec, seed, i) for i, spec in specs]
        return _pack(examples, stage, processor)

    def _read_data(self, step: int, microbatch: int) -> Batch:
        """Read a batch of data."""
        stage_index, stage_step = locate_step(self.config, step)
        stage, dataset = self.config.stages[stage_index], self.datasets[stage_index]
        seed, num_bins = stage_seed(self.config, stage_index), dataset.data.global_batch_size
        bin_numbers = bins_of_rank(
            bins_of_step(dataset.plan, stage_step, num_bins=num_bins, seed=seed),
            rank=self.rank,
            world_size=self.world_size,
            microbatch=microbatch,
            num_microbatches=self.config.gradient_accumulation_steps,
        )
        entries = [
            entry
            for bin_number in bin_numbers.tolist()
            for entry in dataset.plan.members(bin_number).tolist()
        ]
        return read_batch(dataset, stage, entries)


def iterate_batches(
    config: TrainConfig,
    processor: Processor,
    start: int,
    *,
    datasets: dict[int, PackedDataset] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield a rank's batches from step `start` on, prefetched by `config.num_workers` processes.

    Every rank gets `config.gradient_accumulation_steps` batches for each step. The samples of a
    step depend on none of rank, world_size, gradient_accumulation_steps and num_workers.

    Args:
        datasets: the result of `open_datasets`, if it was called before: measuring may take hours.

    Raises:
        InputError: too many bad samples, while iterating; or as `open_datasets` (also FontError).
        ConfigError: the data differ from those that the run began with, or do not divide evenly.
    """
    check_global_batch_sizes(config, world_size)
    if datasets is None:
        datasets = open_datasets(config, processor)
    if datasets and rank == 0:
        check_fingerprints(config, datasets, start)
        _write_fingerprints(config, datasets)
    num_workers = num_local_workers(config)
    batches = iterate_in_workers(
        BatchDataset(config, processor, datasets, rank, world_size),
        num_workers=num_workers,
        sampler=range(
            start * config.gradient_accumulation_steps,
            config.steps * config.gradient_accumulation_steps,
        ),
        prefetch_factor=4 if num_workers else None,
        pin_memory=config.device.startswith("cuda"),
    )
    return _tracking_bad_samples(batches, config, datasets, start, rank) if datasets else batches


def open_datasets(
    config: TrainConfig,
    processor: Processor,
    *,
    progress: ProgressCallback = lambda what, done, total: None,
) -> dict[int, PackedDataset]:
    """Open the dataset of each stage that has one, by stage index; measures new sources.

    Args:
        config: of the run.
        processor: of its model.
        progress: called while samples are measured.

    Raises:
        FontError: fonts of any stage are not installed. A worker could raise it only when its stage
            begins, and as a traceback.
        InputError: data are missing, damaged or too large for a bin.
        ConfigError: a source has no supported format, or there are too few samples for a step.
    """
    for stage in config.stages:
        if stage.data is None and stage.mixture is not None:
            check_resources(stage.mixture)
    return {
        stage_index: open_dataset(config, stage_index, processor, progress=progress)
        for stage_index, stage in enumerate(config.stages)
        if stage.data is not None and stage.steps
    }


def open_dataset(
    config: TrainConfig,
    stage_index: int,
    processor: Processor,
    *,
    progress: ProgressCallback = lambda what, done, total: None,
) -> PackedDataset:
    """Open the dataset of a stage that reads data; raises as `open_datasets`."""
    stage = config.stages[stage_index]
    assert stage.data is not None, "a stage of synthetic samples has no dataset"
    return PackedDataset.open(
        stage.data,
        stage_processor(stage, processor),
        seed=stage_seed(config, stage_index),
        default_system=stage.default_system,
        num_workers=num_local_workers(config),
        progress=progress,
    )


def read_batch(dataset: PackedDataset, stage: Stage, entries: Iterable[int]) -> Batch:
    """Read entries of a stage's dataset as one batch, which lists the bad ones among them."""
    examples, bad_samples = dataset.read(entries)
    return _pack(examples, stage, dataset.processor, tuple(bad_samples))


def _pack(
    examples: Sequence[TrainingExample],
    stage: Stage,
    processor: Processor,
    bad_samples: tuple[BadSample, ...] = (),
) -> Batch:
    config = processor.config
    return pack_batch(
        examples,
        pad_id=config.bos_token_id,  # <|endoftext|>, as everywhere in Qwen2
        weighting=stage.weighting,
        patch_dim=config.vision.patch_dim,
        bad_samples=bad_samples,
    )


def num_local_workers(config: TrainConfig) -> int:
    """Return config.num_workers, limited to this rank's share of the CPU cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every platform
    num_cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return min(
        config.num_workers, max(1, num_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    )


def stage_processor(stage: Stage, processor: Processor) -> Processor:
    """Return the processor with the stage's own min_pixels, if it has one."""
    if not stage.min_pixels:
        return processor
    limits = PixelLimits(min_pixels=stage.min_pixels, max_pixels=processor.pixels.max_pixels)
    return Processor(processor.config, processor.tokenizer, pixels=limits)


def _tracking_bad_samples(
    batches: Iterator[Batch],
    config: TrainConfig,
    datasets: dict[int, PackedDataset],
    start: int,
    rank: int,
) -> Iterator[Batch]:
    """Yield the batches, and record their bad samples."""
    tracker = BadSampleTracker(Path(config.folder), rank=rank)
    for index, batch in enumerate(batches, start * config.gradient_accumulation_steps):
        step = index // config.gradient_accumulation_steps
        dataset = datasets.get(locate_step(config, step)[0])
        if dataset is not None:
            tracker.record(batch, step + 1, dataset.data, len(dataset.tokens))
        yield batch


def check_fingerprints(
    config: TrainConfig, datasets: Mapping[int, PackedDataset], start: int
) -> None:
    """Refuse to resume with other data than the run began with: steps would have other samples.

    Args:
        config: of the run.
        datasets: by stage index; need not be all of the run.
        start: the step at which the run resumes; 0 begins it anew.

    Raises:
        ConfigError: the data differ.
    """
    folder, current = Path(config.folder), _fingerprints(config, datasets)
    path = folder / FINGERPRINTS_FILE
    if start and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in current if stored.get(name) != current[name]]:
            raise ConfigError(
                f"{folder}: the data of {', '.join(changed)} are not those that this run began "
                "with (a bad sample that was fixed counts too); restore those, or begin "
                "another run with output_dir=FOLDER"
            )


def _write_fingerprints(config: TrainConfig, datasets: Mapping[int, PackedDataset]) -> None:
    path = Path(config.folder) / FINGERPRINTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_fingerprints(config, datasets), indent=1), encoding="utf-8")


def _fingerprints(config: TrainConfig, datasets: Mapping[int, PackedDataset]) -> dict[str, str]:
    """Return the fingerprints of the stages' data, by the names of the stages."""
    return {
        config.stages[stage_index].name: dataset.fingerprint
        for stage_index, dataset in datasets.items()
    }


def _synthetic_example(
    processor: Processor, stage: Stage, spec: Spec, seed: int, index: int
) -> TrainingExample:
    example = render(spec)
    messages = with_default_system(example.messages, stage.default_system, seed, index)
    return TrainingExample(processor(messages, for_training=True), example.spec.family)
