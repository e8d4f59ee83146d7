"""Metrics of the paper's benchmarks, by the rules of lmms-eval, VLMEvalKit, and strict ones.

    answer --text_distance, relaxed, vqa, ocrbench, multiple_choice, choice_sets, yes_no,
             open_answers, grounding--> score of an item --scores, intervals--> score of a set

Pure functions of the standard library, without state. Each takes a `style`: "lmms" and "vlmevalkit"
equal the functions of lmms-eval 0.7.3 and ms-vlmeval 0.0.20, slips included, but for what
differences.py lists (benchmarks/metrics_parity.py compares); "strict" is ours.
"""

from qwen2vl.eval.metrics.grounding import iou
from qwen2vl.eval.metrics.intervals import (
    bootstrap_interval,
    chance_upper_bound,
    ratio_interval,
    wilson_interval,
)
from qwen2vl.eval.metrics.scores import ItemScore, Score, Style, mean, summarize
from qwen2vl.eval.metrics.text_distance import (
    anls,
    character_error_rate,
    edit_distance,
    normalize_answer,
    normalize_line,
)

__all__ = [
    "ItemScore",
    "Score",
    "Style",
    "anls",
    "bootstrap_interval",
    "chance_upper_bound",
    "character_error_rate",
    "edit_distance",
    "iou",
    "mean",
    "normalize_answer",
    "normalize_line",
    "ratio_interval",
    "summarize",
    "wilson_interval",
]
