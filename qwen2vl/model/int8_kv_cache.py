"""Int8 KV cache: keys and values as integers, with one scale for each token and KV head.

    write   scale = largest magnitude of the head's C numbers / 127    int = round(number / scale)
    read    number = int * scale, at most scale / 2 from what was written

A token takes C + 4 bytes a head in place of 2 * C. Queries attend to what is read, also to the keys
of their own forward: an output then does not depend on how its prompt was cut into chunks, on
cached prefixes or on draft tokens. Reading makes a copy of one layer in the model's dtype; the
decode kernel (linear/cpu) reads the integers. Letters as in attention.py. (vLLM: kv_cache_dtype.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qwen2vl.config import TextConfig
from qwen2vl.model.kv_cache import KVCache, LayerSlots

__all__ = ["Int8KVCache", "dequantize_heads", "quantize_heads"]

MAX_INT = 127
MIN_ABS = 1e-30  # a head of zeros is divided by this; kMinAbs of linear/cpu/kernels


def quantize_heads(x_TKC: Tensor) -> tuple[Tensor, Tensor]:
    """Round the numbers of each token and head, symmetrically: int8 (T, K, C), scales (T, K).

    Scales are float32: in float16 they lose precision where all numbers of a head are below 0.008,
    for 2 bytes of 132. A head with a NaN or an infinity is read as NaN.
    """
    x_TKC = x_TKC.float()
    scale_TK = x_TKC.abs().amax(-1).clamp(min=MIN_ABS) / MAX_INT
    return (x_TKC / scale_TK[..., None]).round().to(torch.int8), scale_TK


def dequantize_heads(ints: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of `quantize_heads`; axes before the last are any."""
    return (ints.float() * scale[..., None]).to(dtype)


class _Int8Slots(NamedTuple):
    """Slots of an `Int8KVCache`."""

    new_k_TKC: Tensor
    new_v_TKC: Tensor
    new_k_scale_TK: Tensor
    new_v_scale_TK: Tensor
    k_1KZC: Tensor
    v_1KZC: Tensor
    k_scale_1KZ: Tensor
    v_scale_1KZ: Tensor

    def append(self, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Round and write the new keys and values; return all of them, dequantized."""
        for x_TKC, new_TKC, new_scale_TK in (
            (k_TKC, self.new_k_TKC, self.new_k_scale_TK),
            (v_TKC, self.new_v_TKC, self.new_v_scale_TK),
        ):
            ints_TKC, scale_TK = quantize_heads(x_TKC)
            new_TKC.copy_(ints_TKC)
            new_scale_TK.copy_(scale_TK)
        return (
            dequantize_heads(self.k_1KZC, self.k_scale_1KZ, k_TKC.dtype),
            dequantize_heads(self.v_1KZC, self.v_scale_1KZ, v_TKC.dtype),
        )


@dataclass(slots=True)
class Int8KVCache(KVCache):
    """KV cache of one sequence in int8; scales are contiguous, as keys and values are."""

    k_scale_LKZ: Tensor = field(kw_only=True)
    v_scale_LKZ: Tensor = field(kw_only=True)
    layer_slots: ClassVar[Callable[..., LayerSlots]] = _Int8Slots

    @classmethod
    def allocate(
        cls, config: TextConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> Int8KVCache:
        """Allocate slots for `capacity` tokens; `dtype` of the model changes nothing."""
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity)
        k_LKZC, v_LKZC = (
            torch.empty((*shape, config.head_dim), dtype=torch.int8, device=device)
            for _ in range(2)
        )
        k_scale_LKZ, v_scale_LKZ = (
            torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2)
        )
        return cls(k_LKZC, v_LKZC, k_scale_LKZ=k_scale_LKZ, v_scale_LKZ=v_scale_LKZ)

    @classmethod
    def bytes_per_token(cls, config: TextConfig, dtype: torch.dtype) -> int:
        """Return the bytes of a token's slots: 2 * L * K times C integers and a scale."""
        heads = 2 * config.num_hidden_layers * config.num_key_value_heads
        return heads * (config.head_dim + torch.float32.itemsize)

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """All tensors of the cache; their third axis is that of the slots."""
        return self.k_LKZC, self.v_LKZC, self.k_scale_LKZ, self.v_scale_LKZ
