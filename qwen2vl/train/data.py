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
    """Batch number `step` of a run, whoever asks and whenever."""

    def __init__(self, config: TrainConfig, processor: Processor) -> None:
        self.config = config
        self.processor = processor

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        stage, seed, indices = draw(self.config, step)
        processor = _processor_of(stage, self.processor)
        examples = [_example(processor, stage, seed, index) for index in indices]
        pad_id = self.processor.config.bos_token_id  # <|endoftext|>, as everywhere in Qwen2
        return pack(examples, pad_id=pad_id, weighting=stage.weighting)


def batches(config: TrainConfig, processor: Processor, start: int) -> Iterator[Batch]:
    """Yield the batches from step `start` on, prepared ahead by `config.workers` processes.

    Raises:
        FontError: fonts of any stage are not installed. A worker could say so only when its stage
            comes, and as a traceback.
    """
    for stage in config.stages:
        check_fonts(stage.mixture)
    loader = DataLoader(
        WorldBatches(config, processor),
        batch_size=None,
        sampler=range(start, config.steps),
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
