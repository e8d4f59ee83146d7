"""Questions of the first task families: wordings.json's and those of the grammar.

A wording is a format string; the task family fills in its fields. wordings.json has a few of every
task, of which every fourth is held out of training. The frozen suites have questions of both
parts, so that the file must not change, and those of the splits "held_out" and "all" are only
its. Training has more: most of its questions are worded by the grammar (`qwen2vl.synth.grammar`).
"""

from __future__ import annotations

from functools import cache
from random import Random

from qwen2vl.synth.grammar import OPENINGS, fill_pattern, vary_typing, word_question
from qwen2vl.synth.grammar.holdout import (
    is_listed,
    load_wordings,
    normalize_pattern,
    wordings_of,
)

__all__ = ["OPENINGS", "load_wordings", "sample_question_text", "trained_wordings", "wordings_of"]

_LISTED_SHARE = 0.35  # of the training questions: wordings of wordings.json


@cache
def trained_wordings(task: str) -> tuple[str, ...]:
    """Return the wordings of a task that training uses: those of its part that no suite holds out.

    Three of them are patterns of easy-VQA.
    """
    return tuple(w for w in wordings_of(task, "train") if not is_listed(normalize_pattern(w)))


def sample_question_text(
    rng: Random, task: str, split: str, *fields: str, article: bool = False
) -> str:
    """Sample a wording of a task and fill in its fields.

    Args:
        split: "train"; "held_out" or "all" for wordings of wordings.json as they are written.
        article: the wording has "a" before the first field; replace it by "an" where required.
    """
    if split == "train":
        if rng.random() < _LISTED_SHARE:
            wording = vary_typing(rng, rng.choice(trained_wordings(task)))
            return fill_pattern(wording, *fields)
        return word_question(rng, task, *fields)
    wording = rng.choice(wordings_of(task, split))
    if article and fields and fields[0].startswith("o"):
        wording = wording.replace("a {0}", "an {0}")
    return wording.format(*fields)
