"""Dry-run report; tests/cli/test_dry_run.py tests the printed output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qwen2vl.recipes import tiny
from qwen2vl.train.dry_run.report import estimate_duration


def test_duration_is_estimated_from_the_last_training_log_line(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), output_dir=str(tmp_path))
    assert estimate_duration(config, 1000.0) is None
    lines = [{"step": 1, "tokens_per_second": 50.0}, {"step": 2, "tokens_per_second": 100.0}]
    evaluation = {"step": 2, "held_out": {"loss": 1.0}}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, evaluation])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert estimate_duration(config, 1000.0) == 10.0
