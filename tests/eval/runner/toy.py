"""A suite of arithmetic without images, and what answers it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen2vl.eval.runner.results_file import ResultsHeader
from qwen2vl.eval.runner.run import SuiteAnswer
from qwen2vl.eval.suites.suite import SuiteItem
from qwen2vl.eval.suites.thresholds import CHANCE, NO_THRESHOLD, Threshold
from qwen2vl.eval.task import Messages

NUM_ITEMS = 150  # of two and a half batches


class ToySuite:
    """Twice a number, as words or as text. (Implements Suite.)"""

    name = "toy"
    max_tokens = 4
    max_model_len = None
    paired_parts = ()
    digest = "d1"
    parts = ("word", "text")
    blind_parts = ("word",)

    def note(self, part: str, *, blind: bool = False) -> str:
        return f"note of {part}"

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        return CHANCE if blind else NO_THRESHOLD

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        return [
            SuiteItem(
                id=f"{number:03d}",
                part="text" if number % 5 == 0 else "word",
                kind="double",
                question=f"Twice {number}?",
                answers=(str(2 * number),),
                similar_answers=(f"{2 * number}.0",),
                metric="edit_distance" if number % 5 == 0 else "exact_match",
                chance=0.1,
                similar_chance=0.2,
            )
            for number in range(NUM_ITEMS)
            if ("text" if number % 5 == 0 else "word") in parts
        ]

    def messages(self, item: SuiteItem) -> Messages:
        return [{"role": "user", "content": item.question}]

    def check_part(self, part: str) -> None:
        pass


@dataclass
class ToyAnswerer:
    """Answers with twice the number, wrongly for multiples of 7. (Implements Answerer.)"""

    kill_after: int | None = None  # batches, after which the process is killed
    batches: list[list[str]] = field(default_factory=list)

    def answer(
        self, batch: Sequence[Messages], on_answer: Callable[[], None]
    ) -> Sequence[SuiteAnswer]:
        if len(self.batches) == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        questions = [messages[0]["content"] for messages in batch]
        self.batches.append(questions)
        answers = []
        for question in questions:
            number = int(question.split()[1].rstrip("?"))
            text = "7" if number % 7 == 0 else str(2 * number)
            answers.append(SuiteAnswer(text=text, logprob=-0.01 * (number + len(questions))))
            on_answer()
        return answers


def toy_header(**changes: object) -> ResultsHeader:
    """Return the header of a run of the toy suite."""
    fields: dict[str, object] = {
        **{"suite": "toy", "digest": "d1", "blind": False},
        **{"model": {"name": "toy", "weights": "w"}, "settings": {"max_tokens": 4}},
    }
    return ResultsHeader(**{**fields, **changes})  # type: ignore[arg-type]
