"""Per-part torch.compile: everything but the attention kernel, which loops over host integers.

Norms, projections with their rotation, and MLPs become fused kernels; shapes are dynamic, so one
compilation serves every batch. It pays where the same model runs for minutes (training), since
the first step then takes half a minute; it needs a C++ compiler. Arithmetic may differ in the last
bits. Parameters, their names and the state dict stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qwen2vl.model import Qwen2VL

__all__ = ["compile_parts"]


def compile_parts(model: Qwen2VL) -> None:
    """Replace the forward of each part by a compiled one; compiling happens at first use."""
    for owner, name in _parts(model):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))


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
