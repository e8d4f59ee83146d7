"""Both kits' values on frozen answers, computed with lmms-eval 0.7.3 and VLMEvalKit.

benchmarks/metrics_parity.py compares 10,000 generated answers of each metric with the kits
themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.eval.metrics import choice_sets, iou
from qwen2vl.eval.metrics.grounding import contains_center, parse_box
from qwen2vl.eval.metrics.multiple_choice import extract_choice
from qwen2vl.eval.metrics.ocrbench import ocrbench_hit
from qwen2vl.eval.metrics.open_answers import mmmu_open_candidates, mmmu_open_correct
from qwen2vl.eval.metrics.relaxed import relaxed_accuracy
from qwen2vl.eval.metrics.scores import Style
from qwen2vl.eval.metrics.text_distance import anls
from qwen2vl.eval.metrics.vqa import normalize_vqa_answer, vqa_accuracy
from qwen2vl.eval.metrics.yes_no import MMEResult, mme_scores, parse_yes_no

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
CHOICES = {
    "A": "a cat",
    "B": "a dog",
    "C": "the sky",
    "D": "a tree",
}  # of the frozen multiple choice
KITS: tuple[Style, ...] = ("lmms", "vlmevalkit")

Compute = Callable[[dict[str, Any], Style], Any]


@pytest.mark.parametrize("style", KITS)
@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("anls", lambda v, style: round(anls(v["pred"], [v["gt"]], style=style), 6)),
        ("relaxed", lambda v, style: relaxed_accuracy(v["pred"], [v["target"]], style=style)),
        ("vqa_norm", lambda v, style: normalize_vqa_answer(v["raw"], style=style)),
        ("mme_yesno", lambda v, style: parse_yes_no(v["resp"], style=style)),
    ],
)
def test_values_of_both_kits(name: str, compute: Compute, style: Style) -> None:
    nothing = {"other": None, "Unknown": None, "Yes": "yes", "No": "no"}
    for vector in GOLDEN[name]:
        wanted = vector[style]
        assert compute(vector, style) == nothing.get(wanted, wanted), vector


@pytest.mark.parametrize("style", KITS)
def test_vqa_accuracy_by_the_number_of_matches(style: Style) -> None:
    for vector in GOLDEN["vqa_acc"]:
        matches = vector["n_match"]
        answers = ["yes"] * matches + [f"no {i}" for i in range(10 - matches)]
        assert vqa_accuracy("Yes", answers, style=style) == pytest.approx(vector["acc"])


def test_ocrbench_of_lmms_eval() -> None:
    for vector in GOLDEN["ocrbench"]:
        answers = vector["gt"] if isinstance(vector["gt"], list) else [vector["gt"]]
        formula = vector["dataset"] == "HME100k"
        found = ocrbench_hit(vector["pred"], answers, is_formula=formula, style="lmms")
        assert found == vector["score"], vector


@pytest.mark.parametrize("vector", GOLDEN["mcq"], ids=lambda v: repr(v["resp"]))
def test_multiple_choice(vector: dict[str, Any]) -> None:
    text = vector["resp"]
    assert extract_choice(text, CHOICES, style="lmms") == (vector["lmms_mcq"] or None)
    found = extract_choice(text, CHOICES, style="vlmevalkit")
    if "**B**" not in text:  # "stated_answer": the vectors are of a newer VLMEvalKit
        assert found == (vector["vlmevalkit_can_infer"] or None)
    letter = choice_sets.video_mme_choice(text, CHOICES, style="vlmevalkit")
    assert letter == (vector["vlmevalkit_videomme"] or None)
    # Where our parser reads nothing, the kit drew a letter at random: "random_letter".
    assert choice_sets.mmmu_choice(text, CHOICES, style="lmms") in (None, vector["mmmu"])
    right = choice_sets.mvbench_correct(text, "B", CHOICES, style="lmms")
    assert right == vector["mvbench_lmms_vs_B"]
    right = choice_sets.mvbench_correct(text, "B", CHOICES, style="vlmevalkit")
    assert right == (vector["mvbench_vlmevalkit_vs_(B)"] and text != "")  # "empty_answer_is_right"


def test_mme() -> None:
    pairs = GOLDEN["mme_agg"]["pairs"]
    results = [
        MMEResult(category="OCR", image=str(i), is_correct=bool(right))
        for i, pair in enumerate(pairs)
        for right in pair
    ]
    assert mme_scores(results)["total"] == pytest.approx(GOLDEN["mme_agg"]["score"])


def test_boxes_of_lmms_eval() -> None:
    for vector in GOLDEN["refcoco"]:
        box = parse_box(vector["text"], (1, 1), style="lmms") or (0, 0, 0, 0)
        assert list(box) == vector["parsed"], vector
    for vector in GOLDEN["iou"]:
        assert iou(vector["a"], vector["b"]) == pytest.approx(vector["iou"], abs=1e-6)
        assert (iou(vector["a"], vector["b"]) >= 0.5) == vector["acc50"]
        assert contains_center(vector["a"], vector["b"]) == vector["center"]


def test_open_questions_of_mmmu() -> None:
    for vector in GOLDEN["mmmu_open"]:
        found = mmmu_open_candidates(vector["resp"], style="lmms")
        assert sorted(map(str, found)) == sorted(vector["parsed"]), vector
        right = mmmu_open_correct(vector["resp"], [vector["gold"]], style="lmms")
        assert right == vector["ok"], vector
