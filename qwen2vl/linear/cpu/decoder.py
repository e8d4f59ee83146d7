"""The decode kernel: one new token of each of several sequences through all decoder blocks.

One call of kernels/decode.h in place of some fifty operations a block, which for few rows take
longer to call than to compute. States are float32 between products. Used by
engine/decode/kernel_decode.py, which provides tokens and KV caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qwen2vl.linear.cpu.library import Kernels
from qwen2vl.linear.cpu.weights import KernelWeights, LinearStruct, kernel_weights
from qwen2vl.model import Int8KVCache, KVCache, Qwen2VL

__all__ = ["DecoderKernel"]

MAX_CHANNELS = 512  # kMaxChannels of kernels/attention.h

# `enum CacheDType` of kernels/attention.h
_CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class _LayerStruct(ctypes.Structure):
    """`struct Layer` of kernels/decode.h."""

    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("num_qkv", ctypes.c_int64),
        ("num_gate_up", ctypes.c_int64),
        ("qkv", LinearStruct * 3),
        ("o", LinearStruct),
        ("gate_up", LinearStruct * 2),
        ("down", LinearStruct),
    ]


class _DecoderStruct(ctypes.Structure):
    """`struct Decoder` of kernels/decode.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("num_layers", "width", "heads", "kv_heads", "channels")
        ),
        ("eps", ctypes.c_double),
        ("layers", ctypes.POINTER(_LayerStruct)),
        ("final_norm", ctypes.c_void_p),
    ]


class _SequenceStruct(ctypes.Structure):
    """`struct Sequence` of kernels/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_scale", "v_scale")),
        *((name, ctypes.c_int64) for name in ("dtype", "length", "layer_stride", "head_stride")),
    ]


class DecoderKernel:
    """The blocks of a decoder and its final norm; weights are used where they are, not copied."""

    def __init__(self, kernels: Kernels, model: Qwen2VL, layers: Sequence[_LayerStruct]) -> None:
        text = model.config.text
        self._kernels = kernels
        self._layers = (_LayerStruct * len(layers))(*layers)
        self._final_norm = model.model.norm.weight.detach().float()
        self._decoder = _DecoderStruct(
            len(layers),
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.rms_norm_eps,
            self._layers,
            self._final_norm.data_ptr(),
        )
        self._tensors: list[Tensor] = []  # that the structs point to

    @classmethod
    def try_create(cls, kernels: Kernels, model: Qwen2VL) -> DecoderKernel | None:
        """Return the kernel of a model, or None if a layer of it is of an unsupported kind."""
        is_supported = model.dtype in (torch.float32, torch.bfloat16)
        if not is_supported or model.config.text.head_dim > MAX_CHANNELS:
            return None
        tensors: list[Tensor] = []
        layers: list[_LayerStruct] = []
        for block in model.model.layers:
            layer = _layer_struct(block, tensors)
            if layer is None:
                return None
            layers.append(layer)
        kernel = cls(kernels, model, layers)
        kernel._tensors = tensors
        return kernel

    def __call__(
        self, hidden_SD: Tensor, cos: Tensor, sin: Tensor, caches: Sequence[KVCache]
    ) -> Tensor:
        """Write the tokens' keys and values; return their states after the final norm.

        Args:
            hidden_SD: embedding of each sequence's token, float32; overwritten by the result.
            cos, sin: (S, C / 2) float32, of the tokens' positions.
            caches: of the tokens before, in the model's dtype or in int8; each has a free slot.
        """
        count = len(caches)
        assert hidden_SD.is_contiguous()
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        sequences = (_SequenceStruct * count)(*map(_sequence_struct, caches))
        failed = self._kernels.decode(
            self._kernels.level,
            torch.get_num_threads(),
            ctypes.byref(self._decoder),
            sequences,
            hidden_SD.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            count,
        )
        if failed:
            raise MemoryError(f"no memory for a decode step of {count} sequences")
        return hidden_SD


def _sequence_struct(cache: KVCache) -> _SequenceStruct:
    k_LKZC, v_LKZC = cache.k_LKZC, cache.v_LKZC
    layer_stride, head_stride, slot_stride, _ = k_LKZC.stride()
    assert slot_stride == k_LKZC.shape[3]
    assert v_LKZC.stride() == k_LKZC.stride()
    assert cache.length < cache.capacity
    scales: list[int | None] = [None, None]
    if isinstance(cache, Int8KVCache):
        strides = (layer_stride // slot_stride, head_stride // slot_stride, 1)
        assert cache.k_scale_LKZ.stride() == cache.v_scale_LKZ.stride() == strides
        scales = [cache.k_scale_LKZ.data_ptr(), cache.v_scale_LKZ.data_ptr()]
    return _SequenceStruct(
        k_LKZC.data_ptr(),
        v_LKZC.data_ptr(),
        *scales,
        _CACHE_DTYPES[k_LKZC.dtype],
        cache.length,
        layer_stride,
        head_stride,
    )


def _layer_struct(block: Any, tensors: list[Tensor]) -> _LayerStruct | None:
    """Build the struct of a block; tensors that it points to are appended to `tensors`."""
    attn, mlp = block.self_attn, block.mlp
    groups = (
        [attn.q_proj, attn.k_proj, attn.v_proj],
        [attn.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    parts: list[list[KernelWeights]] = []
    for group in groups:
        weights = kernel_weights(group)
        if weights is None:
            return None
        parts.append(weights)
    qkv, o, gate_up, down = ([part.struct() for part in group] for group in parts)
    norms = [
        norm.weight.detach().float()
        for norm in (block.input_layernorm, block.post_attention_layernorm)
    ]
    tensors += norms
    for part in (part for group in parts for part in group):
        owned: tuple[Any, ...] = (part.weight, part.scale, part.zero, part.bias)
        tensors += [tensor for tensor in owned if tensor is not None]
    return _LayerStruct(
        *(norm.data_ptr() for norm in norms),
        len(qkv),
        len(gate_up),
        (LinearStruct * 3)(*qkv),
        o[0],
        (LinearStruct * 2)(*gate_up),
        down[0],
    )
