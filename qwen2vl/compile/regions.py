"""Per-part torch.compile: everything but the attention kernel, which loops over host integers.

Norms, projections with their rotation, and MLPs become fused kernels; shapes are dynamic, so one
compilation serves every batch, and equal blocks share it. Products of packed weights and of
integers stay what they are: what comes before and behind them is fused, rounding included. It pays
where the same model runs for minutes: in training, and for answers where pictures and long prompts
are read. On a CPU few rows of decode run as they are, for a part would pay for its guards with what
it saves (one_token.py has what pays for one); on a GPU they wait for the launching of kernels, and
fewer are better. The first time takes up to half a minute and
needs a C++ compiler; torch keeps what it made for the next start. Arithmetic may differ in the
last bits. Parameters, their names and the state dict stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwen2vl.geometry import AttnMeta, Grid, VisionMeta
from qwen2vl.linear.aot import NotCompiledError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import Int4Linear, compile_widening
from qwen2vl.quantization.int8 import Int8Linear, WideInt8Linear

__all__ = ["compile_for_answers", "compile_parts"]

logger = logging.getLogger(__name__)

FEW_ROWS = 32  # below this a forward on a CPU is decode, or a picture too small to matter


def compile_parts(model: Qwen2VL) -> None:
    """Replace the forward of each part by a compiled one; compiling happens at first use."""
    for owner, name in _parts(model):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))


def compile_for_answers(model: Qwen2VL) -> bool:
    """Compile both towers now; on a CPU forwards of few rows run as they are.

    Parts that make floats of small integers stay as they are, too.

    Returns:
        Whether anything here can compile; else the model stays as it was, and a warning says why.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

    parts = [(owner, name) for owner, name in _parts(model, rounding=True) if not _widens(owner)]
    least = 0 if model.device.type == "cuda" else FEW_ROWS
    for owner, name in parts:
        plain = getattr(owner, name)
        setattr(owner, name, _by_rows(plain, torch.compile(plain, dynamic=True), least))
    try:
        _warm_up(model)
    except BackendCompilerFailed as error:
        for owner, name in parts:
            delattr(owner, name)
        reason = str(error).strip().splitlines()[0]
        logger.warning("compile: nothing here can compile (%s); computing as without it", reason)
        return False
    if model.device.type == "cpu":
        _compile_widening(model)
    return True


def _compile_widening(model: Qwen2VL) -> None:
    try:
        compile_widening(model, model.dtype)
    except NotCompiledError as error:
        logger.warning("compile: not for the widening of 4 bits here (%s)", error)


def _by_rows(few: Callable[..., Any], many: Callable[..., Any], least: int) -> Callable[..., Any]:
    def choose(x_TD: Tensor, *rest: Any) -> Any:
        return (few if len(x_TD) < least else many)(x_TD, *rest)

    return choose


@torch.inference_mode()
def _warm_up(model: Qwen2VL) -> None:
    """Run both towers; no length here is a width, which would be taken for the same number."""
    vision, device = model.config.vision, model.device
    side = vision.spatial_merge_size
    grid = Grid(1, side, 37 * side)
    patches_NP = torch.zeros(37 * side**2, vision.patch_dim, dtype=torch.uint8, device=device)
    model.encode(patches_NP, VisionMeta.build([grid], side).to(device))
    # One row is compiled by itself, where it is compiled at all.
    for tokens in (53, 1) if device.type == "cuda" else (53,):
        places_3T = torch.arange(tokens, device=device).expand(3, -1)
        model(torch.zeros_like(places_3T[0]), places_3T, AttnMeta.build([tokens]).to(device))


def _widens(owner: nn.Module) -> bool:
    """Tell whether a part makes floats of whole matrices, which no fusion helps."""
    return any(isinstance(module, Int4Linear | WideInt8Linear) for module in owner.modules())


def _parts(model: Qwen2VL, *, rounding: bool = False) -> Iterator[tuple[Any, str]]:
    """List (module, method): the same method of equal blocks shares one compiled graph.

    With `rounding`, also layers that stand alone, if they round what comes in. A LayerNorm is one
    kernel already.
    """
    alone: list[nn.Module] = []
    for block in cast("Iterable[Any]", model.visual.blocks):
        yield from ((block.attn, "project"), (block.mlp, "forward"))
        alone.append(block.attn.proj)
    yield model.visual.merger, "forward"
    for layer in cast("Iterable[Any]", model.model.layers):
        yield layer.input_layernorm, "forward"
        yield layer.post_attention_layernorm, "forward"
        yield from ((layer.self_attn, "project"), (layer.mlp, "forward"))
        alone.append(layer.self_attn.o_proj)
    yield model.model.norm, "forward"
    if rounding:
        yield from ((layer, "forward") for layer in alone if isinstance(layer, Int8Linear))
