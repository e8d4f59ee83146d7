"""What is minimised: cross-entropy of the supervised tokens, summed and divided once.

Only rows that carry loss meet the vocabulary: pictures and questions, most of a batch, never do.
The divisor is the weight of the whole optimiser step, so that a token counts the same in whatever
batch or rank it lands. Text alone is supervised. (Qwen2-VL sec. 2.2.) Next room: optim.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.train.pack import Batch

__all__ = ["Outcome", "token_loss"]


class Outcome(NamedTuple):
    """The loss to differentiate, and what metrics need, without a gradient."""

    loss: Tensor  # scalar, already divided
    losses_R: Tensor  # unweighted cross-entropy of each target
    right_R: Tensor  # bool: the greedy choice was the target


def token_loss(hidden_TD: Tensor, head_weight: Tensor, batch: Batch, divisor: float) -> Outcome:
    """Compute sum(weight * cross-entropy) / divisor over the target rows of `batch`."""
    rows_RD = hidden_TD.index_select(0, batch.target_index_R)
    logits_RV = F.linear(rows_RD, head_weight).float()
    losses_R = F.cross_entropy(logits_RV, batch.targets_R, reduction="none")
    loss = (losses_R * batch.weights_R).sum() / divisor
    with torch.no_grad():
        right_R = logits_RV.argmax(1) == batch.targets_R
    return Outcome(loss, losses_R.detach(), right_R)
