"""Lines of text: uncut, readable, of the configured alphabet and fonts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2vl.synth import Mixture, render, sample
from qwen2vl.synth.colors import contrast
from qwen2vl.synth.draw import draw_image, ink_extent
from qwen2vl.synth.fonts import files_of, stems_look_alike
from qwen2vl.synth.spec import Line, Spec
from qwen2vl.synth.strings import DIGITS, LETTERS, PUNCTUATION
from tests.requirements import needs_training_fonts, needs_validation_fonts


def _lines(count: int = 150, fonts: Any = "bundled", **knobs: Any) -> list[tuple[Spec, Line]]:
    mixture = Mixture(weights={"text": 1.0}, fonts=fonts, **knobs)
    specs = [sample(11, i, mixture) for i in range(count)]
    return [(s, p) for s in specs for p in s.pictures if isinstance(p, Line)]


def test_answer_is_the_written_text() -> None:
    for spec, line in _lines():
        (question,) = spec.questions
        assert question.task == "read"
        assert question.answer == line.text
        assert 1 <= len(line.text) <= 16
        assert line.text == line.text.strip()
        assert "  " not in line.text


@pytest.mark.parametrize(
    ("alphabet", "allowed"),
    [
        ("digits", DIGITS),
        ("letters", LETTERS + " "),
        ("all", LETTERS + DIGITS + PUNCTUATION + " "),
    ],
)
def test_alphabet(alphabet: str, allowed: str) -> None:
    written = Counter("".join(line.text for _, line in _lines(600, alphabet=alphabet)))
    assert set(written) <= set(allowed)
    assert set(written) >= set(allowed)


def test_all_lengths_of_the_range_occur() -> None:
    lengths = {len(line.text) for _, line in _lines(400, text_length=(3, 9), random_share=1.0)}
    assert lengths == set(range(3, 10))


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("all", marks=needs_training_fonts)])
def test_ink_is_uncut_and_inside_the_canvas(fonts: str) -> None:
    """The distance of the ink to each border is within the padding."""
    for spec, _ in _lines(200, fonts, plain_share=1.0, padding=(1, 9)):
        image = render(spec).messages[0]["content"][0]["image"]
        rows, columns = np.nonzero(image[..., 0] < 255)
        borders = (
            rows.min(),
            columns.min(),
            image.shape[0] - 1 - rows.max(),
            image.shape[1] - 1 - columns.max(),
        )
        assert all(1 <= border <= 9 for border in borders), spec.questions[0].answer


def test_sizes_and_widths_are_within_limits() -> None:
    lines = [line for _, line in _lines(300, font_size=(14, 30), max_width=150)]
    assert {line.size for line in lines} == set(range(14, 31))
    assert max(line.width for line in lines) <= 150


def test_text_too_wide_gets_a_smaller_font_then_is_cut() -> None:
    lines = [line for _, line in _lines(40, text_length=(16, 16), max_width=80, random_share=1.0)]
    assert {line.size for line in lines} == {12}
    assert all(len(line.text) < 16 for line in lines)


def test_ink_contrasts_with_its_ground() -> None:
    lines = [line for _, line in _lines(300, plain_share=0.0)]
    assert min(contrast(line.ink, line.ground) for line in lines) >= 3.5
    lighter = sum(sum(line.ink) > sum(line.ground) for line in lines)
    assert 75 < lighter < 225


def test_pixels_are_ink_and_ground() -> None:
    for spec, line in _lines(60, plain_share=0.0, textured_share=0.0, font_size=(30, 40)):
        image = render(spec).messages[0]["content"][0]["image"].reshape(-1, 3)
        colors = {tuple(int(v) for v in pixel) for pixel in image}
        assert line.ink in colors
        assert tuple(int(v) for v in image[0]) == line.ground


def test_texture_is_slight() -> None:
    for spec, line in _lines(60, plain_share=0.0, textured_share=1.0, padding=(3, 6)):
        image = render(spec).messages[0]["content"][0]["image"].astype(int)
        assert np.abs(image[:2] - np.array(line.ground)).max() <= 7
        assert image[:2].std(axis=(0, 1)).max() > 0


def test_cells_hold_one_centered_character_each() -> None:
    knobs = {"layout": "cells", "fonts": "bundled", "plain_share": 1.0, "random_share": 1.0}
    for spec, line in _lines(80, text_length=(1, 6), **knobs):
        image = render(spec).messages[0]["content"][0]["image"]
        assert image.shape == (28, 28 * len(line.text), 3)
        for i in range(len(line.text)):
            cell = image[:, 28 * i : 28 * (i + 1), 0] < 255
            columns = np.nonzero(cell.any(axis=0))[0]
            assert abs(columns.min() - (27 - columns.max())) <= 1


def test_a_page_equals_its_lines_stacked() -> None:
    """Each row of a page in cells has the same pixels as its line drawn alone."""
    knobs = {"layout": "cells", "fonts": "bundled", "plain_share": 1.0, "random_share": 1.0}
    counts = set()
    for spec, page in _lines(60, page_share=1.0, page_lines=(2, 4), text_length=(1, 6), **knobs):
        (question,) = spec.questions
        assert (question.task, question.answer) == ("read_page", page.text)
        image = draw_image(page)
        rows = page.text.split("\n")
        counts.add(len(rows))
        assert image.shape == (28 * len(rows), 28 * max(map(len, rows)), 3)
        for i, text in enumerate(rows):
            alone = draw_image(replace(page, text=text, width=28 * len(text), height=28))
            assert np.array_equal(image[28 * i : 28 * (i + 1), : 28 * len(text)], alone)
    assert counts == {2, 3, 4}


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("all", marks=needs_training_fonts)])
def test_pages_are_uncut_and_within_the_max_width(fonts: str) -> None:
    pages = _lines(100, fonts, page_share=1.0, padding=(2, 5), max_width=150, plain_share=1.0)
    for _, page in pages:
        ink_rows, ink_columns = np.nonzero(draw_image(page)[..., 0] < 255)
        assert min(ink_rows.min(), ink_columns.min()) >= 2
        assert ink_rows.max() < page.height - 2
        assert ink_columns.max() < page.width - 2
        assert all(row.strip() == row != "" for row in page.text.split("\n"))
    assert 100 < max(page.width for _, page in pages) <= 150


def test_page_share_is_the_fraction_of_pages() -> None:
    pages = sum("\n" in line.text for _, line in _lines(300, page_share=0.5))
    assert 110 < pages < 190


@pytest.mark.parametrize(
    "fonts",
    [
        "bundled",
        pytest.param("mono2", marks=needs_training_fonts),
        pytest.param("all", marks=needs_training_fonts),
        pytest.param("validation", marks=needs_validation_fonts),
    ],
)
def test_fonts_come_from_their_set(fonts: str) -> None:
    used = {line.font for _, line in _lines(500, fonts)}
    assert used == {file for family in files_of(fonts) for file in family}


@needs_training_fonts
def test_judging_fonts_are_never_trained() -> None:
    used = {line.font for _, line in _lines(800, "all")}
    assert not used & {"Cabin-Regular.otf", "Inconsolata.otf", "Roboto-Regular.ttf"}


@needs_training_fonts
def test_random_strings_avoid_an_i_that_looks_like_an_l() -> None:
    lines = [line for _, line in _lines(500, "all", random_share=1.0)]
    assert any(stems_look_alike(line.font) for line in lines)
    assert not any(stems_look_alike(line.font) and "I" in line.text for line in lines)


def test_single_characters_are_not_ambiguous() -> None:
    single = {line.text for _, line in _lines(400, random_share=1.0, text_length=(1, 1))}
    assert not single & set("oOcCsS0Il.,")
    assert len(single) > 25


def test_random_share_is_the_fraction_of_random_strings() -> None:
    lines = [line for _, line in _lines(400, random_share=0.5, text_length=(10, 16))]
    words = sum(any(w in line.text.lower() for w in ("the", "e ", "ar", "ea")) for line in lines)
    assert 60 < words < 260


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("all", marks=needs_training_fonts)])
def test_large_and_sparse_lines_are_uncut(fonts: Any) -> None:
    plain = Mixture(weights={"text": 1.0}, padding=(2, 2), fonts=fonts)
    wide = replace(plain, large_share=1.0, sparse_share=1.0)
    aspects = []
    for index in range(100):
        (line,) = sample(1, index, wide).pictures
        assert isinstance(line, Line)
        assert plain.font_size[1] <= line.size <= 3 * plain.font_size[1]
        left, top, right, bottom = ink_extent(
            line.text, line.font, line.size, cell=0, tracking=line.tracking
        )
        assert line.x + left >= 2
        assert line.y + top >= 2
        assert line.x + right <= line.width - 2
        assert line.y + bottom <= line.height - 2
        aspects.append(line.width / line.height)
    assert min(aspects) < 1 < 10 < max(aspects)
