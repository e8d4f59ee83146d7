"""Decode backend interface: computes pure decode batches faster than the model's forward.

`ModelRunner` uses it for steps in which every request decodes one token; `cuda_graphs.py` and
`compiled.py` implement it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from qwen2vl.model import KVCache

__all__ = ["DecodeBackend", "DecodeToken"]


class DecodeToken(NamedTuple):
    """The newest token of one request, with its position and KV cache."""

    id: int
    position: int  # the same on all three axes: output tokens are text
    cache: KVCache  # of the tokens before it; has a free slot for this one


class DecodeBackend(Protocol):
    """Computes one decode step for up to `max_batch_size` requests."""

    max_batch_size: int  # 0: it cannot be used

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        """Store the tokens' keys and values; return the next-token logits, one row for each.

        The caller advances the cache lengths.
        """
        ...

    def on_weights_changed(self) -> None:
        """Drop everything derived from the old weights."""
