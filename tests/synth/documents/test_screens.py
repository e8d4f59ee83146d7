"""Windows: elements in their boxes, checked boxes, filled bars, colored buttons."""

from __future__ import annotations

import numpy as np

from qwen2vl.synth.compositing import draw_composite
from qwen2vl.synth.compositing.layers import Rect, Text
from qwen2vl.synth.documents import DocumentSample, sample_screen
from qwen2vl.synth.spec import Box, Mixture
from tests.synth.documents.drawings import assert_text_is_whole, facts_of, samples, text_box

CLEAN = Mixture(fonts="bundled", degraded_share=0.0, textured_share=0.0)


def boxes_of(sample: DocumentSample) -> dict[str, Box]:
    return {fact.answer: fact.box for fact in facts_of(sample, "screen_click") if fact.box}


def texts_in(sample: DocumentSample, box: Box) -> list[Text]:
    """Return the lines that begin in a box."""
    return [
        layer
        for layer in sample.picture.layers
        if isinstance(layer, Text)
        if box[0] <= layer.x < box[2] and box[1] < layer.y < box[3]
    ]


def test_text_is_neither_cut_nor_covered() -> None:
    for sample in samples(sample_screen, 80):
        assert_text_is_whole(sample.picture)


def test_boxes_hold_what_they_are_named_after() -> None:
    for sample in samples(sample_screen, 60):
        boxes = boxes_of(sample)
        (buttons,) = facts_of(sample, "screen_buttons")
        (count,) = facts_of(sample, "screen_button_count")
        assert count.answer == str(len(buttons.answer.split(", ")))
        for label in buttons.answer.split(", "):
            box = boxes[f"{label} button"]
            (text,) = texts_in(sample, box)
            assert text.text == label
            assert text_box(text)[2] <= box[2]
        for fact in facts_of(sample, "screen_field"):
            name = f"{fact.fields[0].lower()} field"
            (box,) = [box for own, box in boxes.items() if own.lower() == name]
            assert [text.text for text in texts_in(sample, box)] == [fact.answer]
        for box in boxes.values():
            assert 0 <= box[0] < box[2] <= sample.picture.width
            assert 0 <= box[1] < box[3] <= sample.picture.height


def test_checked_boxes_have_a_mark() -> None:
    answers = []
    for sample in samples(sample_screen, 60, CLEAN):
        checks = facts_of(sample, "screen_checked")
        if not checks:
            continue
        pixels = draw_composite(sample.picture).astype(int)
        boxes = {name.lower(): box for name, box in boxes_of(sample).items()}
        for fact in checks:
            x1, y1, x2, y2 = boxes[f"{fact.fields[0].lower()} checkbox"]
            inner = pixels[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
            assert (np.ptp(inner) > 60) == (fact.answer == "yes")
            answers.append(fact.answer)
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_progress_bars_are_filled_to_their_value() -> None:
    found = set()
    for sample in samples(sample_screen, 100, CLEAN):
        for fact in facts_of(sample, "screen_progress"):
            percent = int(fact.answer.removesuffix("%"))
            x1, y1, x2, y2 = boxes_of(sample)["progress bar"]
            row = draw_composite(sample.picture)[(y1 + y2) // 2, x1 + 1 : x2 - 1].astype(int)
            filled = np.abs(row - row[-1]).sum(axis=1) > 30 if percent < 100 else np.ones(len(row))
            assert abs(100 * filled.mean() - percent) < 4
            found.add(percent)
    assert len(found) > 6


def test_colors_of_buttons() -> None:
    colored = 0
    for sample in samples(sample_screen, 60):
        boxes = boxes_of(sample)
        rects = {
            layer.box: layer.rgb
            for layer in reversed(sample.picture.layers)
            if isinstance(layer, Rect)
        }
        by_label = {name.lower(): box for name, box in boxes.items()}
        for fact in facts_of(sample, "screen_button_color"):
            colored += 1
            red, green, blue = rects[by_label[f"{fact.fields[0].lower()} button"]]
            assert (fact.answer != "red") or red > max(green, blue) + 100
            assert (fact.answer != "blue") or blue > max(red, green) + 100
        colors = [fact.answer for fact in facts_of(sample, "screen_button_color")]
        assert len(set(colors)) == len(colors)
    assert colored > 10
