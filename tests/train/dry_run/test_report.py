"""What a run would do, told before it does it; tests/cli/test_dry_run.py holds what is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from qwen2vl.recipes import tiny
from qwen2vl.train.dry_run.report import seconds_left


def test_time_is_told_by_the_last_report_whatever_a_probe_wrote_behind_it(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), out=str(tmp_path))
    assert seconds_left(config, 1000.0) is None
    lines = [{"step": 1, "tokens_per_second": 50.0}, {"step": 2, "tokens_per_second": 100.0}]
    probe = {"step": 2, "held_out": {"loss": 1.0}}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, probe])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert seconds_left(config, 1000.0) == 10.0
