"""Scores cases by VLMEvalKit's own functions, in its environment.

    run_module.py vlmeval_metrics CASES RESULTS

As lmms_metrics.py. What the kit reads and writes as tables is handed over in memory. Imports none
of this package.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas

Case = dict[str, Any]


def _module(name: str) -> Any:
    return importlib.import_module(f"vlmeval.{name}")


def _with_table(module: Any, function: Callable[[str], Any], rows: list[Case]) -> Any:
    """Call a function that loads a table; return what it returns, or else what it writes."""
    written: list[Any] = []
    module.load = lambda path: pandas.DataFrame(rows)
    module.dump = lambda value, path: written.append(value)
    module.get_intermediate_file_path = lambda *arguments: ""
    returned = function("")
    return written[-1] if returned is None else returned


def _adapters() -> dict[str, Callable[[Case], Any]]:
    vqa, yes_no = _module("dataset.utils.vqa_eval"), _module("dataset.utils.yorn")
    matching, choice = _module("utils.matching_util"), _module("dataset.utils.multiple_choice")
    mvbench, video_mme = _module("dataset.utils.mvbench"), _module("dataset.utils.videomme")

    def by_line(c: Case, method: str, dataset: str) -> float:
        answers = c.get("answers") or [c["answer"]]
        line = {"answer": repr(answers), "prediction": c["text"]}
        return float(vqa.hit_calculate([vqa.process_line(line, method=method)], dataset)[0])

    def infer(c: Case) -> str | None:
        return matching.can_infer(c["text"], dict(c["choices"])) or None

    return {
        "anls": lambda c: by_line(c, "anls", "DocVQA"),
        "relaxed_accuracy": lambda c: by_line(c, "relaxed_accuracy", "ChartQA"),
        "vqa_normalization": lambda c: vqa.process_answer(c["text"]),
        "vqa_accuracy": lambda c: by_line(c, "vqa_score", "TextVQA"),
        "ocrbench": _ocrbench,
        **dict.fromkeys(("multiple_choice", "mmmu_choice", "mmt_choice"), infer),
        "ai2d": lambda c: infer(c) == c["letter"],
        "mvbench": lambda c: mvbench.check_ans(
            c["text"], f"({c['letter']}) {c['choices'][c['letter']]}"
        ),
        "video_mme": lambda c: video_mme.extract_characters_regex(c["text"]) or None,
        "circular": lambda c: _circular(choice, c),
        "yes_no": lambda c: {"Unknown": None}.get(
            p := yes_no.YOrN_Extraction(c["text"]), p.lower()
        ),
        "mme": lambda c: _mme(yes_no, c),
        "hallusion_bench": lambda c: _hallusion(yes_no, c),
        "mmmu_open": lambda c: (
            matching.can_infer(c["text"], {"A": c["answer"], "B": "Other Answers"}) == "A"
        ),
        "mtvqa": _mtvqa(),
        "mathvista": _mathvista,
        "vcr": _vcr(),
        "box": lambda c: _box(c),
        "refcoco": _refcoco,
    }


def _ocrbench(case: Case) -> float:
    module = _module("dataset.utils.ocrbench")
    module.tqdm = lambda values: values
    module.logger = SimpleNamespace(info=lambda *arguments: None)
    category = "Handwritten Mathematical Expression Recognition"
    row = {
        "prediction": case["text"],
        "answer": repr(case["answers"]),
        "category": category if case["is_formula"] else "Doc-oriented VQA",
    }
    return float(_with_table(module, module.OCRBench_eval, [row])["Final Score"])


def _circular(module: Any, case: Case) -> bool:
    rows = [
        {"GT": letter, "prediction": text, **choices} for text, letter, choices in case["rotations"]
    ]
    found = module.prefetch_circular_group(pandas.DataFrame(rows))
    return found is not None and bool(found["hit"])  # None: a judge is asked, or it is wrong


def _mme(module: Any, case: Case) -> float:
    rows = [{"category": c, "image_path": i, "score": s} for c, i, s in case["rows"]]
    table = _with_table(module, module.MME_rating, rows)
    return float(table["perception"][0] + table["reasoning"][0])


def _hallusion(module: Any, case: Case) -> list[float]:
    rows = []
    for category, subcategory, set_id, figure, question, text, truth in case["rows"]:
        right = module.YOrN_Extraction(text) == {"1": "Yes", "0": "No"}[truth]
        index = f"{category}_{subcategory}_0_{set_id}_{figure}_{question}"
        rows.append({"index": index, "l2-category": subcategory, "score": right})
    table = _with_table(module, module.Hallusion_rating, rows)
    return [float(table[name][0]) / 100 for name in ("aAcc", "fAcc", "qAcc")]


def _mtvqa() -> Callable[[Case], bool]:
    module = _module("dataset.image_vqa")

    def score(case: Case) -> bool:
        row = {"prediction": case["text"], "answer": case["answer"], "category": "x"}
        return bool(_with_table(module, module.MTVQADataset.evaluate, [row])["Average"])

    return score


def _mathvista(case: Case) -> bool:
    line = {
        "question_type": case["question_type"],
        "answer_type": case["answer_type"],
        "answer": case["answer"],
        "choices": repr(case["choices"]),
        "res": case["text"],
        "prediction": case["text"],
    }
    if case["choices"]:
        line["answer_option"] = "ABCDE"[case["choices"].index(case["answer"])]
    return bool(_module("dataset.utils.mathvista").post_check(line, prefetch=False))


def _vcr() -> Callable[[Case], list[float]]:
    nltk = ModuleType("nltk.util")
    nltk.__dict__["ngrams"] = lambda t, n: zip(*(t[i:] for i in range(n)), strict=False)
    sys.modules.update({"nltk": ModuleType("nltk"), "nltk.util": nltk})
    vcr = _module("dataset.vcr")
    vcr.tokenize = lambda text, language: text.split()
    no_scores = SimpleNamespace(compute=lambda **options: {"rouge1": 0.0})

    def score(case: Case) -> list[float]:
        if not vcr.rough_filter(case["text"]):
            return [0.0, 0.0]
        found = vcr.find_best_match(case["covered"], case["text"], "en", no_scores)
        return [found["exact_match"], found["jaccard"]]

    return score


def _box(case: Case) -> list[float] | None:
    dataset, (height, width) = _module("dataset.refcoco").RefCOCODataset, case["size"]
    numbers = dataset._parse_prediction(case["text"])
    box = None if numbers is None else dataset._to_absolute(numbers, width, height)
    return None if box is None else list(map(float, box))


def _refcoco(case: Case) -> bool:
    box, dataset = _box(case), _module("dataset.refcoco").RefCOCODataset
    return box is not None and bool(dataset._compute_iou(box, case["truth"]) >= 0.5)


def _scored(adapter: Callable[[Case], Any], case: Case) -> Any:
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
