"""Lengths: from headers as from prepared samples; vision cost; tables cached by content."""

from __future__ import annotations

import gc
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
from qwen2vl.data import lengths, workers
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.lengths import LengthTable, SampleSize, measure_lengths, vision_cost
from qwen2vl.data.preprocess import HeaderPreprocessor, SamplePreprocessor
from qwen2vl.data.sources.source import JsonLinesSource, SampleSource
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.model.vision import VisionTower
from tests.data.rows import conversation, create_data_config, good_rows, write_media, write_rows
from tests.media import uncollected_decoder
from tests.tiny import tiny_config, tiny_processor

DATA = DataConfig(sources=(SourceConfig(path="x"),))


def create_source(folder: Path) -> JsonLinesSource:
    write_media(folder)
    bad = conversation("<image>what?", "x", image="none.png")
    return JsonLinesSource([write_rows(folder / "rows.jsonl", [*good_rows(), bad])], str(folder))


def measure_rows(source: JsonLinesSource, folder: Path, **limits: int) -> tuple[LengthTable, str]:
    measurer = HeaderPreprocessor(tiny_processor(**limits), DATA, media_root=source.media_root)
    return measure_lengths(source, measurer, cache_dir=folder / "cache", label="rows")


def test_lengths_from_headers_equal_those_of_prepared_samples(tmp_path: Path) -> None:
    source = create_source(tmp_path)
    table, _ = measure_rows(source, tmp_path)
    assert set(table.bad) == {len(source) - 1}
    assert table.tokens[-1] == table.vision[-1] == 0
    preparer = SamplePreprocessor(tiny_processor(), DATA, media_root=str(tmp_path))
    for i in range(len(source) - 1):
        processed = preparer.prepare(source.read(i))
        grids_K3 = table.grids_K3[table.starts[i] : table.starts[i + 1]]
        assert len(processed.input_ids) == table.tokens[i]
        assert processed.loss_mask is not None and sum(processed.loss_mask) == table.targets[i]
        assert [tuple(grid) for grid in grids_K3] == [tuple(grid) for grid in processed.grids]
        assert table.vision[i] == pytest.approx(vision_cost(grids_K3, tiny_config().vision).sum())


def test_a_cached_table_is_loaded_and_bad_samples_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = create_source(tmp_path)
    first, name = measure_rows(source, tmp_path)
    original, measured_indices = lengths._measure_samples, []

    def recording_measure_samples(
        source: SampleSource, indices: Sequence[int], *args: Any
    ) -> list[SampleSize]:
        measured_indices.extend(indices)
        return original(source, indices, *args)

    monkeypatch.setattr(lengths, "_measure_samples", recording_measure_samples)
    again, same = measure_rows(source, tmp_path)
    assert measured_indices == [len(source) - 1]  # only the bad sample
    assert same == name
    assert again.bad == first.bad
    for field in ("tokens", "targets", "vision", "grids_K3", "starts"):
        assert np.array_equal(getattr(first, field), getattr(again, field))


def test_unused_columns_are_counted_and_cached(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("q", "a", source="web", tag=i % 2 or None) for i in range(4)]
    rows.append(conversation("<image>q", "a", image="late.png", source="web", note="x"))
    source = JsonLinesSource([write_rows(tmp_path / "rows.jsonl", rows)], str(tmp_path))
    for _ in range(2):  # measured, then from the cache
        table, _name = measure_rows(source, tmp_path)
        assert table.unused == {"source": 4, "tag": 2}  # a bad sample's are not counted
    (tmp_path / "late.png").write_bytes((tmp_path / "3.png").read_bytes())
    for _ in range(2):
        table, _name = measure_rows(source, tmp_path)
        assert table.unused == {"source": 5, "tag": 2, "note": 1}


def test_notes_are_counted_and_cached(tmp_path: Path) -> None:
    write_media(tmp_path)
    rows = [conversation("q", "a"), conversation("q", ""), conversation("q", " ")]
    rows.append(conversation("<image>q", "<image>", image="late.png"))
    source = JsonLinesSource([write_rows(tmp_path / "rows.jsonl", rows)], str(tmp_path))
    empty = "an empty answer, of which only <|im_end|> is learned"
    for _ in range(2):  # measured, then from the cache
        table, _name = measure_rows(source, tmp_path)
        assert table.notes == {empty: 2}
    (tmp_path / "late.png").write_bytes((tmp_path / "3.png").read_bytes())
    table, _name = measure_rows(source, tmp_path)
    assert sorted(table.notes.values()) == [1, 2]


