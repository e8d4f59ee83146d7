"""Grammar of the training questions: thousands of wordings a task, a fifth of which is held out.

    text = word_question(rng, "exists", "red circle")      "do you see a red circle in the photo"

The JSON files beside this module have templates by task. `expansion.py` reads and expands them;
`holdout.py` says which patterns training must avoid; this module fills in the names, and varies
casing, punctuation, openings and closings as people do.
"""

from __future__ import annotations

import re
from random import Random

from qwen2vl.synth.grammar.expansion import count_patterns, load_templates, sample_pattern
from qwen2vl.synth.grammar.holdout import is_held_out

__all__ = [
    "OPENINGS",
    "count_patterns",
    "fill_pattern",
    "is_held_out",
    "load_templates",
    "sample_pattern",
    "vary_typing",
    "word_question",
]

# The first ones precede questions only, the others also requests.
_QUESTION_OPENINGS = ("Please tell me: ", "One question: ", "Quick question: ", "My question: ")
_OTHER_OPENINGS = ("And now: ", "Hi, ", "Look at this: ", "So, ", "Hello, ", "Okay, ", "Now, ")
OPENINGS = (*_QUESTION_OPENINGS, *_OTHER_OPENINGS)
_THANKS = (" Thanks.", " Thank you.", " Thanks!")
_PLEASE = (" please", ", please")

# Cumulative shares of the ways of typing; the rest is as written. Capitals only, two final marks
# and a space before the final mark are held out: the suite wordings tests them.
_LOWER, _BARE, _LOWER_BARE, _OPENED, _CLOSED = 0.15, 0.25, 0.40, 0.50, 0.54

# Words that begin with a vowel letter but take "a", and those that take "an" without one.
_CONSONANT = re.compile(r"uni|use|usu|uk|ute|euc|eur|ewe|one\b|once\b|UFO", re.IGNORECASE)
_VOWEL = re.compile(r"[aeiou]|hour|hono|heir|x-ray|sos\b", re.IGNORECASE)


def word_question(rng: Random, task: str, *fields: str, held_out: bool = False) -> str:
    """Word a question of a task.

    Args:
        task: a key of the JSON files.
        fields: names that replace {0}, {1}, ... of the template.
        held_out: use only patterns that are held out of training, typed as they are written.
    """
    while is_held_out(pattern := sample_pattern(rng, task)) != held_out:
        pass
    return fill_pattern(pattern if held_out else vary_typing(rng, pattern), *fields)


def fill_pattern(pattern: str, *fields: str) -> str:
    """Fill in the names of a pattern, with the article that each requires: "an orange star"."""
    for number, field in enumerate(fields):
        at = pattern.find(f"a {{{number}}}")
        while at >= 0:
            is_article = at == 0 or not pattern[at - 1].isalnum()
            if is_article and _takes_an(field):
                pattern = f"{pattern[: at + 1]}n{pattern[at + 1 :]}"
            at = pattern.find(f"a {{{number}}}", at + 1)
        if pattern.startswith(f"A {{{number}}}") and _takes_an(field):
            pattern = f"An{pattern[1:]}"
    return pattern.format(*fields)


def vary_typing(rng: Random, pattern: str) -> str:
    """Vary casing, punctuation, opening and closing of a pattern; fields are not yet filled in."""
    how = rng.random()
    if how >= _CLOSED:
        return pattern
    if how < _LOWER:
        return pattern.lower()
    bare = pattern[:-1] if pattern[-1] in ".?" else pattern
    if how < _BARE:
        return bare
    if how < _LOWER_BARE:
        return bare.lower()
    if how < _OPENED:
        return _open(rng, pattern)
    return _close(rng, pattern, bare)


def _open(rng: Random, pattern: str) -> str:
    openings = OPENINGS if pattern.endswith("?") else _OTHER_OPENINGS
    first = pattern if pattern.startswith(("I ", "I'")) else pattern[0].lower() + pattern[1:]
    return rng.choice(openings) + first


def _close(rng: Random, pattern: str, bare: str) -> str:
    """Add thanks or "please", but not to a name, of which it could be a part."""
    if pattern[-1] in "}>!":
        return pattern
    if bare[-1] in '}>"' or "lease" in pattern or rng.random() < 0.5:
        return pattern + rng.choice(_THANKS)
    return bare + rng.choice(_PLEASE) + rng.choice(("", pattern[len(bare) :]))


def _takes_an(name: str) -> bool:
    return bool(_VOWEL.match(name)) and not _CONSONANT.match(name)
