"""Ways to be wrong, each a small change on our side, and the step that must be named for it."""

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
import qwen2vl.processor.video
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.model.rope import Rotation

Fault = Callable[[pytest.MonkeyPatch, Qwen2VL], None]
FAULTS: dict[str, tuple[str, Fault]] = {}


def fault(first_divergence: str) -> Callable[[Fault], Fault]:
    """Register a fault, and the step that must be named for it."""

    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = (first_divergence, function)
        return function

    return register


def wrap_patchify(
    patch: pytest.MonkeyPatch, change: Callable[[Tensor, Grid], tuple[Tensor, Grid]]
) -> None:
    sound = qwen2vl.processor.image.patchify
    for room in (qwen2vl.processor.image, qwen2vl.processor.video):
        patch.setattr(room, "patchify", lambda frames, vision: change(*sound(frames, vision)))


def wrap_positions(
    patch: pytest.MonkeyPatch, change: Callable[[Tensor, int], tuple[Tensor, int]]
) -> None:
    sound = qwen2vl.geometry.text_positions
    patch.setattr(
        qwen2vl.processor.processor, "text_positions", lambda *args: change(*sound(*args))
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
def another_image_mean(patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
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
def rope_delta_forgotten(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    wrap_positions(patch, lambda position_ids_3T, _delta: (position_ids_3T, 0))


@fault("vision.patch_embed")
def frames_of_a_pair_swapped(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    weight = model.visual.patch_embed.proj.weight
    weight.data = weight.data.flip(2)


def round_frequencies(patch: pytest.MonkeyPatch, room: str, function: str) -> None:
    """Do to the frequencies of one tower what `model.to(torch.bfloat16)` does to a buffer."""
    sound = getattr(qwen2vl.model.rope, function)
    exact = qwen2vl.model.rope._frequencies

    def rounded(*args: Any) -> Tensor:
        return exact(*args).bfloat16().float()

    def rotation(*args: Any) -> Rotation:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(qwen2vl.model.rope, "_frequencies", rounded)
            return sound(*args)

    patch.setattr(f"qwen2vl.model.{room}.{function}", rotation)


@fault("vision.rotary")
def frequencies_of_the_eyes_cast(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    round_frequencies(patch, "vision", "vision_rotation")


@fault("text.rotary")
def frequencies_of_the_words_cast(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    round_frequencies(patch, "text", "text_rotation")


@fault("vision.rotary")
def columns_before_rows(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    sound = qwen2vl.geometry.patch_positions
    patch.setattr("qwen2vl.geometry.patch_positions", lambda *args: sound(*args).flip(1))


@fault("text.rotary")
def sections_in_another_order(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.model.config = replace(model.model.config, mrope_section=(3, 3, 2))


@fault("vision.block.0")
def one_segment_for_a_whole_clip(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    def whole(grids: list[Grid], merge: int = 2) -> VisionMeta:
        sound = qwen2vl.geometry.patch_positions(grids, merge)
        return VisionMeta(sound, AttnMeta.build([math.prod(grid) for grid in grids]))

    patch.setattr(VisionMeta, "build", whole)


@fault("vision.block.0")
def the_epsilon_of_clip(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    norm: Any = model.visual.blocks[0].get_submodule("norm1")
    norm.eps = 1e-3


@fault("vision.block.1")
def no_bias_in_one_qkv(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("visual.blocks.1.attn.qkv.bias").data.zero_()


@fault("vision.block.1")
def q_and_k_exchanged(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    for kind in ("weight", "bias"):
        fused = model.get_parameter(f"visual.blocks.1.attn.qkv.{kind}")
        q, k, v = fused.data.chunk(3)
        fused.data = torch.cat((k, q, v))


@fault("vision.merger")
def the_tanh_form_of_gelu(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.visual.merger.mlp[1] = nn.GELU(approximate="tanh")


@fault("text.embeddings")
def vision_rows_one_token_late(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    sound = qwen2vl.geometry.pad_index
    patch.setattr(qwen2vl.processor.processor, "pad_index", lambda *args: sound(*args) + 1)


@fault("text.layer.0")
def attention_sees_the_future(patch: pytest.MonkeyPatch, _model: Qwen2VL) -> None:
    sound = qwen2vl.model.attention.attention

    def blind(*args: Any, causal: bool, **rest: Any) -> Tensor:
        return sound(*args, causal=not causal, **rest)

    patch.setattr("qwen2vl.model.text.attention", blind)


@fault("text.layer.1")
def gate_and_up_exchanged(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    gate = model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    up = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    gate.data, up.data = up.data, gate.data


@fault("text.layer.1")
def a_layer_in_bfloat16(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    weight = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
    weight.data = weight.data.bfloat16().float()


@fault("text.norm")
def another_weight_in_the_last_norm(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("model.norm.weight").data += 0.01


@fault("logits")
def a_tied_head(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.lm_head = None


@fault("logits")
def one_number_of_the_head_lost(_patch: pytest.MonkeyPatch, model: Qwen2VL) -> None:
    model.get_parameter("lm_head.weight").data[7, 3] = math.nan
