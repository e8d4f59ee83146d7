"""Activation checkpointing: a block's backward recomputes activations instead of storing them.

Full checkpointing saves a block's input only. Selective checkpointing also saves the outputs of
operators that are expensive for their size: attention, and matmuls whose output is no wider than
their input (q, k, v, o and the down projection of the MLP). Gradients are bit for bit those without
checkpointing, since the same kernels run on the same inputs. Modules and parameter names do not
change: only a block's `forward` is replaced, inside the FSDP hooks, so that weights are gathered
before the recomputation. (arXiv 1604.06174; selective: arXiv 2205.05198.)
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

__all__ = ["CheckpointingMode", "apply_activation_checkpointing"]

CheckpointingMode = Literal["none", "full", "selective"]

_aten = torch.ops.aten

# Every kernel that scaled_dot_product_attention may dispatch to.
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

# The varlen kernel (model/kernels.py), by its name: it is imported on GPUs only.
_VARLEN_ATTENTION = "torch_attn._varlen_attn.default"

# Matmul operators, and which of their arguments is the (inputs, outputs) matrix.
_MATMULS = {_aten.mm.default: 1, _aten.addmm.default: 2}


def apply_activation_checkpointing(
    model: Qwen2VL, *, visual: CheckpointingMode, text: CheckpointingMode, every_n_blocks: int = 1
) -> None:
    """Checkpoint one block of every `every_n_blocks`, in the vision tower and in the decoder."""
    _wrap_blocks(list(model.visual.blocks)[::every_n_blocks], visual)
    _wrap_blocks(list(model.model.layers)[::every_n_blocks], text)


def _wrap_blocks(blocks: Iterable[nn.Module], mode: CheckpointingMode) -> None:
    if mode == "none":
        return
    # Dropout of LoRA layers: the recomputation must draw the same mask.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _selective_policy)
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def _selective_policy(
    _context: Any, operator: Any, *inputs: Any, **_options: Any
) -> CheckpointPolicy:
    """Save attention and matmuls no wider than their input; recompute everything else."""
    if operator in _ATTENTION or str(operator) == _VARLEN_ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if operator in _MATMULS:
        num_inputs, num_outputs = inputs[_MATMULS[operator]].shape
        if num_outputs <= num_inputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
