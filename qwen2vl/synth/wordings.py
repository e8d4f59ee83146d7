"""Question templates of the synthetic tasks: many wordings a task, a quarter held out of training.

A wording is a format string; the task family fills in its fields. wordings.json has those of every
task. Every fourth wording of a task (index 3, 7, 11, ...) is held out, so that the split is fixed,
readable in the file, and appending a wording to a list changes no other. A quarter of the training
questions are written casually, with an opening phrase or without capitals and final punctuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from random import Random

__all__ = ["OPENINGS", "load_wordings", "sample_question_text", "wordings_of"]

_CASUAL_SHARE = 0.25  # of training questions
OPENINGS = ("Please tell me: ", "And now: ", "Hi, ", "Look at this: ", "One question: ", "So, ")


@cache
def load_wordings() -> Mapping[str, tuple[str, ...]]:
    """Load wordings.json: task -> wordings, in the order of the file."""
    import json  # here, so that importing qwen2vl.synth does not take its 2 ms

    text = Path(__file__).with_name("wordings.json").read_text(encoding="utf-8")
    return {task: tuple(wordings) for task, wordings in json.loads(text).items()}


def wordings_of(task: str, split: str) -> tuple[str, ...]:
    """Return the wordings of a task that belong to `split` ("train", "held_out" or "all")."""
    wordings = load_wordings()[task]
    if split == "all":
        return wordings
    held_out = split == "held_out"
    return tuple(w for i, w in enumerate(wordings) if (i % 4 == 3) == held_out)


def sample_question_text(
    rng: Random, task: str, split: str, *fields: str, article: bool = False
) -> str:
    """Sample a wording of a task and fill in its fields.

    Args:
        article: the wording has "a" before the first field; replace it by "an" where required.
    """
    wording = rng.choice(wordings_of(task, split))
    if split == "train" and rng.random() < _CASUAL_SHARE:
        wording = _casual(rng, wording)
    if article and fields[0].startswith("o"):
        wording = wording.replace("a {0}", "an {0}")
    return wording.format(*fields)


def _casual(rng: Random, wording: str) -> str:
    """Make a wording casual: with an opening, in lower case, or without a full stop."""
    how = rng.randrange(3)
    if how == 0:
        return rng.choice(OPENINGS) + wording[0].lower() + wording[1:]
    bare = wording.rstrip(".?")
    return bare.lower() if how == 1 else bare
