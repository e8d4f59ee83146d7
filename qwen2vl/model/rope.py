"""Rotary position embeddings: 2D RoPE for patches, M-RoPE (time, height, width) for tokens.

Angles are computed in float32 from the config and never stored as buffers, since a model moved to
bfloat16 would round them and lose large positions. Vision tower and decoder both use the half-split
layout (rotate_half): channel i is paired with channel i + C/2.
(Qwen2-VL sec. 2.1; HF: Qwen2VLVisionRotaryEmbedding, Qwen2VLRotaryEmbedding.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["CosSin", "apply_rotary_emb", "mrope_cos_sin", "vision_cos_sin"]

CosSin = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, C/2) float32


@lru_cache(maxsize=32)
def _inv_freq(channels: int, theta: float, device: torch.device) -> Tensor:
    """Compute inverse frequencies: theta ** (-2i / channels) for i below channels/2, float32."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return 1.0 / theta**exponent


def vision_cos_sin(positions_N2: Tensor, head_dim: int, theta: float) -> CosSin:
    """Compute 2D rotary embeddings of (row, column); rows take the first half of the frequencies.

    channels of one head   0 .. C/4    rows         C/2 .. 3C/4   rows
                           C/4 .. C/2  columns      3C/4 .. C     columns
    """
    inv_freq = _inv_freq(head_dim // 2, theta, positions_N2.device)
    angles = (positions_N2[..., None].float() * inv_freq).flatten(1)
    return angles.cos(), angles.sin()


def mrope_cos_sin(
    position_ids_3T: Tensor, head_dim: int, theta: float, mrope_section: tuple[int, int, int]
) -> CosSin:
    """Compute multimodal rotary embeddings (M-RoPE): each axis takes a section of the frequencies.

        frequencies   0 .. 16 time   16 .. 40 height   40 .. 64 width     for [16, 24, 24]

    Text tokens have the same position on all three axes; for them this is 1D RoPE.
    """
    inv_freq = _inv_freq(head_dim, theta, position_ids_3T.device)
    parts = [
        position_ids_3T[axis].float()[:, None] * section
        for axis, section in enumerate(inv_freq.split(mrope_section))
    ]
    angles = torch.cat(parts, dim=1)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x_THC: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotate the channel pairs (i, i + C/2) of each head, in the dtype of `x_THC`."""
    cos, sin = (part.to(x_THC.dtype)[:, None] for part in cos_sin)
    left, right = x_THC.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
