"""Ahead-of-time compiled decoder blocks for decode with a single token on a CPU.

For a single row a block runs some fifty small operations around its four matrix products. Eagerly
they take a tenth of a decode step; as regions with torch.compile's guards, nearly as much. So the
forward of a block is traced once, with weights, keys and values as arguments, and compiled into one
function without guards (linear/aot.py) that serves every block of the same structure. Whoever
replaces weights must call `refresh_weights`. Letters as in model/attention.py. Used by
engine/decode/compiled.py, which provides the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qwen2vl.geometry import AttnMeta
from qwen2vl.linear.aot import CompiledFunction, compile_ahead_of_time
from qwen2vl.model import Qwen2VL
from qwen2vl.model.attention import decode_attention
from qwen2vl.model.rope import mrope_cos_sin

__all__ = ["CompiledDecodeBlocks"]

_EXAMPLE_LENGTH = 77  # keys in the example inputs; the number is arbitrary


class CompiledDecodeBlocks:
    """The decoder's blocks for a single token; weights are passed as arguments, not copied."""

    def __init__(self, model: Qwen2VL) -> None:
        """Compile one function for each distinct block structure.

        Raises:
            CompilationError: nothing can be compiled on this machine.
        """
        self._model = model
        # Block signature -> function of x_1D, cos, sin, k_KTC, v_KTC and weights; returns (x_1D,).
        self._functions: dict[str, CompiledFunction] = {}
        self._blocks: list[tuple[CompiledFunction, list[Tensor]]] = []
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Use the model's current weights; compiles where a block's structure is new.

        Raises:
            CompilationError: nothing can be compiled on this machine.
        """
        blocks: list[tuple[CompiledFunction, list[Tensor]]] = []
        for layer in self._model.model.layers:
            signature = _block_signature(layer)
            if signature not in self._functions:
                self._functions[signature] = _compile_block(layer, self._model)
            blocks.append((self._functions[signature], list(_tensors(layer).values())))
        self._blocks = blocks

    def __call__(
        self, x_1D: Tensor, cos: Tensor, sin: Tensor, k_LKTC: Tensor, v_LKTC: Tensor
    ) -> Tensor:
        """Run all blocks; the token's own keys and values are written at the last index of T."""
        caches = zip(k_LKTC.unbind(), v_LKTC.unbind(), strict=True)
        for (function, weights), (k_KTC, v_KTC) in zip(self._blocks, caches, strict=True):
            (x_1D,) = function(x_1D, cos, sin, k_KTC, v_KTC, *weights)
        return x_1D


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _block_signature(layer: nn.Module) -> str:
    """Return the structure of a block as text; blocks with equal ones share a function."""
    tensors = [(n, tuple(t.shape), t.dtype, _strides(t)) for n, t in _tensors(layer).items()]
    return f"{layer} {tensors}"


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None  # prepacked ones have none


def _compile_block(layer: nn.Module, model: Qwen2VL) -> CompiledFunction:
    config, dtype = model.config.text, model.dtype
    cos_sin = mrope_cos_sin(
        torch.zeros(3, 1, dtype=torch.int64),
        config.head_dim,
        config.rope_theta,
        config.mrope_section,
    )
    shape = (config.num_key_value_heads, 2 * _EXAMPLE_LENGTH, config.head_dim)
    k_KTC, v_KTC = (torch.zeros(shape, dtype=dtype)[:, :_EXAMPLE_LENGTH] for _ in range(2))
    tensors = _tensors(layer)
    return compile_ahead_of_time(
        _functional_forward(layer, list(tensors)),
        (
            torch.zeros(1, config.hidden_size, dtype=dtype),
            *cos_sin,
            k_KTC,
            v_KTC,
            *tensors.values(),
        ),
        dynamic_dims={3: 1, 4: 1},
        num_threads=1,  # for the operations between products; one row is too little work for two
    )


class _LastSlot(NamedTuple):
    """One layer's KV cache, whose last slot is that of the new token."""

    k_KTC: Tensor
    v_KTC: Tensor

    def attend(self, q_1HC: Tensor, k_1KC: Tensor, v_1KC: Tensor) -> Tensor:
        self.k_KTC[:, -1:] = k_1KC.transpose(0, 1)
        self.v_KTC[:, -1:] = v_1KC.transpose(0, 1)
        q_1KGC = q_1HC.unflatten(1, (self.k_KTC.shape[0], -1))
        return decode_attention(q_1KGC, self.k_KTC[None], self.v_KTC[None]).flatten(1, 2)


def _functional_forward(layer: nn.Module, names: Sequence[str]) -> Callable[..., tuple[Tensor]]:
    """Return the forward of a block as a function of tensors alone."""
    meta = AttnMeta.build([1], [_EXAMPLE_LENGTH])

    def block(
        x_1D: Tensor, cos: Tensor, sin: Tensor, k_KTC: Tensor, v_KTC: Tensor, *weights: Tensor
    ) -> tuple[Tensor]:
        state = dict(zip(names, weights, strict=True))
        # tie_weights would swap a fused layer once for each slice that shares it, and restore it
        # only once.
        inputs = (x_1D, (cos, sin), meta, _LastSlot(k_KTC, v_KTC))
        return (functional_call(layer, state, inputs, tie_weights=False),)

    return block
