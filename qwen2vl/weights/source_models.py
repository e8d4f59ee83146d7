"""The two models that a Qwen2-VL is built out of: read, understood, under Qwen2-VL's own names.

A Qwen2 folder gives the decoder; its names are ours already. A CLIP folder gives the vision blocks,
in the spelling of open_clip (as DFN is published) or of transformers. A donor whose blocks would
compute something else here is refused by name, and so is a tensor nobody knows. What becomes of
them is the business of transplant.py, the next room. (Qwen2-VL sec. 2.2; open_clip:
VisionTransformer; HF: CLIPVisionModel, Qwen2ForCausalLM.)
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

__all__ = ["TextDonor", "VisionDonor", "read_text_donor", "read_vision_donor"]

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_FILE = "open_clip_model.safetensors"
_OPEN_CLIP_PICKLE = "open_clip_pytorch_model.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDonor:
    """A Qwen2 language model; its tensors bear the names they have in a Qwen2-VL."""

    folder: Path
    raw: Mapping[str, Any]  # config.json
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionDonor:
    """The vision tower of a CLIP model, as far as a Qwen2-VL has use for it."""

    num_heads: int
    mlp_width: int
    patch_E3YX: Tensor  # the patch embedding, a convolution over one frame
    pre_norm: tuple[Tensor, Tensor] | None  # gain and bias of the norm before the first block
    blocks: tuple[Mapping[str, Tensor], ...]  # by our names, from `norm1.weight` on
    image_mean: tuple[float, ...] | None  # of the pixels it was trained on; None: not said
    image_std: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    """How a library names the parts of a vision tower; {} is the number of the block."""

    block: str
    leaves: Mapping[str, str]  # ours -> theirs, each with a weight and a bias
    qkv: tuple[str, ...]  # what lies one below the other in our attn.qkv
    patch: str
    pre_norm: str
    dropped: frozenset[str]


_OPEN_CLIP = _Spelling(
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
_TRANSFORMERS = _Spelling(
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
    pre_norm="pre_layrnorm",  # so it is spelled
    dropped=frozenset(
        [
            *("embeddings.class_embedding", "embeddings.position_embedding.weight"),
            *("embeddings.position_ids", "post_layernorm.weight", "post_layernorm.bias"),
        ]
    ),
)


def read_text_donor(folder: Path) -> TextDonor:
    """Open a Qwen2 folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another kind.
    """
    raw = _config(folder, "config.json")
    if raw.get("model_type") != "qwen2":
        raise CheckpointError(
            f"{folder}: model_type is {raw.get('model_type')!r}, expected 'qwen2'; give the folder "
            "of a Qwen2 language model, as Qwen/Qwen2-1.5B"
        )
    if scaling := raw.get("rope_scaling"):
        raise CheckpointError(
            f"{folder}: rope_scaling is {scaling!r}, which positions in three sections do not "
            "know; give a model without it"
        )
    return TextDonor(folder=folder, raw=raw, tensors=open_tensors(folder))


def read_vision_donor(folder: Path) -> VisionDonor:
    """Open a CLIP folder, with or without its text tower.

    Raises:
        CheckpointError: it is missing, damaged, or its blocks compute something else.
    """
    if (folder / OPEN_CLIP_CONFIG).is_file():
        # Some folders hold both layouts, one of them as a pickle only.
        is_theirs = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
        if not is_theirs or (folder / OPEN_CLIP_FILE).is_file():
            return _read_open_clip(folder)
    return _read_transformers(folder)


def _read_open_clip(folder: Path) -> VisionDonor:
    raw = _config(folder, OPEN_CLIP_CONFIG)
    model, pixels = _object(raw, "model_cfg"), _object(raw, "preprocess_cfg")
    vision = _object(model, "vision_cfg")
    _demand_quick_gelu(folder, "quick_gelu" if model.get("quick_gelu") else "gelu")
    path = folder / OPEN_CLIP_FILE
    if not path.is_file():
        remedy = pickle_remedy(_OPEN_CLIP_PICKLE).replace("model.safetensors", OPEN_CLIP_FILE)
        raise CheckpointError(
            f"{path}: no such file; if there is only {_OPEN_CLIP_PICKLE}, a pickle, which can run "
            f"code and is never loaded: {remedy}"
        )
    tensors = TensorFolder(folder, {path: read_header(path)})
    own = {n.removeprefix("visual."): n for n in tensors if n.startswith("visual.")}
    width = len(tensors[own[_OPEN_CLIP.patch]]) if _OPEN_CLIP.patch in own else 0
    heads = width // int(vision.get("head_width", 64))
    return _understand(folder, _OPEN_CLIP, own, tensors, heads, (pixels, "mean", "std"))


def _read_transformers(folder: Path) -> VisionDonor:
    raw = _config(folder, "config.json")
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{folder}: model_type is {kind!r}, expected 'clip' or 'clip_vision_model', or a "
            f"folder with {OPEN_CLIP_CONFIG}; give a CLIP vision tower, as "
            "apple/DFN5B-CLIP-ViT-H-14-378"
        )
    vision = raw if kind == "clip_vision_model" else _object(raw, "vision_config")
    # What a file leaves out is the class's default: quick_gelu, and 12 heads.
    _demand_quick_gelu(folder, vision.get("hidden_act", "quick_gelu"))
    settings = folder / "preprocessor_config.json"
    pixels = read_json(settings) if settings.is_file() else {}
    tensors = open_tensors(folder)
    root = "vision_model." if any(n.startswith("vision_model.") for n in tensors) else ""
    own = {n.removeprefix(root): n for n in tensors if n.startswith(root)}
    heads = int(vision.get("num_attention_heads", 12))
    return _understand(
        folder, _TRANSFORMERS, own, tensors, heads, (pixels, "image_mean", "image_std")
    )


def _understand(
    folder: Path,
    spelling: _Spelling,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    num_heads: int,
    pixels: tuple[Mapping[str, Any], str, str],
) -> VisionDonor:
    """Sort the tensors of a tower; `names` are those without the tower's prefix."""
    pattern = re.escape(spelling.block).replace(r"\{\}", r"(\d+)")
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    depth = max(numbers, default=-1) + 1
    norm = [f"{spelling.pre_norm}.{leaf}" for leaf in ("weight", "bias")]
    wanted = {spelling.patch, *(n for i in range(depth) for n in _names_of(spelling, i))}
    known = wanted | spelling.dropped | set(norm)
    missing, strange = sorted(wanted - names.keys()), sorted(names.keys() - known)
    if missing or strange or not depth:
        problems = [
            f"{len(found)} {what}: {shorten(found)}"
            for what, found in (("missing", missing), ("not understood", strange))
            if found
        ]
        raise CheckpointError(
            f"{folder}: the vision tower is not a plain CLIP ViT: {'; '.join(problems)}"
        )
    given = {name: tensors[full] for name, full in names.items() if name in known}
    blocks = tuple(_block(spelling, i, given) for i in range(depth))
    settings, mean, std = pixels
    return VisionDonor(
        num_heads=num_heads,
        mlp_width=len(blocks[0]["mlp.fc1.weight"]),
        patch_E3YX=given[spelling.patch],
        pre_norm=(given[norm[0]], given[norm[1]]) if norm[0] in given else None,
        blocks=blocks,
        image_mean=tuple(settings[mean]) if settings.get(mean) else None,
        image_std=tuple(settings[std]) if settings.get(std) else None,
    )


def _names_of(spelling: _Spelling, number: int) -> list[str]:
    prefix = spelling.block.format(number)
    parts = (*spelling.leaves.values(), *spelling.qkv)
    return [f"{prefix}{part}{leaf}" for part in parts for leaf in ("weight", "bias")]


def _block(spelling: _Spelling, number: int, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = spelling.block.format(number)
    found: dict[str, Tensor] = {}
    for leaf in ("weight", "bias"):
        for ours, theirs in spelling.leaves.items():
            found[f"{ours}.{leaf}"] = given[f"{prefix}{theirs}{leaf}"]
        found[f"attn.qkv.{leaf}"] = torch.cat([given[f"{prefix}{p}{leaf}"] for p in spelling.qkv])
    return found


def _demand_quick_gelu(folder: Path, found: Any) -> None:
    if found != "quick_gelu":
        raise CheckpointError(
            f"{folder}: its blocks compute {found}, those of Qwen2-VL quick_gelu; give a tower "
            "that was trained with quick_gelu, as DFN's"
        )


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r}: no such folder")
    return read_json(folder / name)


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}
