"""Evaluation during training: loss on held-out conversations, and the vision gain.

The held-out loss is the mean cross-entropy of the targets of conversations that are never trained
on. The vision gain is by how much that loss rises with another conversation's images in place of
the right ones: zero for a model that answers from the text alone, as a model that learns to read
does for the first part of its training. (Image-text ablations as in arXiv 2506.13688's plateaus.)
Images of equal grids are exchanged between conversations of different text (where the texts are
equal, so is the sum of their losses after the exchange), so that the rest of a batch does not
change, token for token; conversations whose images have no partner are left out of the gain.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qwen2vl.data.bin_packing import seeded_permutation
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.preprocess import padded_length
from qwen2vl.geometry import Grid
from qwen2vl.memory import matmul_dtype
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.fsdp import is_sharded
from qwen2vl.processor.processor import Processor
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.data_order import locate_step
from qwen2vl.train.loader.dataloader import iterate_batches, open_dataset, read_batch
from qwen2vl.train.loss import token_loss

__all__ = ["EvaluationFunction", "Evaluator", "held_out_batches", "open_held_out", "swap_images"]

logger = logging.getLogger(__name__)

EvaluationFunction = Callable[[Qwen2VL, Processor, int], Mapping[str, Any]]  # ..., step


class Evaluator:
    """Computes loss and vision gain on the same held-out conversations throughout a stage.

    With several ranks every rank evaluates the same batches, since FSDP collectives must match;
    the result is the same on each.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._stage_index = -1
        self._batches: list[Batch] = []

    def __call__(self, model: Qwen2VL, processor: Processor, step: int) -> dict[str, Any]:
        """Evaluate `model` after `step` steps; empty where a stage has no held-out data."""
        stage_index, _ = locate_step(self._config, step - 1)
        if stage_index != self._stage_index:
            self._stage_index = stage_index
            self._batches = held_out_batches(self._config, stage_index, processor)
        return {"held_out": self._evaluate(model)} if self._batches else {}

    def _evaluate(self, model: Qwen2VL) -> dict[str, Any]:
        # family -> [loss, targets, loss with own and with swapped images, targets of the swapped]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
        num_compared = 0
        for batch in self._batches:
            matched_R = self._losses(model, batch)
            swapped = swap_images(batch)
            swapped_examples = swapped.swapped_examples
            num_compared += len(swapped_examples)
            swapped_R = self._losses(model, swapped.batch) if swapped_examples else matched_R
            for example_index, family in enumerate(batch.families):
                in_example_R = batch.example_index_R == example_index
                loss_sums = torch.stack((matched_R[in_example_R].sum(), in_example_R.sum()))
                comparison_sums = torch.stack(
                    (
                        matched_R[in_example_R].sum(),
                        swapped_R[in_example_R].sum(),
                        in_example_R.sum(),
                    )
                )
                sums[family] += torch.cat(
                    (
                        loss_sums,
                        comparison_sums if example_index in swapped_examples else torch.zeros(3),
                    )
                )
        if not sums:
            return {}
        total_sums = torch.stack(list(sums.values())).sum(0)
        families = {family: _mean_losses(own) for family, own in sorted(sums.items())}
        compared = {"compared": num_compared} if num_compared else {}
        return {**_mean_losses(total_sums), **compared, "families": families}

    def _losses(self, model: Qwen2VL, batch: Batch) -> Tensor:
        """Compute losses_R with the precision of training; returns float64 on the CPU."""
        device_batch = batch.to(model.device)
        dtype = matmul_dtype(self._config.dtype, model.device)
        use_autocast = dtype == torch.bfloat16 and not is_sharded(model)
        was_training = model.training
        model.eval()
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, torch.bfloat16, enabled=use_autocast),
        ):
            output = token_loss(
                device_batch.forward(model), model.lm_head_weight, device_batch, 1.0
            )
        model.train(was_training)
        return output.losses_R.cpu().double()


class SwappedBatch(NamedTuple):
    """A batch whose images and videos are exchanged between conversations."""

    batch: Batch
    swapped_examples: frozenset[int]  # conversations of which every item is another's


def swap_images(batch: Batch) -> SwappedBatch:
    """Exchange images and videos of equal grids between conversations of different text.

    The items of a grid are rotated by the largest number that conversations of one text have, so
    that none gets an item of its own text. Where one text has more than half of them, they stay.
    On the CPU.
    """
    items = list(_find_items(batch))
    text_of = _number_texts(batch) if items else []
    by_grid: dict[Grid, list[_ItemPatches]] = defaultdict(list)
    for item in sorted(items, key=lambda item: text_of[item.example_index]):
        by_grid[item.grid].append(item)
    order_N = torch.arange(len(batch.patches_NP))
    unswapped: set[int] = set()
    for group in by_grid.values():
        ((_, max_per_text),) = Counter(text_of[x.example_index] for x in group).most_common(1)
        if 2 * max_per_text > len(group):
            unswapped.update(item.example_index for item in group)
            continue
        for item, source in zip(group, [*group[max_per_text:], *group[:max_per_text]], strict=True):
            order_N[item.patches] = torch.arange(source.patches.start, source.patches.stop)
    swapped_examples = frozenset(item.example_index for item in items) - unswapped
    return SwappedBatch(replace(batch, patches_NP=batch.patches_NP[order_N]), swapped_examples)


