"""The interface of a decoder that computes pure decode batches faster than the model's forward.

`runner.py` asks it for steps in which every request decodes one token; `cuda_graphs.py` and
`compiled.py` implement it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from qwen2vl.model import KVCache

__all__ = ["Decode", "Token"]


class Token(NamedTuple):
    """One token to be decoded: what it is, and where it stands."""

    id: int
    position: int  # on all three axes: answers are text
    cache: KVCache  # what came before it; there is room for one more


class Decode(Protocol):
    """Stores the keys and values of tokens, and scores the words behind each."""

    most: int  # tokens that it takes at once

    def __call__(self, tokens: Sequence[Token]) -> Tensor:
        """Compute logits, one row for each token; the caller advances the caches."""
        ...

    def forget(self) -> None:
        """Hear that weights are others now."""
