"""What the task files of lmms-eval name as `!function utils.NAME`; copied beside them as utils.py.

Documents are rows of PART.parquet. Pictures and clips are files beside it. The answer is scored as
`qwen2vl eval` scores it, by the rules of the suite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from qwen2vl.eval.mini import build_task
from qwen2vl.eval.synthetic import SyntheticTask

FOLDER = Path(__file__).resolve().parent

Document = Mapping[str, Any]


def doc_to_visual(doc: Document) -> list[Any]:
    """Return the pictures of a question, or the path of its clip."""
    if doc["video"]:
        return [str(FOLDER / doc["video"])]
    return [Image.open(FOLDER / name) for name in doc["images"]]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the question."""
    return doc["question"]


def process_results(doc: Document, results: Sequence[str]) -> dict[str, Any]:
    """Score an answer."""
    task = _suite_task(doc["part"])
    scored = task.score(task.examples()[doc["number"]], results[0])
    found: dict[str, Any] = {"accuracy": scored.score}
    if scored.length is not None:
        found["character_error_rate"] = (scored.edits, scored.length)
    return found


def character_error_rate(pairs: Sequence[tuple[int, int]]) -> float:
    """Return edits over characters, summed over all lines."""
    return sum(edits for edits, _ in pairs) / sum(length for _, length in pairs)


@cache
def _suite_task(part: str) -> SyntheticTask:
    return build_task(part)
