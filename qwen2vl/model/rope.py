"""Rotary positions: two axes for patches, three sections for tokens.

Angles are always computed in float32 from the config, never stored as buffers: a model moved to
bfloat16 would round them and lose large positions. Both towers rotate halves: channel i pairs with
channel i + C/2. (Qwen2-VL sec. 2.1; HF: Qwen2VLVisionRotaryEmbedding, Qwen2VLRotaryEmbedding.)
Next room: vision.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Rotation", "rotate", "text_rotation", "vision_rotation"]

Rotation = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, C/2) float32


@lru_cache(maxsize=32)
def _frequencies(channels: int, theta: float, device: torch.device) -> Tensor:
    """theta ** (-2i / channels) for i below channels/2, float32."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return 1.0 / theta**exponent


def vision_rotation(positions_N2: Tensor, head_dim: int, theta: float) -> Rotation:
    """Turn (row, column) into angles: the first half of the frequencies is for rows.

    channels of one head   0 .. C/4    rows         C/2 .. 3C/4   rows
                           C/4 .. C/2  columns      3C/4 .. C     columns
    """
    frequencies = _frequencies(head_dim // 2, theta, positions_N2.device)
    angles = (positions_N2[..., None].float() * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def text_rotation(
    position_ids_3T: Tensor, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> Rotation:
    """Turn (time, height, width) into angles: contiguous sections of the frequencies.

        frequencies   0 .. 16 time   16 .. 40 height   40 .. 64 width     for [16, 24, 24]

    Text has the same position on all three axes, where this is ordinary rotary embedding.
    """
    frequencies = _frequencies(head_dim, theta, position_ids_3T.device)
    parts = [
        position_ids_3T[axis].float()[:, None] * part
        for axis, part in enumerate(frequencies.split(sections))
    ]
    angles = torch.cat(parts, dim=1)
    return angles.cos(), angles.sin()


def rotate(x_THC: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs (i, i + C/2) of each head, in the dtype of `x_THC`."""
    cos, sin = (part.to(x_THC.dtype)[:, None] for part in rotation)
    left, right = x_THC.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
