"""The interface of a suite: items with media that are drawn lazily, parts, and a blind control.

An item is one question with its accepted answers. Its part is a row of the table, its kind a
finer group, within which chance levels are computed and media are exchanged: the blind control
asks every question about another item's media, so that a model which only knows which answers are
frequent scores the same. Items are plain data; `Suite.messages` draws or names their media.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qwen2vl.eval.suites.scoring import Metric
from qwen2vl.eval.suites.thresholds import Threshold
from qwen2vl.eval.task import Messages

__all__ = ["Box", "Suite", "SuiteItem", "constant_answer_chances", "exchange_media"]

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of the size of the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteItem:
    """One question of a suite."""

    id: str  # unique in the suite: "counting/017"; the same in the blind control
    part: str  # row of the table
    kind: str  # of question, within the part
    question: str
    answers: tuple[str, ...]  # accepted ones; the first is the reference answer
    similar_answers: tuple[str, ...] = ()  # accepted too where names may be mapped
    metric: Metric
    chance: float  # chance level: probability that a random answer is correct
    similar_chance: float = 0.0  # the same with `similar_answers`
    box: Box | None = None  # ground truth of the metric "box_iou"
    # Sentences that say that the picture does not answer the question; empty: the suite has none.
    refusals: tuple[str, ...] = ()
    is_answerable: bool = True  # False: the accepted answers are the refusals
    media: Any = None  # what the suite draws the image or clip from
    num_pixels: int = 0  # of its images or frames, where they are large; see run.MAX_BATCH_PIXELS


class Suite(Protocol):
    """Questions with known answers."""

    @property
    def name(self) -> str:
        """Name on the command line and in files."""
        ...

    @property
    def max_tokens(self) -> int:
        """Limit of an answer's length, in tokens."""
        ...

    @property
    def max_model_len(self) -> int | None:
        """Tokens of the longest prompt and its answer, if a model needs more than usual."""
        ...

    @property
    def paired_parts(self) -> Sequence[tuple[str, str]]:
        """Pairs of parts with the same items, asked or shown in two ways; ids end alike."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the list of items: scores of different digests cannot be compared."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """Names of the parts, in the order of the table."""
        ...

    @property
    def blind_parts(self) -> Sequence[str]:
        """Names of the parts that have a blind control."""
        ...

    def note(self, part: str, *, blind: bool = False) -> str:
        """Return how a part differs from what a reader might assume."""
        ...

    def threshold(self, part: str, *, blind: bool = False) -> Threshold:
        """Return the threshold of a part; that of its blind control is chance."""
        ...

    def items(self, parts: Sequence[str], *, blind: bool = False) -> Sequence[SuiteItem]:
        """Return the items of some parts, always in the same order.

        Args:
            parts: names of them, without repetition.
            blind: each item has the media of another item of its kind.
        """
        ...

    def messages(self, item: SuiteItem) -> Messages:
        """Draw the media of an item, and build its messages."""
        ...

    def check_part(self, part: str) -> None:
        """Check that the media of a part can be drawn.

        Raises:
            ConfigError: fonts are not installed.
        """
        ...


def constant_answer_chances(
    accepted: Sequence[tuple[Hashable, Collection[str]]],
) -> list[float]:
    """Return the chance level of each item: the accuracy of the best constant answer to its group.

    Args:
        accepted: of each item, its group and the answers that are correct.
    """
    sizes = Counter(group for group, _ in accepted)
    correct: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for group, answers in accepted:
        correct[group].update(set(answers))
    best = {group: max(counts.values()) / sizes[group] for group, counts in correct.items()}
    return [best[group] for group, _ in accepted]


def exchange_media(items: Sequence[SuiteItem]) -> list[SuiteItem]:
    """Give each item the media of the next item of its kind that has other media.

    An item whose kind has no other media keeps its own, which its suite must not allow.
    """
    by_kind: dict[tuple[str, str], list[SuiteItem]] = defaultdict(list)
    for item in items:
        by_kind[item.part, item.kind].append(item)
    exchanged: dict[str, Any] = {}
    for group in by_kind.values():
        for index, item in enumerate(group):
            following = (group[(index + n) % len(group)].media for n in range(1, len(group)))
            others = (media for media in following if media != item.media)
            exchanged[item.id] = next(others, item.media)
    return [replace(item, media=exchanged[item.id]) for item in items]
