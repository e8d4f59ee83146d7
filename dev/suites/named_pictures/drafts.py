"""Items before they are numbered and ordered, and the order that their blind control needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from dev.suites.named_pictures.names import are_confusable
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.compositing import Composite, Icon

__all__ = ["Draft", "order_for_blind_control"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An item, whose id may be empty yet, and the names that its question is about."""

    item: FrozenItem
    asked: tuple[str, ...]


def order_for_blind_control(rng: Random, drafts: Sequence[Draft]) -> list[Draft]:
    """Shuffle items of one kind so that no picture shows what the question before it asks about.

    The blind control asks each question about the picture of the next item of its kind.
    """
    while True:
        remaining = rng.sample(drafts, len(drafts))
        ordered = [remaining.pop()]
        while remaining:
            fitting = (d for d in reversed(remaining) if not _shows(d, ordered[-1].asked))
            following = next(fitting, None)
            if following is None:
                break
            remaining.remove(following)
            ordered.append(following)
        if not remaining and not _shows(ordered[0], ordered[-1].asked):
            return ordered


def _shows(draft: Draft, names: Sequence[str]) -> bool:
    """Return whether a picture shows anything that one of the names may mean."""
    return any(are_confusable(name, shown) for name in names for shown in _names_shown(draft))


def _names_shown(draft: Draft) -> Iterator[str]:
    for picture in draft.item.pictures:
        assert isinstance(picture, Composite)
        yield from (layer.name for layer in picture.layers if isinstance(layer, Icon))
