"""Sets with pictures and short answers, in lmms-lab's columns: documents, charts, text, boxes.

DocVQA, InfoVQA, ChartQA, TextVQA, OCRBench, MTVQA, MME, HallusionBench, RefCOCO, RefCOCO+ and
RefCOCOg. Prompts are those of lmms-eval 0.7.3, but for RefCOCO, where its prompt asks for a form of
boxes that Qwen2-VL was not trained on.
"""

from __future__ import annotations

import ast
from io import BytesIO
from pathlib import Path

from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.eval.public_sets.items import (
    PublicItem,
    Row,
    column,
    image_source,
    text_list,
    user_message,
)
from qwen2vl.grounding import REF_END, REF_START

__all__ = [
    "parse_chartqa",
    "parse_docvqa",
    "parse_hallusion_bench",
    "parse_mme",
    "parse_mtvqa",
    "parse_ocrbench",
    "parse_refcoco",
    "parse_textvqa",
]

SHORT = "\nAnswer the question using a single word or phrase."
YES_NO = " Please answer yes or no."


def _image(row: Row) -> dict[str, object]:
    return {"type": "image", "image": image_source(column(row, "image"))}


def parse_docvqa(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of DocVQA or InfoVQA; the test split has no answers."""
    messages = user_message(column(row, "question") + SHORT, _image(row))
    return [
        PublicItem(
            name=str(column(row, "questionId")),
            messages=messages,
            answers=tuple(text_list(row.get("answers"))),
            metric="anls",
        )
    ]


def parse_chartqa(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of ChartQA; its group is "human_test" or "augmented_test"."""
    text = column(row, "question") + "\nAnswer the question with a single word."
    return [
        PublicItem(
            name=column(row, "question"),
            messages=user_message(text, _image(row)),
            answers=(str(column(row, "answer")),),
            metric="relaxed_accuracy",
            group=row.get("type", ""),
        )
    ]


def parse_textvqa(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of TextVQA; lmms-eval capitalizes the question and lowers its other letters."""
    text = column(row, "question").capitalize() + SHORT
    return [
        PublicItem(
            name=str(column(row, "question_id")),
            messages=user_message(text, _image(row)),
            answers=tuple(text_list(row.get("answers"))),
            metric="vqa_accuracy",
        )
    ]


def parse_ocrbench(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of OCRBench; formulas are those of HME100k. Its prompt has no suffix."""
    return [
        PublicItem(
            name=column(row, "question"),
            messages=user_message(column(row, "question").strip(), _image(row)),
            answers=tuple(text_list(column(row, "answer"))),
            metric="ocrbench",
            group=column(row, "question_type"),
            details={"is_formula": column(row, "dataset") == "HME100k"},
        )
    ]


def parse_mtvqa(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MTVQA, which has one image and several questions, as a list or as its text.

    Raises:
        InputError: the questions cannot be read.
    """
    pairs = column(row, "qa_pairs")
    try:
        pairs = ast.literal_eval(pairs) if isinstance(pairs, str) else pairs
        found = [(str(p["question"]).strip(), str(p["answer"]).strip()) for p in pairs]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise InputError(f"MTVQA, row {row.get('id')}: qa_pairs cannot be read: {error}") from error
    suffix = "\nAnswer the question using a word or phrase in the language of the question."
    return [
        PublicItem(
            name=f"{row.get('id', '')}_{i}",
            messages=user_message(question + suffix, _image(row)),
            answers=(answer,),
            metric="mtvqa",
            group=row.get("lang", ""),
        )
        for i, (question, answer) in enumerate(found)
        if question and answer
    ]


def parse_mme(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MME; the two questions of an image have the same question_id."""
    question = column(row, "question").strip().replace(YES_NO, "")
    return [
        PublicItem(
            name=f"{column(row, 'question_id')}: {question}",
            messages=user_message(question + SHORT, _image(row)),
            answers=(column(row, "answer").strip().rstrip(".").lower(),),
            metric="mme",
            group=column(row, "category"),
            details={"image": str(column(row, "question_id"))},
        )
    ]


def parse_hallusion_bench(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of HallusionBench with an image; lmms-eval adds nothing to the question."""
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    ids = {name: str(column(row, name)) for name in names}
    return [
        PublicItem(
            name="_".join(ids.values()),
            messages=user_message(column(row, "question"), _image(row)),
            answers=("yes" if str(column(row, "gt_answer")) == "1" else "no",),
            metric="hallusion_bench",
            group=ids["category"],
            details=ids,
        )
    ]


def parse_refcoco(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of RefCOCO, RefCOCO+ or RefCOCOg: one item for each expression of a box.

    The official prompt is not published. This one has the expression between the tokens of object
    references, of which Qwen2-VL answers with a box.
    """
    x, y, width, height = map(float, column(row, "bbox"))
    image = image_source(column(row, "image"))
    return [
        PublicItem(
            name=f"{column(row, 'question_id')}_{i}",
            messages=user_message(
                f"Detect the bounding box of {REF_START}{expression}{REF_END}.",
                {"type": "image", "image": image},
            ),
            answers=(),
            metric="refcoco",
            group=row.get("split", ""),
            details={"box": (x, y, x + width, y + height), "size": _size(image)},
        )
        for i, expression in enumerate(text_list(column(row, "answer")))
    ]


def _size(image: object) -> tuple[int, int]:
    """Return (height, width), from the header of an image in bytes or in a file."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    try:
        with Image.open(BytesIO(image) if isinstance(image, bytes) else str(image)) as opened:
            return opened.height, opened.width
    except OSError as error:
        raise InputError("the image of a row cannot be read: is the file complete?") from error
