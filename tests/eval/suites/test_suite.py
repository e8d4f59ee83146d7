"""Chance levels of constant answers, and media exchanged within kinds."""

from __future__ import annotations

from qwen2vl.eval.suites.suite import SuiteItem, constant_answer_chances, exchange_media


def item(id: str, kind: str, media: object) -> SuiteItem:
    return SuiteItem(
        **{"id": id, "part": "part", "kind": kind, "question": "?", "answers": ("yes",)},
        metric="exact_match",
        chance=0.5,
        media=media,
    )


def test_chance_is_the_best_constant_answer_of_the_group() -> None:
    accepted = [("a", ("yes",)), ("a", ("yes",)), ("a", ("no",)), ("b", ("red",))]
    assert constant_answer_chances(accepted) == [2 / 3, 2 / 3, 2 / 3, 1.0]


def test_an_answer_that_several_items_accept_counts_for_all_of_them() -> None:
    accepted = [("a", ("red",)), ("a", ("brown", "red")), ("a", ("blue",)), ("a", ("teal", "blue"))]
    assert constant_answer_chances(accepted) == [0.5] * 4


def test_media_are_exchanged_within_a_kind_and_never_kept() -> None:
    media = {"1": "x", "2": "x", "3": "y", "4": "z"}
    items = [item(id, "a", own) for id, own in media.items()]
    items += [item("5", "b", "v"), item("6", "b", "w")]
    exchanged = exchange_media(items)
    assert [one.id for one in exchanged] == ["1", "2", "3", "4", "5", "6"]
    assert [one.media for one in exchanged] == ["y", "y", "z", "x", "w", "v"]


def test_a_kind_without_other_media_keeps_its_own() -> None:
    assert exchange_media([item("1", "a", "x"), item("2", "a", "x")])[0].media == "x"
