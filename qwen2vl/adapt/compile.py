"""Per-part torch.compile: everything but the attention kernel, which loops over host integers.

Norms, projections with their rotation, and MLPs become fused kernels; shapes are dynamic, so one
compilation serves every batch, and equal blocks share it. It pays where the same model runs for
minutes: in training, and for answers where pictures and long prompts are read. Single rows of
decode wait for memory, and run as they are. The first time takes up to half a minute and needs a
C++ compiler; torch keeps what it made for the next start. Arithmetic may differ in the last bits.
Parameters, their names and the state dict stay as they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qwen2vl.adapt.quantise import describe
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL

__all__ = ["compile_for_answers", "compile_parts"]

logger = logging.getLogger(__name__)

FEW_ROWS = 32  # below this a forward is decode, or a picture too small to matter


def compile_parts(model: Qwen2VL) -> None:
    """Replace the forward of each part by a compiled one; compiling happens at first use."""
    for owner, name in _parts(model):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))


def compile_for_answers(model: Qwen2VL) -> float | None:
    """Compile both towers for forwards of many rows, now; fewer run as they are.

    Returns:
        The seconds it took; None where nothing here can compile: the model stays as it was, and a
        warning says why.

    Raises:
        InputError: the model computes in small integers, which compiling makes slower.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

    if describe(model):
        raise InputError(
            "compile: this model computes in small integers, which torch.compile makes slower; "
            "leave it out, or leave quantize out"
        )
    began = time.perf_counter()
    for owner, name in _parts(model):
        plain = getattr(owner, name)
        setattr(owner, name, _by_rows(plain, torch.compile(plain, dynamic=True)))
    try:
        _warm_up(model)
    except BackendCompilerFailed as error:
        for owner, name in _parts(model):
            delattr(owner, name)
        reason = str(error).strip().splitlines()[0]
        logger.warning("compile: nothing here can compile (%s); computing as without it", reason)
        return None
    return time.perf_counter() - began


def _by_rows(few: Callable[..., Any], many: Callable[..., Any]) -> Callable[..., Any]:
    def choose(x_TD: Tensor, *rest: Any) -> Any:
        return (few if len(x_TD) < FEW_ROWS else many)(x_TD, *rest)

    return choose


@torch.inference_mode()
def _warm_up(model: Qwen2VL) -> None:
    """Run both towers once; no length here is a width, which would be taken for the same number."""
    vision, device = model.config.vision, model.device
    side = vision.spatial_merge_size
    grid = Grid(1, side, 37 * side)
    patches_NP = torch.zeros(37 * side**2, vision.patch_dim, dtype=torch.uint8, device=device)
    model.encode(patches_NP, VisionMeta.build([grid], side).to(device))
    places_3T = torch.arange(53, device=device).expand(3, -1)
    model(torch.zeros_like(places_3T[0]), places_3T, AttnMeta.build([53]).to(device))


def _parts(model: Qwen2VL) -> Iterator[tuple[Any, str]]:
    """List (module, method): the same method of equal blocks shares one compiled graph."""
    for block in model.visual.blocks:
        yield from ((block.norm1, "forward"), (block.norm2, "forward"))
        yield from ((block.attn, "project"), (block.mlp, "forward"))
    yield model.visual.merger, "forward"
    for layer in model.model.layers:
        yield layer.input_layernorm, "forward"
        yield layer.post_attention_layernorm, "forward"
        yield from ((layer.self_attn, "project"), (layer.mlp, "forward"))
    yield model.model.norm, "forward"
