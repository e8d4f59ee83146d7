"""Rows prepared as in training, and what is learned of them; the pictures that fixtures name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.formats import Sample, parse_row
from qwen2vl.data.preprocess import SamplePreprocessor
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.train.dry_run.report import text_spans
from tests.media import encoded, smooth
from tests.tiny import tiny_processor

DATA = DataConfig(sources=(SourceConfig(path="x"),), frame_cache_gb=0)


def write_pictures(folder: Path) -> None:
    """Write a.png, 112 x 84 pixels, and b.png, 56 x 140."""
    (folder / "a.png").write_bytes(encoded(smooth(84, 112, 0)))
    (folder / "b.png").write_bytes(encoded(smooth(140, 56, 1)))


def parse(row: Any) -> Any:
    return parse_row(row, "rows.jsonl:1")


def prepare(sample: Sample, folder: Path | str = "") -> ModelInput:
    return SamplePreprocessor(tiny_processor(), DATA, media_root=str(folder)).prepare(sample)


def learned(model_input: ModelInput) -> list[str]:
    """Decode each run of supervised tokens."""
    processor = tiny_processor()
    spans = text_spans(model_input, processor.tokenizer, processor.config.placeholder_ids)
    return [span.text for span in spans if span.is_supervised]


def error_of(row: Any) -> str:
    """Return reason and text of the error of a row that is refused when it is read or prepared."""
    from qwen2vl.data.formats import SampleError

    try:
        prepare(parse(row))
    except SampleError as error:
        return f"{error.reason}: {error}"
    raise AssertionError("the row is not refused")
