"""Work on whole matrices when every rank has some rows of each: swap rows for matrices, and back.

    rank 0   A0 B0 C0 D0          rank 0   A0 A1 -> work(A)          rank 0   A0' B0' C0' D0'
    rank 1   A1 B1 C1 D1    ->    rank 1   B0 B1 -> work(B)    ->    rank 1   A1' B1' C1' D1'
                                  then C and D in a second round

Each matrix is worked on by one rank of the group and travels twice, so time falls with the number
of ranks. Gathered on every rank instead, all of them would do all of it: Newton-Schulz on a 7B
model is more arithmetic than a training step of 8,000 tokens. A round holds at most one whole
matrix a rank. It must not know what the work is. (arXiv 2502.16982, sec. 2.3.) Next: mesh.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["on_whole"]

Work = Callable[[Tensor], Tensor]


def on_whole(
    parts: Sequence[Tensor],
    num_rows: Sequence[int],
    work: Work,
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Apply `work`, matrix -> matrix of the same shape, and return this rank's rows of each result.

    Args:
        parts: this rank's rows of each matrix, dim 0 sharded as FSDP does; all of one dtype.
        num_rows: of each whole matrix.
        work: done by one rank for each matrix, its result in any dtype.
        group: the ranks that share the matrices; None: `parts` are whole.
    """
    if group is None:
        return [work(part) for part in parts]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    done: list[Tensor | None] = [None] * len(parts)
    # Matrices of one shape cost the same: they share a round, so that no rank waits for another.
    order = sorted(range(len(parts)), key=lambda i: (num_rows[i], parts[i].shape[1]))
    for start in range(0, len(order), size):
        turn = order[start : start + size]
        own = turn[rank] if rank < len(turn) else None
        gathered = _swap([parts[i] for i in turn], _rows(num_rows, own, size), parts, own, group)
        result = None if own is None else work(gathered).to(parts[own].dtype)
        returned = _swap_back(result, _rows(num_rows, own, size), turn, parts, group)
        for index, part in zip(turn, returned, strict=True):
            done[index] = part
    return [part for part in done if part is not None]


def _rows(num_rows: Sequence[int], index: int | None, size: int) -> list[int]:
    """Say how many rows of a matrix each rank has: equal chunks, then a shorter one, then none."""
    if index is None:
        return [0] * size
    total = num_rows[index]
    chunk = -(-total // size)
    return [max(0, min(chunk, total - rank * chunk)) for rank in range(size)]


def _swap(
    sent: list[Tensor],
    rows: list[int],
    parts: Sequence[Tensor],
    own: int | None,
    group: dist.ProcessGroup,
) -> Tensor:
    """Send rows of every matrix of this round to its rank; receive all rows of our own."""
    size = dist.get_world_size(group)
    width = 0 if own is None else parts[own].shape[1]
    out_sizes = [part.numel() for part in sent] + [0] * (size - len(sent))
    in_sizes = [count * width for count in rows]
    received = sent[0].new_empty(sum(in_sizes))
    flat = torch.cat([part.flatten() for part in sent])
    dist.all_to_all_single(received, flat, in_sizes, out_sizes, group=group)
    return received.view(sum(rows), width) if own is not None else received


def _swap_back(
    result: Tensor | None,
    rows: list[int],
    turn: list[int],
    parts: Sequence[Tensor],
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Send each rank its rows of our result; receive ours of all the others'."""
    size = dist.get_world_size(group)
    width = 0 if result is None else result.shape[1]
    in_sizes = [parts[i].numel() for i in turn] + [0] * (size - len(turn))
    first = parts[turn[0]]
    received = first.new_empty(sum(in_sizes))
    flat = first.new_empty(0) if result is None else result.flatten()
    dist.all_to_all_single(received, flat, in_sizes, [n * width for n in rows], group=group)
    pieces = received.split(in_sizes)[: len(turn)]
    return [piece.view_as(parts[i]) for piece, i in zip(pieces, turn, strict=True)]
