"""One question of a public benchmark: messages, references, metric and group.

The functions build messages from what the columns of published files hold: images as PIL images,
as bytes or as the {"bytes", "path"} of Hugging Face datasets, options as lists or as the text of a
Python list.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from qwen2vl.errors import InputError

__all__ = [
    "Metric",
    "PublicItem",
    "Row",
    "column",
    "image_source",
    "lettered",
    "option_lines",
    "text_list",
    "user_message",
    "video_path",
]

Row = Mapping[str, Any]
Metric = Literal[
    "anls",
    "relaxed_accuracy",
    "vqa_accuracy",
    "ocrbench",
    "multiple_choice",
    "ai2d",
    "mmmu",
    "mmt_bench",
    "realworldqa",
    "mmbench",
    "mme",
    "hallusion_bench",
    "mtvqa",
    "refcoco",
    "mvbench",
    "perception_test",
    "egoschema",
    "video_mme",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicItem:
    """One question with its references."""

    name: str  # id within the set
    messages: list[dict[str, Any]]  # for `LLM.chat`
    answers: tuple[str, ...]  # references; empty where the authors' server scores
    metric: Metric
    group: str = ""  # split, category, language or duration: scores are also given by group
    choices: Mapping[str, str] = field(default_factory=dict)  # letter -> text of the option
    # What a metric needs besides: "is_formula"; "image"; the ids of HallusionBench; "box" (x1, y1,
    # x2, y2 in pixels) and "size" (height, width); "question" of rotated options.
    details: Mapping[str, Any] = field(default_factory=dict)


def column(row: Row, name: str) -> Any:
    """Return a column of a row.

    Raises:
        InputError: the row has no such column.
    """
    if name not in row:
        raise InputError(
            f"the row has no column {name!r}, it has {', '.join(map(repr, row)) or 'none'}; is "
            "this file of another set, or of another version?"
        )
    return row[name]


def image_source(value: Any) -> Any:
    """Return what a message takes as an image: bytes, a PIL image or a path.

    Raises:
        InputError: the value has neither bytes nor a path.
    """
    if not isinstance(value, Mapping):
        return value
    source = value.get("bytes") or value.get("path")
    if not source:
        raise InputError(f"an image needs bytes or a path, got the keys {sorted(value)}")
    return source


def user_message(text: str, *media: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one message of the user: the media, then the text, as lmms-eval sends them."""
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Return letter -> text of the options, from "A"."""
    return dict(zip(ascii_uppercase, map(str, options), strict=False))


def option_lines(choices: Mapping[str, str], form: str = "{}. {}") -> str:
    """Return one line for each option."""
    return "\n".join(form.format(letter, text) for letter, text in choices.items())


def text_list(value: Any) -> list[str]:
    """Return a list of texts that a column holds as a list, as the text of one, or as one text.

    Only literals are read: the text is never executed.
    """
    if value is None:
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    return list(map(str, value)) if isinstance(value, list | tuple) else [str(value)]


def video_path(media: Path, name: str) -> dict[str, Any]:
    """Return the part of a message for a clip in the folder of clips; it is not opened here."""
    return {"type": "video", "video": str(media / name)}
