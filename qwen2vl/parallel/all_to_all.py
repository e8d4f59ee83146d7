"""All-to-all over row-sharded matrices: apply a function to each full matrix, on one rank (Muon).

    rank 0   A0 B0 C0 D0          rank 0   A0 A1 -> f(A)             rank 0   A0' B0' C0' D0'
    rank 1   A1 B1 C1 D1    ->    rank 1   B0 B1 -> f(B)       ->    rank 1   A1' B1' C1' D1'
                                  then C and D in a second round

Each matrix is processed by one rank of the group and is sent twice, so the time falls with the
number of ranks. With an all-gather every rank would process every matrix: Newton-Schulz on a 7B
model is more arithmetic than a training step of 8,000 tokens. A round holds at most one full matrix
per rank. (arXiv 2502.16982, sec. 2.3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["apply_to_full_matrices"]

MatrixFunction = Callable[[Tensor], Tensor]


def apply_to_full_matrices(
    shards: Sequence[Tensor],
    num_rows: Sequence[int],
    function: MatrixFunction,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Apply `function` to every full matrix, and return this rank's rows of each result.

    Args:
        shards: this rank's rows of each matrix, dim 0 sharded as FSDP does; all of one dtype.
        num_rows: of each full matrix.
        function: matrix -> matrix of the same shape, in any dtype; called once per matrix.
        group: the ranks over which the matrices are sharded; None: `shards` are full matrices.
    """
    if group is None:
        return [function(shard) for shard in shards]
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    results: list[Tensor | None] = [None] * len(shards)
    # Matrices of equal shape cost the same: they share a round, so that no rank waits for another.
    order = sorted(range(len(shards)), key=lambda i: (num_rows[i], shards[i].shape[1]))
    for start in range(0, len(order), world_size):
        round_indices = order[start : start + world_size]
        own_index = round_indices[rank] if rank < len(round_indices) else None
        gathered = _gather_matrix(
            [shards[i] for i in round_indices],
            _rows_per_rank(num_rows, own_index, world_size),
            shards,
            own_index,
            group,
        )
        result = None if own_index is None else function(gathered).to(shards[own_index].dtype)
        returned = _scatter_rows(
            result, _rows_per_rank(num_rows, own_index, world_size), round_indices, shards, group
        )
        for index, shard in zip(round_indices, returned, strict=True):
            results[index] = shard
    return [shard for shard in results if shard is not None]


def _rows_per_rank(num_rows: Sequence[int], index: int | None, world_size: int) -> list[int]:
    """Return how many rows of a matrix each rank has: equal chunks, then a shorter one, then 0."""
    if index is None:
        return [0] * world_size
    total = num_rows[index]
    chunk = -(-total // world_size)
    return [max(0, min(chunk, total - rank * chunk)) for rank in range(world_size)]


def _gather_matrix(
    outgoing: list[Tensor],
    rows: list[int],
    shards: Sequence[Tensor],
    own_index: int | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Send this rank's rows of each matrix of the round to its rank; return the own full matrix."""
    world_size = dist.get_world_size(group)
    width = 0 if own_index is None else shards[own_index].shape[1]
    send_sizes = [shard.numel() for shard in outgoing] + [0] * (world_size - len(outgoing))
    receive_sizes = [count * width for count in rows]
    received = outgoing[0].new_empty(sum(receive_sizes))
    flat = torch.cat([shard.flatten() for shard in outgoing])
    dist.all_to_all_single(received, flat, receive_sizes, send_sizes, group=group)
    return received.view(sum(rows), width) if own_index is not None else received


def _scatter_rows(
    result: Tensor | None,
    rows: list[int],
    round_indices: list[int],
    shards: Sequence[Tensor],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Send each rank its rows of this rank's result; return this rank's rows of all results."""
    world_size = dist.get_world_size(group)
    width = 0 if result is None else result.shape[1]
    receive_sizes = [shards[i].numel() for i in round_indices] + [0] * (
        world_size - len(round_indices)
    )
    first = shards[round_indices[0]]
    received = first.new_empty(sum(receive_sizes))
    flat = first.new_empty(0) if result is None else result.flatten()
    dist.all_to_all_single(received, flat, receive_sizes, [n * width for n in rows], group=group)
    pieces = received.split(receive_sizes)[: len(round_indices)]
    return [piece.view_as(shards[i]) for piece, i in zip(pieces, round_indices, strict=True)]
