"""Samples: what a row of a data file becomes, and the error of a row that cannot be used.

A sample holds text and media sources as the file has them, which messages or parts of it are
supervised, and the names of the columns that were not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2vl.errors import InputError

__all__ = [
    "Conversation",
    "Document",
    "Sample",
    "SampleError",
    "TextTokens",
    "describe_reasons",
]

# Reason that bad samples are counted by -> what is wrong with them, for people.
_DESCRIPTIONS = {
    "answer": "without an answer to learn from",
    "box": "with boxes that are not in their image, or not in its scale",
    "image": "with an unreadable image",
    "length": "with media changed since they were measured",
    "messages": "with malformed messages",
    "missing": "with a missing media file",
    "oversize": "larger than a bin",
    "placeholders": "whose tags (<image>, <video>, <bbox>) do not match their media or objects",
    "task": "for another kind of training",
    "text": "with unreadable text",
    "video": "with an unreadable video",
}


class SampleError(InputError):
    """One sample cannot be used; `reason` is the category it is counted by."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def describe_reasons(counts: Mapping[str, int]) -> str:
    """Say how many samples are bad for which reason, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {_DESCRIPTIONS[reason]}" for reason, count in ordered)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of a chat; the assistant's messages are supervised, but those of `unsupervised`."""

    id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    unsupervised: tuple[int, ...] = ()  # indices of the assistant's messages that are context only
    unused: tuple[str, ...] = ()  # columns and keys of the row that nothing was made of
    notes: tuple[str, ...] = ()  # what the row has that is likely an error: "an empty answer"


@dataclass(frozen=True, slots=True)
class Document:
    """Interleaved text and media; all text after the prompt's parts is supervised."""

    id: str
    parts: tuple[str | Mapping[str, Any], ...]  # text, or the content item of an image or video
    num_prompt_parts: int = 0  # of the parts, from the start: context only
    unused: tuple[str, ...] = ()  # columns of the row that nothing was made of
    notes: tuple[str, ...] = ()  # what the row has that is likely an error


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Text that is already tokenized; all tokens are supervised."""

    id: str
    ids: np.ndarray


Sample = Conversation | Document | TextTokens