def test_a_fixed_sample_is_used_from_then_on(tmp_path: Path) -> None:
    write_media(tmp_path)
    missing_rows = [
        conversation("<image><image>what?", "x", images=["late.png", "1.png"]),
        conversation("<image>what?", "y", image="never.png"),
    ]
    rows = [*good_rows()[:3], missing_rows[0], *good_rows()[3:], missing_rows[1], missing_rows[0]]
    source = JsonLinesSource([write_rows(tmp_path / "rows.jsonl", rows)], str(tmp_path))
    data = create_data_config(
        tmp_path, tmp_path / "rows.jsonl", max_bad_fraction=1.0, global_batch_size=1
    )
    before = PackedDataset.open(data, tiny_processor(), seed=0)
    assert set(before.lengths[0].bad) == {3, len(rows) - 2, len(rows) - 1}
    assert PackedDataset.open(data, tiny_processor(), seed=0).fingerprint == before.fingerprint
    (tmp_path / "late.png").write_bytes((tmp_path / "3.png").read_bytes())
    fixed = PackedDataset.open(data, tiny_processor(), seed=0)
    fresh, _ = measure_rows(source, tmp_path / "elsewhere")
    assert fixed.fingerprint != before.fingerprint
    assert dict(fixed.lengths[0].bad) == dict(fresh.bad)
    assert set(fresh.bad) == {len(rows) - 2}
    assert fixed.lengths[0].digest() == fresh.digest()
    examples, bad = fixed.read(fixed.plan.entries)
    assert (len(examples), len(bad)) == (len(rows) - 1, 1)


def test_the_table_key_depends_on_pixel_limits_and_content(tmp_path: Path) -> None:
    source = create_source(tmp_path)
    _, name = measure_rows(source, tmp_path)
    smaller, other = measure_rows(source, tmp_path, max_pixels=8 * 784)
    assert other != name
    assert smaller.tokens.sum() < measure_rows(source, tmp_path)[0].tokens.sum()
    write_rows(tmp_path / "rows.jsonl", good_rows()[1:])
    _, third = measure_rows(JsonLinesSource([tmp_path / "rows.jsonl"], source.media_root), tmp_path)
    assert third not in (name, other)


def test_a_damaged_table_is_measured_again(tmp_path: Path) -> None:
    source = create_source(tmp_path)
    first, name = measure_rows(source, tmp_path)
    (path,) = (tmp_path / "cache" / "lengths").glob(f"{name}*.npz")
    path.write_bytes(path.read_bytes()[:100])
    again, _ = measure_rows(source, tmp_path)
    assert np.array_equal(first.tokens, again.tokens)


def test_workers_give_the_same_lengths(tmp_path: Path) -> None:
    rows = [conversation("q", "a" * (i % 90)) for i in range(300)]
    source = JsonLinesSource([write_rows(tmp_path / "rows.jsonl", rows)], "")
    progress_calls: list[tuple[int, int]] = []
    tables = [
        measure_lengths(
            source,
            HeaderPreprocessor(tiny_processor(), DATA),
            cache_dir=tmp_path / str(workers),
            label="rows",
            num_workers=workers,
            progress=lambda what, done, total: progress_calls.append((done, total)),
        )[0]
        for workers in (0, 2)
    ]
    assert np.array_equal(tables[0].tokens, tables[1].tokens)
    assert tables[0].bad == tables[1].bad == {}
    assert progress_calls[:3] == [(128, 300), (256, 300), (300, 300)]


@pytest.mark.timeout(60)
def test_workers_do_not_free_video_decoders_of_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_limit_threads", lambda _: gc.collect())
    source = JsonLinesSource(
        [write_rows(tmp_path / "rows.jsonl", [conversation("q", "a")] * 200)], ""
    )
    preprocessor = HeaderPreprocessor(tiny_processor(), DATA)
    with uncollected_decoder():
        table, _ = measure_lengths(
            source, preprocessor, cache_dir=tmp_path, label="rows", num_workers=1
        )
    assert len(table.tokens) == 200


@pytest.mark.parametrize("grid", [Grid(1, 4, 6), Grid(1, 16, 16), Grid(3, 8, 10)])
def test_vision_cost_is_proportional_to_the_flops_of_a_block(grid: Grid) -> None:
    """Equal to torch's FLOP counter up to one factor, for small and large images and videos."""
    vision = replace(tiny_config().vision, depth=1)

    def count_flops(config: VisionConfig) -> int:
        patches_NP = torch.zeros(grid.t * grid.h * grid.w, config.patch_dim, dtype=torch.uint8)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            VisionTower(config)(patches_NP, VisionMeta.build([grid]))
        return counter.get_total_flops()

    block = count_flops(replace(vision, depth=2)) - count_flops(vision)
    width = vision.embed_dim
    one_patch = 2 * (4 * width**2 + 2 * width * int(width * vision.mlp_ratio))
    cost = vision_cost(np.array([grid]), vision).sum()
    assert block == pytest.approx(cost * one_patch)
