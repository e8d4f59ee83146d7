"""Differences of lmms-eval, VLMEvalKit and the strict rules, and of ours from the kits, as data.

Every entry has an example that the tests compute. `STYLE_DIFFERENCES` explains why one set of
answers has different scores in the two kits. `KIT_DIFFERENCES` is complete for the functions that
benchmarks/metrics_parity.py compares: any other difference there fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen2vl.eval.metrics.scores import Style

__all__ = ["KIT_DIFFERENCES", "STYLE_DIFFERENCES", "KitDifference", "StyleDifference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleDifference:
    """A rule on which the styles disagree, with an answer that they score differently."""

    name: str
    rule: str
    function: str  # within this package: "relaxed.relaxed_accuracy"
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[Style, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class KitDifference:
    """A rule of a kit that its style does not follow, with an answer and our value of it."""

    name: str
    kit: Literal["lmms", "vlmevalkit"]
    metrics: tuple[str, ...]  # of metrics_parity.py; empty where that cannot compare it
    rule: str
    function: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: Any


ABCD = {"A": "dog", "B": "cat", "C": "bird", "D": "fish"}


def _by_style(lmms: Any, vlmevalkit: Any, strict: Any) -> dict[Style, Any]:
    return {"lmms": lmms, "vlmevalkit": vlmevalkit, "strict": strict}


STYLE_DIFFERENCES = (
    StyleDifference(
        name="anls_length",
        rule="the kits divide the distance by the length of the texts before normalization",
        function="text_distance.anls",
        arguments=("ab   cd", ["ab ce"]),
        values=_by_style(1 - 1 / 7, 1 - 1 / 7, 0.8),
    ),
    StyleDifference(
        name="chartqa_whitespace",
        rule="VLMEvalKit strips the prediction, lmms-eval does not",
        function="relaxed.relaxed_accuracy",
        arguments=("Yes\n", ["yes"]),
        values=_by_style(0.0, 1.0, 1.0),
    ),
    StyleDifference(
        name="chartqa_years",
        rule="the kits allow a year to be off by 5 %",
        function="relaxed.relaxed_accuracy",
        arguments=("1914", ["2014"]),
        values=_by_style(1.0, 1.0, 0.0),
    ),
    StyleDifference(
        name="chartqa_zero",
        rule="in the kits only the same text is right for 0",
        function="relaxed.relaxed_accuracy",
        arguments=("0.0", ["0"]),
        values=_by_style(0.0, 0.0, 1.0),
    ),
    StyleDifference(
        name="chartqa_separators",
        rule="Python's float reads no thousands separators",
        function="relaxed.relaxed_accuracy",
        arguments=("1000", ["1,000"]),
        values=_by_style(0.0, 0.0, 1.0),
    ),
    StyleDifference(
        name="chartqa_percent",
        rule="the kits divide by 100 where there is a %, so that 0.5 is right for 50%",
        function="relaxed.relaxed_accuracy",
        arguments=("0.5", ["50%"]),
        values=_by_style(1.0, 1.0, 0.0),
    ),
    StyleDifference(
        name="vqa_full_stop",
        rule="VLMEvalKit keeps a full stop after a digit; lmms-eval's look-behind has a slip",
        function="vqa.normalize_vqa_answer",
        arguments=("3.",),
        values=_by_style("3", "3.", "3"),
    ),
    StyleDifference(
        name="vqa_possessive",
        rule="lmms-eval separates 's from its word",
        function="vqa.normalize_vqa_answer",
        arguments=("Tom's",),
        values=_by_style("tom 's", "tom's", "tom's"),
    ),
    StyleDifference(
        name="vqa_nothing_left",
        rule="in the kits an article alone becomes nothing, which an empty answer equals",
        function="vqa.vqa_accuracy",
        arguments=("", ["A"] * 10),
        values=_by_style(1.0, 1.0, 0.0),
    ),
    StyleDifference(
        name="ocrbench_full_width",
        rule="lmms-eval alone folds full-width letters and digits to ASCII",
        function="ocrbench.ocrbench_hit",
        arguments=("abc", ["\uff21\uff22\uff23"]),
        options={"is_formula": False},
        values=_by_style(1.0, 0.0, 1.0),
    ),
    StyleDifference(
        name="choice_of_several",
        rule="lmms-eval ranks letters, VLMEvalKit reads only a single one",
        function="multiple_choice.extract_choice",
        arguments=("Both (A) and (C)", ABCD),
        values=_by_style("C", None, None),
    ),
    StyleDifference(
        name="choice_last_words",
        rule="VLMEvalKit reads a letter among the last five words only",
        function="multiple_choice.extract_choice",
        arguments=("(B) is right, since no other one fits", ABCD),
        values=_by_style("B", None, None),
    ),
    StyleDifference(
        name="choice_by_text",
        rule="VLMEvalKit accepts the only option whose text occurs",
        function="multiple_choice.extract_choice",
        arguments=("It must be a cat", ABCD),
        values=_by_style(None, "B", None),
    ),
    StyleDifference(
        name="choice_article",
        rule='the kits read "A dog" as the letter A',
        function="multiple_choice.extract_choice",
        arguments=("A dog", {"A": "cat", "B": "dog"}),
        values=_by_style("A", "A", "B"),
    ),
    StyleDifference(
        name="video_mme_first_letter",
        rule="VLMEvalKit takes the first capital A to D, also of a word",
        function="choice_sets.video_mme_choice",
        arguments=("Both show it, so (A)", ABCD),
        values=_by_style("A", "B", None),
    ),
    StyleDifference(
        name="mvbench_first_word",
        rule="lmms-eval searches for a letter in the text, VLMEvalKit in the first word",
        function="choice_sets.mvbench_correct",
        arguments=("The answer is B.", "B", ABCD),
        values=_by_style(True, False, True),
    ),
    StyleDifference(
        name="mvbench_unanswered",
        rule="lmms-eval leaves empty answers out of the mean",
        function="choice_sets.mvbench_accuracy",
        arguments=([("A", True), ("", False)],),
        values=_by_style(1.0, 0.5, 0.5),
    ),
    StyleDifference(
        name="yes_no_start",
        rule="lmms-eval searches the first four characters, VLMEvalKit for words",
        function="yes_no.parse_yes_no",
        arguments=("Not sure, yes",),
        values=_by_style("no", "yes", "yes"),
    ),
    StyleDifference(
        name="hallusion_default",
        rule="lmms-eval without a judge takes every answer without yes for no",
        function="yes_no.parse_hallusion_answer",
        arguments=("I cannot tell",),
        values=_by_style("no", None, None),
    ),
    StyleDifference(
        name="box_units",
        rule="lmms-eval reads shares in brackets, VLMEvalKit four numbers, strict Qwen2-VL's form",
        function="grounding.parse_box",
        arguments=("the 2 dogs(100,200),(300,400)", (1000, 1000)),
        values=_by_style(None, (2.0, 100.0, 200.0, 300.0), (100.0, 200.0, 300.0, 400.0)),
    ),
    StyleDifference(
        name="mmmu_open_numbers",
        rule="VLMEvalKit makes a choice of an open question, and compares no numbers",
        function="open_answers.mmmu_open_correct",
        arguments=("It is 1,000", ["1000"]),
        values=_by_style(True, False, True),
    ),
)

KIT_DIFFERENCES = (
    KitDifference(
        name="random_letter",
        kit="lmms",
        metrics=(),  # that run draws from the same seeds
        rule="where no letter can be read, lmms-eval draws one; None here, unless `draw` is given",
        function="choice_sets.mmmu_choice",
        arguments=("none of them", ABCD),
        options={"style": "lmms"},
        ours=None,
    ),
    KitDifference(
        name="judge",
        kit="vlmevalkit",
        metrics=(),
        rule="without `exact_matching` a judge reads what rules cannot, else a letter is drawn",
        function="multiple_choice.extract_choice",
        arguments=("A or B", ABCD),
        options={"style": "vlmevalkit"},
        ours=None,
    ),
    KitDifference(
        name="empty_answer_is_right",
        kit="vlmevalkit",
        metrics=("mvbench",),
        rule="MVBench's function takes an empty answer for right, and its task leaves it out",
        function="choice_sets.mvbench_correct",
        arguments=("", "B", ABCD),
        options={"style": "vlmevalkit"},
        ours=False,
    ),
    KitDifference(
        name="stated_answer",
        kit="vlmevalkit",
        metrics=(),  # ms-vlmeval 0.0.20 has not got the rule
        rule='the main branch of VLMEvalKit also reads a letter after "answer is"',
        function="multiple_choice.extract_choice",
        arguments=("The correct answer is **B**. Here's why: A is wrong", ABCD),
        options={"style": "vlmevalkit"},
        ours=None,
    ),
    KitDifference(
        name="missing_option",
        kit="lmms",
        metrics=(),
        rule='a missing option of MMBench has the text "nan", which occurs in "banana"; none here',
        function="multiple_choice.circular_correct",
        arguments=([("a banana", "A", {"A": "banana", "B": "apple"})],),
        options={"style": "lmms"},
        ours=True,
    ),
)
