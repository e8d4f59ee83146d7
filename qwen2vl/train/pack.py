"""Examples laid end to end: one Batch, ready for one forward.

    ids     a a a a . b b . c c c c c c c .       three conversations, '.' rounds up a length
    pos     0 1 2 3   0 1   0 1 2 3 ...           positions restart with each
    labels  a a a -   b -   c c ...               shifted inside each, never across

Conversations are sorted by length and rounded up to a multiple, so that neighbours share a length
and attention handles them in one call. Pictures form one stream, sorted by area. Everything
is built in the worker; the step searches for nothing. Next room: objective.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["Batch", "Example", "pack"]

ROUND = 8  # lengths are rounded up to a multiple of this


class Example(NamedTuple):
    """One supervised conversation, and which family of tasks it belongs to."""

    input: ModelInput
    family: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward and backward eat. R counts the target rows: tokens that carry loss."""

    input_ids_T: Tensor  # (T,) int64
    position_ids_3T: Tensor  # (3, T) int64
    meta: AttnMeta  # one segment for each conversation
    patches_NP: Tensor | None  # (N, P) uint8; None when no conversation has a picture
    vision_meta: VisionMeta | None
    pad_index_M: Tensor | None
    target_index_R: Tensor  # (R,) int64, rows of hidden_TD that carry loss
    targets_R: Tensor  # (R,) int64, the next token of each
    weights_R: Tensor  # (R,) float32
    owner_R: Tensor  # (R,) int64, which conversation of this batch
    families: tuple[str, ...]  # of each conversation

    def run(self, model: Qwen2VL) -> Tensor:
        """Let a model read all conversations in one forward: hidden_TD."""
        return model(
            self.input_ids_T,
            self.position_ids_3T,
            self.meta,
            patches_NP=self.patches_NP,
            vision_meta=self.vision_meta,
            pad_index_M=self.pad_index_M,
        )

    def to(self, device: torch.device | str) -> Batch:
        """Copy once to where the model is."""
        if torch.device(device).type == "cpu":
            return self
        moved = {
            name: value.to(device)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor | AttnMeta | VisionMeta)
        }
        return replace(self, **moved)


def pack(
    examples: Sequence[Example],
    *,
    pad_id: int,
    weighting: Literal["token", "root"] = "token",
) -> Batch:
    """Lay out what the schedule chose; every conversation must have supervised tokens."""
    ordered = sorted(examples, key=lambda example: len(example.input.input_ids))
    lengths = [-(-len(e.input.input_ids) // ROUND) * ROUND for e in ordered]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    ids: list[int] = []
    targets: list[tuple[int, int, float, int]] = []
    for owner, (example, length, start) in enumerate(zip(ordered, lengths, starts, strict=True)):
        own = example.input.input_ids
        ids += own + [pad_id] * (length - len(own))
        targets += _targets(example.input, start, owner, weighting)
    items, pad_index_M = _stream(ordered, starts)
    index, target, weight, owner_of = zip(*targets, strict=True)
    return Batch(
        input_ids_T=torch.tensor(ids),
        position_ids_3T=torch.cat(
            [_padded(e.input.position_ids_3T, n) for e, n in zip(ordered, lengths, strict=True)], 1
        ),
        meta=AttnMeta.build(lengths),
        patches_NP=torch.cat([item.patches_NP for item in items]) if items else None,
        vision_meta=VisionMeta.build([item.grid for item in items]) if items else None,
        pad_index_M=pad_index_M,
        target_index_R=torch.tensor(index),
        targets_R=torch.tensor(target),
        weights_R=torch.tensor(weight),
        owner_R=torch.tensor(owner_of),
        families=tuple(e.family for e in ordered),
    )


def _stream(ordered: Sequence[Example], starts: Sequence[int]) -> tuple[list[Item], Tensor | None]:
    """Sort the items of all conversations by area, and say where the rows of each belong.

    Their order in the stream is free, since every row names its token; sorted, pictures of one
    area are neighbours and share a call of the attention kernel.
    """
    placed: list[tuple[Item, Tensor]] = []
    for example, start in zip(ordered, starts, strict=True):
        items = example.input.items
        rows = example.input.pad_index_M.split([item.num_tokens for item in items])
        placed += [(item, own + start) for item, own in zip(items, rows, strict=True)]
    placed.sort(key=lambda pair: pair[0].grid.h * pair[0].grid.w)
    items = [item for item, _ in placed]
    return items, torch.cat([own for _, own in placed]) if placed else None


def _targets(
    example: ModelInput, start: int, owner: int, weighting: str
) -> list[tuple[int, int, float, int]]:
    """List (row, next token, weight, conversation) of every supervised token."""
    assert example.loss_mask is not None, "the processor was not asked for a training example"
    # Row i predicts token i + 1: the shift happens here, inside one conversation.
    rows = [i - 1 for i, supervised in enumerate(example.loss_mask) if supervised and i > 0]
    assert rows, "a conversation without supervised tokens reached the packer"
    weight = len(rows) ** -0.5 if weighting == "root" else 1.0
    return [(start + i, example.input_ids[i + 1], weight, owner) for i in rows]


def _padded(position_ids_3T: Tensor, length: int) -> Tensor:
    """Round up to `length`; what stands behind a conversation is seen by nobody."""
    missing = length - position_ids_3T.shape[1]
    return torch.nn.functional.pad(position_ids_3T, (0, missing)) if missing else position_ids_3T
