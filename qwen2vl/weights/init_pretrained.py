"""A Qwen2 and a CLIP vision tower -> the Qwen2-VL that training starts from.

    decoder            as it is; positions of text are the same on all three axes
    vision blocks      as they are, renamed; q, k, v one below the other
    patch embedding    over two frames, half of it for each: a still picture counts once
    merger             fresh, drawn so that vision tokens come as large as words
    class token, table of positions, last norm, projection: left out

The norm before the blocks, which Qwen2-VL has not, leaves its linear part in the patch embedding:
centring and gain. Its division by each patch's deviation goes; the first block's own norm divides.
The paper does not say how its authors did it. (Qwen2-VL sec. 2.2.) Next room: cli/commands/init.py.
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
    complete_tokenizer,
)
from qwen2vl.weights.hub import find
from qwen2vl.weights.save import check_target, save_folder
from qwen2vl.weights.source_models import TextDonor, VisionDonor, read_text_donor, read_vision_donor
from qwen2vl.weights.state_dict import EMBEDDING, HEAD, PATCH_EMBED, expected_shapes

__all__ = ["transplant"]

FRAMES = 2  # that one patch covers
CONTEXT = 32768  # the longest that Qwen2-VL was trained for, sec. 3.2.7
PIXELS = PixelLimits(min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)  # the released models'

# Root of the mean square of GELU over a normal distribution.
GELU_SIZE = 0.652


def transplant(
    text: str | Path,
    vision: str | Path,
    target: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Qwen2VLConfig:
    """Write the starting checkpoint built out of a Qwen2 and a CLIP folder to `target`.

    Args:
        text: the folder, or repo id, of a Qwen2 language model.
        vision: that of a CLIP model with a ViT, in open_clip's or transformers' layout.
        target: the folder to make; must not exist yet (or be empty).
        seed: of what is drawn.
        dtype: what the weights are stored as.

    Returns:
        What the model is.

    Raises:
        CheckpointError: a donor cannot be used, or the target is there.
        ConfigError: the donors' numbers cannot belong to one Qwen2-VL.
    """
    check_target(target)
    words, eyes = read_text_donor(find(text)), read_vision_donor(find(vision))
    with tempfile.TemporaryDirectory(prefix="qwen2vl-init-") as folder:
        added = complete_tokenizer(words.folder, Path(folder))
        tokenizer = Tokenizer.from_folder(folder)
        config = _config(words, eyes, tokenizer)
        tokenizer.check(config)
        state = _decoder(words, added, seed)
        state |= _tower(eyes) | _merger(config, _size(state[EMBEDDING]), seed + 1)
        _check_fit(words, state, config)
        save_folder(
            target,
            config=config,
            state_dict=state,
            tokenizer_folder=folder,
            pixels=PIXELS,
            dtype=dtype,
        )
    return config


def _config(words: TextDonor, eyes: VisionDonor, tokenizer: Tokenizer) -> Qwen2VLConfig:
    rows = len(words.tensors[EMBEDDING]) if EMBEDDING in words.tensors else 0
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{words.folder}: has {rows} rows for words, but with those of Qwen2-VL there are "
            f"{len(tokenizer)} tokens; give a model with room, as all Qwen2 have"
        )
    raw: dict[str, Any] = {"rms_norm_eps": 1e-6, **words.raw, "model_type": "qwen2_vl"}
    rope = raw.pop("rope_parameters", None) or {}
    theta = raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0  # HF's default for Qwen2
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    longest = raw.get("max_position_embeddings") or CONTEXT
    raw |= {
        "rope_theta": theta,
        "rope_scaling": {"type": "mrope", "mrope_section": _sections(head_dim)},
        "max_position_embeddings": min(longest, CONTEXT),
        **tokenizer.config_ids,
        "vision_config": {
            "depth": len(eyes.blocks),
            "embed_dim": len(eyes.patch_E3YX),
            "num_heads": eyes.num_heads,
            "mlp_ratio": eyes.mlp_width / len(eyes.patch_E3YX),
            "hidden_size": raw["hidden_size"],
            "patch_size": eyes.patch_E3YX.shape[-1],
            "temporal_patch_size": FRAMES,
        },
    }
    return Qwen2VLConfig.from_dict(
        raw, {"image_mean": eyes.image_mean, "image_std": eyes.image_std}
    )


def _sections(head_dim: int) -> list[int]:
    """Part the frequencies as the released models do: a quarter is time, (16, 24, 24) of 64."""
    half = head_dim // 2
    time = half // 4
    return [time, (half - time) - (half - time) // 2, (half - time) // 2]


def _decoder(words: TextDonor, added: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Take every tensor; rows of tokens that the donor never saw are drawn like those it did."""
    tied = bool(words.raw.get("tie_word_embeddings"))
    state = {name: words.tensors[name] for name in words.tensors if not (tied and name == HEAD)}
    draw = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD) if added else ():
        if name in state:
            state[name] = _with_rows(state[name], added, draw)
    return state


def _with_rows(table_VD: Tensor, added: Sequence[int], draw: torch.Generator) -> Tensor:
    seen_VD = table_VD[: min(added)].float()
    noise = torch.randn(len(added), table_VD.shape[1], generator=draw)
    rows = seen_VD.mean(0) + seen_VD.std(0) * noise
    full_VD = table_VD.clone()
    full_VD[list(added)] = rows.to(table_VD.dtype)
    return full_VD


def _tower(eyes: VisionDonor) -> dict[str, Tensor]:
    """Rename the blocks, and let the patch embedding see two frames."""
    state = {PATCH_EMBED: _inflated(eyes)}
    for number, block in enumerate(eyes.blocks):
        state |= {f"visual.blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return state


def _inflated(eyes: VisionDonor) -> Tensor:
    patch_E3YX = eyes.patch_E3YX.float()
    if eyes.pre_norm is not None:
        gain_E = eyes.pre_norm[0].float()
        patch_E3YX = (patch_E3YX - patch_E3YX.mean(0)) * gain_E[:, None, None, None]
    return torch.stack([patch_E3YX / FRAMES] * FRAMES, dim=2)


def _merger(config: Qwen2VLConfig, word_size: float, seed: int) -> dict[str, Tensor]:
    """Draw the two layers: inputs come with deviation 1, outputs leave as large as words."""
    draw = torch.Generator().manual_seed(seed)
    deviations = {"mlp.0.weight": 1.0, "mlp.2.weight": word_size / GELU_SIZE}
    state: dict[str, Tensor] = {}
    for name, shape in expected_shapes(config).items():
        leaf = name.removeprefix("visual.merger.")
        if leaf == name:
            continue
        if len(shape) == 2:
            std = deviations[leaf] * shape[1] ** -0.5
            state[name] = std * torch.randn(shape, generator=draw)
        else:
            state[name] = torch.ones(shape) if leaf == "ln_q.weight" else torch.zeros(shape)
    return state


def _size(table_VD: Tensor) -> float:
    """Measure the root of the mean square."""
    return float(table_VD.float().square().mean().sqrt())


def _check_fit(words: TextDonor, state: dict[str, Tensor], config: Qwen2VLConfig) -> None:
    wanted = expected_shapes(config)
    wrong = sorted(
        name
        for name in wanted.keys() | state.keys()
        if name not in wanted or name not in state or tuple(state[name].shape) != wanted[name]
    )
    if wrong:
        raise CheckpointError(
            f"{words.folder}: {len(wrong)} tensors do not fit config.json: {', '.join(wrong[:5])}; "
            "fetch the folder again"
        )
