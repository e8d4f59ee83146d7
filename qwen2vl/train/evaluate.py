"""What a model knows of conversations that it does not learn from, and whether it looks at them.

The held-out loss is the mean over their targets. The vision gain is how much worse that loss gets
with another conversation's pictures in place of the right ones: nothing, for a model that answers
from the words alone, which is where one that learns to read spends its first stretch. It is the
curve that tells the two apart. (Image-text ablations as in arXiv 2506.13688's plateaus.)
Pictures of equal grids change places, so that all else of a batch stays as it is, token for token;
conversations whose pictures find no partner are left out of the gain. Back up: loop.py.
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

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.geometry import Grid
from qwen2vl.model import Qwen2VL
from qwen2vl.parallel.fsdp import is_sharded
from qwen2vl.processor.processor import Processor
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.loader.data_order import locate
from qwen2vl.train.loader.dataloader import batches
from qwen2vl.train.loss import token_loss

__all__ = ["HeldOut", "Probe", "held_out_batches", "with_wrong_pictures"]

Probe = Callable[[Qwen2VL, Processor, int], Mapping[str, Any]]  # after so many steps


class HeldOut:
    """Loss and vision gain on the same held-out conversations throughout a stage.

    In a run of several ranks all of them measure the same batches: their forwards must agree, and
    the numbers are those of any one.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._stage = -1
        self._batches: list[Batch] = []

    def __call__(self, model: Qwen2VL, processor: Processor, step: int) -> dict[str, Any]:
        """Measure `model` after `step` steps; nothing where a stage has nothing held out."""
        number, _ = locate(self._config, step - 1)
        if number != self._stage:
            self._stage = number
            self._batches = held_out_batches(self._config, number, processor)
        return {"held_out": self._measure(model)} if self._batches else {}

    def _measure(self, model: Qwen2VL) -> dict[str, Any]:
        # family -> [loss, targets, loss with right and with wrong pictures, targets of those]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
        compared = 0
        for batch in self._batches:
            right_R = self._losses(model, batch)
            wrong = with_wrong_pictures(batch)
            changed = wrong.conversations
            compared += len(changed)
            wrong_R = self._losses(model, wrong.batch) if changed else right_R
            for owner, family in enumerate(batch.families):
                mine_R = batch.owner_R == owner
                own = torch.stack((right_R[mine_R].sum(), mine_R.sum()))
                pair = torch.stack((right_R[mine_R].sum(), wrong_R[mine_R].sum(), mine_R.sum()))
                sums[family] += torch.cat((own, pair if owner in changed else torch.zeros(3)))
        if not sums:
            return {}
        total = torch.stack(list(sums.values())).sum(0)
        families = {family: _means(row) for family, row in sorted(sums.items())}
        return {**_means(total), "compared": compared, "families": families}

    def _losses(self, model: Qwen2VL, batch: Batch) -> Tensor:
        """Compute losses_R, on the CPU in float64, as training would."""
        moved = batch.to(model.device)
        casts = self._config.dtype == "bfloat16" and not is_sharded(model)
        was_training = model.training
        model.eval()
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=casts):
            outcome = token_loss(moved.run(model), model.head_weight, moved, 1.0)
        model.train(was_training)
        return outcome.losses_R.cpu().double()


class Wrong(NamedTuple):
    """A batch with pictures in the wrong places."""

    batch: Batch
    conversations: frozenset[int]  # those of which every picture is another's


def with_wrong_pictures(batch: Batch) -> Wrong:
    """Let pictures and clips of equal grids change places between conversations; on the CPU.

    Each goes on by as many places as one conversation has at most, so that none gets one of its
    own. Where one conversation has more than half of a grid's pictures, these stay.
    """
    items = list(_items(batch))
    by_grid: dict[Grid, list[_Placed]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.owner):
        by_grid[item.grid].append(item)
    order_N = torch.arange(len(batch.patches_NP))
    kept: set[int] = set()
    for group in by_grid.values():
        (_, most), *_ = Counter(item.owner for item in group).most_common(1)
        if 2 * most > len(group):
            kept.update(item.owner for item in group)
            continue
        for item, donor in zip(group, [*group[most:], *group[:most]], strict=True):
            order_N[item.patches] = torch.arange(donor.patches.start, donor.patches.stop)
    changed = frozenset(item.owner for item in items) - kept
    return Wrong(replace(batch, patches_NP=batch.patches_NP[order_N]), changed)


def held_out_batches(config: TrainConfig, number: int, processor: Processor) -> list[Batch]:
    """Prepare the conversations that stage `number` is measured on.

    Of the world they come from another seed; of data from the file that `probe.path` names.

    Raises:
        As train.batches.batches does.
    """
    stage = _held_out_stage(config, config.stages[number])
    if stage is None:
        return []
    apart = replace(
        config,
        stages=(stage,),
        out=f"{config.folder}/held-out",
        seed=-1 - config.seed if stage.data is None else config.seed,
        accumulate=1,
        workers=0,
    )
    found: list[Batch] = []
    for batch in islice(batches(apart, processor, 0), stage.steps):
        found.append(batch)
        if sum(len(one.families) for one in found) >= config.probe.examples:
            break
    return found


def _held_out_stage(config: TrainConfig, stage: Stage) -> Stage | None:
    """Turn a stage into one that shows what is held out, in batches of the same size."""
    wanted, path = config.probe.examples, config.probe.path
    if path:
        data = stage.data or DataConfig(sources=(Source(path=path),))
        data = replace(data, sources=(Source(path=path),), bins=1)
        return replace(stage, mixture=None, data=data, steps=wanted)
    if stage.data is not None:
        return None
    examples = min(stage.examples, wanted)
    return replace(stage, examples=examples, steps=-(-wanted // examples))


def _means(row: Tensor) -> dict[str, float]:
    loss, targets, right, wrong, compared = row.tolist()
    means = {"loss": loss / targets}
    if compared:
        means["vision_gain"] = (wrong - right) / compared
    return means


class _Placed(NamedTuple):
    """A picture or clip in the stream of a batch."""

    patches: slice
    grid: Grid
    owner: int  # conversation that it stands in


def _items(batch: Batch) -> Iterator[_Placed]:
    """Find the items of a batch again: the rows of each stand at neighboring tokens."""
    index_M = batch.pad_index_M
    if not len(index_M):
        return
    ends = list(accumulate(batch.meta.lengths_q))
    merged = len(batch.patches_NP) // len(index_M)
    breaks = (index_M.diff() != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(index_M)]
    for first, last in pairwise(bounds):
        patches = slice(merged * first, merged * last)
        rows, columns = (batch.vision_meta.positions_N2[patches].amax(0) + 1).tolist()
        frames = merged * (last - first) // (rows * columns)
        owner = bisect(ends, int(index_M[first]))
        yield _Placed(patches, Grid(frames, rows, columns), owner)
