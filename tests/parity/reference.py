"""Reference implementation of transformers with the weights of a model of this library.

Positions are always passed in: transformers 5.23 resumes text after a video without counting its
frames, where the paper and transformers 4.x count them (tests/parity/test_positions.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig as ReferenceConfig
from transformers import Qwen2VLForConditionalGeneration as ReferenceModel

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta, mrope_positions, placeholder_index
from qwen2vl.model import Qwen2VL
from tests.prompts import Prompt


def random_model(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VL:
    """Build a model whose parameters are all random, including biases and norms."""
    model = Qwen2VL(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            center = 1.0 if "norm" in name or "ln_q" in name else 0.0
            parameter.data = center * (name.endswith("weight")) + 0.2 * noise
        elif "embed_tokens" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    return model


def reference_name(name: str) -> str:
    """Translate a parameter's name in the checkpoints to its name in transformers 5."""
    module_name, _, rest = name.partition(".")
    return {"visual": "model.visual.", "model": "model.language_model."}.get(
        module_name, "lm_head."
    ) + rest


def to_reference(model: Qwen2VL, attention: str = "eager") -> ReferenceModel:
    """Build the reference with the weights of `model`, in fp32."""
    config = ReferenceConfig(**model.config.to_dict("float32"))
    config._attn_implementation = attention
    reference = ReferenceModel(config).eval()
    weights = {reference_name(k): v.clone() for k, v in model.state_dict().items()}
    if model.lm_head is None:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    reference.load_state_dict(weights, strict=True)
    return reference


def split_by_kind(patches_NP: Tensor, prompt: Prompt) -> dict[str, Tensor]:
    """Split the packed patches into the reference's image and video inputs, each with its grids."""
    item_patches = patches_NP.split([grid.t * grid.h * grid.w for grid in prompt.grids])
    inputs: dict[str, Tensor] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        of_kind = [
            patches
            for patches, item in zip(item_patches, prompt.visuals, strict=True)
            if item.kind == kind
        ]
        if of_kind:
            inputs[pixels] = torch.cat(of_kind)
            inputs[grids] = torch.tensor(prompt.of_kind(kind))
    return inputs


def compute_reference_logits(
    reference: ReferenceModel, prompt: Prompt, patches_NP: Tensor, config: Qwen2VLConfig
) -> Tensor:
    """Compute logits_TV of one sequence with the reference."""
    position_ids_3T, _ = mrope_positions(prompt.ids, prompt.grids, config)
    return reference(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        position_ids=position_ids_3T[:, None],
        **split_by_kind(patches_NP, prompt),
    ).logits[0]


def pack_prompts(
    prompts: Sequence[Prompt], patches: Sequence[Tensor], config: Qwen2VLConfig
) -> dict[str, Any]:
    """Concatenate prompts to the arguments of `Qwen2VL.forward`."""
    ids: list[int] = []
    positions: list[Tensor] = []
    grids: list[Grid] = []
    for prompt in prompts:
        ids += prompt.ids
        grids += prompt.grids
        positions.append(mrope_positions(prompt.ids, prompt.grids, config)[0])
    arguments: dict[str, Any] = {
        "input_ids_T": torch.tensor(ids),
        "position_ids_3T": torch.cat(positions, dim=1),
        "meta": AttnMeta.build([len(prompt.ids) for prompt in prompts]),
    }
    if grids:
        arguments |= {
            "patches_NP": torch.cat(list(patches)),
            "vision_meta": VisionMeta.build(grids),
            "placeholder_index_M": placeholder_index(ids, config),
        }
    return arguments


def compute_logits(model: Qwen2VL, prompt: Prompt, patches_NP: Tensor) -> Tensor:
    """Compute logits_TV of one sequence with a model of this library."""
    return model.logits(model(**pack_prompts([prompt], [patches_NP], model.config)))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the largest deviation relative to the largest magnitude."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()
