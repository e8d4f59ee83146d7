"""Hidden states -> one vector for a prompt: what a model that was trained to answer knows of it.

Two ways are in use. The last token has read everything before it; the mean weighs all tokens alike,
those of the template and of pictures included. Both are over the normed states that the head reads,
in float32, scaled to length one, so that a dot product is a cosine. Rows of a prefix that was found
in a cache are not there to be averaged: a mean needs its prompt computed whole.
(HF: last_hidden_state, which is after the final norm.) Back up: llm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Pooling", "pool"]

Pooling = Literal["last", "mean"]


def pool(hidden_TD: Tensor, lengths: Sequence[int], pooling: Pooling = "last") -> Tensor:
    """Give each sequence its vector: (S, D), float32, of length one.

    Args:
        hidden_TD: the states of all sequences, end to end.
        lengths: tokens of each sequence, at least one; together they are T.
        pooling: the last token of each sequence, or the mean of its tokens.
    """
    assert min(lengths) > 0 and sum(lengths) == len(hidden_TD), "lengths do not cover the states"
    if pooling == "last":
        ends = torch.tensor(lengths, device=hidden_TD.device).cumsum(0)
        pooled_SD = hidden_TD[ends - 1].float()
    else:
        parts = hidden_TD.split(list(lengths))
        pooled_SD = torch.stack([part_TD.mean(dim=0, dtype=torch.float32) for part_TD in parts])
    return F.normalize(pooled_SD, dim=-1)
