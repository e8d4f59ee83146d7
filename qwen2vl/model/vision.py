"""Vision tower of Qwen2-VL (a ViT): patches of images and videos to vision embeddings.

A pre-norm transformer over the packed patches of all items. Attention is restricted to one temporal
patch (a pair of frames); only the patch embedding mixes time, by folding two frames into one
vector. The merger then turns each 2 x 2 neighborhood of patches into one vision token. What depends
on the grids is passed in as `VisionMeta`.
(Qwen2-VL sec. 2.1; HF: Qwen2VisionTransformerPretrainedModel.)
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.config import VisionConfig
from qwen2vl.geometry import AttnMeta, VisionMeta
from qwen2vl.model.activations import quick_gelu
from qwen2vl.model.attention import attention
from qwen2vl.model.rope import CosSin, apply_rotary_emb, vision_cos_sin

__all__ = ["VisionTower", "normalize_pixels"]


class PatchEmbed(nn.Module):
    """Patch embedding as one matmul; the weight keeps its Conv3d shape, (E, 3, 2, 14, 14).

    Kernel and stride are equal, so the convolution is a linear map of flattened patches; as a
    convolution it is many times slower on several backends.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.embed_dim, kernel, kernel, bias=False)

    def forward(self, patches_NP: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches_NP.to(weight.dtype), weight)


class VisionAttention(nn.Module):
    """Bidirectional multi-head attention among the patches of one pair of frames."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def project_qkv(self, hidden_NE: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """Project to q_NHC, k_NHC, v_NHC, with rotary embeddings applied to the first two."""
        qkv_N3HC = self.qkv(hidden_NE).unflatten(1, (3, self.num_heads, -1))
        q_NHC, k_NHC, v_NHC = qkv_N3HC.unbind(1)
        # In float32, as the reference does here (but not in the text model).
        q_NHC = apply_rotary_emb(q_NHC.float(), cos_sin).to(v_NHC.dtype)
        k_NHC = apply_rotary_emb(k_NHC.float(), cos_sin).to(v_NHC.dtype)
        return q_NHC, k_NHC, v_NHC

    def forward(self, hidden_NE: Tensor, cos_sin: CosSin, attn_meta: AttnMeta) -> Tensor:
        q_NHC, k_NHC, v_NHC = self.project_qkv(hidden_NE, cos_sin)
        out_NHC = attention(q_NHC, k_NHC, v_NHC, attn_meta, causal=False)
        return self.proj(out_NHC.flatten(1))


class VisionMLP(nn.Module):
    """Two layers with quick GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, width)
        self.fc2 = nn.Linear(width, config.embed_dim)

    def forward(self, hidden_NE: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(hidden_NE)))


class VisionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, hidden_NE: Tensor, cos_sin: CosSin, attn_meta: AttnMeta) -> Tensor:
        hidden_NE = hidden_NE + self.attn(self.norm1(hidden_NE), cos_sin, attn_meta)
        return hidden_NE + self.mlp(self.norm2(hidden_NE))


class PatchMerger(nn.Module):
    """Merge four consecutive patches (a 2 x 2 neighborhood) into one vision token of text width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.hidden_size)
        )

    def forward(self, hidden_NE: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden_NE).view(-1, self.width))


class VisionTower(nn.Module):
    """The vision encoder: packed patches of all items to packed vision embeddings of all items."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches_NP: Tensor, meta: VisionMeta) -> Tensor:
        """Encode patches into vision_MD, M = N / 4; uint8 patches are normalized first."""
        if patches_NP.dtype == torch.uint8:
            patches_NP = normalize_pixels(patches_NP, self.config)
        cos_sin = vision_cos_sin(meta.positions_N2, self.config.head_dim, self.config.rope_theta)
        hidden_NE = self.patch_embed(patches_NP)
        for block in self.blocks:
            hidden_NE = block(hidden_NE, cos_sin, meta.attn_meta)
        return self.merger(hidden_NE)


def normalize_pixels(patches_NP: Tensor, config: VisionConfig) -> Tensor:
    """Rescale uint8 patches to [0, 1], then subtract the mean and divide by the standard deviation.

    Returns float32. A patch is channel-major, so each third of it has its own mean.
    (HF: Qwen2VLImageProcessorPil, the same numbers bit for bit.)
    """
    mean, std = _channel_constants(config, patches_NP.device)
    # Division: multiplying by the rounded 1/255 is off by one bit for 126 of the 256 values.
    pixels_NCX = patches_NP.unflatten(1, (config.in_channels, -1)).to(torch.float32, copy=True)
    return pixels_NCX.div_(255).sub_(mean).div_(std).flatten(1)


@lru_cache(maxsize=8)
def _channel_constants(config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(config.image_mean, device=device)[:, None]
    return mean, torch.tensor(config.image_std, device=device)[:, None]
