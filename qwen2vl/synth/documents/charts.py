"""Bar charts: two to seven bars, vertical or horizontal, in one color or in named ones.

Values are written at the bars, or can be read off an axis with ticks, or cannot be read at all: a
value is asked for only if it is written or lies on a tick, and bars are compared only if their
lengths differ visibly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from qwen2vl.synth.colors import sample_color
from qwen2vl.synth.compositing.layers import Layer, Rect
from qwen2vl.synth.documents.layout import (
    DocumentSample,
    Fact,
    Sheet,
    Style,
    distinct_colors,
    largest_width,
    mix_colors,
    place_sheet,
    sample_budget,
    sample_style,
    text_width,
    write,
)
from qwen2vl.synth.documents.vocabulary import cased, load_word_lists, sample_made_up, spoken
from qwen2vl.synth.spec import RGB, Box, Mixture

__all__ = ["Bar", "Chart", "sample_chart"]

_NUM_BARS = (2, 7)
_ATTEMPTS = 7
_TITLE_SHARE = 0.35
_ONE_COLOR_SHARE = 0.35
_VISIBLE = 0.06  # of the axis: smallest difference of two bars that are compared
_TICK_STEPS = (1, 1, 2, 5, 5, 10, 10, 20, 25, 50, 100)
_POSITIONS = {False: ("leftmost", "rightmost"), True: ("top", "bottom")}
_SIZE_WORDS = {  # superlative, comparative and adjective of a bar's length
    False: (("tallest", "taller", "tall"), ("highest", "higher", "high")),
    True: (("longest", "longer", "long"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a chart."""

    label: str
    value: int
    color: str  # its name
    rgb: RGB


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A bar chart before it is laid out."""

    title: str
    bars: tuple[Bar, ...]
    is_horizontal: bool
    step: int  # from one tick to the next
    num_ticks: int  # above zero
    has_ticks: bool  # with numbers
    has_values: bool  # written at the bars

    @property
    def top(self) -> int:
        """The value at the end of the axis."""
        return self.step * self.num_ticks

    @property
    def has_one_color(self) -> bool:
        """Return whether all bars have the same color."""
        return len({bar.color for bar in self.bars}) == 1

    def is_readable(self, bar: Bar) -> bool:
        """Return whether the value of a bar can be read."""
        return self.has_values or (self.has_ticks and bar.value % self.step == 0)

    def differ(self, a: Bar, b: Bar) -> bool:
        """Return whether the lengths of two bars differ visibly."""
        return abs(a.value - b.value) >= _VISIBLE * self.top


def sample_chart(rng: Random, mixture: Mixture) -> DocumentSample | None:
    """Sample a bar chart as a picture; None if the mixture's pictures are too small for it.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    budget = sample_budget(rng, mixture)
    for attempt in range(_ATTEMPTS):
        style = sample_style(rng, mixture, budget, attempt=attempt, light=0.75)
        chart = _sample_content(rng, style, max(_NUM_BARS[0] + 1, _NUM_BARS[1] - attempt))
        width, height, layers = _lay_out(rng, chart, style)
        sheet = Sheet(width=width, height=height, layers=tuple(layers), facts=_facts(rng, chart))
        if budget.admits(sheet):
            return place_sheet(rng, mixture, budget, style, sheet)
    return None


def _sample_content(rng: Random, style: Style, most: int) -> Chart:
    lists = load_word_lists()
    count = rng.randint(_NUM_BARS[0], most)
    num_ticks, step = rng.randint(3, 6), rng.choice(_TICK_STEPS)
    has_values = rng.random() < 0.45
    has_ticks = rng.random() < (0.3 if has_values else 0.8)
    return Chart(
        title=rng.choice(lists["titles"]) if rng.random() < _TITLE_SHARE else "",
        bars=_sample_bars(rng, style, count, step * num_ticks, 0 if has_values else step),
        is_horizontal=rng.random() < 0.4,
        step=step,
        num_ticks=num_ticks,
        has_ticks=has_ticks,
        has_values=has_values,
    )


