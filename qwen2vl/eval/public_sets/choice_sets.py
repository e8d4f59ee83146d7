"""Multiple-choice sets with pictures, in lmms-lab's columns, with the prompts of lmms-eval 0.7.3.

AI2D, MMBench (all rotations of the options are rows), MMStar, MMMU, MMT-Bench and RealWorldQA.
MMStar and RealWorldQA have their options in the question; they are read from it where they are
lines such as "A. text" or "A: text, B: text".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwen2vl.eval.public_sets.items import (
    PublicItem,
    Row,
    column,
    image_source,
    lettered,
    option_lines,
    text_list,
    user_message,
)

__all__ = [
    "options_in",
    "parse_ai2d",
    "parse_mmbench",
    "parse_mmbench_cn",
    "parse_mmmu",
    "parse_mmstar",
    "parse_mmt_bench",
    "parse_realworldqa",
]

LETTER = "\nAnswer with the option's letter from the given choices directly."
MISSING = (None, "", "nan")  # texts of options that a question does not have
ROTATION = 1_000_000  # MMBench: the rotations of a question have the same index modulo this
OPTION_LINE = re.compile(r"^\(?([A-H])[.)]\s*(.+?)\s*$", re.MULTILINE)
OPTION_IN_LINE = re.compile(r"\b([A-H]):\s*(.+?)\s*(?=,\s*[A-H]:|$)", re.MULTILINE)


def _image(value: Any) -> dict[str, Any]:
    return {"type": "image", "image": image_source(value)}


def options_in(question: str) -> dict[str, str]:
    """Read the options that stand in a question; empty where there are none from "A" on."""
    for form in (OPTION_LINE, OPTION_IN_LINE):
        found = dict(form.findall(question))
        if len(found) > 1 and list(found) == list("ABCDEFGH")[: len(found)]:
            return found
    return {}


def _columns_of_options(row: Row, letters: str) -> dict[str, str]:
    return {c: str(row[c]) for c in letters if c in row and row[c] not in MISSING}


def parse_ai2d(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of AI2D, whose answer is the index of an option."""
    choices = lettered(text_list(column(row, "options")))
    text = f"{column(row, 'question')}\n{option_lines(choices)}{LETTER}"
    return [
        PublicItem(
            name=column(row, "question"),
            messages=user_message(text, _image(column(row, "image"))),
            answers=(list(choices)[int(column(row, "answer"))],),
            metric="ai2d",
            choices=choices,
        )
    ]


def parse_mmbench(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MMBench in English; the test split has no answers."""
    return _mmbench(row, "There are several options:", LETTER)


def parse_mmbench_cn(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MMBench in Chinese."""
    return _mmbench(row, "有如下几个选项:", "\n请直接使用所提供的选项字母作为答案回答。")


def _mmbench(row: Row, heading: str, suffix: str) -> list[PublicItem]:
    choices, hint = _columns_of_options(row, "ABCDE"), row.get("hint")
    start = "" if hint in MISSING else f"{hint} "
    text = f"{start}{column(row, 'question')} {heading}\n{option_lines(choices)}\n{suffix}"
    index = int(column(row, "index"))
    return [
        PublicItem(
            name=str(index),
            messages=user_message(text, _image(column(row, "image"))),
            answers=() if row.get("answer") in MISSING else (str(row["answer"]),),
            metric="mmbench",
            group=row.get("category", ""),
            choices=choices,
            details={"question": str(index % ROTATION)},
        )
    ]


def parse_mmstar(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MMStar; lmms-eval's score is the mean over its second-level categories."""
    question = column(row, "question").strip()
    return [
        PublicItem(
            name=str(column(row, "index")),
            messages=user_message(question + LETTER[:-1], _image(column(row, "image"))),
            answers=(column(row, "answer").strip().upper(),),
            metric="multiple_choice",
            group=column(row, "l2_category"),
            choices=options_in(question) or dict.fromkeys("ABCD", ""),
        )
    ]


def parse_mmmu(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MMMU: "<image 1>" to "<image 7>" stand where the images belong.

    The images of the question and of its options come where they are named, as in lmms-eval's
    messages.
    """
    choices = lettered(text_list(column(row, "options")))
    is_choice = column(row, "question_type") == "multiple-choice"
    options = f"{option_lines(choices)}\n\n{LETTER.strip()}" if is_choice else ""
    rest = options or "\nAnswer the question using a single word or phrase."
    text = f"{column(row, 'question')}\n{rest}"
    return [
        PublicItem(
            name=column(row, "id"),
            messages=[{"role": "user", "content": _interleaved(text, row)}],
            answers=tuple(text_list(column(row, "answer"))),
            metric="mmmu",
            group=re.sub(r"^[a-z]+_|_\d+$", "", column(row, "id")),
            choices=choices if is_choice else {},
        )
    ]


def _interleaved(text: str, row: Row) -> list[dict[str, Any]]:
    pieces = re.split(r"<image (\d)>", text)
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            content.append(_image(column(row, f"image_{piece}")))
        elif piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    return content


def parse_mmt_bench(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of MMT-Bench; the test split has no answers."""
    choices = {c: text.strip() for c, text in _columns_of_options(row, "ABCDEFGHI").items()}
    question = f"Question: {column(row, 'question').strip()}\n{option_lines(choices, '{}: {}')}"
    suffix = "\nAnswer the question using a single character from the given options."
    images = row["image"] if isinstance(row.get("image"), list) else [column(row, "image")]
    return [
        PublicItem(
            name=str(column(row, "index")),
            messages=user_message(question + suffix, *map(_image, images)),
            answers=() if row.get("answer") in MISSING else (str(row["answer"]).strip(),),
            metric="mmt_bench",
            group=row.get("l2-category", ""),
            choices=choices,
        )
    ]


def parse_realworldqa(row: Row, media: Path) -> list[PublicItem]:
    """Parse a row of RealWorldQA, whose question says how to answer."""
    question = column(row, "question").strip()
    return [
        PublicItem(
            name=question,
            messages=user_message(question, _image(column(row, "image"))),
            answers=(column(row, "answer").strip(),),
            metric="realworldqa",
            choices=options_in(question),
        )
    ]
