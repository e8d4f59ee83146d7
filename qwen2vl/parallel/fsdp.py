"""FSDP2 (`fully_shard`): parameters, gradients and optimizer states sharded over a device mesh.

    visual.blocks.0 .. n | visual.merger | model.layers.0 .. n     all-gathered one at a time
    the rest: patch embedding, embedding, norm, head               gathered from forward to loss

The loss reads the head's weight outside of every forward, so the root's group, in which a tied head
is the embedding, stays gathered until the backward. Training must call `forward` only: `encode` or
`logits` called from outside would run on shards. Gradients are summed, never averaged, since the
loss is divided by the target weight of all ranks. Every rank must run every trainable FSDP unit in
every batch (a batch without media runs the dummy image of train/loader/batch.py), else the
collectives deadlock. (FSDP, arXiv 2304.11277.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qwen2vl.model import Qwen2VL

__all__ = [
    "apply_fsdp",
    "fill_shards",
    "fsdp_units",
    "is_sharded",
    "refresh_requires_grad",
    "reshard_model",
    "set_replica_all_reduce",
]


def apply_fsdp(
    model: Qwen2VL,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    replicated: Collection[str] = (),
    reshard_after_forward: bool = True,
) -> None:
    """Shard `model` in place over the mesh, one FSDP unit per block; shards are on `device`.

    Args:
        model: the same on every rank, in the dtype of the optimizer step; or on the meta device,
            then the shards are empty, to be filled by `fill_shards`.
        mesh: dimensions "replicate" and "shard".
        device: of this rank.
        dtype: of gathered weights and matmuls; gradients are reduced in float32. None: as stored.
        replicated: names of frozen parameters that every rank holds in full, in `dtype`: more
            memory, no all-gather.
        reshard_after_forward: free a block's weights after its forward, and gather them again for
            its backward.
    """
    replicated_parameters = {
        parameter for name, parameter in model.named_parameters() if name in replicated
    }
    for parameter in replicated_parameters:
        assert not parameter.requires_grad, "only frozen parameters can be replicated"
        target_device = parameter.device if parameter.is_meta else device
        parameter.data = parameter.data.to(target_device, dtype)
    fsdp_modules = [
        unit
        for unit in fsdp_units(model)
        if not replicated_parameters.issuperset(unit.parameters())
    ]
    policy = _mixed_precision_policy(dtype)
    fsdp_mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    for unit in fsdp_modules:
        # The backward needs the last block first; the root stays gathered for the loss, see above.
        frees_weights = (
            reshard_after_forward and unit is not model.model.layers[-1] and unit is not model
        )
        fully_shard(
            unit,
            mesh=fsdp_mesh,
            reshard_after_forward=frees_weights,
            mp_policy=policy,
            ignored_params=replicated_parameters,
        )
    for unit in fsdp_modules:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # With a factor of 1 it is a plain sum; without this NCCL would get a premultiplied sum.
        unit.set_force_sum_reduction_for_comms(True)
    if model.model.norm.weight.is_meta:
        model.to_empty(device=device)


@torch.no_grad()
def fill_shards(model: nn.Module, read_tensor: Callable[[str], Tensor]) -> None:
    """Copy this rank's rows of every parameter and buffer from full tensors.

    Args:
        model: sharded or not.
        read_tensor: returns the full tensor of a name. One full tensor exists at a time.
    """
    for name, parameter_or_buffer in model.state_dict().items():
        if isinstance(parameter_or_buffer, DTensor):
            _copy_shard(parameter_or_buffer, read_tensor(name))
        else:
            parameter_or_buffer.copy_(read_tensor(name))


def is_sharded(model: nn.Module) -> bool:
    """Return whether `apply_fsdp` was applied to `model`."""
    return isinstance(model, FSDPModule)


def reshard_model(model: nn.Module) -> None:
    """Free the weights that a forward without a backward left all-gathered.

    Until then the model's parameters are not the sharded ones that the optimizers step.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def refresh_requires_grad(model: nn.Module) -> None:
    """Update FSDP's record of which parameters require gradients, after a stage changed them.

    At its first all-gather a unit fixes the dtype in which gradients are reduced and stored; a
    parameter that was frozen then would store its gradient in the dtype of the matmuls.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()


def set_replica_all_reduce(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward all-reduces gradients over the replicas of the model (HSDP).

    With gradient accumulation only the last batch of an optimizer step needs it; within a replica
    every batch reduce-scatters, so that no rank ever holds full gradients.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(enabled)
        model.set_requires_all_reduce(enabled)


def _copy_shard(parameter_or_buffer: DTensor, full: Tensor) -> None:
    """Copy this rank's rows of `full`: chunks of equal size, then a shorter one, then none."""
    local, mesh = parameter_or_buffer.to_local(), parameter_or_buffer.device_mesh
    chunk = -(-len(full) // mesh["shard"].size())
    first = min(len(full), chunk * mesh.get_local_rank("shard"))
    local.copy_(full[first : first + len(local)])


def fsdp_units(model: Qwen2VL) -> Iterator[nn.Module]:
    """Yield the modules that are all-gathered as one, inner ones first; the root holds the rest."""
    yield from model.visual.blocks
    yield model.visual.merger
    yield from model.model.layers
    yield model


def _mixed_precision_policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    # Inputs are not cast: rotary tables and pixels are float32 on purpose.
    if dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
