"""One token through a block of the decoder, as one compiled function: decode on a CPU.

Of a single row a block makes some fifty small operations around its four products. Called one by
one they take a tenth of a step; as parts that torch.compile guards, nearly as much. So the forward
of a block is traced once as it stands, with weights, keys and values as arguments, and compiled
into one function (direct.py) that serves every block built alike. Who exchanges weights says so.
Letters as in model/attention.py. Back up: engine/decode/compiled.py, which brings the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qwen2vl.geometry import AttnMeta
from qwen2vl.linear.aot import Direct, compile_direct
from qwen2vl.model import Qwen2VL
from qwen2vl.model.attention import attend_token
from qwen2vl.model.rope import text_rotation

__all__ = ["TokenBlocks"]

_TOKENS = 77  # keys of the example; any other number would do


class TokenBlocks:
    """The decoder's blocks for a single row; weights are arguments, and so not copied."""

    def __init__(self, model: Qwen2VL) -> None:
        """Compile one function for each kind of block.

        Raises:
            NotCompiledError: that does not work here.
        """
        self._model = model
        self._kinds: dict[str, Direct] = {}  # x_1D, cos, sin, k_KTC, v_KTC, weights -> (x_1D,)
        self._blocks: list[tuple[Direct, list[Tensor]]] = []
        self.gather()

    def gather(self) -> None:
        """Take the weights that the model has now; compiles where they are of another kind.

        Raises:
            NotCompiledError: that does not work here.
        """
        blocks: list[tuple[Direct, list[Tensor]]] = []
        for layer in self._model.model.layers:
            kind = _describe(layer)
            if kind not in self._kinds:
                self._kinds[kind] = _compiled(layer, self._model)
            blocks.append((self._kinds[kind], list(_tensors(layer).values())))
        self._blocks = blocks

    def __call__(
        self, x_1D: Tensor, cos: Tensor, sin: Tensor, k_LKTC: Tensor, v_LKTC: Tensor
    ) -> Tensor:
        """Run all blocks; the token's own keys and values are written to the last of T."""
        caches = zip(k_LKTC.unbind(), v_LKTC.unbind(), strict=True)
        for (function, weights), (k_KTC, v_KTC) in zip(self._blocks, caches, strict=True):
            (x_1D,) = function(x_1D, cos, sin, k_KTC, v_KTC, *weights)
        return x_1D


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _describe(layer: nn.Module) -> str:
    """Say how a block is built: the same for blocks that one function serves."""
    kinds = [(n, tuple(t.shape), t.dtype, _strides(t)) for n, t in _tensors(layer).items()]
    return f"{layer} {kinds}"


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None  # packed ones have none


def _compiled(layer: nn.Module, model: Qwen2VL) -> Direct:
    config, dtype = model.config.text, model.dtype
    rotation = text_rotation(
        torch.zeros(3, 1, dtype=torch.int64),
        config.head_dim,
        config.rope_theta,
        config.mrope_section,
    )
    shape = (config.num_key_value_heads, 2 * _TOKENS, config.head_dim)
    k_KTC, v_KTC = (torch.zeros(shape, dtype=dtype)[:, :_TOKENS] for _ in range(2))
    tensors = _tensors(layer)
    return compile_direct(
        _flat(layer, list(tensors)),
        (
            torch.zeros(1, config.hidden_size, dtype=dtype),
            *rotation,
            k_KTC,
            v_KTC,
            *tensors.values(),
        ),
        free={3: 1, 4: 1},
        threads=1,  # for what lies between products; a row is too little for two
    )


def _flat(layer: nn.Module, names: Sequence[str]) -> Callable[..., tuple[Tensor]]:
    """Write the forward of a block as a function of tensors alone."""
    meta = AttnMeta.build([1], [_TOKENS])

    def block(
        x_1D: Tensor, cos: Tensor, sin: Tensor, k_KTC: Tensor, v_KTC: Tensor, *weights: Tensor
    ) -> tuple[Tensor]:
        def attend(q_1HC: Tensor, k_1KC: Tensor, v_1KC: Tensor) -> Tensor:
            k_KTC[:, -1:] = k_1KC.transpose(0, 1)
            v_KTC[:, -1:] = v_1KC.transpose(0, 1)
            return attend_token(q_1HC, k_KTC, v_KTC)

        own = dict(zip(names, weights, strict=True))
        # Tied, a layer that several share would be exchanged several times, and back only once.
        inputs = (x_1D, (cos, sin), meta, attend)
        return (functional_call(layer, own, inputs, tie_weights=False),)

    return block
