"""Evaluation during training: loss on held-out conversations, and the vision gain.

The held-out loss is the mean cross-entropy of the targets of conversations that are never trained
on. The vision gain is by how much that loss rises with another conversation's images in place of
the right ones: zero for a model that answers from the text alone, as a model that learns to read
does for the first part of its training. (Image-text ablations as in arXiv 2506.13688's plateaus.)
Images of equal grids are exchanged, so that the rest of a batch does not change, token for token;
conversations whose images have no partner are left out of the gain.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.geometry import Grid
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.fsdp import is_sharded
from qwen2vl.processor.processor import Processor
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.data_order import locate_step
from qwen2vl.train.loader.dataloader import iterate_batches
from qwen2vl.train.loss import token_loss

__all__ = ["EvaluationFunction", "Evaluator", "held_out_batches", "swap_images"]

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
        return {**_mean_losses(total_sums), "compared": num_compared, "families": families}

    def _losses(self, model: Qwen2VL, batch: Batch) -> Tensor:
        """Compute losses_R with the precision of training; returns float64 on the CPU."""
        device_batch = batch.to(model.device)
        use_autocast = self._config.dtype == "bfloat16" and not is_sharded(model)
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
    """Exchange images and videos of equal grids between conversations; on the CPU.

    The items of a grid are rotated by the largest number that one conversation has, so that none
    gets an item of its own. Where one conversation has more than half of them, they stay.
    """
    items = list(_find_items(batch))
    by_grid: dict[Grid, list[_ItemPatches]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.example_index):
        by_grid[item.grid].append(item)
    order_N = torch.arange(len(batch.patches_NP))
    unswapped: set[int] = set()
    for group in by_grid.values():
        (_, max_per_example), *_ = Counter(item.example_index for item in group).most_common(1)
        if 2 * max_per_example > len(group):
            unswapped.update(item.example_index for item in group)
            continue
        for item, source in zip(
            group, [*group[max_per_example:], *group[:max_per_example]], strict=True
        ):
            order_N[item.patches] = torch.arange(source.patches.start, source.patches.stop)
    swapped_examples = frozenset(item.example_index for item in items) - unswapped
    return SwappedBatch(replace(batch, patches_NP=batch.patches_NP[order_N]), swapped_examples)


def held_out_batches(config: TrainConfig, stage_index: int, processor: Processor) -> list[Batch]:
    """Prepare the held-out batches of stage `stage_index`.

    Synthetic conversations come from another seed, others from the file `evaluation.path`.

    Raises:
        As `iterate_batches` does.
    """
    stage = _held_out_stage(config, config.stages[stage_index])
    if stage is None:
        return []
    held_out_config = replace(
        config,
        stages=(stage,),
        output_dir=f"{config.folder}/held-out",
        seed=-1 - config.seed if stage.data is None else config.seed,
        gradient_accumulation_steps=1,
        num_workers=0,
    )
    held_out: list[Batch] = []
    for batch in islice(iterate_batches(held_out_config, processor, 0), stage.steps):
        held_out.append(batch)
        if sum(len(b.families) for b in held_out) >= config.evaluation.num_examples:
            break
    return held_out


def _held_out_stage(config: TrainConfig, stage: Stage) -> Stage | None:
    """Return `stage` with the held-out data in place of its own, in batches of the same size."""
    num_examples, path = config.evaluation.num_examples, config.evaluation.path
    if path:
        data = stage.data or DataConfig(sources=(SourceConfig(path=path),))
        data = replace(data, sources=(SourceConfig(path=path),), global_batch_size=1)
        return replace(stage, mixture=None, data=data, steps=num_examples)
    if stage.data is not None:
        return None
    batch_size = min(stage.global_batch_size, num_examples)
    return replace(stage, global_batch_size=batch_size, steps=-(-num_examples // batch_size))


def _mean_losses(sums: Tensor) -> dict[str, float]:
    loss, num_targets, matched_loss, swapped_loss, num_swapped_targets = sums.tolist()
    means = {"loss": loss / num_targets}
    if num_swapped_targets:
        means["vision_gain"] = (swapped_loss - matched_loss) / num_swapped_targets
    return means


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
