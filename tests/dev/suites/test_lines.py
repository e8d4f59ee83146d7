"""The suite lines: scripts, faces, legible text that fits, a blind control, the same file again."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from dev.suites import lines as freeze
from dev.suites.line_texts import has_clear_case, load_names, sample_names
from dev.suites.lines import PARTS, covers, draw_items
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.synth.colors import contrast
from qwen2vl.synth.compositing import Composite, Text, draw_composite
from qwen2vl.synth.fonts import TRAINING_FAMILIES, VALIDATION_FAMILIES
from tests.requirements import needs_dataset

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "6db9a3ee0025e39496da7c331d8b97c82baaf1cb63da763cd83851ead3e12394"
SUITE = open_frozen_suite("lines")
FILE = Path(freeze.FILE)
NUMBERS = set("0123456789 +-.,:/%$£€")

needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no raqm layout")


def items(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def picture_of(item: FrozenItem) -> tuple[Composite, Text]:
    (picture,) = item.pictures
    assert isinstance(picture, Composite)
    (layer,) = picture.layers
    assert isinstance(layer, Text)
    return picture, layer


def test_the_file_is_frozen_and_small() -> None:
    assert SUITE.digest == sha256(FILE.read_bytes()).hexdigest() == DIGEST
    assert FILE.stat().st_size < 1_000_000


@pytest.mark.parametrize("part", SUITE.parts)
def test_lines_are_different_and_of_several_lengths(part: str) -> None:
    texts = [item.answers[0] for item in items(part)]
    lengths = [len(text) for text in texts]
    assert 80 <= len(set(texts)) == len(texts) == PARTS[part].count
    assert min(lengths) <= 4 and 11 <= max(lengths) <= PARTS[part].source.max_length
    assert len(set(lengths)) >= 10


@pytest.mark.parametrize("part", SUITE.parts)
def test_text_has_one_form_only(part: str) -> None:
    """No character is invisible, and each belongs to the script."""
    scripts = PARTS[part].source.scripts
    for text in (item.answers[0] for item in items(part)):
        assert text == unicodedata.normalize("NFC", text) == " ".join(text.split())
        assert not {unicodedata.category(char) for char in text} & {"Cf", "Cc", "Co", "Cn", "Cs"}
        letters = [char for char in text if unicodedata.category(char)[0] in "LM"]
        assert all(unicodedata.name(char).startswith(scripts) for char in letters)
        if part == "digits":
            assert set(text) <= NUMBERS and not letters
        else:
            assert letters


def test_faces_are_used_and_languages_take_turns() -> None:
    for name, part in PARTS.items():
        own = items(name)
        assert {item.kind for item in own} == {name}
        assert len(part.source.languages) <= len(own)
        faces = Counter(picture_of(item)[1].font for item in own)
        assert set(faces) == {file for files in part.faces.values() for file in files}, name


def test_accented_lines_have_accents_and_english_ones_none() -> None:
    assert not any(item.answers[0].isascii() for item in items("latin_accents"))
    assert all(item.answers[0].isascii() for item in items("latin"))


def test_faces_are_held_out() -> None:
    held_out = SUITE.header.held_out["fonts"]
    assert {picture_of(item)[1].font for item in SUITE.frozen_items} == set(held_out)
    families = [*TRAINING_FAMILIES.values(), *VALIDATION_FAMILIES.values()]
    trained = {file for _, files in families for file in files}
    assert not {Path(file).name for file in held_out} & trained


def test_pictures_are_legible() -> None:
    """The text of a picture is the answer; sizes and contrasts are those that a person reads."""
    colored = 0
    for item in SUITE.frozen_items:
        picture, layer = picture_of(item)
        assert layer.text == item.answers[0] and item.metric == "edit_distance"
        assert PARTS[item.part].min_size <= layer.size <= 48
        assert picture.ground.kind == "plain"
        assert contrast(layer.rgb, picture.ground.rgb) >= 4.5
        assert picture.blur == 0 or (picture.blur <= 0.9 and layer.size >= 24)
        assert picture.jpeg_quality == 0 or 60 <= picture.jpeg_quality <= 90
        colored += (layer.rgb, picture.ground.rgb) != ((0, 0, 0), (255, 255, 255))
    assert 0.28 < colored / len(SUITE.frozen_items) < 0.38
    for effect in ("blur", "jpeg_quality"):
        share = sum(bool(getattr(picture_of(i)[0], effect)) for i in SUITE.frozen_items)
        assert 0.05 < share / len(SUITE.frozen_items) < 0.25, effect


def test_an_oracle_makes_no_error() -> None:
    for item in SUITE.items(SUITE.parts):
        result = score_item(item, SuiteAnswer(text=f" {item.answers[0]}\n"))
        assert (result.score, result.edits, result.length) == (1, 0, len(item.answers[0]))
        assert item.chance == 1 / len(SUITE.items([item.part]))  # no two lines are equal


def test_the_blind_control_shows_another_line() -> None:
    assert set(SUITE.blind_parts) == set(SUITE.parts)
    seeing, blind = SUITE.items(SUITE.parts), SUITE.items(SUITE.parts, blind=True)
    for own, other in zip(seeing, blind, strict=True):
        assert own.id == other.id and own.question == other.question
        assert own.media.pictures[0].layers[0].text != other.media.pictures[0].layers[0].text


@pytest.mark.parametrize(
    ("text", "is_clear"),
    [("cow", False), ("COW", False), ("Cow", True), ("crow", True), ("лось", False)]
    + [("рыба", True), ("15:30", True), ("žuk", False), ("狼", True)],
)
def test_letters_like_their_capitals_are_ambiguous_alone(text: str, is_clear: bool) -> None:
    assert has_clear_case(text) is is_clear


@pytest.mark.parametrize("part", ["latin", "cyrillic", "greek"])
def test_no_line_has_letters_of_unknown_case(part: str) -> None:
    assert all(has_clear_case(item.answers[0]) for item in items(part))


@needs_dataset("test-fonts")
def test_every_character_has_a_glyph() -> None:
    wrong = [i.id for i in SUITE.frozen_items if not covers(picture_of(i)[1].font, i.answers[0])]
    assert not wrong
    assert not covers("fonts-humor-sans/Humor-Sans.ttf", "£5")  # drawn as a little face
    assert not covers("fonts-kacst/KacstBook.ttf", "گل")  # a Persian letter


@needs_raqm
@needs_dataset("test-fonts")
@pytest.mark.parametrize("part", SUITE.parts)
def test_all_of_the_ink_is_inside_the_canvas(part: str) -> None:
    for item in items(part)[:6]:
        picture = replace(picture_of(item)[0], blur=0.0, jpeg_quality=0)
        is_ink_HW = (draw_composite(picture) != np.array(picture.ground.rgb)).any(axis=2)
        assert is_ink_HW.any()
        border = is_ink_HW.copy()
        border[3:-3, 3:-3] = False
        assert not border.any(), item.id


@needs_raqm
@needs_dataset("test-fonts")
@needs_dataset("names")
@pytest.mark.parametrize("part", SUITE.parts)
def test_the_same_lines_are_drawn_again(part: str) -> None:
    assert list(draw_items(part, 8)) == items(part)[:8]


@needs_dataset("names")
def test_names_with_characters_of_another_kind_are_left_out() -> None:
    persian = load_names("fa", ("ARABIC",))
    assert "گورکن" in persian
    assert not any("\u200c" in name for name in persian)
    assert "אַיִל" not in load_names("he", ("HEBREW",))  # with vowel points


@needs_dataset("names")
def test_a_line_is_no_longer_than_its_source_allows() -> None:
    source = replace(PARTS["khmer"].source, max_length=9)
    texts = [sample_names(freeze.Random(str(seed)), source, "km") for seed in range(50)]
    assert max(map(len, texts)) <= 9 and len(set(texts)) > 30
