"""Memory estimator: the bytes of one training step on a rank, before any weight is loaded.

    peak = weights + moments + gathered + the maximum over time of
           activations + logits at the loss, then fewer activations + more gradients + one block

Weights, optimizer states and gradients are counted parameter by parameter, as FSDP shards them;
activations and logits come from the activation-memory estimator, which runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.memory import matmul_dtype
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.parallel.activation_checkpointing import apply_activation_checkpointing
from qwen2vl.parallel.fsdp import fsdp_units
from qwen2vl.train.adapter import inject_adapter
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.dry_run.activation_memory import BatchShape, estimate_activation_memory
from qwen2vl.train.optim.optimizers import always_frozen, apply_lr_rules, optimizer_state_bytes

__all__ = [
    "StaticMemory",
    "StepMemory",
    "estimate_static_memory",
    "estimate_step_memory",
    "wrapped_meta_model",
]

FLOAT32_BYTES = torch.float32.itemsize  # of a weight in the optimizer step, and of its gradient


class StaticMemory(NamedTuple):
    """Bytes on one rank that do not depend on the batch."""

    weights: int  # this rank's shards
    moments: int  # optimizer states
    gathered: int  # all-gathered weights, and gradients in reduce-scatter
    gradients: int  # this rank's shards, at the end of the backward


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes on one rank; the peak is less than the sum, since not all exist at the same time."""

    weights: int  # these four as in StaticMemory
    moments: int
    gathered: int
    gradients: int
    activations: int  # of vision tower and decoder, saved for the backward
    logits: int  # peak of the loss: a chunk of logits, the head's gradient, etc.
    peak: int


def estimate_step_memory(
    config: TrainConfig,
    model_config: Qwen2VLConfig,
    stage: Stage,
    batch: BatchShape,
    *,
    world_size: int = 1,
) -> StepMemory:
    """Estimate the memory of one step, on the rank with the largest shards.

    Args:
        config: of the run.
        model_config: of its model.
        stage: its rules decide which parameters are trainable.
        batch: the largest batch of a rank.
        world_size: number of ranks.

    Raises:
        ConfigError: a rule, or a pattern of the adapter, is wrong.
    """
    model = wrapped_meta_model(config, model_config)
    static = estimate_static_memory(config, model, stage, world_size=world_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(_gathered_dtype(config, world_size))
    timeline = estimate_activation_memory(
        model,
        batch,
        device=_kernel_device(config),
        use_autocast=_is_bfloat16(config) and world_size == 1,
    )
    existing_gradients = static.gradients if config.gradient_accumulation_steps > 1 else 0
    dynamic_peak = max(
        timeline.peak(
            num_shards=_num_shards(config, world_size), existing_gradients=existing_gradients
        ),
        static.gradients,
    )
    return StepMemory(
        **static._asdict(),
        activations=timeline.saved,
        logits=timeline.loss_working,
        peak=static.weights + static.moments + static.gathered + dynamic_peak,
    )


def estimate_static_memory(
    config: TrainConfig, model: Qwen2VL, stage: Stage, *, world_size: int = 1
) -> StaticMemory:
    """Sum weights, gradients and optimizer states of a rank; applies the stage's rules to `model`.

    Raises:
        ConfigError: a rule is wrong.
    """
    replicated = _replicated_names(config, model) if world_size > 1 else set()
    apply_lr_rules(model, stage.rules)
    gathered_dtype = _gathered_dtype(config, world_size)
    weights = moments = gradients = 0
    for name, parameter in model.named_parameters():
        num_owned = _max_shard_numel(
            parameter, 1 if name in replicated else _num_shards(config, world_size)
        )
        weights += num_owned * (gathered_dtype.itemsize if name in replicated else FLOAT32_BYTES)
        if parameter.requires_grad:
            gradients += num_owned * FLOAT32_BYTES
            moments += optimizer_state_bytes(config.optim, name, parameter, num_owned)
    weights += sum(buffer.nbytes for buffer in model.buffers())
    gathered = (
        _gathered_bytes(model, replicated, gathered_dtype, config.mesh.reshard_after_forward)
        if world_size > 1
        else 0
    )
    return StaticMemory(weights, moments, gathered, gradients)


def wrapped_meta_model(config: TrainConfig, model_config: Qwen2VLConfig) -> Qwen2VL:
    """Build the run's model on the meta device, with adapter and activation checkpointing.

    Raises:
        ConfigError: a pattern of the adapter matches nothing, or a size is impossible.
    """
    model = meta_model(model_config)
    if config.adapter is not None:
        inject_adapter(model, replace(config.adapter, init=""), config.seed)
    apply_activation_checkpointing(model, **asdict(config.activation_checkpointing))
    return model


def _kernel_device(config: TrainConfig) -> torch.device:
    """Return the run's device; without a GPU the kernels of the CPU are an approximation."""
    is_available = config.device != "cuda" or torch.cuda.is_available()
    return torch.device(config.device if is_available else "cpu")


def _num_shards(config: TrainConfig, world_size: int) -> int:
    return max(1, world_size // config.mesh.dp_replicate)


def _gathered_dtype(config: TrainConfig, world_size: int) -> torch.dtype:
    """Return the dtype of gathered weights; on a single rank they stay float32 under autocast."""
    return torch.bfloat16 if _is_bfloat16(config) and world_size > 1 else torch.float32


def _is_bfloat16(config: TrainConfig) -> bool:
    return matmul_dtype(config.dtype, torch.device(config.device)) == torch.bfloat16


def _replicated_names(config: TrainConfig, model: Qwen2VL) -> set[str]:
    return always_frozen(model, config.stages) if config.mesh.frozen == "replicate" else set()


def _max_shard_numel(parameter: Tensor, num_shards: int) -> int:
    """Return the number of elements on rank 0, which has the most rows."""
    rows = -(-parameter.shape[0] // num_shards)
    return rows * parameter[0].numel()


def _gathered_bytes(
    model: Qwen2VL, replicated: Collection[str], dtype: torch.dtype, reshard_after_forward: bool
) -> int:
    """Return the maximum bytes of all-gathered weights and of gradients in reduce-scatter.

    The root and the last block stay gathered from their forward on. Of the other blocks one is
    computed while the next one is prefetched, unless all stay. The gradients of one unit are in
    reduce-scatter.
    """
    replicated_parameters = {
        parameter for name, parameter in model.named_parameters() if name in replicated
    }
    sizes: list[int] = []
    max_trainable = 0
    counted_parameters = set(replicated_parameters)
    for unit in fsdp_units(model):
        own = [p for p in unit.parameters() if p not in counted_parameters]
        counted_parameters.update(own)
        sizes.append(sum(p.numel() for p in own))
        max_trainable = max(max_trainable, sum(p.numel() for p in own if p.requires_grad))
    *block_sizes, root_size = sizes
    num_staying = (
        sum(block_sizes)
        if not reshard_after_forward
        else min(sum(block_sizes), block_sizes[-1] + 2 * max(block_sizes))
    )
    return (root_size + num_staying) * dtype.itemsize + max_trainable * FLOAT32_BYTES
