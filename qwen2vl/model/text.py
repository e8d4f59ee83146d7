"""The words: embeddings -> hidden states. A Qwen2 decoder with three-section rotary positions.

Pre-norm blocks of grouped-query attention (q, k, v with bias) and SwiGLU. It never sees ids of
pictures: vision tokens have already taken their places among the embeddings.
(Qwen2-VL sec. 2.1; HF: Qwen2VLTextModel.) Next room: qwen2vl.py, where eyes and words meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import KVCache, LayerCaches, SharedCache, attention
from qwen2vl.model.rope import Rotation, rotate, text_rotation

__all__ = ["TextModel"]


class RMSNorm(nn.Module):
    """Scale to unit mean square, in float32; rounded to the model's dtype before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        wide = x_TD.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x_TD.dtype)


class TextAttention(nn.Module):
    """Causal attention; K key/value heads are shared by H query heads."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)

    def project(self, hidden_TD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q_THC, k_TKC, v_TKC, the first two already rotated to their positions."""
        q_THC = self.q_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        k_TKC = self.k_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        v_TKC = self.v_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        return rotate(q_THC, rotation), rotate(k_TKC, rotation), v_TKC

    def forward(
        self,
        hidden_TD: Tensor,
        rotation: Rotation,
        meta: AttnMeta,
        layer_caches: LayerCaches | None,
    ) -> Tensor:
        q_THC, k_TKC, v_TKC = self.project(hidden_TD, rotation)
        out_THC = attention(q_THC, k_TKC, v_TKC, meta, causal=True, layer_caches=layer_caches)
        return self.o_proj(out_THC.flatten(1))


class TextMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_TD)) * self.up_proj(hidden_TD))


class TextBlock(nn.Module):
    """x + self_attn(input_layernorm(x)), then x + mlp(post_attention_layernorm(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = TextAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TextMLP(config)

    def forward(
        self,
        hidden_TD: Tensor,
        rotation: Rotation,
        meta: AttnMeta,
        layer_caches: LayerCaches | None,
    ) -> Tensor:
        normed_TD = self.input_layernorm(hidden_TD)
        hidden_TD = hidden_TD + self.self_attn(normed_TD, rotation, meta, layer_caches)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))


class TextModel(nn.Module):
    """The decoder, from embeddings to the normed hidden states the head reads."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        embeds_TD: Tensor,
        position_ids_3T: Tensor,
        meta: AttnMeta,
        caches: Sequence[KVCache] | SharedCache | None,
    ) -> Tensor:
        """Run all blocks; with caches, store each segment's keys and values and advance them.

        A SharedCache is advanced by who owns it.
        """
        config = self.config
        rotation = text_rotation(
            position_ids_3T, config.head_dim, config.rope_theta, config.mrope_section
        )
        hidden_TD = embeds_TD
        for index, layer in enumerate(self.layers):
            if isinstance(caches, Sequence):
                layer_caches = [cache.layer(index) for cache in caches]
            else:
                layer_caches = None if caches is None else caches.layer(index)
            hidden_TD = layer(hidden_TD, rotation, meta, layer_caches)
        if isinstance(caches, Sequence):
            for cache, length in zip(caches, meta.lengths_q, strict=True):
                cache.length += length
        return self.norm(hidden_TD)
