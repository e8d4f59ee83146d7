"""Patterns of the suites and of easy-VQA that training must avoid: python -m dev.suites.held_out.

They are copied into qwen2vl/synth/grammar/held_out.txt, normalized, since synth cannot import eval.
Those of the suite wordings have {name} in the place of the name: they are found in questions with
any name of up to three words (`find_held_out_pattern`). The others have {}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dev.suites.wordings import held_out_patterns
from qwen2vl.eval.suites.easy_vqa import load_definition
from qwen2vl.eval.suites.frozen_suite import open_frozen_suite
from qwen2vl.synth.families.text_only import SMALL_TALK
from qwen2vl.synth.grammar.holdout import (
    ANY_NAME,
    LISTED,
    load_wordings,
    normalize_pattern,
    wordings_of,
)
from qwen2vl.synth.wordings import OPENINGS

__all__ = ["FILE", "list_held_out"]

FILE = Path(__file__).parents[2] / "qwen2vl" / "synth" / "grammar" / LISTED
SUITES = ("any-size", "honesty", "clips")


def list_held_out() -> list[str]:
    """Return the normalized patterns, sorted."""
    named = {normalize_pattern(p).replace("{}", ANY_NAME) for p in _patterns_of_wordings()}
    others = {normalize_pattern(pattern) for pattern in _other_patterns()}
    return sorted(named | {key for key in others if key.replace("{}", ANY_NAME) not in named})


def _patterns_of_wordings() -> Iterator[str]:
    openings = tuple(normalize_pattern(opening) + " " for opening in OPENINGS)
    for patterns in held_out_patterns().values():
        for pattern in patterns:
            yield pattern
            # "So what shape is that" would be found in "What shape is that?" and an opening.
            key = normalize_pattern(pattern)
            yield from (key.removeprefix(opening) for opening in openings)


def _other_patterns() -> Iterator[str]:
    for suite in SUITES:
        yield from open_frozen_suite(suite).header.held_out["patterns"]
    for patterns in load_definition().patterns.values():
        for pattern in patterns:
            yield pattern
            yield pattern.replace("{color} shape", "{0}")  # a phrase is one name in our grammar
    # The mini suite and those of dev/suites/synthetic.py ask in the held-out part of wordings.json.
    # "Hi" and "Bye" are in no suite, and nano is to understand them.
    for task in sorted(set(load_wordings()) - set(SMALL_TALK)):
        yield from wordings_of(task, "held_out")


if __name__ == "__main__":
    FILE.write_text("\n".join(list_held_out()) + "\n", encoding="utf-8")
