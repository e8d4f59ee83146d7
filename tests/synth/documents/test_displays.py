"""Displays: what the segments show is the answer; labels, units and colors."""

from __future__ import annotations

import re

from qwen2vl.synth.colors import contrast
from qwen2vl.synth.compositing.layers import Rect, Text
from qwen2vl.synth.documents import sample_display
from qwen2vl.synth.spec import Box, Mixture
from tests.synth.documents.drawings import assert_text_is_whole, facts_of, samples

VALUES = ("display_number", "display_time", "display_temperature")


def holds(outer: Box, inner: Box) -> bool:
    return (
        outer[0] <= inner[0]
        and outer[1] <= inner[1]
        and inner[2] <= outer[2]
        and inner[3] <= outer[3]
    )


def test_text_is_neither_cut_nor_covered() -> None:
    for sample in samples(sample_display, 80):
        assert_text_is_whole(sample.picture)
        for layer in sample.picture.layers:
            if isinstance(layer, Rect):
                assert 0 <= layer.box[0] < layer.box[2] <= sample.picture.width
                assert 0 <= layer.box[1] < layer.box[3] <= sample.picture.height


def test_every_kind_of_reading_has_its_format() -> None:
    formats = {
        "display_number": r"-?\d+(\.\d+)?",
        "display_time": r"([01]?\d|2[0-3]):[0-5]\d(:[0-5]\d)?( [AP]M)?",
        "display_temperature": r"-?\d{1,2}(\.\d)?( °[CF])?",
    }
    found: dict[str, int] = dict.fromkeys(formats, 0)
    for sample in samples(sample_display, 200):
        for task, pattern in formats.items():
            for fact in facts_of(sample, task):
                found[task] += 1
                assert re.fullmatch(pattern, fact.answer), fact
                units = [one.text for one in sample.picture.layers if isinstance(one, Text)]
                assert all(part in units for part in fact.answer.split()[1:])
    assert min(found.values()) > 15


def test_digits_and_signs_follow_from_the_reading() -> None:
    negative = []
    for sample in samples(sample_display, 300):
        (value,) = [fact.answer for task in VALUES for fact in facts_of(sample, task)] or [""]
        digits = re.sub(r"\D", "", value)
        for fact in facts_of(sample, "display_digits"):
            assert fact.answer == str(len(digits))
        for fact in facts_of(sample, "display_nth"):
            assert fact.answer == (digits[0] if fact.fields == ("first",) else digits[-1])
        for fact in facts_of(sample, "display_negative"):
            assert fact.answer == ("yes" if value.startswith("-") else "no")
            negative.append(fact.answer)
    assert 0.3 < negative.count("yes") / len(negative) < 0.7


def test_pairs_are_asked_for_by_label_and_compared() -> None:
    pairs = 0
    for sample in samples(sample_display, 120):
        values = facts_of(sample, "display_value_of")
        if not values:
            continue
        pairs += 1
        labels = {fact.fields[0].lower(): int(fact.answer) for fact in values}
        assert len(labels) == 2
        written = [one.text for one in sample.picture.layers if isinstance(one, Text)]
        assert {text.lower() for text in written} == set(labels)
        (larger,) = facts_of(sample, "display_larger")
        assert labels[larger.answer.lower()] == max(labels.values())
        assert {field.lower() for field in larger.fields} == set(labels)
    assert pairs > 10


def test_segments_contrast_with_their_panel() -> None:
    for sample in samples(sample_display, 60):
        rects = [one for one in sample.picture.layers if isinstance(one, Rect)]
        # Paper, bezel and panel come first, and hold what follows.
        last = max(
            number
            for number, rect in enumerate(rects[:3])
            if rects[number + 1 :]
            and all(holds(rect.box, other.box) for other in rects[number + 1 :])
        )
        shades = {one.rgb for one in rects[last + 1 :]}
        assert len(shades) <= 2
        assert max(contrast(rgb, rects[last].rgb) for rgb in shades) > 2.4
        (color,) = facts_of(sample, "display_color")
        assert color.answer


def test_any_size_is_large_enough() -> None:
    for mixture in (
        Mixture(fonts="bundled", picture_side=(28, 30)),
        Mixture(fonts="bundled", picture_side=(28, 64), max_aspect=1.0),
    ):
        for sample in samples(sample_display, 30, mixture):
            assert sample.picture.width * sample.picture.height <= 64**2
            assert_text_is_whole(sample.picture)
