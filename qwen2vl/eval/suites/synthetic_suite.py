"""The synthetic suite: rendered text, shapes, boxes, motion and pairs; `mini` is its former name.

The frozen specs and the thresholds are those of eval/mini.py, whose parts wrong_* are the blind
control here: the same questions and ids, with the media of another question of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files

from qwen2vl.eval.mini import PARTS, build_task
from qwen2vl.eval.suites.suite import SuiteItem
from qwen2vl.eval.suites.thresholds import Threshold
from qwen2vl.eval.synthetic import EvalCase, SyntheticTask, metric_of
from qwen2vl.eval.task import Messages

__all__ = ["SyntheticSuite"]

BLIND_PREFIX = "wrong_"


class SyntheticSuite:
    """The frozen specs of mini.json, rendered on demand. (Implements Suite.)"""

    name = "synthetic"
    max_tokens = 64  # the longest correct answer, a phrase and its box, has about 50 with nano
    max_model_len = None
    paired_parts: Sequence[tuple[str, str]] = ()
    parts: Sequence[str] = tuple(name for name in PARTS if not name.startswith(BLIND_PREFIX))
    blind_parts: Sequence[str] = tuple(
        name.removeprefix(BLIND_PREFIX) for name in PARTS if name.startswith(BLIND_PREFIX)
    )

    @property
    def digest(self) -> str:
        """SHA-256 of the file of specs and the names of the parts that are derived from it."""
        content = files("qwen2vl.eval").joinpath("suites", "mini.json").read_bytes()
        return sha256(content + "\n".join(PARTS).encode()).hexdigest()

    def note(self, part: str, *, blind: bool = False) -> str:
        """Return how a part differs from what a reader might assume."""
        return PARTS[_task_name(part, blind)].note

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        """Return the threshold of a part."""
        return PARTS[_task_name(part, blind)].threshold

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        """Return the items of some parts, part by part."""
        return [
            _to_item(part, case)
            for part in parts
            for case in _build_task(_task_name(part, blind)).cases
        ]

    def messages(self, item: SuiteItem) -> Messages:
        """Render the images of an item, and build its messages."""
        case: EvalCase = item.media
        return _build_task(item.part).prompt(case)

    def check_part(self, part: str) -> None:
        """Check that the fonts of a part are installed.

        Raises:
            FontError: fonts are not installed; the text names the packages.
        """
        _build_task(part).check_fonts()


def _task_name(part: str, blind: bool) -> str:
    return BLIND_PREFIX + part if blind else part


@cache
def _build_task(name: str) -> SyntheticTask:
    return build_task(name)


def _to_item(part: str, case: EvalCase) -> SuiteItem:
    question = case.question
    return SuiteItem(
        id=f"{part}/{case.name}",
        part=part,
        kind=question.task,
        question=question.text,
        answers=(question.answer,),
        metric=metric_of(case),
        chance=case.chance,
        box=case.box,
        media=case,
    )
