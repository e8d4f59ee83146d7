"""Decode steps of a single request on a CPU, through ahead-of-time compiled decoder blocks.

`CompiledDecode` implements `DecodeBackend` for batches of one token and a compiled model. It is
the forward of model/text.py for one token, with the decoder blocks compiled as a whole
(compile/decode_block.py). Optional: without it the model's forward runs every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.compile.decode_block import CompiledDecodeBlocks
from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.linear.aot import eager_fallback
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import mrope_cos_sin

__all__ = ["CompiledDecode"]

_WHAT = "single-token decode"  # in the warning where it cannot be compiled


class CompiledDecode:
    """Decodes one token of one request on a CPU."""

    def __init__(self, model: Qwen2VL, blocks: CompiledDecodeBlocks) -> None:
        self.max_batch_size = 1
        self._model = model
        self._blocks = blocks

    @classmethod
    def try_compile(cls, model: Qwen2VL) -> CompiledDecode | None:
        """Compile the decoder blocks of a model; where that fails, log a warning, return None."""
        with eager_fallback(_WHAT):
            return cls(model, CompiledDecodeBlocks(model))
        return None

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        """Store the token's keys and values; return its next-token logits, (1, V)."""
        (token,) = tokens
        model, cache, stop = self._model.model, token.cache, token.cache.length + 1
        config = model.config
        cos, sin = mrope_cos_sin(
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

    def on_weights_changed(self) -> None:
        """Collect the new weights; if compilation for them fails, disable this backend."""
        self.max_batch_size = 0
        with eager_fallback(_WHAT):
            self._blocks.refresh_weights()
            self.max_batch_size = 1
