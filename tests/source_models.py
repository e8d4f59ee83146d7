"""Source models for init from pretrained: tiny, with random weights, in published layouts.

open_clip's vision tower is reimplemented in plain torch, with its parameter names and operations:
open_clip itself needs torchvision, which has no build without CUDA on the package index.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import models
from torch import Tensor, nn

from qwen2vl.config import TextConfig
from qwen2vl.model.text import TextModel
from qwen2vl.processor.tokenizer_files import END_OF_TEXT, IM_END, IM_START
from tests.tiny import tiny_tokenizer_dir

WIDTH, HEADS, DEPTH, PATCH = 64, 2, 2, 14
VOCABULARY = 384  # rows of the text model's embedding, more than the tokenizer has tokens

CLIP_MODEL_CFG: dict[str, Any] = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 56,
        "layers": DEPTH,
        "width": WIDTH,
        "head_width": WIDTH // HEADS,
        "patch_size": PATCH,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
}


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class OpenClipBlock(nn.Module):
    """open_clip's ResidualAttentionBlock, for (batch, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(WIDTH, 4 * WIDTH),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * WIDTH, WIDTH),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    """open_clip's VisionTransformer: parameters, and the modules that Qwen2-VL is built from."""

    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(17, WIDTH))
        self.proj = nn.Parameter(torch.zeros(WIDTH, 48))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock() for _ in range(DEPTH))
        self.ln_post = nn.LayerNorm(WIDTH)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter, so that none is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                center = 1.0 if ("ln_" in name or "norm" in name) and "weight" in name else 0.0
                parameter.copy_(center + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def write_open_clip(folder: Path, tower: nn.Module | None = None) -> nn.Module:
    """Write a folder in open_clip's layout, with one tensor of the text tower."""
    if tower is None:
        tower = OpenClipTower()
        randomize(tower)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "model_cfg": CLIP_MODEL_CFG,
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = {f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    state["token_embedding.weight"] = torch.zeros(50, 32)
    save_file(state, folder / "open_clip_model.safetensors")
    return tower


def write_tokenizer(folder: Path) -> int:
    """Write a Qwen2 tokenizer with its three special tokens; return its number of tokens."""
    full_tokenizer = tokenizers.Tokenizer.from_file(str(tiny_tokenizer_dir() / "tokenizer.json"))
    backend = tokenizers.Tokenizer(
        models.BPE.from_file(
            str(tiny_tokenizer_dir() / "vocab.json"), str(tiny_tokenizer_dir() / "merges.txt")
        )
    )
    backend.normalizer, backend.pre_tokenizer = (
        full_tokenizer.normalizer,
        full_tokenizer.pre_tokenizer,
    )
    backend.decoder = full_tokenizer.decoder
    backend.add_special_tokens([END_OF_TEXT, IM_START, IM_END])
    backend.save(str(folder / "tokenizer.json"))
    return backend.get_vocab_size()


def text_config(**changes: Any) -> dict[str, Any]:
    """Return config.json of a Qwen2 as on the hub."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 131072,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
        **changes,
    }


def write_qwen2(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Write a Qwen2 folder with random weights and return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    raw = text_config(**changes)
    (folder / "config.json").write_text(json.dumps(raw))
    names = {field: raw[field] for field in TextConfig.__dataclass_fields__ if field in raw}
    model = TextModel(TextConfig(**names, mrope_section=(2, 3, 3)))
    randomize(model, seed=1)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if not raw["tie_word_embeddings"]:
        state["lm_head.weight"] = torch.randn(VOCABULARY, 64)
    save_file(state, folder / "model.safetensors")
    return state