def _sample_bars(rng: Random, style: Style, count: int, top: int, step: int) -> tuple[Bar, ...]:
    """Sample labels, values and colors; most values are multiples of `step`, if it is given."""
    colors = rng.sample(distinct_colors(style.paper), count)
    if rng.random() < _ONE_COLOR_SHARE:
        colors = colors[:1] * count
    bars = []
    for label, color in zip(_sample_labels(rng, count), colors, strict=True):
        value = rng.randint(max(1, top // 20), top)
        if step and rng.random() < 0.8:
            value = step * max(1, round(value / step))
        bars.append(Bar(label=label, value=value, color=color, rgb=sample_color(rng, color)))
    return tuple(bars)


def _sample_labels(rng: Random, count: int) -> list[str]:
    lists = load_word_lists()
    kind = rng.random()
    if kind < 0.15:
        return list("ABCDEFG"[:count])
    if kind < 0.25:
        start = rng.randrange(len(lists["months"]) - count + 1)
        return list(lists["months"][start : start + count])
    if kind < 0.35:
        return [day[:3] for day in lists["days"][:count]]
    if kind < 0.42:
        start = rng.randint(1990, 2030)
        return [str(start + number) for number in range(count)]
    if kind < 0.58:
        return rng.sample([name for name in lists["people"] if len(name) < 6], count)
    if kind < 0.66:
        return [cased(sample_made_up(rng)[:5], "first") for _ in range(count)]
    case = rng.choice(("lower", "first", "first"))
    return [cased(word, case) for word in rng.sample(lists["short"], count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Geometry of a chart along its axis of values and across it, in pixels."""

    plot: Box
    pitch: int  # from one bar to the next
    thickness: int  # of a bar


def _lay_out(rng: Random, chart: Chart, style: Style) -> tuple[int, int, list[Layer]]:
    """Return width, height and layers."""
    labels = [bar.label for bar in chart.bars]
    label_width = largest_width(labels, style.font, style.size)
    row, pad = style.pixels(1.35), style.pixels(0.4)
    ticks = [str(chart.step * number) for number in range(chart.num_ticks + 1)]
    tick_width = largest_width(ticks, style.font, style.size)
    top = pad + (row if chart.title else 0)
    if chart.is_horizontal:
        pitch = max(row, style.pixels(rng.uniform(1.2, 2.2)))
        length = max(style.pixels(rng.uniform(5, 10)), chart.num_ticks * 12)
        length = max(length, (tick_width + 4) * chart.num_ticks) if chart.has_ticks else length
        left = pad + label_width + style.pixels(0.4)
        plot = (left, top, left + length, top + pitch * len(labels))
        ends = (tick_width + style.pixels(0.3) if chart.has_values else tick_width // 2, row)
    else:
        pitch = max(label_width + style.pixels(0.4), style.pixels(rng.uniform(1.2, 2.4)))
        if chart.has_values:
            pitch = max(pitch, tick_width + style.pixels(0.3))
        length = max(style.pixels(rng.uniform(4, 8)), chart.num_ticks * 10)
        length = max(length, row * chart.num_ticks) if chart.has_ticks else length
        left = pad + (tick_width + style.pixels(0.4) if chart.has_ticks else 0)
        top += row if chart.has_values else row // 2
        plot = (left, top, left + pitch * len(labels), top + length)
        ends = (0, row)
    thickness = max(4, round(pitch * rng.uniform(0.4, 0.85)))
    frame = _Frame(plot=plot, pitch=pitch, thickness=thickness)
    width = plot[2] + ends[0] + pad
    bottom = ends[1] if chart.has_ticks or not chart.is_horizontal else 0
    layers = _draw_axes(rng, chart, style, frame)
    layers += _draw_bars(chart, style, frame)
    if chart.title:
        width = max(width, largest_width([chart.title], style.bold, style.size) + 2 * pad)
        box = (0, pad, width, pad + row)
        layers.append(
            write(chart.title, box, style.ink, font=style.bold, size=style.size, align="center")
        )
    return width, plot[3] + bottom + pad, layers


def _draw_axes(rng: Random, chart: Chart, style: Style, frame: _Frame) -> list[Layer]:
    """Draw the axis, ticks with their numbers, and grid lines."""
    x1, y1, x2, y2 = frame.plot
    line = mix_colors(style.paper, style.ink, 0.7)
    faint = mix_colors(style.paper, style.ink, 0.18)
    has_grid = chart.has_ticks and rng.random() < 0.6
    layers: list[Layer] = []
    row = style.pixels(1.35)
    for number in range(chart.num_ticks + 1 if chart.has_ticks else 0):
        text = str(chart.step * number)
        if chart.is_horizontal:
            x = x1 + round((x2 - x1) * number / chart.num_ticks)
            long = Rect(rgb=faint, box=(x, y1, x + 1, y2))
            short = Rect(rgb=line, box=(x, y2, x + 1, y2 + 3))
            half = text_width(text, style.font, style.size)
            box = (x - half, y2 + 2, x + half, y2 + 2 + row)
            align = "center"
        else:
            y = y2 - round((y2 - y1) * number / chart.num_ticks)
            long = Rect(rgb=faint, box=(x1, y, x2, y + 1))
            short = Rect(rgb=line, box=(x1 - 3, y, x1, y + 1))
            box = (0, y - row // 2, x1 - style.pixels(0.3), y - row // 2 + row)
            align = "right"
        layers += [long, short] if has_grid else [short]
        layers.append(write(text, box, style.ink, font=style.font, size=style.size, align=align))
    if chart.is_horizontal:
        return [*layers, Rect(rgb=line, box=(x1 - 1, y1, x1, y2))]
    return [*layers, Rect(rgb=line, box=(x1, y2, x2, y2 + 1))]


def _draw_bars(chart: Chart, style: Style, frame: _Frame) -> list[Layer]:
    """Draw bars with their labels, and values if they are written."""
    x1, y1, x2, y2 = frame.plot
    row = style.pixels(1.35)
    layers: list[Layer] = []

    def put(text: str, box: Box, align: str) -> None:
        layers.append(write(text, box, style.ink, font=style.font, size=style.size, align=align))

    for number, bar in enumerate(chart.bars):
        start = number * frame.pitch
        inset = start + (frame.pitch - frame.thickness) // 2
        if chart.is_horizontal:
            end = x1 + max(1, round((x2 - x1) * bar.value / chart.top))
            box = (x1, y1 + inset, end, y1 + inset + frame.thickness)
            lane = (y1 + start, y1 + start + frame.pitch)
            put(bar.label, (0, lane[0], x1 - style.pixels(0.3), lane[1]), "right")
            if chart.has_values:
                put(str(bar.value), (end + style.pixels(0.25), lane[0], end, lane[1]), "left")
        else:
            end = y2 - max(1, round((y2 - y1) * bar.value / chart.top))
            box = (x1 + inset, end, x1 + inset + frame.thickness, y2)
            lane = (x1 + start, x1 + start + frame.pitch)
            put(bar.label, (lane[0], y2 + 1, lane[1], y2 + 1 + row), "center")
            if chart.has_values:
                put(str(bar.value), (lane[0], end - row, lane[1], end), "center")
        layers.append(Rect(rgb=bar.rgb, box=box))
    return layers


def _facts(rng: Random, chart: Chart) -> tuple[Fact, ...]:
    bars = chart.bars
    superlative, comparative, adjective = rng.choice(_SIZE_WORDS[chart.is_horizontal])
    facts = [
        Fact(
            task="chart_count",
            answer=str(len(bars)),
            about=frozenset({"count"}),
            choices=_NUM_BARS[1] - _NUM_BARS[0] + 1,
        )
    ]
    if chart.title:
        facts.append(Fact(task="chart_title", answer=chart.title, about=frozenset({"title"})))
    facts += _order_facts(rng, chart, superlative, comparative)
    for bar in bars:
        facts += _bar_facts(rng, chart, bar, adjective)
    for place, bar in zip(_POSITIONS[chart.is_horizontal], (bars[0], bars[-1]), strict=True):
        facts.append(_bar_fact("chart_position", bar.label, [bar], place, choices=len(bars)))
    if chart.has_one_color:
        color = bars[0].color
        facts.append(Fact(task="chart_color", answer=color, about=frozenset({"color"})))
    return tuple(facts)


def _bar_facts(rng: Random, chart: Chart, bar: Bar, adjective: str) -> list[Fact]:
    label = spoken(rng, bar.label)
    facts = []
    if not chart.has_one_color:
        facts.append(_bar_fact("chart_color_of", bar.color, [bar], label))
        facts.append(
            _bar_fact("chart_label_of_color", bar.label, [bar], bar.color, choices=len(chart.bars))
        )
    if not chart.is_readable(bar):
        return facts
    value = str(bar.value)
    facts.append(_bar_fact("chart_value", value, [bar], label, adjective))
    if not chart.has_one_color:
        facts.append(_bar_fact("chart_value_of_color", value, [bar], bar.color, adjective))
    others = [one for one in chart.bars if one is not bar]
    if all(chart.differ(one, bar) or chart.has_values for one in others) and bar.value not in {
        one.value for one in others
    }:
        facts.append(
            _bar_fact("chart_label_of_value", bar.label, [bar], value, choices=len(chart.bars))
        )
    return facts


def _order_facts(rng: Random, chart: Chart, superlative: str, comparative: str) -> list[Fact]:
    """Ask for the largest and the smallest bar, and compare two; fewer where bars are alike."""
    by_value = sorted(chart.bars, key=lambda bar: bar.value)
    count = len(by_value)
    facts = []
    smallest = "shortest" if rng.random() < 0.7 else "smallest"
    for word, bar, next_one in (
        (superlative, by_value[-1], by_value[-2]),
        (smallest, by_value[0], by_value[1]),
    ):
        if chart.differ(bar, next_one):
            facts.append(_bar_fact("chart_superlative", bar.label, [bar], word, choices=count))
            if not chart.has_one_color:
                facts.append(
                    _bar_fact("chart_superlative_color", bar.color, [bar], word, choices=count)
                )
    a, b = rng.sample(by_value, 2)
    if chart.differ(a, b):
        larger = max(a, b, key=lambda bar: bar.value)
        fields = (spoken(rng, a.label), spoken(rng, b.label), comparative)
        facts.append(_bar_fact("chart_larger", larger.label, [a, b], *fields, choices=2))
    return facts


def _bar_fact(task: str, answer: str, bars: Sequence[Bar], *fields: str, choices: int = 0) -> Fact:
    about = frozenset(bar.label for bar in bars)
    return Fact(task=task, answer=answer, fields=fields, about=about, choices=choices)
