"""Init from pretrained: builds a Qwen2-VL checkpoint from a Qwen2 and a CLIP vision tower.

    decoder            unchanged; positions of text are the same on all three M-RoPE axes
    vision blocks      unchanged, renamed; q, k, v concatenated
    patch embedding    inflated to two frames, half of the weights each: a still image counts once
    merger             random, scaled so that vision embeddings are as large as token embeddings
    class token, position embedding, last norm, projection: dropped

Qwen2-VL has no norm before its blocks: the linear part of CLIP's (centering, gain) is folded into
the patch embedding; the division by each patch's deviation is dropped, the first block's own norm
divides. The paper does not say how its authors did it. (Qwen2-VL sec. 2.2.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError
from qwen2vl.processor.image import PixelLimits
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import (
    add_missing_special_tokens,
)
from qwen2vl.weights.hub import resolve_model
from qwen2vl.weights.save import check_output_folder, save_folder
from qwen2vl.weights.source_models import (
    TextSourceModel,
    VisionSourceModel,
    read_text_source_model,
    read_vision_source_model,
)
from qwen2vl.weights.state_dict import (
    EMBED_TOKENS_WEIGHT,
    LM_HEAD_WEIGHT,
    PATCH_EMBED_WEIGHT,
    expected_shapes,
)

__all__ = ["init_from_pretrained"]

FRAMES = 2  # of one patch (temporal_patch_size)
CONTEXT = 32768  # the longest context that Qwen2-VL was trained with, sec. 3.2.7
PIXELS = PixelLimits(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)  # the released models'

# Root mean square of GELU over a normal distribution.
GELU_RMS = 0.652


def init_from_pretrained(
    text: str | Path,
    vision: str | Path,
    target: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Qwen2VLConfig:
    """Build a Qwen2-VL checkpoint from a Qwen2 and a CLIP folder, and write it to `target`.

    Args:
        text: the folder, or repo id, of a Qwen2 language model.
        vision: that of a CLIP model with a ViT, in open_clip's or transformers' layout.
        target: the folder to write; must not exist yet (or be empty).
        seed: of the merger and of new tokens' embeddings.
        dtype: of the stored weights.

    Returns:
        The config of the new model.

    Raises:
        CheckpointError: a source model cannot be used, or the target exists.
        ConfigError: the source models' sizes are impossible for one Qwen2-VL.
    """
    check_output_folder(target)
    text_model = read_text_source_model(resolve_model(text))
    vision_model = read_vision_source_model(resolve_model(vision))
    with tempfile.TemporaryDirectory(prefix="qwen2vl-init-") as folder:
        new_ids = add_missing_special_tokens(text_model.folder, Path(folder))
        tokenizer = Tokenizer.from_folder(folder)
        config = _build_config(text_model, vision_model, tokenizer)
        tokenizer.check_config(config)
        state = _decoder_state(text_model, new_ids, seed)
        state |= _vision_state(vision_model) | _merger_state(
            config, _rms(state[EMBED_TOKENS_WEIGHT]), seed + 1
        )
        _check_state(text_model, state, config)
        save_folder(
            target,
            config=config,
            state_dict=state,
            tokenizer_folder=folder,
            pixels=PIXELS,
            dtype=dtype,
        )
    return config


def _build_config(
    text_model: TextSourceModel, vision_model: VisionSourceModel, tokenizer: Tokenizer
) -> Qwen2VLConfig:
    rows = (
        len(text_model.tensors[EMBED_TOKENS_WEIGHT])
        if EMBED_TOKENS_WEIGHT in text_model.tensors
        else 0
    )
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{text_model.folder}: the embedding has {rows} rows, but with Qwen2-VL's special "
            f"tokens there are {len(tokenizer)} tokens; give a model with a padded embedding, as "
            "all Qwen2 have"
        )
    raw: dict[str, Any] = {"rms_norm_eps": 1e-6, **text_model.raw, "model_type": "qwen2_vl"}
    rope = raw.pop("rope_parameters", None) or {}
    theta = raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0  # HF's default for Qwen2
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    max_positions = raw.get("max_position_embeddings") or CONTEXT
    raw |= {
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": _mrope_section(head_dim)},
        "max_position_embeddings": min(max_positions, CONTEXT),
        **tokenizer.config_ids,
        "vision_config": {
            "depth": len(vision_model.blocks),
            "embed_dim": len(vision_model.patch_E3YX),
            "num_heads": vision_model.num_heads,
            "mlp_ratio": vision_model.mlp_width / len(vision_model.patch_E3YX),
            "hidden_size": raw["hidden_size"],
            "patch_size": vision_model.patch_E3YX.shape[-1],
            "temporal_patch_size": FRAMES,
        },
    }
    return Qwen2VLConfig.from_dict(
        raw, {"image_mean": vision_model.image_mean, "image_std": vision_model.image_std}
    )


def _mrope_section(head_dim: int) -> list[int]:
    """Divide the frequencies as the released models do: a quarter is time, (16, 24, 24) of 64."""
    half = head_dim // 2
    time = half // 4
    return [time, (half - time) - (half - time) // 2, (half - time) // 2]


def _decoder_state(
    text_model: TextSourceModel, new_ids: Sequence[int], seed: int
) -> dict[str, Tensor]:
    """Copy every tensor; draw new tokens' embeddings with mean and deviation of the others."""
    tied = bool(text_model.raw.get("tie_word_embeddings"))
    state = {
        name: text_model.tensors[name]
        for name in text_model.tensors
        if not (tied and name == LM_HEAD_WEIGHT)
    }
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBED_TOKENS_WEIGHT, LM_HEAD_WEIGHT) if new_ids else ():
        if name in state:
            state[name] = _init_new_rows(state[name], new_ids, generator)
    return state


