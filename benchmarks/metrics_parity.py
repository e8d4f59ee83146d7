"""Compare our metrics with the functions of lmms-eval and VLMEvalKit, on generated answers.

    python benchmarks/harness_install.py lmms-eval LMMS
    python benchmarks/harness_install.py vlmeval VLMEVAL
    python benchmarks/metrics_parity.py LMMS VLMEVAL [--cases N] [--show N]

Each kit scores the same seeded cases with its own functions in its own environment. A value is
equal, or differs in a way that `qwen2vl.eval.metrics.differences` names, or is different, which
fails. Prints one line for results.md. Needs neither models nor data nor a network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from math import isclose
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from harness.answers import ANSWERS_IN_A_CASE, GENERATORS, Case
from harness_install import HARNESSES
from record import format_result

from qwen2vl.eval.metrics import choice_sets, summarize
from qwen2vl.eval.metrics.differences import KIT_DIFFERENCES
from qwen2vl.eval.metrics.grounding import parse_box, referring_accuracy
from qwen2vl.eval.metrics.multiple_choice import circular_correct, extract_choice
from qwen2vl.eval.metrics.ocrbench import ocrbench_hit
from qwen2vl.eval.metrics.open_answers import (
    covered_text_match,
    mathvista_correct,
    mmmu_open_correct,
    mtvqa_correct,
)
from qwen2vl.eval.metrics.relaxed import relaxed_accuracy
from qwen2vl.eval.metrics.scores import ItemScore, Style
from qwen2vl.eval.metrics.text_distance import anls
from qwen2vl.eval.metrics.vqa import normalize_vqa_answer, vqa_accuracy
from qwen2vl.eval.metrics.yes_no import (
    HallusionResult,
    MMEResult,
    hallusion_scores,
    mme_scores,
    parse_hallusion_answer,
    parse_yes_no,
)

SEED = 17
HARNESS = Path(__file__).resolve().parent / "harness"


def _hallusion(c: Case, style: Style) -> list[float]:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    results = [
        HallusionResult(
            **dict(zip(names, row[:5], strict=True)),
            is_correct=parse_hallusion_answer(row[5], style=style) == ("no", "yes")[int(row[6])],
        )
        for row in c["rows"]
    ]
    scores = hallusion_scores(results, style=style)
    return [scores[name] for name in ("aAcc", "fAcc", "qAcc")]


def _drawing(function: Callable[..., str | None], c: Case, style: Style) -> str | None:
    """Draw a letter where none can be read, from the seed that the kit has for the case."""
    return function(c["text"], c["choices"], style=style, draw=Random(c["seed"]))


def _box(c: Case, style: Style) -> list[float] | None:
    size = (1, 1) if style == "lmms" else tuple(c["size"])  # lmms-eval keeps shares
    box = parse_box(c["text"], size, style=style)
    return None if box is None else list(box)


def _perception(c: Case, style: Style) -> int:
    letter = choice_sets.perception_test_choice(c["text"], c["choices"], style=style)
    return "ABCD".index(letter) if letter else -1


def _mathvista(c: Case, style: Style) -> bool:
    names = ("question_type", "answer_type", "choices", "precision")
    options = {name: c[name] for name in names}
    return mathvista_correct(c["text"], c["answer"], **options, style=style)


OURS: Mapping[str, Callable[[Case, Style], Any]] = {
    "anls": lambda c, style: anls(c["text"], c["answers"], style=style),
    "relaxed_accuracy": lambda c, style: relaxed_accuracy(c["text"], [c["answer"]], style=style),
    "vqa_normalization": lambda c, style: normalize_vqa_answer(c["text"], style=style),
    "vqa_accuracy": lambda c, style: vqa_accuracy(c["text"], c["answers"], style=style),
    "ocrbench": lambda c, style: ocrbench_hit(
        c["text"], c["answers"], is_formula=c["is_formula"], style=style
    ),
    "multiple_choice": lambda c, style: extract_choice(c["text"], c["choices"], style=style),
    "mmmu_choice": lambda c, style: _drawing(choice_sets.mmmu_choice, c, style),
    "mmt_choice": lambda c, style: _drawing(choice_sets.mmt_choice, c, style),
    "egoschema": lambda c, style: _drawing(choice_sets.egoschema_choice, c, style),
    "ai2d": lambda c, style: choice_sets.option_letter_match(
        c["text"], c["letter"], c["choices"], style=style
    ),
    "realworldqa": lambda c, style: choice_sets.realworldqa_correct(
        c["text"], c["answer"], c["choices"], style=style
    ),
    "mvbench": lambda c, style: choice_sets.mvbench_correct(
        c["text"], c["letter"], c["choices"], style=style
    ),
    "mvbench_aggregate": lambda c, style: choice_sets.mvbench_accuracy(c["rows"], style=style),
    "perception_test": _perception,
    "video_mme": lambda c, style: choice_sets.video_mme_choice(
        c["text"], c["choices"], style=style
    ),
    "circular": lambda c, style: circular_correct(c["rotations"], style=style),
    "yes_no": lambda c, style: parse_yes_no(c["text"], style=style),
    "mme": lambda c, style: mme_scores(
        MMEResult(category=name, image=image, is_correct=right) for name, image, right in c["rows"]
    )["total"],
    "hallusion_bench": _hallusion,
    "mmmu_open": lambda c, style: mmmu_open_correct(c["text"], [c["answer"]], style=style),
    "mtvqa": lambda c, style: mtvqa_correct(c["text"], c["answer"], style=style),
    "mathvista": _mathvista,
    "vcr": lambda c, style: list(
        covered_text_match(c["text"], c["covered"], str.split, is_chinese=False)
    ),
    "box": _box,
    "refcoco": lambda c, style: bool(
        referring_accuracy(c["text"], c["truth"], tuple(c["size"]), style=style).value
    ),
    "mmstar_aggregate": lambda c, style: (
        summarize(
            (ItemScore(value=value, group=group) for group, value in c["rows"]), over="groups"
        ).value
    ),
}


def main() -> None:
    """Generate, score three times, compare; exit with 1 where a difference has no name."""
    given = _arguments()
    cases = {
        name: [
            {**generate(Random(f"{SEED} {name} {i}")), "seed": i}
            for i in range(given.cases // ANSWERS_IN_A_CASE.get(name, 1))
        ]
        for name, generate in GENERATORS.items()
    }
    environments: dict[Style, Path] = {"lmms": given.lmms, "vlmevalkit": given.vlmevalkit}
    numbers: dict[str, Any] = {"answers_of_each": given.cases, "seed": SEED}
    total = Counter[str]()
    for style, environment in environments.items():
        found = _score_by_kit(style, environment.resolve(), cases)
        compared = {
            name: _compare(name, style, cases[name], values, given.show)
            for name, values in found.items()
        }
        numbers[style] = {
            "requirement": HARNESSES[_harness(style)].requirement,
            "metrics": {name: dict(sorted(counts.items())) for name, counts in compared.items()},
        }
        total.update(sum(compared.values(), Counter()))
    named = {name: count for name, count in total.items() if name not in ("equal", "different")}
    numbers["total"] = {
        "equal": total["equal"],
        "named": sum(named.values()),
        "different": total["different"],
    }
    print(format_result(numbers))
    if total["different"]:
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lmms", type=Path, help="environment of lmms-eval")
    parser.add_argument("vlmevalkit", type=Path, help="environment of VLMEvalKit")
    parser.add_argument("--cases", type=int, default=10_000, help="answers for each metric")
    parser.add_argument("--show", type=int, default=0, help="differences of each metric to print")
    return parser.parse_args()


def _harness(style: Style) -> str:
    return "lmms-eval" if style == "lmms" else "vlmeval"


def _score_by_kit(
    style: Style, environment: Path, cases: Mapping[str, list[Case]]
) -> dict[str, list[Any]]:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
        command = [str(environment / "bin" / "python")]
        if style == "lmms":
            command += [str(HARNESS / "lmms_metrics.py")]
        else:
            command += [str(HARNESS / "run_module.py"), "vlmeval_metrics"]
        command += [str(folder / "cases.json"), str(folder / "found.json")]
        print("+", *command, file=sys.stderr)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "LMUData": temporary, "VERBOSE": ""}
        subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.DEVNULL)
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _compare(
    metric: str, style: Style, cases: list[Case], values: list[Any], show: int
) -> Counter[str]:
    counts = Counter[str](equal=0, different=0)
    for case, theirs in zip(cases, values, strict=True):
        ours = OURS[metric](case, style)
        verdict = _verdict(metric, style, case, ours, theirs)
        counts[verdict] += 1
        if verdict == "different" and counts[verdict] <= show:
            print(
                f"{metric}, {style}: {case}\n    ours {ours!r}, theirs {theirs!r}", file=sys.stderr
            )
    return counts


def _verdict(metric: str, style: Style, case: Case, ours: Any, theirs: Any) -> str:
    if _is_equal(ours, theirs):
        return "equal"
    names = (d.name for d in KIT_DIFFERENCES if d.kit == style and metric in d.metrics)
    return next((name for name in names if EXPLANATIONS[name](case, ours, theirs)), "different")


EXPLANATIONS: Mapping[str, Callable[[Case, Any, Any], bool]] = {
    "empty_answer_is_right": lambda case, ours, theirs: not case["text"].strip() and not ours,
}


def _is_equal(ours: Any, theirs: Any) -> bool:
    """Compare values; numbers may differ in the last digits, where sums have another order."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return isclose(ours, theirs, rel_tol=1e-12, abs_tol=1e-12)
    return bool(ours == theirs)


if __name__ == "__main__":
    main()
