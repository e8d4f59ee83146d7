"""Source models for init from pretrained: Qwen2 and CLIP folders, under Qwen2-VL's parameter names.

A Qwen2 folder provides the decoder, whose names are the same. A CLIP folder provides the vision
blocks, in the key layout of open_clip (as DFN is published) or of transformers. A source model
whose blocks compute something else is refused by name, and so is an unknown tensor.
init_pretrained.py builds the new model. (Qwen2-VL sec. 2.2; open_clip: VisionTransformer; HF:
CLIPVisionModel, Qwen2ForCausalLM.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.config_files import pickle_remedy, read_json
from qwen2vl.weights.header import read_header
from qwen2vl.weights.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorFolder,
    open_tensors,
    shorten,
)

__all__ = [
    "TextSourceModel",
    "VisionSourceModel",
    "read_text_source_model",
    "read_vision_source_model",
]

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILE = "open_clip_model.safetensors"
_OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSourceModel:
    """A Qwen2 language model; its tensors have the names of a Qwen2-VL."""

    folder: Path
    raw: Mapping[str, Any]  # config.json
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSourceModel:
    """The parts of a CLIP vision tower that a Qwen2-VL is initialized from."""

    num_heads: int
    mlp_width: int
    patch_E3YX: Tensor  # the patch embedding, a convolution over one frame
    pre_norm: tuple[Tensor, Tensor] | None  # gain and bias of the norm before the first block
    blocks: tuple[Mapping[str, Tensor], ...]  # under Qwen2-VL's names, from `norm1.weight` on
    image_mean: tuple[float, ...] | None  # of the pixels it was trained on; None: not given
    image_std: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeyLayout:
    """A library's names of the parts of a vision tower; {} is the number of the block."""

    block: str
    leaves: Mapping[str, str]  # Qwen2-VL's -> the library's, each with a weight and a bias
    qkv: tuple[str, ...]  # concatenated in Qwen2-VL's attn.qkv
    patch: str
    pre_norm: str
    dropped: frozenset[str]


_OPEN_CLIP = _KeyLayout(
    block="transformer.resblocks.{}.",
    leaves={
        "norm1": "ln_1.",
        "norm2": "ln_2.",
        "attn.proj": "attn.out_proj.",
        "mlp.fc1": "mlp.c_fc.",
        "mlp.fc2": "mlp.c_proj.",
    },
    qkv=("attn.in_proj_",),
    patch="conv1.weight",
    pre_norm="ln_pre",
    dropped=frozenset(
        ["class_embedding", "positional_embedding", "proj", "ln_post.weight", "ln_post.bias"]
    ),
)
_TRANSFORMERS = _KeyLayout(
    block="encoder.layers.{}.",
    leaves={
        "norm1": "layer_norm1.",
        "norm2": "layer_norm2.",
        "attn.proj": "self_attn.out_proj.",
        "mlp.fc1": "mlp.fc1.",
        "mlp.fc2": "mlp.fc2.",
    },
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    patch="embeddings.patch_embedding.weight",
    pre_norm="pre_layrnorm",  # transformers' spelling
    dropped=frozenset(
        [
            *("embeddings.class_embedding", "embeddings.position_embedding.weight"),
            *("embeddings.position_ids", "post_layernorm.weight", "post_layernorm.bias"),
        ]
    ),
)


def read_text_source_model(folder: Path) -> TextSourceModel:
    """Open a Qwen2 folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another model type.
    """
    raw = _read_config(folder, "config.json")
    if raw.get("model_type") != "qwen2":
        raise CheckpointError(
            f"{folder}: model_type is {raw.get('model_type')!r}, expected 'qwen2'; give the folder "
            "of a Qwen2 language model, as Qwen/Qwen2-1.5B"
        )
    if scaling := raw.get("rope_scaling"):
        raise CheckpointError(
            f"{folder}: rope_scaling is {scaling!r}, which M-RoPE does not support; give a model "
            "without it"
        )
    return TextSourceModel(folder=folder, raw=raw, tensors=open_tensors(folder))


def read_vision_source_model(folder: Path) -> VisionSourceModel:
    """Open a CLIP folder, with or without its text tower.

    Raises:
        CheckpointError: it is missing or damaged, or its blocks compute something else.
    """
    if (folder / OPEN_CLIP_CONFIG).is_file():
        # Some folders hold both layouts, one of them as a pickle only.
        has_transformers = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
        if not has_transformers or (folder / OPEN_CLIP_FILE).is_file():
            return _read_open_clip(folder)
    return _read_transformers(folder)


