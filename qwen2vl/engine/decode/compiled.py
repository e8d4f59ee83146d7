"""Steps in which everybody decodes, where something computes them faster than a forward.

On a GPU that is graphs.py, for any number of rows. On a CPU it is `SingleDecode`, for one row of a
model that is compiled: one token's way through the decoder, told here as in model/text.py, but
through blocks that were compiled whole. Without this room everything works. Back up: runner.py,
which asks whether a step is one of these.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.compile.decode_block import TokenBlocks
from qwen2vl.engine.decode.decoder import Token
from qwen2vl.linear.aot import NotCompiledError
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import text_rotation

__all__ = ["SingleDecode"]

logger = logging.getLogger(__name__)

_NOT_HERE = "compile: not for single tokens here (%s)"


class SingleDecode:
    """Computes the step of one answer alone, on a CPU."""

    def __init__(self, model: Qwen2VL, blocks: TokenBlocks) -> None:
        self.most = 1
        self._model = model
        self._blocks = blocks

    @classmethod
    def compiled(cls, model: Qwen2VL) -> SingleDecode | None:
        """Compile the blocks of a model; None, and a warning, where that does not work here."""
        try:
            return cls(model, TokenBlocks(model))
        except NotCompiledError as error:
            logger.warning(_NOT_HERE, error)
            return None

    def __call__(self, tokens: Sequence[Token]) -> Tensor:
        """Store and attend; returns logits of the one token, (1, V)."""
        (token,) = tokens
        model, cache, stop = self._model.model, token.cache, token.cache.length + 1
        config = model.config
        cos, sin = text_rotation(
            torch.full((3, 1), token.position),
            config.head_dim,
            config.rope_theta,
            config.mrope_section,
        )
        hidden_1D = self._blocks(
            model.embed_tokens(torch.tensor([token.id])),
            cos,
            sin,
            cache.k_LKZC[:, :, :stop],
            cache.v_LKZC[:, :, :stop],
        )
        return self._model.logits(model.norm(hidden_1D))

    def forget(self) -> None:
        """Hear that weights are others now; if they cannot be compiled for, no step is taken."""
        try:
            self._blocks.gather()
        except NotCompiledError as error:
            logger.warning(_NOT_HERE, error)
            self.most = 0