def _init_new_rows(table_VD: Tensor, new_ids: Sequence[int], generator: torch.Generator) -> Tensor:
    trained_VD = table_VD[: min(new_ids)].float()
    noise = torch.randn(len(new_ids), table_VD.shape[1], generator=generator)
    rows = trained_VD.mean(0) + trained_VD.std(0) * noise
    full_VD = table_VD.clone()
    full_VD[list(new_ids)] = rows.to(table_VD.dtype)
    return full_VD


def _vision_state(vision_model: VisionSourceModel) -> dict[str, Tensor]:
    """Rename the blocks, and inflate the patch embedding to two frames."""
    state = {PATCH_EMBED_WEIGHT: _inflate_patch_embedding(vision_model)}
    for number, block in enumerate(vision_model.blocks):
        state |= {f"visual.blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return state


def _inflate_patch_embedding(vision_model: VisionSourceModel) -> Tensor:
    patch_E3YX = vision_model.patch_E3YX.float()
    if vision_model.pre_norm is not None:
        gain_E = vision_model.pre_norm[0].float()
        patch_E3YX = (patch_E3YX - patch_E3YX.mean(0)) * gain_E[:, None, None, None]
    return torch.stack([patch_E3YX / FRAMES] * FRAMES, dim=2)


def _merger_state(config: Qwen2VLConfig, embedding_rms: float, seed: int) -> dict[str, Tensor]:
    """Draw the two layers: for inputs of deviation 1, outputs have the RMS of token embeddings."""
    generator = torch.Generator().manual_seed(seed)
    deviations = {"mlp.0.weight": 1.0, "mlp.2.weight": embedding_rms / GELU_RMS}
    state: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        leaf = name.removeprefix("visual.merger.")
        if leaf == name:
            continue
        if len(shape) == 2:
            std = deviations[leaf] * shape[1] ** -0.5
            state[name] = std * torch.randn(shape, generator=generator)
        else:
            state[name] = torch.ones(shape) if leaf == "ln_q.weight" else torch.zeros(shape)
    return state


def _rms(table_VD: Tensor) -> float:
    """Compute the root mean square."""
    return float(table_VD.float().square().mean().sqrt())


def _check_state(
    text_model: TextSourceModel, state: dict[str, Tensor], config: Qwen2VLConfig
) -> None:
    expected = expected_shapes(config)
    wrong = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in expected or name not in state or tuple(state[name].shape) != expected[name]
    )
    if wrong:
        raise CheckpointError(
            f"{text_model.folder}: {len(wrong)} tensors do not fit config.json: "
            f"{', '.join(wrong[:5])}; fetch the folder again"
        )
