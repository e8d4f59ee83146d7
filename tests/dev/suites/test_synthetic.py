"""Sampling of a suite: quotas are filled, answers are balanced, and the result is deterministic."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from dev.suites import synthetic as freeze
from dev.suites.synthetic import SECTIONS, Quota, Section, draw_section
from qwen2vl.synth import Mixture, Spec

SMALL = Section(
    mixture=Mixture(weights={"shapes": 1}, split="held_out"),
    quotas={"count_all": Quota(10, 2), "exists": Quota(6, 3)},
)


def test_quotas_and_their_maxima_of_equal_answers() -> None:
    questions = [spec.questions[0] for spec in draw_section(SMALL)]
    assert Counter(q.task for q in questions) == {"count_all": 10, "exists": 6}
    answers = Counter((q.task, q.answer) for q in questions)
    assert set(answers.values()) == {2, 3}


def test_order_is_shuffled_and_deterministic() -> None:
    specs = draw_section(SMALL)
    assert specs == draw_section(SMALL)
    assert [spec.index for spec in specs] != sorted(spec.index for spec in specs)


def test_file_holds_one_spec_per_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "SECTIONS", {"small": SMALL})
    freeze.freeze(tmp_path / "suite.json")
    text = (tmp_path / "suite.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    assert raw["seed"] == freeze.SEED
    assert [Spec.from_json(r) for r in raw["sections"]["small"]] == draw_section(SMALL)
    assert len(text.splitlines()) == 16 + 4


def test_every_section_uses_held_out_wordings_and_fonts() -> None:
    assert all(s.mixture.split == "held_out" for s in SECTIONS.values())
    assert all(s.mixture.fonts == "judge" for s in SECTIONS.values())