def _read_open_clip(folder: Path) -> VisionSourceModel:
    raw = _read_config(folder, OPEN_CLIP_CONFIG)
    model, pixels = _section(raw, "model_cfg"), _section(raw, "preprocess_cfg")
    vision = _section(model, "vision_cfg")
    _require_quick_gelu(folder, "quick_gelu" if model.get("quick_gelu") else "gelu")
    path = folder / OPEN_CLIP_FILE
    if not path.is_file():
        remedy = pickle_remedy(_OPEN_CLIP_PICKLE).replace("model.safetensors", OPEN_CLIP_FILE)
        raise CheckpointError(
            f"{path}: no such file; if there is only {_OPEN_CLIP_PICKLE}, a pickle, which can run "
            f"code and is never loaded: {remedy}"
        )
    tensors = TensorFolder(folder, {path: read_header(path)})
    names = {n.removeprefix("visual."): n for n in tensors if n.startswith("visual.")}
    width = len(tensors[names[_OPEN_CLIP.patch]]) if _OPEN_CLIP.patch in names else 0
    heads = width // int(vision.get("head_width", 64))
    return _map_vision_tower(folder, _OPEN_CLIP, names, tensors, heads, (pixels, "mean", "std"))


def _read_transformers(folder: Path) -> VisionSourceModel:
    raw = _read_config(folder, "config.json")
    model_type = raw.get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{folder}: model_type is {model_type!r}, expected 'clip' or 'clip_vision_model', or a "
            f"folder with {OPEN_CLIP_CONFIG}; give a CLIP vision tower, as "
            "apple/DFN5B-CLIP-ViT-H-14-378"
        )
    vision = raw if model_type == "clip_vision_model" else _section(raw, "vision_config")
    # Defaults of CLIPVisionConfig: quick_gelu, and 12 heads.
    _require_quick_gelu(folder, vision.get("hidden_act", "quick_gelu"))
    settings = folder / "preprocessor_config.json"
    pixels = read_json(settings) if settings.is_file() else {}
    tensors = open_tensors(folder)
    root = "vision_model." if any(n.startswith("vision_model.") for n in tensors) else ""
    names = {n.removeprefix(root): n for n in tensors if n.startswith(root)}
    heads = int(vision.get("num_attention_heads", 12))
    return _map_vision_tower(
        folder, _TRANSFORMERS, names, tensors, heads, (pixels, "image_mean", "image_std")
    )


def _map_vision_tower(
    folder: Path,
    layout: _KeyLayout,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    num_heads: int,
    pixels: tuple[Mapping[str, Any], str, str],
) -> VisionSourceModel:
    """Map the tensors of a tower; `names` maps names without the tower's prefix to full names."""
    pattern = re.escape(layout.block).replace(r"\{\}", r"(\d+)")
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    depth = max(numbers, default=-1) + 1
    norm = [f"{layout.pre_norm}.{leaf}" for leaf in ("weight", "bias")]
    required = {layout.patch, *(n for i in range(depth) for n in _block_keys(layout, i))}
    known = required | layout.dropped | set(norm)
    missing, unexpected = sorted(required - names.keys()), sorted(names.keys() - known)
    if missing or unexpected or not depth:
        problems = [
            f"{len(found)} {what}: {shorten(found)}"
            for what, found in (("missing", missing), ("not understood", unexpected))
            if found
        ]
        raise CheckpointError(
            f"{folder}: the vision tower is not a plain CLIP ViT: {'; '.join(problems)}"
        )
    state = {name: tensors[full] for name, full in names.items() if name in known}
    blocks = tuple(_map_block(layout, i, state) for i in range(depth))
    settings, mean, std = pixels
    return VisionSourceModel(
        num_heads=num_heads,
        mlp_width=len(blocks[0]["mlp.fc1.weight"]),
        patch_E3YX=state[layout.patch],
        pre_norm=(state[norm[0]], state[norm[1]]) if norm[0] in state else None,
        blocks=blocks,
        image_mean=tuple(settings[mean]) if settings.get(mean) else None,
        image_std=tuple(settings[std]) if settings.get(std) else None,
    )


def _block_keys(layout: _KeyLayout, number: int) -> list[str]:
    prefix = layout.block.format(number)
    parts = (*layout.leaves.values(), *layout.qkv)
    return [f"{prefix}{part}{leaf}" for part in parts for leaf in ("weight", "bias")]


def _map_block(layout: _KeyLayout, number: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = layout.block.format(number)
    block: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        for name, key in layout.leaves.items():
            block[f"{name}.{leaf}"] = state[f"{prefix}{key}{leaf}"]
        block[f"attn.qkv.{leaf}"] = torch.cat([state[f"{prefix}{p}{leaf}"] for p in layout.qkv])
    return block


def _require_quick_gelu(folder: Path, activation: Any) -> None:
    if activation != "quick_gelu":
        raise CheckpointError(
            f"{folder}: its blocks compute {activation}, those of Qwen2-VL quick_gelu; give a "
            "tower that was trained with quick_gelu, as DFN's"
        )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r}: no such folder")
    return read_json(folder / name)


def _section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}
