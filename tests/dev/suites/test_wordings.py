"""The suite wordings: pairs of one picture and answer, patterns that training has not, balance."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest

from dev.suites import wordings as freeze
from dev.suites.wording_patterns import (
    TASKS,
    fill_pattern,
    held_out_sentences,
    normalize_wording,
    trained_patterns,
)
from dev.suites.wordings import find_held_out_pattern, held_out_patterns
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.frozen_suite import FrozenItem, FrozenSuite, open_frozen_suite
from qwen2vl.synth import Mixture, sample
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.fonts import BUNDLED_FAMILIES
from qwen2vl.synth.spec import Line, Scene
from qwen2vl.synth.wordings import OPENINGS, load_wordings, wordings_of

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "6f0a8e390cd7be8814652e8b8ce70dc48326f0e8f766bf053dbfcaa2c7b40148"
SUITE = open_frozen_suite("wordings")
FILE = Path(freeze.FILE)


def items(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


@cache
def expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{0\}", r"[a-z]+(?: [a-z]+)?"))


def matches(question: str, patterns: tuple[str, ...]) -> bool:
    text = re.sub(r"\b([Aa])n (?=orange)", r"\1 ", question)
    return any(expression(pattern).fullmatch(text) for pattern in patterns)


def training_questions() -> Iterator[str]:
    """Yield all wordings of the training split, as they are and as `_casual` changes them."""
    for task in load_wordings():
        for wording in wordings_of(task, "train"):
            yield from (wording, *(opening + wording for opening in OPENINGS))


def test_the_file_is_frozen_and_small() -> None:
    assert SUITE.digest == sha256(FILE.read_bytes()).hexdigest() == DIGEST
    assert FILE.stat().st_size < 1_000_000


def test_numbers_of_items_and_their_pairs() -> None:
    counts = {"trained": 1000, "held_out": 1000, "informal": 132, "typed": 132, "negated": 50}
    counts |= {"trained_read": 120, "held_out_read": 120}
    assert Counter(item.part for item in SUITE.frozen_items) == counts
    by_id = {item.id: item for item in SUITE.frozen_items}
    for part, other in SUITE.paired_parts:
        for item in items(part):
            pair = by_id[f"{other}/{item.id.removeprefix(f'{part}/')}"]
            assert item.pictures == pair.pictures and item.kind == pair.kind
            assert item.question != pair.question
            assert (item.answers == pair.answers) == (part != "negated")
    assert len(SUITE.paired_parts) == 5


def test_trained_questions_are_those_of_training() -> None:
    for item in (*items("trained"), *items("trained_read")):
        assert matches(item.question, trained_patterns(item.kind)), item.question
    for task in (*TASKS, "read"):
        name = "count_some" if task == "count_kind" else task
        assert set(trained_patterns(task)) <= set(wordings_of(name, "train"))


def test_other_questions_have_the_patterns_of_the_header() -> None:
    for part in ("held_out", "informal", "negated", "held_out_read"):
        for item in items(part):
            task = "exists_negated" if part == "negated" else item.kind
            assert matches(item.question, held_out_patterns()[task]), item.question
    assert set(held_out_patterns()) == {*TASKS, "exists_negated", "read"}


def test_every_pattern_of_the_whole_sentences_is_asked() -> None:
    for task in TASKS:
        asked = [item.question for item in items("held_out") if item.kind == task]
        for pattern in held_out_sentences(task):
            assert any(matches(question, (pattern,)) for question in asked), pattern


def test_training_has_no_held_out_pattern() -> None:
    trained = {normalize_wording(question) for question in training_questions()}
    held_out = {normalize_wording(p) for listed in held_out_patterns().values() for p in listed}
    assert len(held_out) > 150 and not trained & held_out


def test_no_sampled_training_question_has_a_held_out_pattern() -> None:
    mixture = Mixture(fonts="bundled", max_questions=3, list_share=0.3, page_share=0.3)
    for index in range(600):
        for question in sample(3, index, mixture).questions:
            assert find_held_out_pattern(question.text) is None, question.text


@pytest.mark.parametrize(
    ("question", "pattern"),
    [
        ("SO WHAT SHAPE IS THAT?!", "so what shape is that"),
        ("what is the color of the snow-capped mountain", "What is the color of the {0}?"),
        ("Is there a cat in the image", "is there a {0} in the image?"),
        ("What is the color of the cup that is on the table?", None),
        ("The star has which color?", None),
        ("Is the star left or right?", None),
    ],
)
def test_patterns_are_found_in_questions(question: str, pattern: str | None) -> None:
    assert find_held_out_pattern(question) == pattern


def test_typed_questions_differ_from_trained_ones_by_typing_only() -> None:
    trained = {item.id.split("/")[1]: item for item in items("trained")}
    for item in items("typed"):
        pair = trained[item.id.split("/")[1]]
        assert normalize_wording(item.question) == normalize_wording(pair.question)
        bare = pair.question.rstrip("?.")
        assert item.question not in (pair.question, bare, bare.lower())
    forms = {typing("Is it?") for typing in freeze.TYPING.values()}
    assert forms == {"IS IT?", "IS IT", "Is it??", "Is it ?"}


def test_answers_are_balanced() -> None:
    by_task: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for item in SUITE.frozen_items:
        by_task[item.part, item.kind][item.answers[0]] += 1
    for (_, task), answers in by_task.items():
        if task not in ("describe", "read", "count_kind"):
            assert max(answers.values()) == min(answers.values()), (task, answers)
    for item in SUITE.items(["trained", "held_out"]):
        assert item.chance <= {"exists": 0.5, "left_or_right": 0.5}.get(item.kind, 0.21)
    assert {item.chance for item in SUITE.items(["negated"])} == {0.5}


def test_answers_follow_from_the_pictures() -> None:
    for item in items("trained"):
        (scene,) = item.pictures
        assert isinstance(scene, Scene)
        answer = item.answers[0]
        if item.kind in ("name_shape", "color", "describe"):
            (shape,) = scene.shapes
            assert (
                answer
                == {
                    "name_shape": shape.kind,
                    "color": shape.color,
                    "describe": shape.phrase,
                }[item.kind]
            )
        if item.kind == "count_all":
            assert item.answers[0] == str(len(scene.shapes))
        if item.kind == "exists":
            found = [shape for shape in scene.shapes if shape.phrase in item.question]
            assert answer == ("yes" if found else "no")


def test_shapes_are_apart_and_inside() -> None:
    for item in items("trained"):
        (scene,) = item.pictures
        assert isinstance(scene, Scene)
        covered = [[0] * scene.width for _ in range(scene.height)]
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            assert 0 <= x1 < x2 <= scene.width and 0 <= y1 < y2 <= scene.height
            for row in covered[y1:y2]:
                assert not any(row[x1:x2])
                row[x1:x2] = [1] * (x2 - x1)


def test_lines_are_different_and_in_fonts_of_the_package() -> None:
    bundled = {file for _, files in BUNDLED_FAMILIES.values() for file in files}
    lines = [picture for item in items("trained_read") for picture in item.pictures]
    assert all(isinstance(line, Line) and line.font in bundled for line in lines)
    assert len({line.text for line in lines if isinstance(line, Line)}) == len(lines) == 120
    for item in items("trained_read")[:20]:
        assert item.metric == "edit_distance" and item.answers == (item.pictures[0].text,)  # type: ignore[union-attr]
        assert draw_image(item.pictures[0]).std() > 5


def test_an_oracle_is_always_right_and_the_blind_control_keeps_no_picture() -> None:
    for blind in (False, True):
        for item in SUITE.items(SUITE.parts, blind=blind):
            assert score_item(item, SuiteAnswer(text=item.answers[0])).score == 1
    plain, blind_items = SUITE.items(SUITE.parts), SUITE.items(SUITE.parts, blind=True)
    for item, other in zip(plain, blind_items, strict=True):
        assert item.question == other.question and item.media.pictures != other.media.pictures
    for part in SUITE.parts:
        SUITE.check_part(part)


def test_articles_agree_with_names() -> None:
    assert fill_pattern("Is a {0} there, a {0}?", "orange cross") == (
        "Is an orange cross there, an orange cross?"
    )
    assert fill_pattern("data {0}, a {0}", "red star") == "data red star, a red star"
    assert not any(
        re.search(r"\b(a orange|an (?!orange))", item.question, re.IGNORECASE)
        for item in SUITE.frozen_items
    )


def test_the_generator_writes_the_same_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze, "QUOTAS", {"color": (16, 2), "exists": (8, 4)})
    monkeypatch.setattr(freeze, "NUM_LINES", 3)
    freeze.freeze(tmp_path / "small.jsonl")
    small = FrozenSuite(tmp_path / "small.jsonl")
    assert Counter(item.part for item in small.frozen_items) == {
        **{"trained": 24, "held_out": 24, "informal": 10, "typed": 10, "negated": 4},
        **{"trained_read": 3, "held_out_read": 3},
    }
    assert small.header == SUITE.header
    freeze.freeze(tmp_path / "again.jsonl")
    assert FrozenSuite(tmp_path / "again.jsonl").digest == small.digest


@pytest.mark.slow
def test_the_generator_writes_the_frozen_file(tmp_path: Path) -> None:
    freeze.freeze(tmp_path / "wordings.jsonl")
    assert FrozenSuite(tmp_path / "wordings.jsonl").digest == DIGEST
