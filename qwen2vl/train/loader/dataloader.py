"""From a step's number to its batch: choose, read or render, process, pack, all in a worker.

A stage shows the procedural world, or reads data. The very same Processor that serves answers
prepares the examples, so what the model learns from is what it will be shown. It must not know
weights or the clock. Next rooms: schedule.py (what), data/dataset.py (from where), pack.py (the
layout), loop.py (who asks).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from qwen2vl.data.dataset import Corpus
from qwen2vl.data.preprocess import BadSample, Example
from qwen2vl.data.sources.synthetic import with_system
from qwen2vl.errors import ConfigError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.synth import render, sample
from qwen2vl.synth.world import check_fonts
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.bad_samples import BadSamples
from qwen2vl.train.loader.batch import Batch, pack
from qwen2vl.train.loader.data_order import bins_of, check_shares, deal, draw, locate, stage_seed

__all__ = ["Batches", "batches", "open_corpora", "processor_of", "workers_here"]

FINGERPRINTS = "data.json"  # in the run's folder: what each stage reads


class Batches(Dataset[Batch]):
    """Batch number `index` of one rank of a run, whoever asks and whenever.

    A step has `config.accumulate` batches on each rank, and its samples are dealt out to all.
    """

    def __init__(
        self,
        config: TrainConfig,
        processor: Processor,
        corpora: dict[int, Corpus],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.config, self.processor, self.corpora = config, processor, corpora
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return self.config.steps * self.config.accumulate

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self.config.accumulate)
        number, _ = locate(self.config, step)
        return self._read(step, turn) if number in self.corpora else self._render(step, turn)

    def _render(self, step: int, turn: int) -> Batch:
        """Draw a batch of the world."""
        stage, seed, indices = draw(
            self.config,
            step,
            rank=turn * self.ranks + self.rank,
            ranks=self.ranks * self.config.accumulate,
        )
        processor = processor_of(stage, self.processor)
        return self._pack(stage, [_example(processor, stage, seed, index) for index in indices])

    def _read(self, step: int, turn: int) -> Batch:
        """Read a batch of data."""
        number, inner = locate(self.config, step)
        stage, corpus = self.config.stages[number], self.corpora[number]
        seed, bins = stage_seed(self.config, number), corpus.data.bins
        own = deal(
            bins_of(corpus.plan, inner, bins=bins, seed=seed),
            rank=self.rank,
            ranks=self.ranks,
            turn=turn,
            turns=self.config.accumulate,
        )
        entries = [entry for b in own.tolist() for entry in corpus.plan.members(b).tolist()]
        examples, bad = corpus.read(entries)
        return self._pack(stage, examples, tuple(bad))

    def _pack(
        self, stage: Stage, examples: list[Example], bad: tuple[BadSample, ...] = ()
    ) -> Batch:
        config = self.processor.config
        return pack(
            examples,
            pad_id=config.bos_token_id,  # <|endoftext|>, as everywhere in Qwen2
            weighting=stage.weighting,
            patch_dim=config.vision.patch_dim,
            bad=bad,
        )


def batches(
    config: TrainConfig,
    processor: Processor,
    start: int,
    *,
    corpora: dict[int, Corpus] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield a rank's batches from step `start` on, prepared ahead by `config.workers` processes.

    Every rank gets `config.accumulate` of them for each step. Which samples a step has depends on
    none of rank, ranks, accumulate and workers.

    Args:
        corpora: what `open_corpora` gave, where it was asked before; it may take hours.

    Raises:
        InputError: too many samples are bad, as they come; or as `open_corpora`, and so FontError.
        ConfigError: data are not those that the run began with, or cannot be dealt out evenly.
    """
    check_shares(config, ranks)
    if corpora is None:
        corpora = open_corpora(config, processor)
    if corpora and rank == 0:
        _check_same(Path(config.folder), config, corpora, start)
    workers = workers_here(config)
    loader = DataLoader(
        Batches(config, processor, corpora, rank, ranks),
        batch_size=None,
        sampler=range(start * config.accumulate, config.steps * config.accumulate),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread,
        pin_memory=config.device.startswith("cuda"),
        generator=torch.Generator(),  # the global one is a checkpoint's: dropout draws from it
    )
    ready = iter(loader)  # the workers begin here
    return _watched(ready, config, corpora, start, rank) if corpora else ready


def open_corpora(config: TrainConfig, processor: Processor) -> dict[int, Corpus]:
    """Open what each stage reads, by the stage's number; the first time it is measured.

    Raises:
        FontError: fonts of any stage are not installed. A worker could say so only when its stage
            comes, and as a traceback.
        InputError: data are missing, damaged or too large for a bin.
        ConfigError: nothing can read a source, or there is too little for a step.
    """
    for stage in config.stages:
        if stage.data is None and stage.mixture is not None:
            check_fonts(stage.mixture)
    return {
        number: Corpus.open(
            stage.data,
            processor_of(stage, processor),
            seed=stage_seed(config, number),
            default_system=stage.default_system,
            workers=workers_here(config),
        )
        for number, stage in enumerate(config.stages)
        if stage.data is not None and stage.steps
    }


def workers_here(config: TrainConfig) -> int:
    """Give the number of workers: as asked for, but no more than this rank's share of the cores."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    cores = (os.cpu_count() or 1) if affinity is None else len(affinity(0))
    return min(config.workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def processor_of(stage: Stage, processor: Processor) -> Processor:
    """Apply the stage's own lower limit of pixels, if it has one."""
    if not stage.min_pixels:
        return processor
    limits = PixelLimits(min_pixels=stage.min_pixels, max_pixels=processor.pixels.max_pixels)
    return Processor(processor.config, processor.tokenizer, pixels=limits)


def _watched(
    ready: Iterator[Batch], config: TrainConfig, corpora: dict[int, Corpus], start: int, rank: int
) -> Iterator[Batch]:
    """Count bad samples as their batches come."""
    bad = BadSamples(Path(config.folder), rank=rank)
    for index, batch in enumerate(ready, start * config.accumulate):
        step = index // config.accumulate
        corpus = corpora.get(locate(config, step)[0])
        if corpus is not None:
            bad.take(batch, step + 1, corpus.data, len(corpus.tokens))
        yield batch


def _check_same(folder: Path, config: TrainConfig, corpora: dict[int, Corpus], start: int) -> None:
    """Refuse to go on with other data than the run began with: steps would mean others."""
    own = {config.stages[number].name: corpus.fingerprint for number, corpus in corpora.items()}
    path = folder / FINGERPRINTS
    if start and path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in own if held.get(name) != own[name]]:
            raise ConfigError(
                f"{folder}: the data of {', '.join(changed)} are not those that this run began "
                "with (a bad sample that was mended counts too); bring those back, or begin "
                "another run with out=FOLDER"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own, indent=1), encoding="utf-8")


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # the other cores belong to the training step


def _example(processor: Processor, stage: Stage, seed: int, index: int) -> Example:
    assert stage.mixture is not None
    example = render(sample(seed, index, stage.mixture))
    messages = with_system(example.messages, stage.default_system, seed, index)
    return Example(processor(messages, for_training=True), example.spec.family)
