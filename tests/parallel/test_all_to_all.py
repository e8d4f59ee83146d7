"""Rows swapped for whole matrices and back: each worked on once, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from qwen2vl.parallel.all_to_all import on_whole
from qwen2vl.parallel.mesh import join
from tests.parallel.gang import Gang

# More and fewer rows than ranks; one round and a piece of another.
SHAPES = [(8, 3), (5, 4), (1, 6), (2, 2), (7, 7), (8, 3), (3, 9)]

worked: list[tuple[int, ...]] = []


def matrices() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def work(matrix: Tensor) -> Tensor:
    """Mix all numbers, so that no row can be right by itself."""
    worked.append(tuple(matrix.shape))
    return (matrix.T @ matrix).sum() * matrix.flip(0)


def swap() -> tuple[list[Tensor], list[tuple[int, ...]]]:
    worked.clear()
    with join("cpu") as ranks:
        parts = [own_rows(matrix, ranks.rank, ranks.size) for matrix in matrices()]
        done = on_whole(parts, [rows for rows, _ in SHAPES], work, ranks.shard_group)
        gathered = [gather(part, ranks.size) for part in done]
    return gathered, list(worked)


def own_rows(matrix: Tensor, rank: int, size: int) -> Tensor:
    chunks = matrix.chunk(size)
    return chunks[rank] if rank < len(chunks) else matrix[:0]


def gather(part: Tensor, size: int) -> Tensor:
    parts: list[Tensor] = [torch.empty(0)] * size
    dist.all_gather_object(parts, part)
    return torch.cat(parts)


@pytest.mark.parametrize("size", [2, 4])
def test_each_matrix_is_worked_on_once_and_every_row_comes_back(gang: Gang, size: int) -> None:
    results = gang.run(size, swap)
    for given, matrix in zip(results[0][0], matrices(), strict=True):
        torch.testing.assert_close(given, work(matrix))
    assert sorted(shape for _, own in results for shape in own) == sorted(SHAPES)
    counts = [len(own) for _, own in results]
    assert max(counts) - min(counts) <= 1


def test_without_a_group_parts_are_whole() -> None:
    for given, matrix in zip(
        on_whole(matrices(), [rows for rows, _ in SHAPES], work, None), matrices(), strict=True
    ):
        torch.testing.assert_close(given, work(matrix))
