"""Decode steps on a CPU through the decode kernel of linear/cpu, for any number of requests.

`KernelDecode` implements `DecodeBackend`: it is the forward of model/text.py for one token of each
request, in one call. Optional: without kernels, and for models with layers that they do not
compute (prepacked ones), the model's forward runs every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.linear.cpu.decoder import DecoderKernel
from qwen2vl.linear.cpu.library import load_kernels
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import mrope_cos_sin

__all__ = ["KernelDecode"]


class KernelDecode:
    """Decodes one token of each of up to `max_batch_size` requests on a CPU."""

    def __init__(self, model: Qwen2VL, max_batch_size: int) -> None:
        self.max_batch_size = 0
        self._model = model
        self._limit = max_batch_size
        self._kernel: DecoderKernel | None = None
        self.on_weights_changed()

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        """Store the tokens' keys and values; return the next-token logits, one row for each."""
        assert self._kernel is not None
        model = self._model.model
        config = model.config
        positions_S = torch.tensor([token.position for token in tokens])
        cos, sin = mrope_cos_sin(
            positions_S.expand(3, -1), config.head_dim, config.rope_theta, config.mrope_section
        )
        embeds_SD = model.embed_tokens(torch.tensor([token.id for token in tokens]))
        # A copy also where it is float32 already: the kernel overwrites it.
        hidden_SD = embeds_SD.to(torch.float32, copy=True)
        hidden_SD = self._kernel(hidden_SD, cos, sin, [token.cache for token in tokens])
        return self._model.logits(hidden_SD.to(self._model.dtype))

    def on_weights_changed(self) -> None:
        """Use the model's current weights, or nothing if they are not of a supported kind."""
        kernels = load_kernels()
        self._kernel = None if kernels is None else DecoderKernel.try_create(kernels, self._model)
        self.max_batch_size = 0 if self._kernel is None else self._limit
