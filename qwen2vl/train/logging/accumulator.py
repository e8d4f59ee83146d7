"""MetricAccumulator: sums of a rank between two reports, kept on the device, additive over ranks.

    counts    batches, grad_norm, examples, tokens, ...              one number each
    families  loss, targets, correct, examples, exact_matches        a row for each family
    ranks     data_wait, data, forward, ..., flops                   a row for each rank

All sums form one float64 vector. Each rank fills its own row of the last table, so that the sum of
the vectors of all ranks (all_reduce) is the vector of the union of their batches, with a table of
all ranks. Means are computed once, at the end: over targets, not over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2vl.flops import Flops
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.logging.step_timer import PHASES
from qwen2vl.train.loss import LossOutput

__all__ = ["COUNTS", "MetricAccumulator", "MetricSums", "Values", "unpack_sums"]

COUNTS: tuple[str, ...] = (
    "batches",
    "grad_norm",
    "examples",
    "tokens",
    "patches",
    "images",
    "bad",
    "model_flops",
    "recompute_flops",
)
FAMILY_SUMS: tuple[str, ...] = ("loss", "targets", "correct", "examples", "exact_matches")
RANK_SUMS: tuple[str, ...] = ("data_wait", *PHASES, "flops")

Values = dict[str, float]


class MetricSums(NamedTuple):
    """The sums of a vector, by name."""

    counts: Values
    families: dict[str, Values]  # families with at least one conversation
    ranks: list[Values]


class MetricAccumulator:
    """Sums of one rank since the accumulator was created."""

    def __init__(self, seen_bad: set[tuple[str, str]] | None = None) -> None:
        """Begin with sums of zero.

        Args:
            seen_bad: source and id of the bad samples counted before, which are not counted again;
                those of each batch are added.
        """
        self._seen_bad = set() if seen_bad is None else seen_bad
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._data_wait = 0.0  # seconds in which steps waited for the data loader
        self._grad_norms: list[Tensor] = []
        self._example_sums: list[Tensor] = []  # (3, conversations): loss, targets, correct
        self._families: list[str] = []  # of each of their columns

    def add(
        self, batch: Batch, output: LossOutput, grad_norm: Tensor, data_wait: float, cost: Flops
    ) -> None:
        """Add one batch, without a device sync."""
        has_images = len(batch.placeholder_index_M) > 0  # a dummy image does not count
        self._data_wait += data_wait
        for name, count in (
            ("batches", 1),
            ("examples", len(batch.families)),
            ("tokens", len(batch.input_ids_T)),
            ("patches", len(batch.patches_NP) if has_images else 0),
            ("images", len(batch.vision_meta.attn_meta.lengths_q) if has_images else 0),
            ("bad", self._count_new(batch)),
            ("model_flops", cost.model),
            ("recompute_flops", cost.recompute),
        ):
            self._counts[name] += count
        self._grad_norms.append(grad_norm.detach())
        self._families += batch.families
        losses_R = output.losses_R.float()
        sums_3R = torch.stack((losses_R, torch.ones_like(losses_R), output.is_correct_R.float()))
        zeros_3S = torch.zeros(3, len(batch.families), device=losses_R.device)
        self._example_sums.append(zeros_3S.index_add_(1, batch.example_index_R, sums_3R))

    def _count_new(self, batch: Batch) -> int:
        """Count the bad samples that no earlier batch had: each epoch has them again."""
        num_before = len(self._seen_bad)
        self._seen_bad.update((sample.source, sample.id) for sample in batch.bad_samples)
        return len(self._seen_bad) - num_before

    @property
    def families(self) -> list[str]:
        """Return the families seen so far, sorted."""
        return sorted(set(self._families))

    def to_vector(
        self, families: Sequence[str], seconds: Values, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Return all sums as one vector; waits for the device.

        Args:
            families: the same list on all ranks, at least those that this rank has seen.
            seconds: of each phase, on this rank.
            rank: whose row of the last table to fill.
            world_size: number of rows of that table.
        """
        counts = dict(self._counts)
        if self._grad_norms:
            counts["grad_norm"] = float(torch.stack(self._grad_norms).double().sum())
        rank_sums = {
            "data_wait": self._data_wait,
            **seconds,
            "flops": counts["model_flops"] + counts["recompute_flops"],
        }
        by_rank = torch.zeros(world_size, len(RANK_SUMS), dtype=torch.float64)
        by_rank[rank] = torch.tensor([rank_sums[name] for name in RANK_SUMS], dtype=torch.float64)
        count_sums = torch.tensor([counts[name] for name in COUNTS], dtype=torch.float64)
        return torch.cat((count_sums, self._sum_by_family(families).flatten(), by_rank.flatten()))

    def _sum_by_family(self, families: Sequence[str]) -> Tensor:
        """Sum conversations by family: (families, 5)."""
        index_of = {family: i for i, family in enumerate(families)}
        sums = torch.zeros(len(families), len(FAMILY_SUMS), dtype=torch.float64)
        if self._example_sums:
            loss, targets, correct = torch.cat(self._example_sums, 1).cpu().double()
            exact_matches = (correct == targets).double()
            family_sums = torch.stack(
                (loss, targets, correct, torch.ones_like(loss), exact_matches), 1
            )
            sums.index_add_(
                0, torch.tensor([index_of[family] for family in self._families]).long(), family_sums
            )
        return sums


def unpack_sums(vector: Tensor, families: Sequence[str], world_size: int = 1) -> MetricSums:
    """Convert a vector, of one rank or summed over all, to named sums."""
    sizes = [len(COUNTS), len(families) * len(FAMILY_SUMS), world_size * len(RANK_SUMS)]
    counts, by_family, by_rank = vector.split(sizes)
    rows = zip(families, by_family.view(-1, len(FAMILY_SUMS)).tolist(), strict=True)
    named = {family: dict(zip(FAMILY_SUMS, row, strict=True)) for family, row in rows}
    table = by_rank.view(-1, len(RANK_SUMS)).tolist()
    return MetricSums(
        dict(zip(COUNTS, counts.tolist(), strict=True)),
        {family: row for family, row in sorted(named.items()) if row["examples"]},
        [dict(zip(RANK_SUMS, row, strict=True)) for row in table],
    )
