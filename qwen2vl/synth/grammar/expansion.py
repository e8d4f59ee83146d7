"""Templates and their expansion: "[Is there|Do you see] a {0} in the <picture>?".

[a|b|c] is one of the alternatives, which may be empty and may contain others; <name> is one of
common.json's alternatives of that name. Spaces around an empty alternative are joined. A pattern is
an expansion with its fields {0}, {1}, ... not yet filled in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from itertools import accumulate, product
from random import Random
from typing import Any

__all__ = [
    "count_expansions",
    "count_patterns",
    "list_patterns",
    "load_templates",
    "sample_expansion",
    "sample_pattern",
]

_COMMON = "common.json"
_MAX_EXPANSIONS = 900  # that make a template more frequent
_TOKENS = re.compile(r"<\|\w+\|>|<\w+>|[\[\]|]|[^\[\]|<]+")  # marks as <|box_start|> are text
_SENTENCE = re.compile(r"([.?!] |\n)([a-z])")
_MARKS = (" .", " ,", " ?", " !", " :", " ;")

# A template is a sequence of parts; a part is a text or a list of alternatives.
_Alternatives = tuple["str | _Sequence", ...]
_Sequence = tuple["str | _Alternatives", ...]


@cache
def load_templates() -> Mapping[str, tuple[str, ...]]:
    """Load the templates: task -> templates, of all JSON files but common.json."""
    templates: dict[str, tuple[str, ...]] = {}
    for file in sorted(files(__package__ or "").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json") and file.name != _COMMON:
            for task, listed in _read_json(file.name).items():
                assert task not in templates, f"{task} is in two files"
                templates[task] = tuple(listed)
    return templates


def sample_pattern(rng: Random, task: str) -> str:
    """Sample a template of the task, and one alternative at each of its choices.

    The probability of a template is proportional to the square root of its number of expansions,
    up to 900: those of many wordings are more frequent, and those of a single one remain.
    """
    templates, cumulative = _weighted(task)
    (template,) = rng.choices(templates, cum_weights=cumulative)
    return sample_expansion(rng, template)


def sample_expansion(rng: Random, template: str) -> str:
    """Sample a pattern of a template: one alternative at each of its choices."""
    parts: list[str] = []
    _sample(rng.random, _parse(template), parts)
    return _clean("".join(parts))


def list_patterns(template: str) -> Iterator[str]:
    """Yield all patterns of a template; some may come twice."""
    for text in _expand(_parse(template)):
        yield _clean(text)


def count_expansions(template: str) -> int:
    """Count the combinations of alternatives of a template: at least its number of patterns."""
    return _count(_parse(template))


def count_patterns(task: str) -> int:
    """Count the different patterns of a task."""
    return len({p for template in load_templates()[task] for p in list_patterns(template)})


@cache
def _weighted(task: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    templates = load_templates()[task]
    return templates, tuple(
        accumulate(min(count_expansions(t), _MAX_EXPANSIONS) ** 0.5 for t in templates)
    )


def _sample(random: Any, sequence: _Sequence, parts: list[str]) -> None:
    for part in sequence:
        if part.__class__ is str:
            parts.append(part)  # pyright: ignore[reportArgumentType]
            continue
        option = part[int(random() * len(part))]  # several times faster than Random.choice
        if option.__class__ is str:
            parts.append(option)  # pyright: ignore[reportArgumentType]
        else:
            _sample(random, option, parts)  # pyright: ignore[reportArgumentType]


def _expand(sequence: _Sequence) -> Iterator[str]:
    choices = [[part] if isinstance(part, str) else _texts_of(part) for part in sequence]
    for chosen in product(*choices):
        yield "".join(chosen)


def _texts_of(alternatives: _Alternatives) -> list[str]:
    """Return the different texts of alternatives, which are repeated where one is frequent."""
    return list(
        dict.fromkeys(
            text
            for option in alternatives
            for text in ([option] if isinstance(option, str) else _expand(option))
        )
    )


def _count(sequence: _Sequence) -> int:
    count = 1
    for part in sequence:
        if not isinstance(part, str):
            count *= len(_texts_of(part))
    return count


def _clean(text: str) -> str:
    """Join the spaces around empty alternatives, and start sentences with capitals."""
    if "  " in text:
        text = " ".join([word for word in text.split(" ") if word])
    text = text.strip()
    for mark in _MARKS:
        if mark in text:
            text = text.replace(mark, mark[1])
    if ". " in text or "? " in text or "\n" in text:
        text = _SENTENCE.sub(lambda found: found[1] + found[2].upper(), text)
    return text[:1].upper() + text[1:]


def _read_json(name: str) -> dict[str, list[str]]:
    import json  # here, so that importing qwen2vl.synth does not take its 2 ms

    return json.loads(files(__package__ or "").joinpath(name).read_text(encoding="utf-8"))


@cache
def _common() -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(listed) for name, listed in _read_json(_COMMON).items()}


@cache
def _common_alternatives(name: str) -> _Alternatives:
    assert name in _common(), f"{_COMMON} has no <{name}>"
    return tuple(_simplify(_parse(listed)) for listed in _common()[name])


@cache
def _parse(template: str) -> _Sequence:
    tokens = _TOKENS.findall(template)
    assert "".join(tokens) == template, f"< opens no name: {template}"
    sequence, end = _parse_sequence(tokens, 0)
    assert end == len(tokens), f"brackets do not match: {template}"
    return sequence


def _parse_sequence(tokens: list[str], at: int) -> tuple[_Sequence, int]:
    """Parse up to the end of an alternative, and return the index of what follows."""
    parts: list[str | _Alternatives] = []
    while at < len(tokens) and tokens[at] not in ("|", "]"):
        token = tokens[at]
        at += 1
        if token == "[":
            options: list[str | _Sequence] = []
            separator = "|"
            while separator == "|":
                option, at = _parse_sequence(tokens, at)
                options.append(_simplify(option))
                assert at < len(tokens), f"brackets do not match: {''.join(tokens)}"
                separator = tokens[at]
                at += 1
            parts.append(tuple(options))
        elif token[0] == "<" and token[1] != "|":
            parts.append(_common_alternatives(token[1:-1]))
        else:
            parts.append(token)
    return tuple(parts), at


def _simplify(sequence: _Sequence) -> str | _Sequence:
    """Return a text in place of a sequence that has only one part, or none."""
    if not sequence:
        return ""
    return sequence[0] if len(sequence) == 1 and isinstance(sequence[0], str) else sequence
