"""Seven-segment displays: clocks, thermometers, counters, numbers, and pairs of labeled numbers.

The segments have named colors on a dark or light panel; labels, units and AM or PM are text.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from qwen2vl.synth.colors import contrast, is_light, sample_color, sample_ground
from qwen2vl.synth.compositing.layers import Layer, Rect
from qwen2vl.synth.documents.layout import (
    Budget,
    DocumentSample,
    Fact,
    Sheet,
    Style,
    distinct_colors,
    mix_colors,
    place_sheet,
    sample_budget,
    sample_style,
    text_size,
    text_width,
    write,
)
from qwen2vl.synth.documents.segments import draw_segments, sample_segment_shape, segments_width
from qwen2vl.synth.documents.vocabulary import load_word_lists, spoken
from qwen2vl.synth.spec import RGB, Mixture

__all__ = ["Reading", "sample_display"]

_DIGIT_HEIGHTS = (18, 90)  # pixels
_MIN_CONTRAST = 2.5
_DARK_SHARE = 0.65
_UNLIT_SHARE = 0.25
_BEZEL_SHARE = 0.4
_ATTEMPTS = 12
_KINDS = {"number": 3, "clock": 3, "temperature": 2, "counter": 1, "pair": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One number or time of a display."""

    text: str  # as the segments show it
    label: str = ""  # above it
    unit: str = ""  # beside it


