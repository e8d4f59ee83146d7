"""Scores cases by lmms-eval's own functions, in its environment: `lmms_metrics.py CASES RESULTS`.

Reads {metric: [case, ...]} and writes {metric: [value, ...]} as JSON. A case that the kit cannot
score gives {"raises": NAME}; letters that it draws at random are drawn from the seed of the case.
Packages that the functions do not need are replaced by empty ones. Imports nothing of this package.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

Case = dict[str, Any]


def _task(name: str) -> Any:
    return importlib.import_module(f"lmms_eval.tasks.{name}")


def _stub(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module


def _adapters() -> dict[str, Callable[[Case], Any]]:
    os.environ.setdefault("HF_HOME", ".")
    metrics = importlib.import_module("lmms_eval.api.metrics")
    mcq = _task("_task_utils.mcq_extract").extract_mcq_answer
    mmmu_mcq = _task("_task_utils.mmmu_mcq_utils")
    egoschema, mmt = (_task(n) for n in ("egoschema.utils", "mmt.utils"))
    textvqa, vqa = _task("textvqa.utils"), _task("_task_utils.vqa_eval_metric")
    mmmu, mme, mvbench = _task("mmmu.utils"), _task("mme.utils"), _task("mvbench.utils")
    refcoco, relaxed = _task("refcoco.utils_rec"), _task("chartqa.utils").relaxed_correctness
    ai2d_filter = _task("ai2d.utils").MultiChoiceRegexFilter(regex_pattern="([A-Z])\\.")
    perception, realworldqa = _task("perceptiontest.val.utils"), _task("realworldqa.utils")
    ocrbench, mtvqa, mmstar = (_task(f"{n}.utils") for n in ("ocrbench", "mtvqa", "mmstar"))
    return {
        "anls": lambda c: metrics.anls(c["answers"], [c["text"]])["anls"],
        "relaxed_accuracy": lambda c: float(relaxed(c["text"], c["answer"])),
        "vqa_normalization": lambda c: vqa.EvalAIAnswerProcessor()(c["text"]),
        "vqa_accuracy": lambda c: textvqa.textvqa_process_results(
            {"answers": list(c["answers"]), "question_id": 0}, [c["text"]]
        )["exact_match"],
        "ocrbench": lambda c: ocrbench.ocrbench_process_results(
            {
                "answer": c["answers"],
                "dataset": "HME100k" if c["is_formula"] else "other",
                "question_type": "",
            },
            [c["text"]],
        )["ocrbench_accuracy"]["score"],
        "multiple_choice": lambda c: mcq(c["text"], list(c["choices"])) or None,
        "mmmu_choice": lambda c: mmmu_mcq.parse_mmmu_multi_choice_response(
            c["text"], list(c["choices"]), c["choices"]
        ),
        "mmt_choice": lambda c: mmt.parse_multi_choice_response(
            c["text"].strip(), list(c["choices"])
        ),
        "egoschema": lambda c: egoschema.parse_multi_choice_response(
            c["text"], list(c["choices"]), c["choices"]
        )[0],
        "ai2d": lambda c: bool(
            metrics.exact_match_hf_evaluate(
                [ai2d_filter.apply([[c["text"]]], [{}])[0]],
                [c["letter"]],
                ignore_case=True,
                ignore_punctuation=True,
            )["exact_match"]
        ),
        "realworldqa": lambda c: bool(
            realworldqa.realworldqa_process_results({"answer": c["answer"]}, [c["text"]])[
                "exact_match"
            ]
        ),
        "mvbench": lambda c: bool(mvbench.mcq_acc(c["letter"], c["text"])),
        "mvbench_aggregate": lambda c: (
            mvbench.mvbench_aggregate_results(
                [{"pred_answer": text, "score": right} for text, right in c["rows"]]
            )
            / 100
        ),
        "perception_test": lambda c: perception.perceptiontest_val_process_results_mc(
            {"answer_id": 0, "video_name": "", "question": ""}, [c["text"]]
        )["accuracy"]["pred_id"],
        "video_mme": lambda c: _task("videomme.utils").extract_characters_regex(c["text"]) or None,
        "circular": _circular,
        "yes_no": lambda c: {"other": None}.get(p := mme.parse_pred_ans(c["text"]), p),
        "mme": lambda c: mme.mme_aggregate_results(
            [{"category": k, "question_id": i, "score": float(s)} for k, i, s in c["rows"]]
        ),
        "hallusion_bench": _hallusion,
        "mmmu_open": lambda c: mmmu.eval_open(c["answer"], mmmu.parse_open_response(c["text"])),
        "mtvqa": lambda c: bool(
            mtvqa.mtvqa_process_results({"answer": c["answer"], "category": ""}, [c["text"]])[
                "mtvqa_score"
            ]["score"]
        ),
        "mathvista": _mathvista(metrics.levenshtein_distance),
        "vcr": _vcr(),
        "box": lambda c: (
            None if (box := refcoco.parse_float_sequence_within(c["text"])) == [0, 0, 0, 0] else box
        ),
        "refcoco": _refcoco(refcoco),
        "mmstar_aggregate": lambda c: mmstar.mmstar_aggregate_results(
            [{"l2_category": g, "score": s} for g, s in c["rows"]]
        ),
    }


def _circular(case: Case) -> bool:
    pandas = importlib.import_module("pandas")
    evaluator = _task("mmbench.mmbench_evals").MMBench_Evaluator()
    rows = [
        {
            "index": i,
            "prediction": text,
            **{letter: choices.get(letter, float("nan")) for letter in "ABCD"},
        }
        for i, (text, _, choices) in enumerate(case["rotations"])
    ]
    right = {i: letter for i, (_, letter, _) in enumerate(case["rotations"])}
    frame = pandas.DataFrame(rows)
    return bool(evaluator.eval_sub_data(frame, right, static_only=True))


def _hallusion(case: Case) -> list[float]:
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    aggregate = _task("hallusion_bench.evaluate_hb").hb_aggregation_result_intern
    return [
        aggregate(
            [
                {
                    **dict(zip(names, row[:5], strict=True)),
                    "model_prediction": row[5],
                    "gt_answer": row[6],
                }
                for row in case["rows"]
            ],
            name,
        )
        for name in ("aAcc", "fAcc", "qAcc")
    ]


def _mathvista(distance: Callable[[str, str], int]) -> Callable[[Case], bool]:
    _stub("Levenshtein", distance=distance)
    importlib.import_module("lmms_eval.llm_judge").get_server = lambda **options: None  # no judge
    evaluator_class = _task("mathvista.mathvista_evals").MathVistaEvaluator
    evaluator = evaluator_class.__new__(evaluator_class)

    def score(c: Case) -> bool:
        normalized = evaluator.normalize_extracted_answer(
            c["text"], c["choices"], c["question_type"], c["answer_type"], c["precision"]
        )
        return bool(evaluator.safe_equal(normalized, c["answer"]))

    return score


def _vcr() -> Callable[[Case], list[float]]:
    _stub("spacy", load=None)
    _stub("spacy.cli", download=None)
    _stub("nltk")
    _stub("nltk.util", ngrams=lambda t, n: zip(*(t[i:] for i in range(n)), strict=False))
    vcr = _task("vcr_wiki.utils")
    vcr.rouge = SimpleNamespace(compute=lambda **options: {"rouge1": 0.0})  # codespell:ignore rouge
    vcr.nlp = {"en": lambda text: [SimpleNamespace(text=word) for word in text.split()]}

    def score(case: Case) -> list[float]:
        found = vcr.vcr_process_results_single(case["covered"], case["text"], "en")
        return [found["exact_match"], found["jaccard"]]

    return score


def _refcoco(refcoco: Any) -> Callable[[Case], bool]:
    def score(case: Case) -> bool:
        height, width = case["size"]
        truth = [v / s for v, s in zip(case["truth"], (width, height) * 2, strict=True)]
        box = refcoco.parse_float_sequence_within(case["text"])
        return bool(refcoco.compute_accuracy(truth, box, 0.5))

    return score


def _scored(adapter: Callable[[Case], Any], case: Case) -> Any:
    random.seed(case["seed"])
    try:
        return adapter(case)
    except Exception as error:
        return {"raises": type(error).__name__}


def main() -> None:
    """Score all cases."""
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    adapters = _adapters()
    found = {
        name: [_scored(adapters[name], case) for case in listed]
        for name, listed in cases.items()
        if name in adapters
    }
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
