"""Family `refusals`: answers agree with the layers, nothing but the content gives them away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from random import Random
from typing import NamedTuple

import pytest

from qwen2vl.eval.suites.frozen_suite import open_frozen_suite
from qwen2vl.synth import Mixture
from qwen2vl.synth.compositing import Composite, Icon, ShapeLayer, Text, draw_composite
from qwen2vl.synth.compositing.icons import TRAINING_STYLES
from qwen2vl.synth.families.refusals import KINDS, NO_PICTURE, ONLY_PICTURES, REFUSAL, sample
from qwen2vl.synth.grammar.expansion import count_patterns
from qwen2vl.synth.refusals.drafts import Draft, Scene
from qwen2vl.synth.refusals.vocabulary import CHARACTERS, FACTS, ICON_CATEGORIES, THINGS
from qwen2vl.synth.spec import FamilySample, Spec, picture_from_json, picture_to_json
from tests.requirements import needs_dataset

pytestmark = needs_dataset("named-pictures")

MIXTURE = Mixture(fonts="bundled", picture_side=(64, 200))
NOT_ANSWERED = (REFUSAL, NO_PICTURE, ONLY_PICTURES)
ALWAYS_ANSWERED = ("asked_exists", "asked_count")
NUM_SAMPLES = 600


class Asked(NamedTuple):
    """One question, and what could give its answer away."""

    kind: str
    ground: str
    size: int
    num_layers: int
    task: str
    answer: str

    @property
    def is_refused(self) -> bool:
        return self.answer in NOT_ANSWERED


@cache
def asked() -> tuple[Asked, ...]:
    """Sample one question of each of many pictures."""
    listed: list[Asked] = []
    for index in range(NUM_SAMPLES):
        rng = Random(f"asked/{index}")
        (kind,) = rng.choices(list(KINDS), [k.share for k in KINDS.values()])
        drawn = _with_only(kind, rng)
        picture, question = drawn.pictures[0] if drawn.pictures else None, drawn.questions[0]
        ground, size, layers = "", 0, 0
        if isinstance(picture, Composite):
            ground, layers = picture.ground.kind, len(picture.layers)
            size = round((picture.width * picture.height) ** 0.5 / 60)
        listed.append(Asked(kind, ground, size, layers, question.task, question.answer))
    return tuple(listed)


def _with_only(kind: str, rng: Random, mixture: Mixture = MIXTURE) -> FamilySample:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen2vl.synth.families.refusals.KINDS", {kind: KINDS[kind]})
        patch.setattr("qwen2vl.synth.families.refusals._TALK_SHARE", 0.0)
        return sample(rng, mixture)


def scenes(kind: str, count: int) -> Iterator[tuple[Scene, Composite]]:
    for index in range(count):
        scene = KINDS[kind].sample(Random(f"{kind}/{index}"), MIXTURE)
        assert scene.picture is not None
        yield scene, scene.picture


def texts_of(picture: Composite) -> list[str]:
    return [layer.text for layer in picture.layers if isinstance(layer, Text)]


def icons_of(picture: Composite) -> list[str]:
    return [layer.name for layer in picture.layers if isinstance(layer, Icon)]


def shapes_of(picture: Composite) -> list[str]:
    return [layer.kind for layer in picture.layers if isinstance(layer, ShapeLayer)]


@pytest.mark.parametrize("kind", ["shapes", "shapes_on_photo"])
def test_only_shapes_that_are_there_have_a_color(kind: str) -> None:
    tasks = {"asked_color", "asked_color_on_photo"}
    answers: Counter[bool] = Counter()
    for scene, picture in scenes(kind, 40):
        for draft in scene.drafts:
            if draft.task in tasks:
                is_there = draft.fields[0] in shapes_of(picture)
                assert (draft.answer != REFUSAL) == is_there
                answers[is_there] += 1
            elif draft.task == "asked_exists" and " " not in draft.fields[0]:
                assert draft.answer == ("yes" if draft.fields[0] in shapes_of(picture) else "no")
            elif draft.task == "asked_count" and draft.fields == ("shapes",):
                assert draft.answer == str(len(shapes_of(picture)))
            elif draft.task == "asked_shape_of_color" and draft.answer != REFUSAL:
                assert draft.answer in shapes_of(picture)
    assert min(answers[True], answers[False]) > 30


def test_a_color_of_one_shape_with_the_kind_of_another_is_not_there() -> None:
    mixed = 0
    for scene, picture in scenes("shapes", 40):
        color_of = {d.fields[0]: d.answer for d in scene.drafts if d.task == "asked_color"}
        for draft in scene.drafts:
            if draft.task in ("asked_box", "asked_side") and " " in draft.fields[0]:
                color, kind = draft.fields[0].split()
                is_there = kind in shapes_of(picture) and color_of[kind] == color
                assert (draft.answer != REFUSAL) == is_there
                mixed += kind in shapes_of(picture) and not is_there
    assert mixed > 10


def test_numbers_are_those_that_are_written() -> None:
    for scene, picture in scenes("numbers", 40):
        texts = texts_of(picture)
        for draft in scene.drafts:
            if draft.task == "asked_shape_with_number":
                assert (draft.answer != REFUSAL) == (draft.fields[0] in texts)
            elif draft.answer != REFUSAL:
                assert draft.answer in texts
                assert draft.fields[0].split()[-1] in shapes_of(picture)


def test_words_are_those_that_are_written() -> None:
    for scene, picture in scenes("words", 30):
        texts = texts_of(picture)
        for draft in scene.drafts:
            if draft.task == "asked_color_of_word":
                assert (draft.answer != REFUSAL) == (draft.fields[0] in texts)
            elif draft.task == "asked_word_of_color" and draft.answer != REFUSAL:
                assert draft.answer in texts


def test_places_and_neighbors_are_those_of_the_objects() -> None:
    relations: Counter[bool] = Counter()
    for scene, picture in scenes("things", 60):
        names = {*icons_of(picture), *shapes_of(picture)}
        for draft in scene.drafts:
            if draft.task in ("asked_box", "asked_side", "asked_level"):
                assert (draft.answer != REFUSAL) == (
                    draft.fields[0].split()[-1] in names or draft.fields[0] in names
                )
            elif draft.task in ("asked_beside", "asked_shape_beside"):
                relations[draft.answer != REFUSAL] += 1
                if draft.answer != REFUSAL:
                    assert draft.answer in names
                    assert draft.task == "asked_beside" or draft.answer in shapes_of(picture)
                if draft.fields[0] in ("behind", "inside", "beyond", "outside", "past"):
                    assert draft.answer == REFUSAL
            elif draft.task == "asked_larger" and draft.answer == REFUSAL:
                assert any(f not in names and f.split()[-1] not in names for f in draft.fields)
    assert min(relations.values()) > 100


def test_notes_answer_what_they_say() -> None:
    told = 0
    for scene, picture in scenes("facts", 60):
        shown = {*icons_of(picture), *(text.lower() for text in texts_of(picture))}
        for draft in scene.drafts:
            formats = [re.escape(f).replace(r"\{0\}", "(.+)") for f in FACTS[draft.task][0]]
            if draft.answer != REFUSAL:
                written = [re.fullmatch(f, text) for f in formats for text in texts_of(picture)]
                assert draft.answer in [match[1] for match in written if match]
                assert draft.fields[0].lower() in shown
                told += 1
    assert told > 50


@pytest.mark.parametrize("kind", ["blank", "noise", "photo", "categories"])
def test_subjects_are_of_the_category_that_is_asked_for(kind: str) -> None:
    answers: Counter[bool] = Counter()
    for scene, picture in scenes(kind, 60):
        assert scene.first is None or scene.first in scene.drafts
        icons, shapes, texts = icons_of(picture), shapes_of(picture), texts_of(picture)
        assert len(icons) + len(shapes) + len(texts) <= 1
        for draft in scene.drafts:
            if draft.task != "asked_category":
                continue
            (category,) = draft.fields
            if category in ICON_CATEGORIES:
                names = [name for name in icons if name in ICON_CATEGORIES[category]]
            elif category in CHARACTERS:
                names = [text for text in texts if text in CHARACTERS[category]]
            elif "shape" in category:
                names = shapes
            else:
                is_right = str.isdigit if category == "number" else str.isalpha
                names = [text for text in texts if len(text) > 1 and is_right(text)]
            assert draft.answer == (names[0] if names else REFUSAL)
            answers[bool(names)] += 1
    assert min(answers.values()) > 10


def test_without_a_picture_no_question_is_answered() -> None:
    sentences: Counter[str] = Counter()
    for index in range(80):
        scene = KINDS["no_picture"].sample(Random(index), MIXTURE)
        assert scene.picture is None
        assert scene.first is not None
        sentences[scene.first.answer] += 1
        is_about_pictures = scene.first.task not in ("asked_country", "asked_use", "asked_chat")
        assert scene.first.answer == (NO_PICTURE if is_about_pictures else ONLY_PICTURES)
    assert min(sentences.values()) > 20


def test_somewhat_less_than_half_of_the_questions_are_refused() -> None:
    share = sum(one.is_refused for one in asked()) / NUM_SAMPLES
    assert 0.4 < share < 0.52


def test_presence_and_numbers_are_never_refused() -> None:
    answers = Counter(one.answer for one in asked() if one.task == "asked_exists" and one.ground)
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers["yes"] / answers.total() < 0.65
    counts = Counter(one.answer for one in asked() if one.task == "asked_count")
    assert all(answer.isdigit() for answer in counts)
    assert 0.2 < counts["0"] / counts.total() < 0.6


def accuracy(listed: list[Asked], features: Callable[[Asked], Hashable]) -> float:
    """Predict each answer by the majority of the others with the same features."""
    groups: defaultdict[Hashable, list[bool]] = defaultdict(list)
    for one in listed:
        groups[features(one)].append(one.is_refused)
    correct = 0.0
    for group in groups.values():
        for is_refused in group:
            rest = 2 * (sum(group) - is_refused) - (len(group) - 1)
            correct += 0.5 if rest == 0 else (rest > 0) == is_refused
    return correct / len(listed)


def test_neither_style_nor_size_nor_wording_gives_the_answer_away() -> None:
    paired = [
        one
        for one in asked()
        if one.task not in ALWAYS_ANSWERED and one.kind not in ("unseen", "no_picture")
    ]
    assert len(paired) > 380
    assert accuracy(paired, lambda one: one.kind) < 0.57
    assert accuracy(paired, lambda one: (one.kind, one.ground)) < 0.57
    assert accuracy(paired, lambda one: (one.kind, one.size)) < 0.57
    assert accuracy(paired, lambda one: (one.kind, one.task)) < 0.57
    assert accuracy(paired, lambda one: (one.ground, one.size)) < 0.57
    # Where pictures may be empty, their emptiness is what has to be seen.
    empty = ("blank", "noise", "photo", "shapes_on_photo", "stickers", "facts")
    full = [one for one in paired if one.kind not in empty]
    assert accuracy(full, lambda one: (one.kind, one.num_layers)) < 0.6
    # The classifier is able to find what gives an answer away.
    assert accuracy(list(asked()), lambda one: one.task in ALWAYS_ANSWERED) > 0.57


def test_nothing_of_the_suite_is_trained() -> None:
    held_out = {k: set(v) for k, v in open_frozen_suite("honesty").header.held_out.items()}
    assert not held_out["absent_objects"] & {
        *THINGS,
        *(n for v in ICON_CATEGORIES.values() for n in v),
    }
    values = {FACTS[task][1](Random(i)) for task in FACTS for i in range(60)}
    assert not held_out["words"] & values
    assert not {"note_price", "note_age", "note_weight", "note_year", "note_owner"} & set(FACTS)
    words: set[str] = set()
    for kind in KINDS:
        for index in range(15):
            picture = KINDS[kind].sample(Random(f"{kind}/{index}"), MIXTURE).picture
            if picture is None:
                continue
            assert picture.ground.kind not in ("stripes", "checks")
            words.update(word.lower() for text in texts_of(picture) for word in text.split())
            for layer in picture.layers:
                assert not isinstance(layer, Icon) or layer.style in TRAINING_STYLES
                assert type(layer).__name__ != "Photo"
    assert len(words) > 30
    assert not {word.lower() for word in held_out["words"]} & words


def test_questions_of_a_conversation_are_about_different_things() -> None:
    mixture = Mixture(fonts="bundled", max_questions=4, picture_side=(96, 200))
    lengths: Counter[int] = Counter()
    for index in range(120):
        questions = sample(Random(index), mixture).questions
        assert 1 <= len(questions) <= 5
        assert len({question.text.lower() for question in questions}) == len(questions)
        lengths[len(questions)] += 1
    assert sum(count for length, count in lengths.items() if length > 1) > 60


@pytest.mark.parametrize(
    ("side", "aspect"), [((28, 56), 1.0), ((56, 90), 20.0), ((300, 700), 20.0), ((1900, 2000), 1.0)]
)
def test_pictures_of_any_size_can_be_drawn(side: tuple[int, int], aspect: float) -> None:
    mixture = Mixture(fonts="bundled", picture_side=side, max_aspect=aspect)
    count, drawn = (12, 1) if side[1] < 1000 else (3, 0)
    for kind in KINDS:
        for index in range(count):
            sampled = _with_only(kind, Random(f"{kind}/{index}"), mixture)
            for picture in sampled.pictures:
                assert isinstance(picture, Composite)
                boxes = [layer.box for layer in picture.layers if not isinstance(layer, Text)]
                for x1, y1, x2, y2 in boxes:
                    assert 0 <= x1 < x2 <= picture.width
                    assert 0 <= y1 < y2 <= picture.height
                if index < drawn:
                    assert draw_composite(picture).shape == (picture.height, picture.width, 3)


def test_samples_are_reproducible_and_specs_convert_to_json() -> None:
    for index in range(20):
        first, second = (sample(Random(index), MIXTURE) for _ in range(2))
        assert first == second
        for picture in first.pictures:
            assert picture_from_json(picture_to_json(picture)) == picture
        spec = Spec(family="refusals", seed=0, index=index, questions=first.questions)
        assert Spec.from_json(spec.to_json()) == spec


def test_wordings_are_many() -> None:
    for task in ("asked_color", "asked_category", "asked_side", "asked_object", "asked_word"):
        assert count_patterns(task) > 300
    assert all(count_patterns(task) > 60 for task in FACTS)


def test_the_first_draft_is_always_asked() -> None:
    draft = Draft("asked_object", (), REFUSAL)
    with pytest.MonkeyPatch.context() as patch:
        kind = KINDS["blank"]._replace(sample=lambda rng, mixture: Scene(None, [], draft))
        patch.setattr("qwen2vl.synth.families.refusals.KINDS", {"blank": kind})
        assert {sample(Random(i), MIXTURE).questions[0].answer for i in range(5)} == {REFUSAL}
