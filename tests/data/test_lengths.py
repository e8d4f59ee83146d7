"""Lengths: what headers say is what is prepared, costs are the tower's, tables are kept by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qwen2vl.config import VisionConfig
from qwen2vl.data import lengths
from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.dataset import Corpus
from qwen2vl.data.lengths import Lengths, Size, measure, vision_cost
from qwen2vl.data.preprocess import Measurer, Preparer
from qwen2vl.data.sources.source import JsonLines, Samples
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.model.vision import VisionTower
from tests.data.rows import conversation, data_of, good_rows, write_media, write_rows
from tests.tiny import tiny_config, tiny_processor

DATA = DataConfig(sources=(Source(path="x"),))


def source_in(folder: Path) -> JsonLines:
    write_media(folder)
    bad = conversation("<image>what?", "x", image="none.png")
    return JsonLines([write_rows(folder / "rows.jsonl", [*good_rows(), bad])], str(folder))


def measured(source: JsonLines, folder: Path, **given: int) -> tuple[Lengths, str]:
    measurer = Measurer(tiny_processor(**given), DATA, base=source.base)
    return measure(source, measurer, cache=folder / "cache", label="rows")


def test_headers_promise_what_comes(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    table, _ = measured(source, tmp_path)
    assert set(table.bad) == {len(source) - 1}
    assert table.tokens[-1] == table.vision[-1] == 0
    preparer = Preparer(tiny_processor(), DATA, base=str(tmp_path))
    for i in range(len(source) - 1):
        made = preparer.prepare(source.read(i))
        own = table.grids_K3[table.starts[i] : table.starts[i + 1]]
        assert len(made.input_ids) == table.tokens[i]
        assert made.loss_mask is not None and sum(made.loss_mask) == table.targets[i]
        assert [tuple(grid) for grid in own] == [tuple(grid) for grid in made.grids]
        assert table.vision[i] == pytest.approx(vision_cost(own, tiny_config().vision).sum())


def test_a_table_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_in(tmp_path)
    first, name = measured(source, tmp_path)
    rows, wanted = lengths._rows, []

    def counted(source: Samples, indices: Sequence[int], *args: Any) -> list[Size]:
        wanted.extend(indices)
        return rows(source, indices, *args)

    monkeypatch.setattr(lengths, "_rows", counted)
    again, same = measured(source, tmp_path)
    assert wanted == [len(source) - 1]  # the bad one, and no other
    assert same == name
    assert again.bad == first.bad
    for field in ("tokens", "targets", "vision", "grids_K3", "starts"):
        assert np.array_equal(getattr(first, field), getattr(again, field))


def test_what_was_bad_is_measured_again_once_it_is_mended(tmp_path: Path) -> None:
    write_media(tmp_path)
    lost = [
        conversation("<image><image>what?", "x", images=["late.png", "1.png"]),
        conversation("<image>what?", "y", image="never.png"),
    ]
    rows = [*good_rows()[:3], lost[0], *good_rows()[3:], lost[1], lost[0]]
    source = JsonLines([write_rows(tmp_path / "rows.jsonl", rows)], str(tmp_path))
    data = data_of(tmp_path, tmp_path / "rows.jsonl", max_bad=1.0, bins=1)
    before = Corpus.open(data, tiny_processor(), seed=0)
    assert set(before.lengths[0].bad) == {3, len(rows) - 2, len(rows) - 1}
    assert Corpus.open(data, tiny_processor(), seed=0).fingerprint == before.fingerprint
    (tmp_path / "late.png").write_bytes((tmp_path / "3.png").read_bytes())
    mended = Corpus.open(data, tiny_processor(), seed=0)
    fresh, _ = measured(source, tmp_path / "elsewhere")
    assert mended.fingerprint != before.fingerprint
    assert dict(mended.lengths[0].bad) == dict(fresh.bad)
    assert set(fresh.bad) == {len(rows) - 2}
    assert mended.lengths[0].digest() == fresh.digest()
    examples, bad = mended.read(mended.plan.entries)
    assert (len(examples), len(bad)) == (len(rows) - 1, 1)


def test_another_size_of_pictures_or_another_content_is_another_table(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    _, name = measured(source, tmp_path)
    smaller, other = measured(source, tmp_path, max_pixels=8 * 784)
    assert other != name
    assert smaller.tokens.sum() < measured(source, tmp_path)[0].tokens.sum()
    write_rows(tmp_path / "rows.jsonl", good_rows()[1:])
    _, third = measured(JsonLines([tmp_path / "rows.jsonl"], source.base), tmp_path)
    assert third not in (name, other)


def test_a_damaged_table_is_made_again(tmp_path: Path) -> None:
    source = source_in(tmp_path)
    first, name = measured(source, tmp_path)
    path = tmp_path / "cache" / "lengths" / f"{name}.npz"
    path.write_bytes(path.read_bytes()[:100])
    again, _ = measured(source, tmp_path)
    assert np.array_equal(first.tokens, again.tokens)


def test_workers_measure_the_same(tmp_path: Path) -> None:
    rows = [conversation("q", "a" * (i % 90)) for i in range(300)]
    source = JsonLines([write_rows(tmp_path / "rows.jsonl", rows)], "")
    told: list[tuple[int, int]] = []
    tables = [
        measure(
            source,
            Measurer(tiny_processor(), DATA),
            cache=tmp_path / str(workers),
            label="rows",
            workers=workers,
            progress=lambda what, done, total: told.append((done, total)),
        )[0]
        for workers in (0, 2)
    ]
    assert np.array_equal(tables[0].tokens, tables[1].tokens)
    assert tables[0].bad == tables[1].bad == {}
    assert told[:3] == [(128, 300), (256, 300), (300, 300)]


@pytest.mark.parametrize("grid", [Grid(1, 4, 6), Grid(1, 16, 16), Grid(3, 8, 10)])
def test_cost_is_what_the_tower_s_blocks_compute(grid: Grid) -> None:
    """Equal to torch's counter up to one factor, for pictures large and small, and clips."""
    vision = replace(tiny_config().vision, depth=1)

    def flops(config: VisionConfig) -> int:
        patches_NP = torch.zeros(grid.t * grid.h * grid.w, config.patch_dim, dtype=torch.uint8)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            VisionTower(config)(patches_NP, VisionMeta.build([grid]))
        return counter.get_total_flops()

    block = flops(replace(vision, depth=2)) - flops(vision)
    width = vision.embed_dim
    one_patch = 2 * (4 * width**2 + 2 * width * int(width * vision.mlp_ratio))
    cost = vision_cost(np.array([grid]), vision).sum()
    assert block == pytest.approx(cost * one_patch)