def sample_display(rng: Random, mixture: Mixture) -> DocumentSample:
    """Sample a display as a picture; any size is large enough for one.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    budget = sample_budget(rng, mixture)
    (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
    for attempt in range(_ATTEMPTS):
        style = sample_style(rng, mixture, budget, attempt=attempt)
        readings = _sample_readings(rng, kind)
        height = _sample_height(rng, budget, attempt)
        sheet = _lay_out(rng, style, kind, readings, height)
        if budget.admits(sheet):
            return place_sheet(rng, mixture, budget, style, sheet)
    style = sample_style(rng, mixture, budget, attempt=_ATTEMPTS)
    sheet = _lay_out(rng, style, "number", (Reading(text=str(rng.randrange(10))),), 16)
    return place_sheet(rng, mixture, budget, style, sheet)


def _sample_height(rng: Random, budget: Budget, attempt: int) -> int:
    low, high = _DIGIT_HEIGHTS
    high = max(low, round(high * 0.75**attempt))
    return round(rng.uniform(low, high) * budget.zoom)


def _sample_readings(rng: Random, kind: str) -> tuple[Reading, ...]:
    labels = load_word_lists()["labels"]
    if kind == "pair":
        a, b = rng.sample(labels, 2)
        highest = rng.choice((9, 99, 99, 999))
        values = rng.sample(range(highest + 1), 2)
        return tuple(
            Reading(text=str(value), label=label)
            for value, label in zip(values, (a, b), strict=True)
        )
    if kind == "clock":
        return (_sample_clock(rng),)
    if kind == "temperature":
        sign = "-" if rng.random() < 0.5 else ""
        fraction = f".{rng.randrange(10)}" if rng.random() < 0.5 else ""
        unit = rng.choice(("°C", "°C", "°F", ""))
        return (Reading(text=f"{sign}{rng.randint(1, 99)}{fraction}", unit=unit),)
    if kind == "counter":
        text = f"{rng.randrange(10 ** rng.randint(1, 6)):0{rng.randint(3, 6)}d}"
        return (Reading(text=text, label=rng.choice(labels)),)
    return (Reading(text=_sample_number(rng)),)


def _sample_number(rng: Random) -> str:
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.3 and len(digits) > 1:
        point = rng.randint(1, len(digits) - 1)
        digits = f"{int(digits[:point])}.{digits[point:]}"
    elif len(digits) > 1 and digits[0] == "0":
        digits = rng.choice("123456789") + digits[1:]
    return f"-{digits}" if rng.random() < 0.12 and digits.strip("0.") else digits


def _sample_clock(rng: Random) -> Reading:
    minute, second = rng.randrange(60), rng.randrange(60)
    seconds = f":{second:02d}" if rng.random() < 0.2 else ""
    if rng.random() < 0.3:
        text = f"{rng.randint(1, 12)}:{minute:02d}{seconds}"
        return Reading(text=text, unit=rng.choice(("AM", "PM")))
    hour = rng.randrange(24)
    padded = f"{hour:02d}" if rng.random() < 0.6 else str(hour)
    return Reading(text=f"{padded}:{minute:02d}{seconds}")


def _lay_out(
    rng: Random, style: Style, kind: str, readings: tuple[Reading, ...], height: int
) -> Sheet:
    panel, color, lit = _sample_colors(rng, style)
    unlit = mix_colors(panel, lit, rng.uniform(0.05, 0.12)) if rng.random() < _UNLIT_SHARE else None
    shape = sample_segment_shape(rng, height)
    caption = mix_colors(panel, (0, 0, 0) if is_light(panel) else (255, 255, 255), 0.85)
    pad = max(3, round(height * rng.uniform(0.15, 0.5)))
    bezel = rng.randint(2, max(3, height // 8)) if rng.random() < _BEZEL_SHARE else 0
    size = text_size(min(style.size, height), style.font)
    row = round(1.35 * size)
    has_labels = any(reading.label for reading in readings)
    top = bezel + pad + (row if has_labels else 0)
    x = bezel + pad
    layers: list[Layer] = []
    for number, reading in enumerate(readings):
        x += max(2 * pad, shape.width + shape.space) if number else 0
        width = segments_width(reading.text, shape)
        label_width = text_width(reading.label, style.font, size)
        lane = max(width, label_width)
        start = x + (lane - width) // 2
        layers += draw_segments(reading.text, (start, top), shape, lit=lit, unlit=unlit)
        if reading.label:
            box = (x, top - row - row // 4, x + lane, top - row // 4)
            layers.append(
                write(reading.label, box, caption, font=style.font, size=size, align="center")
            )
        x += lane
        if reading.unit:
            x += max(3, shape.space)
            y = top if rng.random() < 0.5 else top + height - row
            box = (x, y, x, y + row)
            layers.append(write(reading.unit, box, caption, font=style.font, size=size))
            x += text_width(reading.unit, style.font, size)
    total = (x + pad + bezel, max(top + height, top + row) + pad + bezel)
    inner = (bezel, bezel, total[0] - bezel, total[1] - bezel)
    case = mix_colors(panel, style.ink, rng.uniform(0.2, 0.6))
    frame: list[Layer] = [Rect(rgb=case, box=(0, 0, *total))] if bezel else []
    return Sheet(
        width=total[0],
        height=total[1],
        layers=(*frame, Rect(rgb=panel, box=inner), *layers),
        facts=_facts(rng, kind, readings, color),
    )


def _sample_colors(rng: Random, style: Style) -> tuple[RGB, str, RGB]:
    """Sample the color of the panel, and name and color of the segments."""
    is_dark = rng.random() < _DARK_SHARE
    panel = style.paper
    while is_light(panel) == is_dark:
        panel = sample_ground(rng)
    if not is_dark and rng.random() < 0.4:
        panel = (rng.randint(150, 190), rng.randint(180, 205), rng.randint(140, 170))  # LCD
    while True:
        name = "black" if not is_dark and rng.random() < 0.5 else rng.choice(distinct_colors(panel))
        rgb = sample_color(rng, name)
        if contrast(rgb, panel) >= _MIN_CONTRAST:
            return panel, name, rgb


def _facts(rng: Random, kind: str, readings: tuple[Reading, ...], color: str) -> tuple[Fact, ...]:
    facts = [Fact(task="display_color", answer=color, about=frozenset({"color"}))]
    if kind == "pair":
        return (*facts, *_pair_facts(rng, readings))
    (reading,) = readings
    task = {"clock": "display_time", "temperature": "display_temperature"}.get(
        kind, "display_number"
    )
    unit = f" {reading.unit}" if reading.unit else ""
    facts.append(_value_fact(task, reading.text + unit))
    digits = [char for char in reading.text if char.isdigit()]
    if kind == "temperature":
        answer = "yes" if reading.text.startswith("-") else "no"
        facts.append(_value_fact("display_negative", answer, choices=2))
    if kind in ("number", "counter"):
        facts.append(_value_fact("display_digits", str(len(digits)), choices=8))
        if len(digits) > 1:
            for place, digit in (("first", digits[0]), ("last", digits[-1])):
                facts.append(_value_fact("display_nth", digit, place, choices=10))
    if reading.label:
        facts.append(Fact(task="display_label", answer=reading.label, about=frozenset({"label"})))
    return tuple(facts)


def _pair_facts(rng: Random, readings: tuple[Reading, ...]) -> list[Fact]:
    """Ask for each number by its label, and which of the two is larger."""
    facts = [
        Fact(
            task="display_value_of",
            answer=reading.text,
            fields=(spoken(rng, reading.label),),
            about=frozenset({reading.label}),
        )
        for reading in readings
    ]
    shown = list(readings)
    rng.shuffle(shown)
    larger = max(readings, key=lambda reading: int(reading.text))
    about = frozenset(reading.label for reading in readings)
    labels = tuple(spoken(rng, reading.label) for reading in shown)
    facts.append(
        Fact(task="display_larger", answer=larger.label, fields=labels, about=about, choices=2)
    )
    return facts


def _value_fact(task: str, answer: str, *fields: str, choices: int = 0) -> Fact:
    return Fact(
        task=task, answer=answer, fields=fields, about=frozenset({"value"}), choices=choices
    )
