"""Who keeps which weights: FSDP2 over a mesh, one unit a block, the model none the wiser.

    visual.blocks.0 .. n | visual.merger | model.layers.0 .. n     gathered when their turn comes
    the rest: patches, embedding, norm, head                       gathered from forward to loss

The head's weight is read by the loss, outside of every forward, so its group, which a tied head
shares with the embedding, stays gathered until the backward. Training must call `forward` alone:
`encode` or `logits` called from outside would see shards. Gradients are summed, never averaged,
since the loss is divided by the weight of all ranks. Every rank must run every trainable unit in
every batch (a batch without pictures runs the null item of train/loader/batch.py), else ranks would wait
for each other for ever. (FSDP, arXiv 2304.11277.)
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
    "fill_parts",
    "free_gathered",
    "is_sharded",
    "note_frozen",
    "reduce_over_copies",
    "shard",
    "units",
]


def shard(
    model: Qwen2VL,
    mesh: DeviceMesh,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    whole: Collection[str] = (),
    reshard: bool = True,
) -> None:
    """Leave each rank its part of every parameter, in place; parts lie on `device`.

    Args:
        model: the same on every rank, in the dtype its weights are stepped in; or on the meta
            device, where parts come out empty, for `fill_parts`.
        mesh: axes "replicate" and "shard".
        device: of this rank.
        dtype: of gathered weights and products; gradients are summed in float32. None: as stored.
        whole: names of frozen parameters that every rank keeps, in `dtype`: more memory, and
            nothing to gather.
        reshard: free a block's weights after its forward, and gather them again for its backward.
    """
    kept = {parameter for name, parameter in model.named_parameters() if name in whole}
    for parameter in kept:
        assert not parameter.requires_grad, "only frozen parameters can be kept whole"
        place = parameter.device if parameter.is_meta else device
        parameter.data = parameter.data.to(place, dtype)
    sharded = [unit for unit in units(model) if not kept.issuperset(unit.parameters())]
    policy = _policy(dtype)
    axes = mesh if mesh.size(0) > 1 else mesh["shard"]
    for unit in sharded:
        # What the backward needs first is not worth freeing; nor is the root, see above.
        frees = reshard and unit is not model.model.layers[-1] and unit is not model
        fully_shard(
            unit, mesh=axes, reshard_after_forward=frees, mp_policy=policy, ignored_params=kept
        )
    for unit in sharded:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        # Divided by one, a sum is a plain sum; without this NCCL would be asked for another kind.
        unit.set_force_sum_reduction_for_comms(True)
    if model.model.norm.weight.is_meta:
        model.to_empty(device=device)


@torch.no_grad()
def fill_parts(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Copy each rank's rows of all parameters and buffers from whole tensors.

    Args:
        model: sharded or not.
        read: gives the whole tensor of a name. One is alive at a time.
    """
    for name, own in model.state_dict().items():
        if isinstance(own, DTensor):
            _copy_rows(own, read(name))
        else:
            own.copy_(read(name))


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` was here."""
    return isinstance(model, FSDPModule)


def free_gathered(model: nn.Module) -> None:
    """Free what a forward without a backward left gathered.

    Until then the model's parameters are not the sharded ones that optimizers step.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def note_frozen(model: nn.Module) -> None:
    """Let units look again at which of their parameters learn, as a new stage says.

    They decide at their first gathering in which dtype gradients are summed and kept; one that
    was frozen then would keep them in that of the products.
    """
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.unshard()
            unit.reshard()


def reduce_over_copies(model: nn.Module, now: bool) -> None:
    """Say whether the next backward adds gradients up over the copies of the model.

    Only the last batch of an optimizer step needs to; within a copy every batch does, so that no
    rank ever holds whole gradients.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(now)
        model.set_requires_all_reduce(now)


def _copy_rows(own: DTensor, whole: Tensor) -> None:
    """Fill this rank's part: equal chunks of rows, then a shorter one, then none."""
    part, mesh = own.to_local(), own.device_mesh
    chunk = -(-len(whole) // mesh["shard"].size())
    first = min(len(whole), chunk * mesh.get_local_rank("shard"))
    part.copy_(whole[first : first + len(part)])


def units(model: Qwen2VL) -> Iterator[nn.Module]:
    """List what is gathered as one, inner modules first; the root takes what is left."""
    yield from model.visual.blocks
    yield model.visual.merger
    yield from model.model.layers
    yield model


def _policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    # Inputs stay as they are: rotations and pixels are float32 on purpose.
    if dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
