"""From a step's number to its batch: sample, render, process, pack, all in a worker.

The procedural world is the source here. The very same Processor that serves answers prepares the
examples, so what the model learns from is what it will be shown. It must not know weights or the
clock. Next room: pack.py for the layout, loop.py for who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.synth import render, sample
from qwen2vl.synth.world import check_fonts
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.pack import Batch, Example, pack
from qwen2vl.train.schedule import draw

__all__ = ["WorldBatches", "batches"]


class WorldBatches(Dataset[Batch]):
    """Batch number `index` of one rank of a run, whoever asks and whenever.

    A step has `config.accumulate` batches on each rank, and its samples are dealt out to all.
    """

    def __init__(
        self, config: TrainConfig, processor: Processor, rank: int = 0, ranks: int = 1
    ) -> None:
        self.config = config
        self.processor = processor
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return self.config.steps * self.config.accumulate

    def __getitem__(self, index: int) -> Batch:
        step, turn = divmod(index, self.config.accumulate)
        stage, seed, indices = draw(
            self.config,
            step,
            rank=turn * self.ranks + self.rank,
            ranks=self.ranks * self.config.accumulate,
        )
        processor = _processor_of(stage, self.processor)
        examples = [_example(processor, stage, seed, index) for index in indices]
        pad_id = self.processor.config.bos_token_id  # <|endoftext|>, as everywhere in Qwen2
        return pack(examples, pad_id=pad_id, weighting=stage.weighting)


def batches(
    config: TrainConfig, processor: Processor, start: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yield a rank's batches from step `start` on, prepared ahead by `config.workers` processes.

    Every rank gets `config.accumulate` of them for each step.

    Raises:
        FontError: fonts of any stage are not installed. A worker could say so only when its stage
            comes, and as a traceback.
    """
    for stage in config.stages:
        check_fonts(stage.mixture)
    loader = DataLoader(
        WorldBatches(config, processor, rank, ranks),
        batch_size=None,
        sampler=range(start * config.accumulate, config.steps * config.accumulate),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)  # the other cores belong to the training step


def _processor_of(stage: Stage, processor: Processor) -> Processor:
    """Apply the stage's own lower limit of pixels, if it has one."""
    if not stage.min_pixels:
        return processor
    limits = PixelLimits(min_pixels=stage.min_pixels, max_pixels=processor.pixels.max_pixels)
    return Processor(processor.config, processor.tokenizer, pixels=limits)


def _example(processor: Processor, stage: Stage, seed: int, index: int) -> Example:
    example = render(sample(seed, index, stage.mixture))
    messages = _with_system(example.messages, stage, Random(f"system {seed} {index}"))
    return Example(processor(messages, for_training=True), example.spec.family)


def _with_system(messages: list[dict[str, Any]], stage: Stage, rng: Random) -> list[dict[str, Any]]:
    """Give most conversations an empty system turn.

    The default sentence costs 28 tokens of a byte-level vocabulary, more than many a question and
    its picture; a share of the examples keeps it, since that is what a user's prompt has.
    """
    if rng.random() < stage.default_system:
        return messages
    return [{"role": "system", "content": ""}, *messages]
