"""easy-VQA: patterns, answers, blind control, chance, and files that are absent or others."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import chance_upper_bound
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.easy_vqa import EasyVQA, load_definition
from qwen2vl.eval.suites.suite import SuiteItem
from tests.eval.suites.package import open_package, write_package


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> EasyVQA:
    return open_package(tmp_path_factory.mktemp("package"), num_images=60)


def accuracy(items: list[SuiteItem], answers: list[str]) -> float:
    pairs = zip(items, answers, strict=True)
    return sum(score_item(item, SuiteAnswer(text=a)).score for item, a in pairs) / len(items)


def perfect_answers(suite: EasyVQA, items: list[SuiteItem]) -> list[str]:
    """Answer by the image that each item has, as a perfect model does."""
    by_media: dict[tuple[object, str], str] = {}
    for item in suite.items(suite.parts):
        by_media[item.media, item.question] = item.answers[0]
        by_media.setdefault((item.media, item.kind), item.answers[0])
    return [
        by_media.get((item.media, item.question)) or by_media[item.media, item.kind]
        for item in items
    ]


def test_the_published_set_is_described() -> None:
    definition = load_definition()
    assert definition.num_questions == 9673
    assert len([p for patterns in definition.patterns.values() for p in patterns]) == 24
    assert set(definition.similar_names) | set(definition.spellings) <= {
        *definition.shapes,
        *definition.colors,
    }


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("what is the teal shape?", ("shape_of_color", "what is the {color} shape?")),
        ("is there not a circle in the image?", ("lacks_shape", None)),
        ("what color is the shape?", ("color", "what color is the shape?")),
        ("is there a purple shape?", None),
        ("what color is the shape", None),
    ],
)
def test_questions_have_one_pattern(question: str, found: tuple[str, str | None] | None) -> None:
    result = load_definition().find_pattern(question)
    if found is None:
        assert result is None
    else:
        assert result is not None and result[0] == found[0] and found[1] in (None, result[1])


def test_items_are_the_published_questions_in_their_order(suite: EasyVQA) -> None:
    items = suite.items(suite.parts)
    assert [item.id for item in items[:2]] == ["0000", "0001"] and len(items) == 60 * 24
    content = suite.messages(items[30])[0]["content"]
    assert Path(content[0]["image"]).name == "1.png"
    assert content[1] == {"type": "text", "text": items[30].question}
    (color,) = {item.part for item in suite.items(["color"])}
    assert color == "color"


def test_an_oracle_is_always_right(suite: EasyVQA) -> None:
    items = list(suite.items(suite.parts))
    assert accuracy(items, [item.answers[0] for item in items]) == 1.0
    assert accuracy(items, perfect_answers(suite, items)) == 1.0


def test_constant_and_random_answers_do_not_exceed_chance(suite: EasyVQA) -> None:
    random, items = Random(1), list(suite.items(suite.parts))
    chance = sum(item.chance for item in items) / len(items)
    words = [*load_definition().shapes, *load_definition().colors, "yes", "no", "", "the"]
    for word in words:
        assert accuracy(items, [word] * len(items)) <= chance + 1e-9
    answers = [random.choice(words) for _ in items]
    assert accuracy(items, answers) < chance
    answers_of: dict[str, list[str]] = {}
    for item in items:
        answers_of.setdefault(item.kind, []).append(item.answers[0])
    best = [max(set(own := answers_of[item.kind]), key=own.count) for item in items]
    assert accuracy(items, best) == pytest.approx(chance)  # and the best constants reach it


def test_a_blind_perfect_model_does_not_exceed_chance(suite: EasyVQA) -> None:
    items = list(suite.items(suite.parts, blind=True))
    sighted = suite.items(suite.parts)
    assert [item.id for item in items] == [item.id for item in sighted]
    assert not [a for a, b in zip(items, sighted, strict=True) if a.media == b.media]
    bound = chance_upper_bound([item.chance for item in items])
    assert accuracy(items, perfect_answers(suite, items)) <= bound


def test_spellings_are_right_and_similar_names_in_the_second_score_only(suite: EasyVQA) -> None:
    gray = next(item for item in suite.items(["color"]) if item.answers[0] == "gray")
    (spelling,) = load_definition().spellings["gray"]
    for text, score, similar in ((f"A {spelling}.", 1, 1), ("white", 0, 1), ("teal", 0, 0)):
        result = score_item(gray, SuiteAnswer(text=text))
        assert (result.score, result.similar_score) == (score, similar)
    assert gray.similar_chance > gray.chance


def test_the_digest_covers_images_and_names(tmp_path: Path) -> None:
    first = open_package(tmp_path / "a", num_images=3)
    same = open_package(tmp_path / "b", num_images=3)
    assert first.digest == same.digest
    (tmp_path / "b/easy_vqa/data/test/images/2.png").write_bytes(b"another")
    assert first.digest != same.digest


def test_absent_and_changed_files_name_the_command(tmp_path: Path) -> None:
    definition = write_package(tmp_path, num_images=2)
    questions = tmp_path / "easy_vqa/data/test/questions.json"
    questions.write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(InputError, match=r"is not the published file .*fetch-data easy-vqa"):
        EasyVQA(tmp_path, definition)
    with pytest.raises(InputError, match="No such file or directory; delete its folder and fetch"):
        EasyVQA(tmp_path / "nothing", definition)
    (tmp_path / "c").mkdir()
    suite = open_package(tmp_path / "c", num_images=2)
    (tmp_path / "c/easy_vqa/data/test/images/1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png: cannot be read"):
        _ = suite.digest
