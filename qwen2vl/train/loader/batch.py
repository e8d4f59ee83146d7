"""Examples laid end to end: one Batch, ready for one forward.

    ids     a a a a . b b . c c c c c c c .       three conversations, '.' rounds up a length
    pos     0 1 2 3   0 1   0 1 2 3 ...           positions restart with each
    labels  a a a -   b -   c c ...               shifted inside each, never across

Conversations are sorted by length and rounded up, so that neighbors share an attention call.
Pictures form one stream, sorted by area; a batch without any carries a null item, so that every
rank's tower runs. All is built and checked in the worker. Next room: objective.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from qwen2vl.data.preprocess import ROUND, BadSample, Example, rounded
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["NULL", "Batch", "pack", "sent"]

# Of the number of targets of a conversation: what each of them weighs.
_EXPONENT = {"token": 0.0, "sample": -1.0, "root": -0.5}

NULL = Grid(1, 2, 2)  # the smallest item: four black patches, one row that stands nowhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one forward and backward eat. R counts the target rows: tokens that carry loss."""

    input_ids_T: Tensor  # (T,) int64
    position_ids_3T: Tensor  # (3, T) int64
    meta: AttnMeta  # one segment for each conversation
    patches_NP: Tensor  # (N, P) uint8; four of a null item when no conversation has a picture
    vision_meta: VisionMeta
    pad_index_M: Tensor  # (M,) int64; empty for a null item
    target_index_R: Tensor  # (R,) int64, rows of hidden_TD that carry loss
    targets_R: Tensor  # (R,) int64, the next token of each
    weights_R: Tensor  # (R,) float32
    owner_R: Tensor  # (R,) int64, which conversation of this batch
    families: tuple[str, ...]  # of each conversation; none where every sample was bad
    bad: tuple[BadSample, ...] = ()  # samples that the schedule chose and that are not here

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
        moved: dict[str, Tensor | AttnMeta | VisionMeta] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = sent(value, device)
            elif isinstance(value, AttnMeta | VisionMeta):
                moved[name] = value.to(device)
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Put the tensors where a GPU fetches them by itself; a DataLoader asks, in its thread."""
        tensors = {n: v for n in self.__slots__ if isinstance(v := getattr(self, n), Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Begin to copy from the CPU to where the model is, without waiting where a GPU can fetch."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(
    examples: Sequence[Example],
    *,
    pad_id: int,
    weighting: Literal["token", "sample", "root"] = "token",
    patch_dim: int = 1176,
    bad: Sequence[BadSample] = (),
) -> Batch:
    """Lay out what the schedule chose; every conversation must have supervised tokens.

    Without any conversation, as when each was bad, the batch is one empty document that nothing
    is learned from: other ranks wait for this one's step.
    """
    ordered = sorted(examples, key=lambda example: len(example.input.input_ids))
    lengths = [rounded(len(e.input.input_ids)) for e in ordered] or [ROUND]
    starts = list(accumulate(lengths[:-1], initial=0))
    ids: list[int] = [] if ordered else [pad_id] * ROUND
    positions = [] if ordered else [torch.arange(ROUND).expand(3, -1)]
    targets: list[tuple[int, int, float, int]] = []
    for owner, (example, start) in enumerate(zip(ordered, starts, strict=False)):
        own, length = example.input.input_ids, lengths[owner]
        ids += own + [pad_id] * (length - len(own))
        positions.append(_padded(example.input.position_ids_3T, length))
        targets += _targets(example.input, start, owner, weighting)
    items, pad_index_M = _stream(ordered, starts)
    null = torch.zeros(NULL.h * NULL.w, patch_dim, dtype=torch.uint8)
    index, target, weight, owner_of = zip(*targets, strict=True) if targets else ((), (), (), ())
    batch = Batch(
        input_ids_T=torch.tensor(ids),
        position_ids_3T=torch.cat(positions, 1),
        meta=AttnMeta.build(lengths),
        patches_NP=torch.cat([item.patches_NP for item in items]) if items else null,
        vision_meta=VisionMeta.build([item.grid for item in items] or [NULL]),
        pad_index_M=pad_index_M,
        target_index_R=torch.tensor(index, dtype=torch.int64),
        targets_R=torch.tensor(target, dtype=torch.int64),
        weights_R=torch.tensor(weight, dtype=torch.float32),
        owner_R=torch.tensor(owner_of, dtype=torch.int64),
        families=tuple(e.family for e in ordered),
        bad=tuple(bad),
    )
    _check(batch)
    return batch


def _check(batch: Batch) -> None:
    """Compare what a kernel would only answer with a crash, or with a wrong number."""
    length, rows = len(batch.input_ids_T), len(batch.targets_R)
    assert batch.position_ids_3T.shape == (3, length), "one position for each token"
    assert sum(batch.meta.lengths_q) == length, "segments cover the tokens"
    assert sum(batch.vision_meta.frames.lengths_q) == len(batch.patches_NP), "frames cover patches"
    assert len(batch.pad_index_M) in (0, len(batch.patches_NP) // 4), "a token for each row"
    assert len(batch.pad_index_M.unique()) == len(batch.pad_index_M), "one row for each token"
    assert all(len(r) == rows for r in (batch.target_index_R, batch.weights_R, batch.owner_R))
    assert not rows or int(batch.target_index_R.max()) + 1 < length, "targets lie inside"


def _stream(ordered: Sequence[Example], starts: Sequence[int]) -> tuple[list[Item], Tensor]:
    """Sort the items of all conversations by area, and say where the rows of each belong.

    Their order in the stream is free, since every row names its token; sorted, pictures of one
    area are neighbors and share a call of the attention kernel.
    """
    placed: list[tuple[Item, Tensor]] = []
    for example, start in zip(ordered, starts, strict=False):
        items = example.input.items
        rows = example.input.pad_index_M.split([item.num_tokens for item in items])
        placed += [(item, own + start) for item, own in zip(items, rows, strict=True)]
    placed.sort(key=lambda pair: pair[0].grid.h * pair[0].grid.w)
    nowhere = torch.empty(0, dtype=torch.int64)
    return [item for item, _ in placed], torch.cat([nowhere, *(own for _, own in placed)])


def _targets(
    example: ModelInput, start: int, owner: int, weighting: str
) -> list[tuple[int, int, float, int]]:
    """List (row, next token, weight, conversation) of every supervised token."""
    assert example.loss_mask is not None, "the processor was not asked for a training example"
    # Row i predicts token i + 1: the shift happens here, inside one conversation.
    rows = [i - 1 for i, supervised in enumerate(example.loss_mask) if supervised and i > 0]
    assert rows, "a conversation without supervised tokens reached the packer"
    weight = len(rows) ** _EXPONENT[weighting]
    return [(start + i, example.input_ids[i + 1], weight, owner) for i in rows]


def _padded(position_ids_3T: Tensor, length: int) -> Tensor:
    """Round up to `length`; what stands behind a conversation is seen by nobody."""
    missing = length - position_ids_3T.shape[1]
    return torch.nn.functional.pad(position_ids_3T, (0, missing)) if missing else position_ids_3T
