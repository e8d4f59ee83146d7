"""Lines of many scripts: answers agree with the layers, questions and layouts with the mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import features

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth import fonts
from qwen2vl.synth.compositing import Composite, Text, check_resources, draw_composite
from qwen2vl.synth.families import lines
from qwen2vl.synth.families.lines import check_lines, sample
from qwen2vl.synth.fonts import FontError
from qwen2vl.synth.grammar.expansion import count_patterns, load_templates
from qwen2vl.synth.scripts import layout
from qwen2vl.synth.scripts.alphabets import SCRIPTS
from qwen2vl.synth.scripts.faces import Face, sample_face
from qwen2vl.synth.scripts.layout import Block, Ink
from qwen2vl.synth.spec import FamilySample, Mixture, Question, Spec
from tests.requirements import needs_dataset, needs_line_fonts

TASKS = (
    *("read_at", "read_colored", "read_sized", "read_line", "count_text_words"),
    *("count_text_lines", "text_word", "text_letter", "text_says", "has_word", "which_script"),
    "text_color",
)
MANY = Mixture(
    max_questions=4, text_length=(1, 24), page_lines=(2, 6), max_width=600, picture_side=(80, 336)
)


@pytest.fixture(scope="module")
def bundled() -> Iterator[None]:
    """Draw in fonts that come with the package."""
    files = ("Cabin-Regular.otf", "Caladea-Italic.ttf", "Courier Prime Bold.otf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "sample_face", lambda rng, script: Face(file=rng.choice(files)))
        yield


@pytest.fixture(scope="module")
def samples(bundled: None) -> list[FamilySample]:
    return draw(500)


def draw(count: int, mixture: Mixture = MANY, seed: str = "lines") -> list[FamilySample]:
    return [sample(Random(f"{seed}/{index}"), mixture) for index in range(count)]


def texts_of(drawn: FamilySample) -> list[Text]:
    (picture,) = drawn.pictures
    assert isinstance(picture, Composite)
    return [layer for layer in picture.layers if isinstance(layer, Text)]


def asked(samples: Sequence[FamilySample], task: str) -> list[tuple[Question, list[Text]]]:
    return [(q, texts_of(one)) for one in samples for q in one.questions if q.task == task]


def test_all_tasks_are_asked(samples: list[FamilySample]) -> None:
    counts = Counter(q.task for one in samples for q in one.questions)
    assert set(counts) == {*TASKS, "read", "read_page"} - {"which_script"}
    assert min(counts.values()) >= 10
    assert counts["read"] > 180 and counts["read_page"] > 40


def test_texts_are_read_as_they_are_written(samples: list[FamilySample]) -> None:
    for question, (text,) in asked(samples, "read"):
        assert question.answer == text.text
    for question, layers in asked(samples, "read_page"):
        assert question.answer == "\n".join(text.text for text in layers)
    for question, layers in asked(samples, "count_text_lines"):
        assert question.answer == str(len(layers))
    for question, layers in asked(samples, "read_line"):
        assert question.answer in {text.text for text in layers}
        index = {" first ": 0, " second ": 1, " third ": 2, " last ": -1}
        for word, at in index.items():
            assert word not in question.text or question.answer == layers[at].text


def test_words_and_letters_are_those_of_the_text(samples: list[FamilySample]) -> None:
    for question, layers in asked(samples, "count_text_words"):
        assert question.answer == str(len(" ".join(text.text for text in layers).split()))
    for question, layers in asked(samples, "text_word"):
        words = " ".join(text.text for text in layers).split()
        assert question.answer == words[-1 if "last" in question.text else 0]
    for question, (text,) in asked(samples, "text_letter"):
        assert question.answer == text.text[-1 if "last" in question.text else 0]


def test_separate_texts_are_selected_by_place(samples: list[FamilySample]) -> None:
    fields = Counter[str]()
    for question, layers in asked(samples, "read_at"):
        (found,) = [text for text in layers if text.text == question.answer]
        others = [text for text in layers if text is not found]
        holds = {
            "at the top": all(found.y < other.y for other in others),
            "at the bottom": all(found.y > other.y for other in others),
            "on the left": all(found.x < other.x for other in others),
            "on the right": all(found.x > other.x for other in others),
        }
        (field,) = [field for field in holds if field in question.text.lower()]
        assert holds[field]
        fields[field] += 1
    assert set(fields) >= {"at the top", "at the bottom", "on the left"}


def test_separate_texts_are_selected_by_color_or_size(samples: list[FamilySample]) -> None:
    for question, layers in asked(samples, "read_colored"):
        (found,) = [text for text in layers if text.text == question.answer]
        assert all(text.rgb != found.rgb for text in layers if text is not found)
    for question, layers in asked(samples, "read_sized"):
        sizes = {text.text: text.size for text in layers}
        best = max(sizes.values()) if "largest" in question.text else min(sizes.values())
        assert sizes[question.answer] == best


@pytest.mark.parametrize("task", ["text_says", "has_word"])
def test_yes_and_no_are_balanced_and_right(task: str, samples: list[FamilySample]) -> None:
    questions = asked(samples, task)
    answers = Counter(question.answer for question, _ in questions)
    assert abs(answers["yes"] - answers["no"]) < 0.4 * len(questions)
    for question, layers in questions:
        written = " ".join(text.text for text in layers)
        words = written.split() if task == "has_word" else [written]
        quoted = [form for word in words for form in (f'"{word}"', f"'{word}'")]
        said = [form for form in quoted if form in question.text]
        assert bool(said) == (question.answer == "yes"), (question, written)


@pytest.mark.usefixtures("bundled")
def test_near_misses_differ_in_one_clear_character() -> None:
    rng = Random(1)
    others = [lines._other_text(rng, "latin", "Guitar 10") for _ in range(300)]
    near = [
        pair
        for other in others
        if len(other) == 9
        for pair in [[(a, b) for a, b in zip("Guitar 10", other, strict=True) if a != b]]
        if len(pair) == 1
    ]
    assert len(near) > 100
    assert "Guitar 10" not in others
    for ((old, new),) in near:
        assert old.isdigit() == new.isdigit() and old.isupper() == new.isupper()
        assert old.lower() != new.lower() and {old, new} not in ({"i", "l"}, {"1", "l"})


@pytest.mark.usefixtures("bundled")
def test_the_number_of_questions_and_the_share_that_reads(samples: list[FamilySample]) -> None:
    assert {len(one.questions) for one in samples} == {1, 2, 3, 4}
    assert all(len({q.text for q in one.questions}) == len(one.questions) for one in samples)
    single = draw(200, Mixture(picture_side=(80, 200)))
    assert {len(one.questions) for one in single} == {1}
    reading = [q for one in single for q in one.questions if q.task.startswith("read")]
    assert len(reading) > 0.83 * 200


@pytest.mark.usefixtures("bundled")
@pytest.mark.parametrize("side", [56, 400, 1600])
def test_text_is_inside_canvases_of_any_size(side: int) -> None:
    mixture = Mixture(
        picture_side=(side, side),
        max_aspect=20,
        font_size=(12, 40),
        degraded_share=0,
        plain_share=1.0,
    )
    for one in draw(25 if side < 1000 else 6, mixture):
        (picture,) = one.pictures
        assert isinstance(picture, Composite)
        pixels = draw_composite(picture)
        assert pixels.shape == (picture.height, picture.width, 3)
        ground = pixels[0, 0]
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        if min(picture.width, picture.height) > side / 8 and side == 1600:
            assert all((edge == ground).all() for edge in edges)
        assert (pixels != ground).any()


@pytest.mark.usefixtures("bundled")
def test_a_sample_is_a_function_of_the_seed_and_survives_json() -> None:
    first, again = draw(30), draw(30)
    assert first == again
    for index, one in enumerate(first):
        spec = Spec(
            family="lines", seed=1, index=index, questions=one.questions, pictures=one.pictures
        )
        assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.usefixtures("bundled")
def test_held_out_wordings_are_others() -> None:
    fields: dict[str, Any] = {"text_length": (4, 9), "max_questions": 3}
    train = {q.text for one in draw(150, Mixture(**fields)) for q in one.questions}
    held_out = {
        q.text for one in draw(150, Mixture(split="held_out", **fields)) for q in one.questions
    }
    assert len(train & held_out) < 5


def test_every_task_has_hundreds_of_patterns() -> None:
    for task in TASKS:
        assert len(load_templates()[task]) >= 13
        assert count_patterns(task) > 500, task


@needs_line_fonts
@needs_dataset("names")
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "latin_accents"])
def test_every_script_is_drawn_in_its_fonts(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "sample_face", sample_face)  # also while `bundled` is in use
    mixture = Mixture(scripts={script: 1.0}, text_length=(1, 12), max_questions=3)
    check_lines(mixture)
    for one in draw(4, mixture, seed=script):
        (picture,) = one.pictures
        assert isinstance(picture, Composite)
        check_resources([picture])
        pixels = draw_composite(picture)
        assert np.ptp(pixels.astype(int), axis=(0, 1)).max() > 60
        assert all(question.answer for question in one.questions)


def test_the_scripts_of_a_mixture_are_asked_about_equally_often() -> None:
    mixture = Mixture(scripts={"latin": 3.0, "latin_accents": 1.0, "greek": 1.0, "digits": 1.0})
    rng, answers = Random(0), Counter[str]()
    for script in 600 * ("latin", "latin", "latin", "latin_accents", "greek", "digits"):
        block = Block(
            script=script,
            texts=("12" if script == "digits" else "ab",),
            font="Cabin-Bold.otf",
            size=20,
            pens=((0, 0),),
            width=20,
            height=20,
        )
        for question in lines._ask_script(rng, mixture, block, Ink(rgb=(0, 0, 0))):
            answers[question.answer] += 1
    assert set(answers) == {"Latin", "Greek"}
    assert 0.75 < answers["Latin"] / answers["Greek"] < 1.33
    assert sum(answers.values()) > 200


def test_what_a_mixture_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="one must have a weight"):
        check_lines(Mixture(scripts={"latin": 0.0}))
    with pytest.raises(ConfigError, match="scripts name runes"):
        check_lines(Mixture(scripts={"runes": 1.0}))
    monkeypatch.setattr(fonts, "_installed", dict)
    with pytest.raises(FontError, match="apt-get install fonts-"):
        check_lines(Mixture())
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match="qwen2vl fetch-data names"):
        check_lines(Mixture(scripts={"latin": 1.0, "greek": 1.0}))


@needs_line_fonts
def test_shaped_fonts_need_raqm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(FontError, match=r"raqm.*libfribidi0"):
        check_lines(Mixture())
