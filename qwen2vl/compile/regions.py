"""Regional compilation: torch.compile of every part of a model but the attention kernel.

The kernel loops over host integers. Norms, projections with their rotation, and MLPs become fused
kernels; shapes are dynamic, so one compilation serves every batch, and equal blocks share it.
Products of prepacked and quantized weights are custom ops: the operations around them are fused. It
pays where one model runs for minutes: training, inference with images
and long prompts. On a CPU forwards of few rows (decode) run eagerly: guards would cost what fusion
saves. On a GPU decode waits for kernel launches, and fusion
leaves fewer. Compilation takes up to half a minute and needs a C++ compiler; torch caches it on
disk. Results may differ in the last bits. Parameters, their names and the state dict do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.model import Qwen2VL
from qwen2vl.model.flash_attention_cpu import enable_flash_attention_cpu

__all__ = ["compile_for_inference", "compile_regions"]

logger = logging.getLogger(__name__)

MIN_COMPILED_ROWS = 32  # fewer on a CPU are decode, or an image too small to matter


def compile_regions(model: Qwen2VL) -> None:
    """Replace the forward of each region by a compiled one; compiled at first use."""
    for owner, name in _regions(model):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))
    enable_flash_attention_cpu()


def compile_for_inference(model: Qwen2VL) -> bool:
    """Compile the regions of vision tower and decoder now, by a warm-up forward.

    On a CPU forwards of few rows run eagerly.

    Returns:
        Whether this machine can compile; if not, the model is unchanged and a warning is logged.
    """
    regions = list(_regions(model))
    min_rows = 0 if model.device.type == "cuda" else MIN_COMPILED_ROWS
    for owner, name in regions:
        eager = getattr(owner, name)
        setattr(owner, name, _dispatch_by_rows(eager, torch.compile(eager, dynamic=True), min_rows))
    try:
        _warm_up(model)
    except _backend_error() as error:
        for owner, name in regions:
            delattr(owner, name)
        reason = str(error).strip().splitlines()[0]
        logger.warning("compile: nothing here can compile (%s); computing as without it", reason)
        return False
    return True


def _backend_error() -> type[RuntimeError]:
    """Return the class of the errors of torch.compile's backend."""
    try:
        from torch._dynamo.exc import BackendCompilerFailed
    except ImportError:  # a private module
        return RuntimeError  # its base class
    return BackendCompilerFailed


def _dispatch_by_rows(
    eager: Callable[..., Any], compiled: Callable[..., Any], min_rows: int
) -> Callable[..., Any]:
    def dispatch(x_TD: Tensor, *args: Any) -> Any:
        return (eager if len(x_TD) < min_rows else compiled)(x_TD, *args)

    return dispatch


@torch.inference_mode()
def _warm_up(model: Qwen2VL) -> None:
    """Run both towers; no length equals a width, which would become the same symbolic size."""
    vision, device = model.config.vision, model.device
    side = vision.spatial_merge_size
    grid = Grid(1, side, 37 * side)
    patches_NP = torch.zeros(37 * side**2, vision.patch_dim, dtype=torch.uint8, device=device)
    model.encode(patches_NP, VisionMeta.build([grid], side).to(device))
    # A single row is a specialization of its own, compiled on GPUs only.
    for tokens in (53, 1) if device.type == "cuda" else (53,):
        positions_3T = torch.arange(tokens, device=device).expand(3, -1)
        model(torch.zeros_like(positions_3T[0]), positions_3T, AttnMeta.build([tokens]).to(device))


def _regions(model: Qwen2VL) -> Iterator[tuple[Any, str]]:
    """Iterate over (module, method name); the same method of equal blocks shares one graph.

    A LayerNorm is one kernel already.
    """
    for block in cast("Iterable[Any]", model.visual.blocks):
        yield from ((block.attn, "project_qkv"), (block.mlp, "forward"))
    yield model.visual.merger, "forward"
    for layer in cast("Iterable[Any]", model.model.layers):
        yield layer.input_layernorm, "forward"
        yield layer.post_attention_layernorm, "forward"
        yield from ((layer.self_attn, "project_qkv"), (layer.mlp, "forward"))
    yield model.model.norm, "forward"