def held_out_batches(config: TrainConfig, stage_index: int, processor: Processor) -> list[Batch]:
    """Prepare the held-out batches of stage `stage_index`; none if it has no held-out data.

    Synthetic conversations come from another seed, others from `open_held_out`. Bad samples are
    left out, with a warning.

    Raises:
        As `iterate_batches` and `open_held_out` do.
    """
    opened = open_held_out(config, stage_index, processor)
    if opened is None:
        stage = config.stages[stage_index]
        return [] if stage.data is not None else _synthetic_batches(config, stage, processor)
    stage, dataset, entries = opened
    batches = [read_batch(dataset, stage, group) for group in _group_entries(dataset, entries)]
    if bad := [sample for batch in batches for sample in batch.bad_samples]:
        logger.warning(
            "evaluation without %d of %d held-out samples, which are bad; %s: %s",
            len(bad),
            len(entries),
            bad[0].id,
            bad[0].text,
        )
    return [batch for batch in batches if batch.families]


def open_held_out(
    config: TrainConfig, stage_index: int, processor: Processor
) -> tuple[Stage, PackedDataset, np.ndarray] | None:
    """Open the data that a stage is evaluated on; None if there are none, or synthetic ones.

    They are those of the file `evaluation.path`, at most `evaluation.num_examples` that the seed
    chooses, or the first ones of the validation split of the stage's own data.

    Returns:
        The stage with these data, the dataset, and the entries to read.

    Raises:
        As `open_datasets` does.
    """
    stage, path = config.stages[stage_index], config.evaluation.path
    if path:
        sources = (SourceConfig(path=path),)
        data = stage.data or DataConfig(sources=sources)
        data = replace(data, sources=sources, global_batch_size=1, validation_size=0.0)
        stage = replace(stage, mixture=None, data=data)
        dataset = open_dataset(replace(config, stages=(stage,)), 0, processor)
        order = seeded_permutation(len(dataset.tokens), "held out", config.seed)
        entries = order[dataset.tokens[order] > 0]
    elif stage.data is not None and stage.data.validation_size:
        dataset = open_dataset(config, stage_index, processor)
        entries = dataset.held_out
    else:
        return None
    return stage, dataset, entries[: config.evaluation.num_examples]


def _group_entries(dataset: PackedDataset, entries: np.ndarray) -> list[list[int]]:
    """Group entries, in their order, into batches that are no larger than bins."""
    groups: list[list[int]] = []
    num_tokens = dataset.data.max_tokens
    for entry in entries.tolist():
        length = padded_length(int(dataset.tokens[entry]))
        num_tokens += length
        if num_tokens > dataset.data.max_tokens:
            groups.append([])
            num_tokens = length
        groups[-1].append(entry)
    return groups


def _synthetic_batches(config: TrainConfig, stage: Stage, processor: Processor) -> list[Batch]:
    """Render samples of another seed, in batches of the same size as in training."""
    num_examples = config.evaluation.num_examples
    batch_size = min(stage.global_batch_size, num_examples)
    stage = replace(stage, global_batch_size=batch_size, steps=-(-num_examples // batch_size))
    held_out_config = replace(
        config,
        stages=(stage,),
        seed=-1 - config.seed,
        gradient_accumulation_steps=1,
        num_workers=0,
    )
    return list(iterate_batches(held_out_config, processor, 0))


def _mean_losses(sums: Tensor) -> dict[str, float]:
    loss, num_targets, matched_loss, swapped_loss, num_swapped_targets = sums.tolist()
    means = {"loss": loss / num_targets}
    if num_swapped_targets:
        means["vision_gain"] = (swapped_loss - matched_loss) / num_swapped_targets
    return means


def _number_texts(batch: Batch) -> list[int]:
    """Number the different texts, prompt and targets, of the conversations of a batch.

    What follows the last target changes no loss: a template's line break, and padding.
    """
    is_text_T = torch.ones(len(batch.input_ids_T), dtype=torch.bool)
    is_text_T[batch.placeholder_index_M] = False
    numbers: dict[tuple[int, ...], int] = {}
    text_of: list[int] = []
    start = 0
    for example_index, length in enumerate(batch.meta.lengths_q):
        targets_R = batch.target_index_R[batch.example_index_R == example_index]
        tokens = slice(start, int(targets_R.max()) + 2)  # the target is the next token
        text = tuple(batch.input_ids_T[tokens][is_text_T[tokens]].tolist())
        text_of.append(numbers.setdefault(text, len(numbers)))
        start += length
    return text_of


class _ItemPatches(NamedTuple):
    """The patches of an image or video in a batch."""

    patches: slice
    grid: Grid
    example_index: int  # its conversation in the batch


def _find_items(batch: Batch) -> Iterator[_ItemPatches]:
    """Recover the items of a batch: the placeholders of each are consecutive tokens."""
    index_M = batch.placeholder_index_M
    if not len(index_M):
        return
    example_ends = list(accumulate(batch.meta.lengths_q))
    patches_per_token = len(batch.patches_NP) // len(index_M)
    breaks = (index_M.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(index_M)]
    for first, last in pairwise(bounds):
        patches = slice(patches_per_token * first, patches_per_token * last)
        rows, columns = (batch.vision_meta.positions_N2[patches].amax(0) + 1).tolist()
        frames = patches_per_token * (last - first) // (rows * columns)
        example_index = bisect(example_ends, int(index_M[first]))
        yield _ItemPatches(patches, Grid(frames, rows, columns), example_index)
