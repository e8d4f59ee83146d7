"""How a suite is drawn: quotas filled, answers spread, the same each time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from qwen2vl.eval import freeze
from qwen2vl.eval.freeze import SECTIONS, Quota, Section, draw_section
from qwen2vl.synth import Mixture, Spec

SMALL = Section(
    mixture=Mixture(weights={"shapes": 1}, split="held_out"),
    quotas={"count_all": Quota(10, 2), "exists": Quota(6, 3)},
)


def test_quotas_are_filled_and_no_answer_has_more_than_its_share() -> None:
    questions = [spec.questions[0] for spec in draw_section(SMALL)]
    assert Counter(q.task for q in questions) == {"count_all": 10, "exists": 6}
    answers = Counter((q.task, q.answer) for q in questions)
    assert set(answers.values()) == {2, 3}


def test_the_order_tells_nothing_and_is_always_the_same() -> None:
    specs = draw_section(SMALL)
    assert specs == draw_section(SMALL)
    assert [spec.index for spec in specs] != sorted(spec.index for spec in specs)


def test_the_file_holds_one_spec_a_line_that_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "SECTIONS", {"small": SMALL})
    freeze.freeze(tmp_path / "suite.json")
    text = (tmp_path / "suite.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    assert raw["seed"] == freeze.SEED
    assert [Spec.from_json(r) for r in raw["sections"]["small"]] == draw_section(SMALL)
    assert len(text.splitlines()) == 16 + 4


def test_every_section_is_of_held_out_wordings_and_judging_fonts() -> None:
    assert all(s.mixture.split == "held_out" for s in SECTIONS.values())
    assert all(s.mixture.fonts == "judge" for s in SECTIONS.values())
