"""Batch: conversations packed end to end (sequence packing), ready for one forward pass.

    ids     a a a a . b b . c c c c c c c .       three conversations, '.' is padding
    pos     0 1 2 3   0 1   0 1 2 3 ...           positions restart with each
    labels  a a a -   b -   c c ...               shifted within each, never across

Conversations are sorted by length and padded to a multiple of 8 tokens, so that neighbors of equal
length share an attention call. Images and videos are concatenated, sorted by area; a batch without
any has a dummy image, so that the vision tower runs on every rank. Batches are built and checked in
the data loader's workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from qwen2vl.data.preprocess import PAD_TO_MULTIPLE_OF, BadSample, TrainingExample, padded_length
from qwen2vl.flops import BatchCounts
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item, ModelInput

__all__ = ["DUMMY_IMAGE_GRID", "Batch", "copy_to_device", "pack_batch"]

# Exponent of a conversation's number of targets in the weight of each of them.
_EXPONENT = {"token": 0.0, "sample": -1.0, "root": -0.5}

DUMMY_IMAGE_GRID = Grid(1, 2, 2)  # the smallest image: four black patches, one unused vision token


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Input of one forward and backward pass. R counts the targets: tokens that carry loss."""

    input_ids_T: Tensor  # (T,) int64
    position_ids_3T: Tensor  # (3, T) int64
    meta: AttnMeta  # one segment for each conversation
    patches_NP: Tensor  # (N, P) uint8; four of a dummy image if there are no media
    vision_meta: VisionMeta
    placeholder_index_M: Tensor  # (M,) int64; empty for a dummy image
    target_index_R: Tensor  # (R,) int64, indices of hidden_TD whose next token is a target
    targets_R: Tensor  # (R,) int64, the next token of each
    weights_R: Tensor  # (R,) float32
    example_index_R: Tensor  # (R,) int64, conversation in this batch
    families: tuple[str, ...]  # of each conversation; empty if every sample was bad
    bad_samples: tuple[BadSample, ...] = ()  # samples of this batch that could not be used

    def forward(self, model: Qwen2VL) -> Tensor:
        """Run the model on all conversations in one forward pass; returns hidden_TD."""
        return model(
            self.input_ids_T,
            self.position_ids_3T,
            self.meta,
            patches_NP=self.patches_NP,
            vision_meta=self.vision_meta,
            placeholder_index_M=self.placeholder_index_M,
        )

    def flop_counts(self) -> BatchCounts:
        """Return the sizes that determine its FLOPs; all of them are on the host already."""
        frames, lengths = self.vision_meta.attn_meta.lengths_q, self.meta.lengths_q
        return BatchCounts.from_lengths(frames, lengths, len(self.targets_R))

    def to(self, device: torch.device | str) -> Batch:
        """Copy to the model's device."""
        if torch.device(device).type == "cpu":
            return self
        moved: dict[str, Tensor | AttnMeta | VisionMeta] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = copy_to_device(value, device)
            elif isinstance(value, AttnMeta | VisionMeta):
                moved[name] = value.to(device)
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Pin the tensors for asynchronous copies to a GPU; called by DataLoader's pin thread."""
        tensors = {
            name: value
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


def copy_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device; from pinned memory and without waiting for it if that is a GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pack_batch(
    examples: Sequence[TrainingExample],
    *,
    pad_id: int,
    weighting: Literal["token", "sample", "root"] = "token",
    patch_dim: int = 1176,
    bad_samples: Sequence[BadSample] = (),
) -> Batch:
    """Pack examples into a batch; every conversation must have supervised tokens.

    Without any example, if all samples were bad, the batch is one empty document without targets,
    since the other ranks wait for this rank's step.
    """
    ordered = sorted(examples, key=lambda example: len(example.input.input_ids))
    lengths = [padded_length(len(example.input.input_ids)) for example in ordered] or [
        PAD_TO_MULTIPLE_OF
    ]
    starts = list(accumulate(lengths[:-1], initial=0))
    ids: list[int] = [] if ordered else [pad_id] * PAD_TO_MULTIPLE_OF
    positions = [] if ordered else [torch.arange(PAD_TO_MULTIPLE_OF).expand(3, -1)]
    targets: list[tuple[int, int, float, int]] = []
    for example_index, (example, start) in enumerate(zip(ordered, starts, strict=False)):
        input_ids, length = example.input.input_ids, lengths[example_index]
        ids += input_ids + [pad_id] * (length - len(input_ids))
        positions.append(_pad_positions(example.input.position_ids_3T, length))
        targets += _targets(example.input, start, example_index, weighting)
    items, placeholder_index_M = _concatenate_items(ordered, starts)
    dummy = torch.zeros(DUMMY_IMAGE_GRID.h * DUMMY_IMAGE_GRID.w, patch_dim, dtype=torch.uint8)
    index, target, weight, example_of = zip(*targets, strict=True) if targets else ((), (), (), ())
    batch = Batch(
        input_ids_T=torch.tensor(ids),
        position_ids_3T=torch.cat(positions, 1),
        meta=AttnMeta.build(lengths),
        patches_NP=torch.cat([item.patches_NP for item in items]) if items else dummy,
        vision_meta=VisionMeta.build([item.grid for item in items] or [DUMMY_IMAGE_GRID]),
        placeholder_index_M=placeholder_index_M,
        target_index_R=torch.tensor(index, dtype=torch.int64),
        targets_R=torch.tensor(target, dtype=torch.int64),
        weights_R=torch.tensor(weight, dtype=torch.float32),
        example_index_R=torch.tensor(example_of, dtype=torch.int64),
        families=tuple(example.family for example in ordered),
        bad_samples=tuple(bad_samples),
    )
    _assert_consistent(batch)
    return batch


def _assert_consistent(batch: Batch) -> None:
    """Assert what a kernel would answer with a crash or a wrong result."""
    length, num_targets = len(batch.input_ids_T), len(batch.targets_R)
    assert batch.position_ids_3T.shape == (3, length), "one position for each token"
    assert sum(batch.meta.lengths_q) == length, "segments cover the tokens"
    assert sum(batch.vision_meta.attn_meta.lengths_q) == len(batch.patches_NP), (
        "frames cover patches"
    )
    assert len(batch.placeholder_index_M) in (0, len(batch.patches_NP) // 4), (
        "a placeholder for each vision token"
    )
    assert len(batch.placeholder_index_M.unique()) == len(batch.placeholder_index_M), (
        "one vision token for each placeholder"
    )
    assert all(
        len(tensor) == num_targets
        for tensor in (batch.target_index_R, batch.weights_R, batch.example_index_R)
    )
    assert not num_targets or int(batch.target_index_R.max()) + 1 < length, "targets lie inside"


def _concatenate_items(
    ordered: Sequence[TrainingExample], starts: Sequence[int]
) -> tuple[list[Item], Tensor]:
    """Sort the items of all conversations by area; return them and their placeholders' indices.

    The order of items is free, since every vision token has the index of its placeholder; sorted,
    images of one area are adjacent and share a call of the attention kernel.
    """
    items_with_index: list[tuple[Item, Tensor]] = []
    for example, start in zip(ordered, starts, strict=False):
        items = example.input.items
        vision_tokens = example.input.placeholder_index_M.split([item.num_tokens for item in items])
        items_with_index += [
            (item, index + start) for item, index in zip(items, vision_tokens, strict=True)
        ]
    items_with_index.sort(key=lambda pair: pair[0].grid.h * pair[0].grid.w)
    empty = torch.empty(0, dtype=torch.int64)
    return [item for item, _ in items_with_index], torch.cat(
        [empty, *(index for _, index in items_with_index)]
    )


def _targets(
    example: ModelInput, start: int, example_index: int, weighting: str
) -> list[tuple[int, int, float, int]]:
    """List (index, next token, weight, conversation) of every supervised token."""
    assert example.loss_mask is not None, "the example was processed without for_training"
    # Index i predicts token i + 1: labels are shifted here, within one conversation.
    indices = [i - 1 for i, supervised in enumerate(example.loss_mask) if supervised and i > 0]
    assert indices, "a conversation without supervised tokens reached the packer"
    weight = len(indices) ** _EXPONENT[weighting]
    return [(start + i, example.input_ids[i + 1], weight, example_index) for i in indices]


def _pad_positions(position_ids_3T: Tensor, length: int) -> Tensor:
    """Pad positions to `length`; no token attends to the padding after a conversation."""
    num_missing = length - position_ids_3T.shape[1]
    return (
        torch.nn.functional.pad(position_ids_3T, (0, num_missing))
        if num_missing
        else position_ids_3T
    )
