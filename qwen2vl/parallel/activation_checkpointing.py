"""Memory for time: what a block's backward computes again instead of keeping it.

A block that is computed again keeps its input alone; a selective one also keeps what is dear for
its size: attention, and products whose output is no wider than their input (q, k, v, o and the way
down of the MLP). Bits stay the same, for the same kernels see the same numbers. Names and modules
stay too: only a block's `forward` is exchanged, inside of what FSDP hooks onto, so that weights are
gathered before anything is computed again. (arXiv 1604.06174; selective: arXiv 2205.05198.)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qwen2vl.model import Qwen2VL

__all__ = ["Mode", "recompute"]

Mode = Literal["none", "block", "selective"]

_aten = torch.ops.aten

# Every kernel that scaled_dot_product_attention may choose.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

# The packed one (model/kernels.py) by its name: only a GPU imports it.
_PACKED_ATTENTION = "torch_attn._varlen_attn.default"

# Products, and which of their arguments is the (inputs, outputs) matrix.
_PRODUCTS = {_aten.mm.default: 1, _aten.addmm.default: 2}


def recompute(model: Qwen2VL, *, visual: Mode, text: Mode, every: int = 1) -> None:
    """Let one block of `every`, in each tower, compute again what its backward needs."""
    _wrap(list(model.visual.blocks)[::every], visual)
    _wrap(list(model.model.layers)[::every], text)


def _wrap(blocks: Iterable[nn.Module], mode: Mode) -> None:
    if mode == "none":
        return
    # An adapter may drop inputs at random: what is computed again must drop the same.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _choose)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def _choose(_context: Any, operator: Any, *inputs: Any, **_options: Any) -> CheckpointPolicy:
    """Keep attention, and products that are narrow for what they cost."""
    if operator in _ATTENTION or str(operator) == _PACKED_ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operator in _PRODUCTS:
        num_inputs, num_outputs = inputs[_PRODUCTS[operator]].shape
        if num_outputs <= num_inputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
