"""Grammar of names: articles, plurals, and which names can be counted.

Names of icons are those of Unicode CLDR: "guitar", "sunglasses", "bread", "locked". Questions name
an object only if its name is a singular that can be counted; the other names are only answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from qwen2vl.synth.compositing.icons import icon_names, load_drawings

__all__ = ["is_countable", "join_names", "plural", "with_article"]

_IRREGULAR = {
    **{"buffalo": "buffaloes", "cactus": "cacti", "die": "dice", "goose": "geese"},
    **{"knife": "knives", "leaf": "leaves", "mango": "mangoes", "mosquito": "mosquitoes"},
    **{"mouse": "mice", "ox": "oxen", "potato": "potatoes", "scarf": "scarves"},
    **{"snowman": "snowmen", "tomato": "tomatoes", "tornado": "tornadoes"},
    **{"volcano": "volcanoes", "wolf": "wolves"},
    # Their plurals are unusual, or the same.
    **dict.fromkeys(("bison", "blowfish", "dango", "deer", "falafel", "fish", "jellyfish"), ""),
    **dict.fromkeys(("luggage", "moose", "sari", "shrimp", "squid"), ""),
}


@cache
def is_countable(name: str) -> bool:
    """Return whether a name is a singular that can be counted; all names of shapes are."""
    found = icon_names().get(name)
    return found is None or (found.is_basic and name not in load_drawings()["no_article"])


def plural(name: str) -> str:
    """Return the plural of a name ("red cross" -> "red crosses"); empty where it is unusual."""
    *before, noun = name.split(" ")
    if noun in _IRREGULAR:
        changed = _IRREGULAR[noun]
        return " ".join((*before, changed)) if changed else ""
    if re.search(r"(s|x|z|ch|sh)$", noun):
        noun += "es"
    elif re.search(r"[^aeiou]y$", noun):
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return " ".join((*before, noun))


def with_article(name: str) -> str:
    """Return "a guitar", "an owl", "a unicorn", and "grapes" as it is."""
    if not is_countable(name):
        return name
    is_vowel = re.match(r"(?!uni|use|eu|one\b)[aeiou]", name, re.IGNORECASE)
    return f"an {name}" if is_vowel else f"a {name}"


def join_names(names: Sequence[str]) -> str:
    """Join names as in "the star, the cross and the circle"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
