"""Language model of Qwen2-VL: a Qwen2 decoder with M-RoPE, from embeddings to hidden states.

Pre-norm blocks of grouped-query attention (q, k, v with bias) and SwiGLU. The input is token
embeddings in which vision embeddings have already replaced those of the placeholder tokens
(qwen2vl.py). (Qwen2-VL sec. 2.1; HF: Qwen2VLTextModel.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.activations import swiglu
from qwen2vl.model.attention import attention
from qwen2vl.model.kv_cache import BatchKVCache, LayerKVCache
from qwen2vl.model.rope import CosSin, apply_rotary_emb, mrope_cos_sin

__all__ = ["TextModel"]


class RMSNorm(nn.Module):
    """RMS normalization in float32; rounded to the model's dtype before the weight is applied."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        x_float_TD = x_TD.float()
        normed_TD = x_float_TD * torch.rsqrt(x_float_TD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed_TD.to(x_TD.dtype)


class TextAttention(nn.Module):
    """Causal grouped-query attention: H query heads share K key/value heads."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=False)

    def project_qkv(self, hidden_TD: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q_THC, k_TKC, v_TKC, with rotary embeddings applied to the first two."""
        q_THC = self.q_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        k_TKC = self.k_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        v_TKC = self.v_proj(hidden_TD).unflatten(1, (-1, self.head_dim))
        return apply_rotary_emb(q_THC, cos_sin), apply_rotary_emb(k_TKC, cos_sin), v_TKC

    def forward(
        self,
        hidden_TD: Tensor,
        cos_sin: CosSin,
        meta: AttnMeta,
        layer_cache: LayerKVCache | None,
    ) -> Tensor:
        q_THC, k_TKC, v_TKC = self.project_qkv(hidden_TD, cos_sin)
        if layer_cache is None:
            out_THC = attention(q_THC, k_TKC, v_TKC, meta, causal=True)
        else:
            out_THC = layer_cache.attend(q_THC, k_TKC, v_TKC)
        return self.o_proj(out_THC.flatten(1))


class TextMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden_TD), self.up_proj(hidden_TD)))


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
        cos_sin: CosSin,
        meta: AttnMeta,
        layer_cache: LayerKVCache | None,
    ) -> Tensor:
        normed_TD = self.input_layernorm(hidden_TD)
        hidden_TD = hidden_TD + self.self_attn(normed_TD, cos_sin, meta, layer_cache)
        return hidden_TD + self.mlp(self.post_attention_layernorm(hidden_TD))


class TextModel(nn.Module):
    """The decoder: input embeddings to hidden states after the final norm."""

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
        caches: BatchKVCache | None,
    ) -> Tensor:
        """Run all blocks; with `caches`, append the keys and values of each segment."""
        config = self.config
        cos, sin = mrope_cos_sin(
            position_ids_3T, config.head_dim, config.rope_theta, config.mrope_section
        )
        cos_sin = cos.to(embeds_TD.dtype), sin.to(embeds_TD.dtype)  # once, not in every layer
        hidden_TD = embeds_TD
        for index, layer in enumerate(self.layers):
            layer_cache = None if caches is None else caches.layer(index)
            hidden_TD = layer(hidden_TD, cos_sin, meta, layer_cache)
        if caches is not None:
            caches.advance(meta.lengths_q)
        return self.norm(hidden_TD)
