"""Fashion-MNIST: answers and spellings, chance, blind control, digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import chance_upper_bound, normalize_answer
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.fashion_mnist import SPELLINGS, FashionMNIST
from qwen2vl.eval.suites.suite import SuiteItem
from tests.data.idx_files import write_idx_files


@pytest.fixture
def suite(tmp_path: Path) -> FashionMNIST:
    return FashionMNIST(tmp_path, write_idx_files(tmp_path, num_images=50, split="test"))


def is_correct(item: SuiteItem, answer: str) -> bool:
    return score_item(item, SuiteAnswer(text=answer)).score == 1


def test_every_item_accepts_its_class_in_its_spellings_and_no_other(suite: FashionMNIST) -> None:
    items = suite.items(suite.parts)
    assert [item.id for item in items[:2]] == ["0000", "0001"] and len(items) == 50
    boot, shirt, tshirt = items[9], items[6], items[0]
    assert all(is_correct(boot, text) for text in ("ankle boot", "An ankle boot.", "Boots"))
    assert not any(is_correct(boot, text) for text in ("shoe", "sneaker", "ankle", ""))
    assert is_correct(tshirt, "T-shirt/top") and is_correct(tshirt, "a t-shirt")
    assert not is_correct(tshirt, "shirt") and not is_correct(shirt, "T-shirt")


def test_no_spelling_is_accepted_for_two_classes() -> None:
    spelled = [
        normalize_answer(text) for name, others in SPELLINGS.items() for text in (name, *others)
    ]
    assert len(set(spelled)) == len(spelled)


def test_the_chance_level_is_the_best_constant_answer(suite: FashionMNIST) -> None:
    items = suite.items(suite.parts)
    assert {item.chance for item in items} == {0.1}
    for constant in ("bag", "ankle boot"):
        assert sum(is_correct(item, constant) for item in items) == 5


def test_a_blind_perfect_model_does_not_exceed_chance(suite: FashionMNIST) -> None:
    items, blind = suite.items(suite.parts), suite.items(suite.parts, blind=True)
    assert [item.id for item in blind] == [item.id for item in items]
    truth = {item.media: item.answers[0] for item in items}
    assert not any(a.media == b.media for a, b in zip(items, blind, strict=True))
    correct = sum(is_correct(item, truth[item.media]) for item in blind)
    assert correct / len(blind) <= chance_upper_bound([item.chance for item in blind])
    assert suite.items([]) == []


def test_the_digest_covers_pixels_labels_and_answers(
    tmp_path: Path, suite: FashionMNIST, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = write_idx_files(tmp_path, num_images=50, split="test")
    digest = suite.digest
    assert FashionMNIST(tmp_path, digests).digest == digest
    for values in (suite._images.pixels, suite._images.labels):
        changed = values.copy()
        changed.flat[7] += 1
        fields = {"pixels" if changed.ndim == 3 else "labels": changed}
        with monkeypatch.context() as patch:
            patch.setattr(suite, "_images", suite._images._replace(**fields))
            assert suite.digest != digest
    monkeypatch.setitem(SPELLINGS, "bag", ("purse",))
    assert suite.digest != digest


def test_only_the_published_files_are_evaluated(tmp_path: Path) -> None:
    write_idx_files(tmp_path, num_images=3, split="test")
    with pytest.raises(InputError, match=r"published file of fashion-mnist.*fetch-data fashion-m"):
        FashionMNIST(tmp_path)
