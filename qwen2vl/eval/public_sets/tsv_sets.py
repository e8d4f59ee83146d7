"""Rows of VLMEvalKit's TSV files, with its prompts for Qwen2-VL.

A row has `index`, `image` (base64, or the text of a list of them), `question`, `answer`, and for
multiple choice one column for each option. MMMU's open questions become a choice between the
reference and "Other Answers", as the kit does. Prompts are the closest public ones to the authors'.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qwen2vl.errors import InputError
from qwen2vl.eval.public_sets.items import (
    Metric,
    PublicItem,
    Row,
    column,
    option_lines,
    text_list,
    user_message,
)

__all__ = ["TSV_METRICS", "tsv_parser"]

VQA = "\nPlease try to answer the question with short words or phrases if possible."
CHOICE = "Please select the correct answer from the options above."
CHOICE_CHINESE = "请直接回答选项字母。"
YES_NO = " Please answer yes or no."

# Beginning of the name of a TSV file -> metric.
TSV_METRICS: dict[str, Metric] = {
    "DocVQA": "anls",
    "InfoVQA": "anls",
    "ChartQA": "relaxed_accuracy",
    "TextVQA": "vqa_accuracy",
    "OCRBench": "ocrbench",
    "AI2D": "ai2d",
    "MME": "mme",
    "MMBench": "mmbench",
    "MMStar": "multiple_choice",
    "MMMU": "mmmu",
    "MMT-Bench": "mmt_bench",
    "RealWorldQA": "realworldqa",
    "HallusionBench": "hallusion_bench",
    "MTVQA": "mtvqa",
    "RefCOCO": "refcoco",
}
FORMULAS = "Handwritten Mathematical Expression Recognition"
LETTERS = "ABCDEFGHI"


def tsv_parser(file_name: str) -> Callable[[Row, Path], list[PublicItem]]:
    """Return the function that parses rows of a TSV file, by the beginning of its name.

    Raises:
        InputError: the set is unknown.
    """
    for name, metric in TSV_METRICS.items():
        if file_name.startswith(name):
            return partial(_parse_rows, metric=metric)
    raise InputError(f"{file_name}: unknown set; known are {', '.join(sorted(TSV_METRICS))}")


def _parse_rows(row: Row, media: Path, *, metric: Metric) -> list[PublicItem]:
    return [_parse_row(row, metric)]


def _parse_row(row: Row, metric: Metric) -> PublicItem:
    choices = {c: str(row[c]) for c in LETTERS if row.get(c) not in (None, "")}
    answers = tuple(text_list(row["answer"])) if row.get("answer") not in (None, "") else ()
    text = _prompt(row, metric, choices)
    if metric == "mmmu" and not choices and answers:
        choices, answers = {"A": answers[0], "B": "Other Answers"}, ("A",)
    if metric in ("mme", "hallusion_bench"):
        answers = tuple(answer.lower() for answer in answers)
    return PublicItem(
        name=str(column(row, "index")),
        messages=user_message(text, *_images(row)),
        answers=() if metric == "refcoco" else answers,
        metric=metric,
        group=row.get("category") or row.get("split") or "",
        choices=choices,
        details=_details(row, metric),
    )


def _prompt(row: Row, metric: Metric, choices: dict[str, str]) -> str:
    question = column(row, "question")
    if choices:
        hint = f"Hint: {row['hint']}\n" if row.get("hint") else ""
        text = f"{hint}Question: {question}\nOptions:\n{option_lines(choices)}\n"
        is_chinese = metric != "mmmu" and re.search("[\u4e00-\u9fff]", text)
        return text + (CHOICE_CHINESE if is_chinese else CHOICE)
    if metric == "mmmu":
        return f"Question: {question}"
    if metric == "hallusion_bench":
        return question + YES_NO
    if metric in ("mme", "refcoco"):  # say themselves how to answer
        return question
    return question + VQA


def _images(row: Row) -> list[dict[str, Any]]:
    encoded = text_list(column(row, "image"))
    try:
        decoded = [base64.b64decode(text, validate=True) for text in encoded]
    except binascii.Error as error:
        raise InputError(
            f"row {row.get('index')}: the image is no base64: {error}; an image that only names "
            "another row is resolved by read_tsv_rows"
        ) from error
    return [{"type": "image", "image": data} for data in decoded]


def _details(row: Row, metric: Metric) -> dict[str, Any]:
    index = str(row["index"])
    if metric == "ocrbench":
        return {"is_formula": row.get("category") == FORMULAS}
    if metric == "mme":
        return {"image": column(row, "image_path")}
    if metric == "mmbench":
        return {"question": str(row.get("g_index") or int(index) % 1_000_000)}
    if metric == "hallusion_bench":
        *_, set_id, figure_id, question_id = index.split("_")
        ids = {"set_id": set_id, "figure_id": figure_id, "question_id": question_id}
        return {
            "category": row.get("category", ""),
            "subcategory": column(row, "l2-category"),
            **ids,
        }
    if metric == "refcoco":
        height, width = (int(float(column(row, name))) for name in ("height", "width"))
        return {"box": _box(row, width, height), "size": (height, width)}
    return {}


def _box(row: Row, width: int, height: int) -> tuple[float, ...]:
    """Return the box in pixels, from its columns, or else from the text of the answer."""
    names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    if all(row.get(name) not in (None, "") for name in names):
        return tuple(float(row[name]) for name in names)
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", str(column(row, "answer")))]
    if len(numbers) != 4:
        raise InputError(f"RefCOCO, row {row['index']}: the answer is no box: {row['answer']!r}")
    scales = (width, height) * 2 if max(numbers) <= 1.5 else (1, 1, 1, 1)
    return tuple(n * scale for n, scale in zip(numbers, scales, strict=True))
