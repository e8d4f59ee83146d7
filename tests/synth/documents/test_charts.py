"""Bar charts: lengths in proportion to values, colors, and no question about unreadable values."""

from __future__ import annotations

from random import Random

from qwen2vl.synth.compositing.layers import Rect, Text
from qwen2vl.synth.documents import DocumentSample, sample_chart
from qwen2vl.synth.documents.charts import Bar, Chart
from qwen2vl.synth.spec import Mixture
from tests.synth.documents.drawings import assert_text_is_whole, facts_of, samples, text_box


def bars_of(sample: DocumentSample) -> dict[str, Rect]:
    """Return label -> rectangle: a bar is drawn right after its label, and its value."""
    bars: dict[str, Rect] = {}
    pending: list[str] = []
    for layer in sample.picture.layers:
        if isinstance(layer, Text):
            pending.append(layer.text)
        elif isinstance(layer, Rect):
            if pending and max(layer.box[2] - layer.box[0], layer.box[3] - layer.box[1]) > 1:
                width, height = layer.box[2] - layer.box[0], layer.box[3] - layer.box[1]
                if min(width, height) > 3 or pending[0] in labels_of(sample):
                    bars[pending[0]] = layer
            pending = []
    return {label: bar for label, bar in bars.items() if label in labels_of(sample)}


def labels_of(sample: DocumentSample) -> set[str]:
    found = {fact.answer for fact in facts_of(sample, "chart_position")}
    for fact in sample.facts:
        if fact.task in ("chart_color_of", "chart_value", "chart_larger"):
            found |= set(fact.about)
    return found


def lengths_of(sample: DocumentSample) -> dict[str, int]:
    """Return label -> length in pixels, along the axis of the values."""
    places = {fact.fields[0] for fact in facts_of(sample, "chart_position")}
    is_horizontal = "top" in places
    return {
        label: bar.box[2] - bar.box[0] if is_horizontal else bar.box[3] - bar.box[1]
        for label, bar in bars_of(sample).items()
    }


def test_text_is_neither_cut_nor_covered() -> None:
    for sample in samples(sample_chart, 80):
        assert_text_is_whole(sample.picture)


def test_order_questions_agree_with_the_drawn_lengths() -> None:
    asked = 0
    for sample in samples(sample_chart, 120):
        lengths = lengths_of(sample)
        for fact in facts_of(sample, "chart_larger"):
            a, b = fact.about
            asked += 1
            assert abs(lengths[a] - lengths[b]) >= 2
            assert fact.answer == max((a, b), key=lambda label: lengths[label])
        for fact in facts_of(sample, "chart_superlative"):
            if fact.answer in lengths and len(lengths) > 1:
                pick = min if fact.fields[0] in ("shortest", "smallest") else max
                assert pick(lengths, key=lambda label: lengths[label]) == fact.answer
    assert asked > 40


def test_values_are_in_proportion_to_lengths() -> None:
    compared = 0
    for sample in samples(sample_chart, 80):
        lengths = lengths_of(sample)
        values = {
            label: int(fact.answer)
            for fact in facts_of(sample, "chart_value")
            for label in fact.about
        }
        scales = [lengths[label] / value for label, value in values.items() if value]
        for label, value in values.items():
            expected = value * sorted(scales)[len(scales) // 2]
            assert abs(lengths[label] - expected) <= 0.05 * max(lengths.values()) + 1.5
            compared += 1
    assert compared > 60


def test_colors_belong_to_their_bars() -> None:
    colored = 0
    for sample in samples(sample_chart, 60):
        bars = bars_of(sample)
        by_color = {
            fact.fields[0]: fact.answer for fact in facts_of(sample, "chart_label_of_color")
        }
        for fact in facts_of(sample, "chart_color_of"):
            (label,) = fact.about
            colored += 1
            assert by_color[fact.answer] == label
            red, green, blue = bars[label].rgb
            assert (fact.answer != "red") or red > max(green, blue) + 100
            assert (fact.answer != "blue") or blue > max(red, green) + 100
            assert (fact.answer != "green") or green > max(red, blue) + 100
        one = facts_of(sample, "chart_color")
        assert bool(one) != bool(by_color)
        assert len(bars) == int(facts_of(sample, "chart_count")[0].answer) or one
    assert colored > 60


def test_the_ends_are_where_they_are_said_to_be() -> None:
    for sample in samples(sample_chart, 40):
        texts = {
            layer.text: text_box(layer)
            for layer in sample.picture.layers
            if isinstance(layer, Text)
        }
        first, last = (fact for fact in facts_of(sample, "chart_position"))
        a, b = texts[first.answer], texts[last.answer]
        if first.fields == ("leftmost",):
            assert a[0] < b[0] and last.fields == ("rightmost",)
        else:
            assert a[1] < b[1] and (first.fields, last.fields) == (("top",), ("bottom",))


def test_only_readable_values_and_visible_differences_are_asked_for() -> None:
    bars = tuple(
        Bar(label=label, value=value, color="red", rgb=(255, 0, 0))
        for label, value in (("a", 10), ("b", 13), ("c", 11))
    )
    settings = {"title": "", "bars": bars, "is_horizontal": False, "step": 10, "num_ticks": 5}
    ticks = Chart(**settings, has_ticks=True, has_values=False)
    assert [ticks.is_readable(bar) for bar in bars] == [True, False, False]
    assert ticks.differ(bars[0], bars[1]) and not ticks.differ(bars[0], bars[2])
    bare = Chart(**settings, has_ticks=False, has_values=False)
    assert not any(bare.is_readable(bar) for bar in bars)
    written = Chart(**settings, has_ticks=False, has_values=True)
    assert all(written.is_readable(bar) for bar in bars)
    assert ticks.has_one_color and ticks.top == 50


def test_pictures_that_are_too_small_have_no_chart() -> None:
    mixture = Mixture(fonts="bundled", picture_side=(28, 30))
    assert sample_chart(Random(1), mixture) is None
