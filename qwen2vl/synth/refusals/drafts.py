"""Drafts of questions, and the sentences that answer those without an answer in the picture.

A draft is a task of grammar/refusals.json with its fields, and the answer. Every task has drafts
with and without an answer, unless only one of them is possible.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.families.text_only import SMALL_TALK
from qwen2vl.synth.spec import Box

__all__ = ["NO_PICTURE", "ONLY_PICTURES", "REFUSAL", "Draft", "Scene"]

REFUSAL = "I cannot tell from the picture."
NO_PICTURE = SMALL_TALK["no_picture"]
ONLY_PICTURES = "I can only answer questions about pictures."


class Draft(NamedTuple):
    """A question before it is worded."""

    task: str
    fields: tuple[str, ...]
    answer: str
    about: tuple[str, ...] = ()  # nothing else is asked about these; empty: about the task
    box: Box | None = None
    choices: int = 0


class Scene(NamedTuple):
    """A picture, or none, and what can be asked about it."""

    picture: Composite | None
    drafts: list[Draft]
    first: Draft | None = None  # is asked in any case
