"""Fault injection for parity tests: small errors, each with the step that must be reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwen2vl.geometry
import qwen2vl.model.attention
import qwen2vl.model.rope
import qwen2vl.processor.image
import qwen2vl.processor.processor
import qwen2vl.processor.video.preprocess
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import CosSin

Fault = Callable[[pytest.MonkeyPatch, Qwen2VL], None]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(first_divergence: str) -> Callable[[Fault], Fault]:
    """Register a fault with the step that must be reported for it."""

    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = (first_divergence, function)
        return function

    return register


def wrap_patchify(
    patch: pytest.MonkeyPatch, change: Callable[[Tensor, Grid], tuple[Tensor, Grid]]
) -> None:
    original = qwen2vl.processor.image.patchify
    for module in (qwen2vl.processor.image, qwen2vl.processor.video.preprocess):
        patch.setattr(module, "patchify", lambda frames, vision: change(*original(frames, vision)))


def wrap_positions(
    patch: pytest.MonkeyPatch, change: Callable[[Tensor, int], tuple[Tensor, int]]
) -> None:
    original = qwen2vl.geometry.mrope_positions
    patch.setattr(
        qwen2vl.processor.processor, "mrope_positions", lambda *args: change(*original(*args))
    )


@fault("pixels")
def patches_in_raster_order(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    def raster(patches_NP: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        order = qwen2vl.geometry.merge_order(grid.h, grid.w).argsort()
        return patches_NP.view(grid.t, grid.h * grid.w, -1)[:, order].flatten(0, 1), grid

    wrap_patchify(patch, raster)


@fault("pixels")
def channels_last_inside_a_patch(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_patchify(
        patch,
        lambda patches_NP, grid: (patches_NP.unflatten(1, (3, -1)).mT.flatten(1), grid),
    )


@fault("pixels")
def wrong_image_mean(patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    vision = replace(model.visual.config, image_mean=(0.5, 0.5, 0.5))
    patch.setattr(model.visual, "config", vision)


@fault("pixels")
def pixels_not_scaled_to_one(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    patch.setattr(
        "qwen2vl.model.vision.normalize_pixels", lambda patches_NP, _config: patches_NP.float()
    )


@fault("grids")
def height_and_width_swapped(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_patchify(patch, lambda patches_NP, g: (patches_NP, Grid(g.t, g.w, g.h)))


@fault("ids")
def no_system_turn(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    patch.setattr("qwen2vl.processor.chat_template._with_system", lambda turns, _tools: turns)


@fault("positions")
def positions_off_by_one(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_positions(patch, lambda position_ids_3T, delta: (position_ids_3T + 1, delta))


@fault("positions")
def time_axis_ignored(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    def flatten_time(position_ids_3T: Tensor, delta: int) -> tuple[Tensor, int]:
        return torch.stack((position_ids_3T[1], *position_ids_3T[1:])), delta

    wrap_positions(patch, flatten_time)


@fault("positions")
def one_dimensional_positions(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_positions(patch, lambda ids, _delta: (torch.arange(ids.shape[1]).expand(3, -1), 0))


@fault("rope_delta")
def rope_delta_missing(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_positions(patch, lambda position_ids_3T, _delta: (position_ids_3T, 0))


@fault("vision.patch_embed")
def frames_of_a_pair_swapped(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    weight = model.visual.patch_embed.proj.weight
    weight.data = weight.data.flip(2)


def round_frequencies(patch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """Round the rotary frequencies of one tower, as `model.to(torch.bfloat16)` does to a buffer."""
    original = getattr(qwen2vl.model.rope, function)
    exact = qwen2vl.model.rope._inv_freq

    def rounded(*args: Any) -> Tensor:
        return exact(*args).bfloat16().float()

    def rotation(*args: Any) -> CosSin:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(qwen2vl.model.rope, "_inv_freq", rounded)
            return original(*args)

    patch.setattr(f"qwen2vl.model.{module}.{function}", rotation)


@fault("vision.rotary")
def vision_frequencies_in_bfloat16(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    round_frequencies(patch, "vision", "vision_cos_sin")


@fault("text.rotary")
def text_frequencies_in_bfloat16(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    round_frequencies(patch, "text", "mrope_cos_sin")


@fault("vision.rotary")
def columns_before_rows(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    original = qwen2vl.geometry.patch_positions
    patch.setattr("qwen2vl.geometry.patch_positions", lambda *args: original(*args).flip(1))


@fault("text.rotary")
def mrope_sections_in_another_order(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.model.config = replace(model.model.config, mrope_section=(3, 3, 2))


@fault("vision.block.0")
def one_attention_segment_for_a_whole_video(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    def whole(grids: list[Grid], merge: int = 2) -> VisionMeta:
        original = qwen2vl.geometry.patch_positions(grids, merge)
        return VisionMeta(original, AttnMeta.build([math.prod(grid) for grid in grids]))

    patch.setattr(VisionMeta, "build", whole)


@fault("vision.block.0")
def wrong_layer_norm_epsilon(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    norm: Any = model.visual.blocks[0].get_submodule("norm1")
    norm.eps = 1e-3


@fault("vision.block.1")
def qkv_bias_missing(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("visual.blocks.1.attn.qkv.bias").data.zero_()


@fault("vision.block.1")
def q_and_k_swapped(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    for kind in ("weight", "bias"):
        fused = model.get_parameter(f"visual.blocks.1.attn.qkv.{kind}")
        q, k, v = fused.data.chunk(3)
        fused.data = torch.cat((k, q, v))


@fault("vision.merger")
def tanh_approximation_of_gelu(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.visual.merger.mlp[1] = nn.GELU(approximate="tanh")


@fault("text.embeddings")
def vision_embeddings_one_token_late(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    original = qwen2vl.geometry.placeholder_index
    patch.setattr(
        qwen2vl.processor.processor, "placeholder_index", lambda *args: original(*args) + 1
    )


@fault("text.layer.0")
def attention_not_causal(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    original = qwen2vl.model.attention.attention

    def not_causal(*args: Any, causal: bool, **rest: Any) -> Tensor:
        return original(*args, causal=not causal, **rest)

    patch.setattr("qwen2vl.model.text.attention", not_causal)


@fault("text.layer.1")
def gate_and_up_swapped(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    gate = model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    up = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    gate.data, up.data = up.data, gate.data


@fault("text.layer.1")
def a_layer_in_bfloat16(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    weight = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
    weight.data = weight.data.bfloat16().float()


@fault("text.norm")
def wrong_weight_in_the_final_norm(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("model.norm.weight").data += 0.01


@fault("logits")
def lm_head_tied(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.lm_head = None


@fault("logits")
def nan_in_the_lm_head(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("lm_head.weight").data[7, 3] = math.nan
