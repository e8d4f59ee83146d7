"""Sums between two reports, on the device until somebody asks, and addable over ranks.

    counts    batches, norm, examples, tokens, ...              one number each
    families  loss, targets, hits, answers, whole               a row each
    ranks     waited, data, forward, ..., operations            a row each, the others' rows are 0

All of it is one vector of float64: added up over ranks it is the same vector for the union of
their batches, and the rows of the ranks, each of which fills its own, become a table of all. Means
are divided once, at the end: over targets, not over batches. Back up: metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2vl.train.flops import Flops
from qwen2vl.train.loader.batch import Batch
from qwen2vl.train.logging.step_timer import PHASES
from qwen2vl.train.loss import Outcome

__all__ = ["COUNTS", "Row", "Sums", "Tally", "read"]

COUNTS: tuple[str, ...] = (
    "batches",
    "norm",
    "examples",
    "tokens",
    "patches",
    "pictures",
    "bad",
    "model",
    "again",
)
OF_FAMILY: tuple[str, ...] = ("loss", "targets", "hits", "answers", "whole")
OF_RANK: tuple[str, ...] = ("waited", *PHASES, "operations")

Row = dict[str, float]


class Sums(NamedTuple):
    """A vector, read."""

    counts: Row
    families: dict[str, Row]  # those that had a conversation
    ranks: list[Row]


class Tally:
    """What one rank has added since it was made."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._waited = 0.0  # seconds in which steps stood still for data
        self._norms: list[Tensor] = []
        self._answers: list[Tensor] = []  # (3, conversations): loss, targets, hits
        self._families: list[str] = []  # of each of their columns

    def add(self, batch: Batch, outcome: Outcome, norm: Tensor, waited: float, cost: Flops) -> None:
        """Count one batch; asks the device for nothing."""
        has_pictures = len(batch.pad_index_M) > 0  # a null item is none
        self._waited += waited
        for name, count in (
            ("batches", 1),
            ("examples", len(batch.families)),
            ("tokens", len(batch.input_ids_T)),
            ("patches", len(batch.patches_NP) if has_pictures else 0),
            ("pictures", len(batch.vision_meta.frames.lengths_q) if has_pictures else 0),
            ("bad", len(batch.bad)),
            ("model", cost.model),
            ("again", cost.again),
        ):
            self._counts[name] += count
        self._norms.append(norm.detach())
        self._families += batch.families
        losses_R = outcome.losses_R.float()
        rows_3R = torch.stack((losses_R, torch.ones_like(losses_R), outcome.right_R.float()))
        empty = torch.zeros(3, len(batch.families), device=losses_R.device)
        self._answers.append(empty.index_add_(1, batch.owner_R, rows_3R))

    @property
    def families(self) -> list[str]:
        """Name the families that were seen, sorted."""
        return sorted(set(self._families))

    def vector(
        self, families: Sequence[str], seconds: Row, rank: int = 0, ranks: int = 1
    ) -> Tensor:
        """Lay the sums out for `families`, which all ranks must give alike; waits for the device.

        Args:
            families: at least those that this rank has seen.
            seconds: of each phase, on this rank.
            rank: whose row of the last table to fill.
            ranks: rows of that table.
        """
        counts = dict(self._counts)
        if self._norms:
            counts["norm"] = float(torch.stack(self._norms).double().sum())
        own = {"waited": self._waited, **seconds, "operations": counts["model"] + counts["again"]}
        table = torch.zeros(ranks, len(OF_RANK), dtype=torch.float64)
        table[rank] = torch.tensor([own[name] for name in OF_RANK], dtype=torch.float64)
        first = torch.tensor([counts[name] for name in COUNTS], dtype=torch.float64)
        return torch.cat((first, self._by_family(families).flatten(), table.flatten()))

    def _by_family(self, families: Sequence[str]) -> Tensor:
        """Add conversations up: (families, 5)."""
        places = {family: i for i, family in enumerate(families)}
        sums = torch.zeros(len(families), len(OF_FAMILY), dtype=torch.float64)
        if self._answers:
            loss, targets, hits = torch.cat(self._answers, 1).cpu().double()
            whole = (hits == targets).double()
            rows = torch.stack((loss, targets, hits, torch.ones_like(loss), whole), 1)
            sums.index_add_(0, torch.tensor([places[f] for f in self._families]).long(), rows)
        return sums


def read(vector: Tensor, families: Sequence[str], ranks: int = 1) -> Sums:
    """Take a vector apart, one rank's or the sum of all."""
    sizes = [len(COUNTS), len(families) * len(OF_FAMILY), ranks * len(OF_RANK)]
    counts, by_family, by_rank = vector.split(sizes)
    rows = zip(families, by_family.view(-1, len(OF_FAMILY)).tolist(), strict=True)
    named = {family: dict(zip(OF_FAMILY, row, strict=True)) for family, row in rows}
    table = by_rank.view(-1, len(OF_RANK)).tolist()
    return Sums(
        dict(zip(COUNTS, counts.tolist(), strict=True)),
        {family: row for family, row in sorted(named.items()) if row["answers"]},
        [dict(zip(OF_RANK, row, strict=True)) for row in table],
    )
