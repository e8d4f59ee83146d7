"""All-to-all over row-sharded matrices: each full matrix is processed once, for any shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from qwen2vl.parallel.all_to_all import apply_to_full_matrices
from qwen2vl.parallel.mesh import init_distributed
from tests.parallel.process_pool import ProcessPool

# More and fewer rows than ranks; one full round and part of another.
SHAPES = [(8, 3), (5, 4), (1, 6), (2, 2), (7, 7), (8, 3), (3, 9)]

processed: list[tuple[int, ...]] = []


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def mix_matrix(matrix: Tensor) -> Tensor:
    """Mix all elements, so that every output row depends on the full matrix."""
    processed.append(tuple(matrix.shape))
    return (matrix.T @ matrix).sum() * matrix.flip(0)


def run_all_to_all() -> tuple[list[Tensor], list[tuple[int, ...]]]:
    processed.clear()
    with init_distributed("cpu") as distributed:
        shards = [
            local_rows(matrix, distributed.rank, distributed.world_size) for matrix in matrices()
        ]
        results = apply_to_full_matrices(
            shards, [rows for rows, _ in SHAPES], mix_matrix, distributed.shard_group
        )
        gathered = [gather(shard, distributed.world_size) for shard in results]
    return gathered, list(processed)


def local_rows(matrix: Tensor, rank: int, world_size: int) -> Tensor:
    chunks = matrix.chunk(world_size)
    return chunks[rank] if rank < len(chunks) else matrix[:0]


def gather(shard: Tensor, world_size: int) -> Tensor:
    shards: list[Tensor] = [torch.empty(0)] * world_size
    dist.all_gather_object(shards, shard)
    return torch.cat(shards)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_matrix_is_processed_once_and_every_rank_gets_its_rows(
    process_pool: ProcessPool, world_size: int
) -> None:
    results = process_pool.run(world_size, run_all_to_all)
    for actual, matrix in zip(results[0][0], matrices(), strict=True):
        torch.testing.assert_close(actual, mix_matrix(matrix))
    assert sorted(shape for _, shapes in results for shape in shapes) == sorted(SHAPES)
    counts = [len(shapes) for _, shapes in results]
    assert max(counts) - min(counts) <= 1


def test_without_a_group_shards_are_full_matrices() -> None:
    for actual, matrix in zip(
        apply_to_full_matrices(matrices(), [rows for rows, _ in SHAPES], mix_matrix, None),
        matrices(),
        strict=True,
    ):
        torch.testing.assert_close(actual, mix_matrix(matrix))
