"""Names of the objects of a clip: shapes with a color, and icons whose names are singular nouns.

No two names of a clip share a word, so that a kind or a color alone identifies a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.objects import training_names, visible_colors
from qwen2vl.synth.shape_masks import MORE_SHAPE_KINDS, SHAPE_KINDS

__all__ = ["ICON_SHARE", "ObjectName", "sample_names"]

ICON_SHARE = 0.45  # of the objects that are not texts

# Names without a plural form, that are no nouns, or that say where something is or of which kind.
_UNUSABLE = frozenset(
    """
    bacon badminton bowling bread broccoli butter camping construction cooking coral dango desert
    dna down falafel fire fog foggy fondue garlic hockey ice lacrosse left liquid locked luggage
    metro milky fuji oden park pong popcorn rail rice right sake salt soap spaghetti sunrise sunset
    sushi thread unlocked up voltage wedding wood yarn
    """.split()
)


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What an object is: "red" and "circle", or the name of an icon."""

    name: str
    color: str = ""  # empty for icons and text

    @property
    def phrase(self) -> str:
        """Its full name: "red circle", "guitar"."""
        return f"{self.color} {self.name}" if self.color else self.name

    @property
    def words(self) -> frozenset[str]:
        """The words of its full name."""
        return frozenset(self.phrase.lower().replace("-", " ").split())


def sample_names(
    rng: Random,
    canvas: Composite,
    kinds: Sequence[str],
    *,
    icons: float = ICON_SHARE,
    others: Sequence[ObjectName] = (),
) -> list[ObjectName]:
    """Sample names of objects, no two of which share a word.

    Args:
        rng: source of the choices.
        canvas: on which colors have to be distinguishable.
        kinds: of the objects, as of `Motion`.
        icons: share of icons among those of any kind.
        others: names with which they share no word either.
    """
    used = set[str]().union(*(one.words for one in others))
    colors = visible_colors(canvas.ground)
    names: list[ObjectName] = []
    for kind in kinds:
        if kind == "text":
            one = ObjectName("text")
        elif kind == "shape" or rng.random() >= icons:
            shapes = [shape for shape in (*SHAPE_KINDS, *MORE_SHAPE_KINDS) if shape not in used]
            free = [color for color in colors if color not in used]
            one = ObjectName(rng.choice(shapes), rng.choice(free or colors))
        else:
            while (one := ObjectName(rng.choice(_icon_names()))).words & used:
                pass
        used |= one.words
        names.append(one)
    return names


@cache
def _icon_names() -> tuple[str, ...]:
    """Return names that are short singular nouns."""
    return tuple(name for name in training_names() if _is_usable(name))


def _is_usable(name: str) -> bool:
    is_plural = name.endswith("s") and not name.endswith(("ss", "us"))
    words = name.split()
    return (
        len(words) <= 2
        and not is_plural
        and name.replace(" ", "").replace("-", "").isalpha()
        and name.islower()
        and not name.endswith("thirty")
        and _UNUSABLE.isdisjoint(words)
    )
