"""The reference beside our model: the same random weights in transformers, and how to ask it.

Positions are always handed over: transformers 5.23 resumes text after a clip without counting its
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
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta, pad_index, text_positions
from qwen2vl.model import Qwen2VL
from tests.prompts import Prompt


def random_model(config: Qwen2VLConfig, seed: int = 0) -> Qwen2VL:
    """Build a model in which every parameter matters: biases and norms are random too."""
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
    room, _, rest = name.partition(".")
    return {"visual": "model.visual.", "model": "model.language_model."}.get(
        room, "lm_head."
    ) + rest


def twin(model: Qwen2VL, attention: str = "eager") -> ReferenceModel:
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
    """Part one stream of items into the reference's two, each with its grids."""
    rows = patches_NP.split([grid.t * grid.h * grid.w for grid in prompt.grids])
    parted: dict[str, Tensor] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [row for row, item in zip(rows, prompt.visuals, strict=True) if item.kind == kind]
        if own:
            parted[pixels] = torch.cat(own)
            parted[grids] = torch.tensor(prompt.of_kind(kind))
    return parted


def ask_reference(
    reference: ReferenceModel, prompt: Prompt, patches_NP: Tensor, config: Qwen2VLConfig
) -> Tensor:
    """Run one sequence through the reference: logits_TV."""
    position_ids_3T, _ = text_positions(prompt.ids, prompt.grids, config)
    return reference(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        position_ids=position_ids_3T[:, None],
        **split_by_kind(patches_NP, prompt),
    ).logits[0]


def packed(
    prompts: Sequence[Prompt], patches: Sequence[Tensor], config: Qwen2VLConfig
) -> dict[str, Any]:
    """Lay prompts end to end, as `Qwen2VL.forward` takes them."""
    ids: list[int] = []
    positions: list[Tensor] = []
    grids: list[Grid] = []
    for prompt in prompts:
        ids += prompt.ids
        grids += prompt.grids
        positions.append(text_positions(prompt.ids, prompt.grids, config)[0])
    arguments: dict[str, Any] = {
        "input_ids_T": torch.tensor(ids),
        "position_ids_3T": torch.cat(positions, dim=1),
        "meta": AttnMeta.build([len(prompt.ids) for prompt in prompts]),
    }
    if grids:
        arguments |= {
            "patches_NP": torch.cat(list(patches)),
            "vision_meta": VisionMeta.build(grids),
            "pad_index_M": pad_index(ids, config),
        }
    return arguments


def ask(model: Qwen2VL, prompt: Prompt, patches_NP: Tensor) -> Tensor:
    """Run one sequence through our model: logits_TV."""
    return model.logits(model(**packed([prompt], [patches_NP], model.config)))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Measure the largest deviation against the largest magnitude."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()
