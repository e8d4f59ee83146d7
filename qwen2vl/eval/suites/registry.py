"""The suites by name, and their former names.

A suite of published files is opened from the folder that `qwen2vl fetch-data` has filled; a frozen
one is a file of the package, whose pictures are drawn. Modules of suites are imported when they are
opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from qwen2vl.errors import InputError
from qwen2vl.eval.suites.suite import Suite

__all__ = [
    "ALIASES",
    "DEFAULT_SUITE",
    "FROZEN_SUITES",
    "SUITE_NAMES",
    "open_suite",
    "select_suite_parts",
]

FROZEN_SUITES = ("named-pictures", "lines", "any-size", "honesty", "wordings", "clips")
SUITE_NAMES = ("synthetic", "easy-vqa", "fashion-mnist", *FROZEN_SUITES)
DEFAULT_SUITE = "synthetic"
ALIASES = {"mini": "synthetic"}  # former name -> name


def open_suite(name: str) -> Suite:
    """Open a suite by its name or a former one.

    Raises:
        InputError: there is no such suite.
        Qwen2VLError: its files are absent, and the text names the command that fetches them; or
            they are not those that were published.
    """
    name = ALIASES.get(name, name)
    if name == "synthetic":
        from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite

        return SyntheticSuite()
    if name == "easy-vqa":
        from qwen2vl.eval.suites.easy_vqa import open_easy_vqa

        return open_easy_vqa()
    if name == "fashion-mnist":
        from qwen2vl.eval.suites.fashion_mnist import open_fashion_mnist

        return open_fashion_mnist()
    if name in FROZEN_SUITES:
        from qwen2vl.eval.suites.frozen_suite import open_frozen_suite

        return open_frozen_suite(name)
    raise InputError(f"no suite is called {name}: {', '.join(SUITE_NAMES)}")


def select_suite_parts(
    suite: Suite, patterns: Sequence[str] = (), *, blind: bool = False
) -> list[str]:
    """Return the parts that match any pattern ("text", "text*"); all without one.

    Args:
        suite: whose parts they are.
        patterns: names, or glob patterns.
        blind: parts that have a blind control only.

    Raises:
        InputError: a pattern matches nothing.
    """
    names = suite.blind_parts if blind else suite.parts
    control = " with a blind control" if blind else ""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = ""
            if pattern.startswith("wrong_"):
                hint = f"; the blind control of a part is --blind --task {pattern[6:]}"
            raise InputError(
                f"no part of the suite {suite.name}{control} is called {pattern}: "
                f"{', '.join(names)}{hint}"
            )
    selected = patterns or ("*",)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in selected)]
