"""The progress line of training: fixed fields, anomalies, and evaluations."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from qwen2vl.cli.progress import Heartbeat, ProgressFormatter

RECORD: dict[str, Any] = {
    "step": 20,
    "steps": 200,
    "stage": "see",
    "loss": 1.2345,
    "seconds": 30.0,
    "tokens_per_second": 12345.6,
    "images_per_second": 88.2,
    "data_wait": 0.013,
    "bad_samples": 0,
    "skipped": 0,
    "families": {
        "text": {"loss": 2.0, "exact_match": 0.125},
        "shapes": {"loss": 0.5, "exact_match": 1.0},
    },
}


def later(**values: Any) -> str:
    progress = ProgressFormatter()
    progress(RECORD, 90)
    return progress({**RECORD, "step": 40, **values}, 120)


def test_training_record() -> None:
    assert ProgressFormatter()(RECORD, 90) == (
        "   1.5 min  20/200 see  loss 1.234  12,346 tok/s  88 img/s  wait 1%  ETA 4 min"
        "  | text 2.000/12%  shapes 0.500/100%"
    )


def test_the_eta_of_a_later_record_is_that_of_the_steps_since_the_one_before() -> None:
    assert "  ETA 4 min  |" in later()  # 160 steps of 1.5 s
    assert "  ETA 2 min  |" in later(seconds=15.0)


def test_the_first_eta_of_a_resumed_run_counts_its_own_steps() -> None:
    assert "ETA 9 min" in ProgressFormatter(first_step=10)(RECORD, 90)  # 180 steps of 3 s


def test_the_epoch_of_a_stage_with_data_is_shown() -> None:
    assert "  20/200 see  epoch 1.50  loss" in ProgressFormatter()({**RECORD, "epoch": 1.5}, 90)


def test_the_last_record_has_no_eta() -> None:
    progress = ProgressFormatter()
    progress(RECORD, 90)
    assert "ETA" not in progress({**RECORD, "step": 200}, 120)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"mfu": 0.4123}, "  MFU 41.2%  wait"),
        ({"bad_samples": 3}, "  3 bad samples  |"),
        ({"skipped": 1}, "  1 spikes skipped  |"),
        ({"loss": None}, "  loss -  "),
    ],
)
def test_optional_fields_and_anomalies(values: dict[str, Any], text: str) -> None:
    assert text in later(**values)


@pytest.mark.parametrize(
    ("name", "over_mean", "shares", "text"),
    [
        ("data_wait", 2.5, {"data_wait": 0.3}, "slow: rank 3 (data 2.5x)"),
        ("data_wait", 2.5, {"data_wait": 0.01}, None),
        ("flops", 1.31, {}, "slow: rank 3 (work 1.3x)"),
        ("flops", 1.05, {}, None),
        ("optimizer", 1.5, {"phases": {"optimizer": 0.2}}, "slow: rank 3 (optimizer 1.5x)"),
        ("optimizer", 1.5, {"phases": {"optimizer": 0.01}}, None),
        ("other", 9.0, {"phases": {"other": 0.5}}, None),
    ],
)
def test_straggler_ranks_are_reported(
    name: str, over_mean: float, shares: dict[str, Any], text: str | None
) -> None:
    line = later(slowest={name: {"rank": 3, "over_mean": over_mean}}, **shares)
    assert text is None or text in line
    assert ("slow:" in line) == (text is not None)


def test_evaluation_record() -> None:
    line = {
        "step": 500,
        "held_out": {
            "loss": 1.5,
            "vision_gain": 0.25,
            "compared": 40,
            "families": {"text": {"loss": 2.0, "vision_gain": 0.5}, "text_only": {"loss": 1.0}},
        },
        "mini": {
            "text": {"accuracy": 0.5, "character_error_rate": 0.0671},
            "shapes": {"accuracy": 0.8},
        },
    }
    assert ProgressFormatter()(line, 60) == (
        "   1.0 min  500 validation  loss 1.500  vision gain 0.250"
        "  | text 2.000 gain 0.500  text_only 1.000  | mini text 6.7% CER  shapes 80%"
    )


def test_evaluation_records_do_not_change_the_eta() -> None:
    progress = ProgressFormatter()
    progress(RECORD, 90)
    progress({"step": 30, "held_out": None}, 100)
    assert "ETA 4 min" in progress({**RECORD, "step": 40}, 120)


def test_the_heartbeat_names_the_activity_until_it_is_stopped(
    capfd: pytest.CaptureFixture[str],
) -> None:
    heartbeat = Heartbeat(interval=0.02)
    heartbeat.start()
    time.sleep(0.1)  # without an activity nothing is shown
    heartbeat.activity = "loading the model"
    time.sleep(0.2)
    heartbeat.stop()
    time.sleep(0.1)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(re.fullmatch(r"qwen2vl: 0\.\d s: loading the model", line) for line in lines)
    heartbeat.stop()
    time.sleep(0.1)
    assert capfd.readouterr().err == ""
