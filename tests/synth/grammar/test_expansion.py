"""Expansion of templates: alternatives, spaces, capitals, errors of notation, and frequencies."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from qwen2vl.synth.grammar import expansion
from qwen2vl.synth.grammar.expansion import (
    count_expansions,
    count_patterns,
    list_patterns,
    load_templates,
    sample_expansion,
    sample_pattern,
)


@pytest.mark.parametrize(
    ("template", "patterns"),
    [
        ("read it.", ["Read it."]),
        ("[a|b] c", ["A c", "B c"]),
        ("see [the [red|blue] one|it]?", ["See the red one?", "See the blue one?", "See it?"]),
        ("is it [|here ][|now]?", ["Is it?", "Is it now?", "Is it here?", "Is it here now?"]),
        ("it [ really |] is [ good] .", ["It really is good.", "It is good."]),
        ("{0}[:| or] {1}", ["{0}: {1}", "{0} or {1}"]),
        ("look. [what|who] is it? say", ["Look. What is it? Say", "Look. Who is it? Say"]),
        ("copy this:\n{0}\nplease", ["Copy this:\n{0}\nPlease"]),
        (
            "find <|box_start|>{0}<|box_end|>[.|]",
            ["Find <|box_start|>{0}<|box_end|>.", "Find <|box_start|>{0}<|box_end|>"],
        ),
        ("[a|a|b]", ["A", "B"]),
    ],
)
def test_templates_expand(template: str, patterns: list[str]) -> None:
    assert list(list_patterns(template)) == patterns
    assert count_expansions(template) == len(patterns)
    rng = Random(0)
    assert {sample_expansion(rng, template) for _ in range(100)} == set(patterns)


def test_names_are_common_alternatives() -> None:
    listed = set(list_patterns("see the <picture>"))
    assert listed == {"See the picture", "See the image", "See the photo"}
    assert "In the photo" in set(list_patterns("<in_picture>"))


@pytest.mark.parametrize("template", ["[a|b", "a|b", "a]", "[a|[b]", "a < b", "<unknown_name>"])
def test_wrong_notation_is_refused(template: str) -> None:
    with pytest.raises(AssertionError):
        list(list_patterns(template))


def test_repeated_alternatives_are_more_frequent() -> None:
    rng = Random(1)
    counts = Counter(sample_expansion(rng, "[a|a|a|b]") for _ in range(2000))
    assert 1400 < counts["A"] < 1600


def test_templates_of_many_patterns_are_more_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = "[0|1|2|3|4|5|6|7|8|9]"
    task = {"task": ("one", f"hundred {digits}{digits}", f"many {digits * 4}")}
    monkeypatch.setattr(expansion, "load_templates", lambda: task)
    monkeypatch.setattr(expansion, "_weighted", expansion._weighted.__wrapped__)
    rng = Random(2)
    counts = Counter(sample_pattern(rng, "task").split()[0] for _ in range(4100))
    assert 50 < counts["One"] < 160  # weights 1, 10 and 30
    assert 850 < counts["Hundred"] < 1150
    assert 2850 < counts["Many"] < 3150
    assert count_patterns("task") == 10101


def test_sampling_is_deterministic() -> None:
    tasks = sorted(load_templates())
    first, second = Random(3), Random(3)
    assert [sample_pattern(first, t) for t in tasks] == [sample_pattern(second, t) for t in tasks]
