"""Receipts: sums, what is written where, the answers, the receipt of the demo."""

from __future__ import annotations

import re
from random import Random

import numpy as np

from qwen2vl.synth.compositing import draw_composite
from qwen2vl.synth.compositing.layers import Composite, Text
from qwen2vl.synth.documents import DocumentSample, demo_receipt, sample_receipt
from qwen2vl.synth.documents.receipts import Receipt
from qwen2vl.synth.spec import Mixture
from tests.synth.documents.drawings import (
    assert_text_is_whole,
    facts_of,
    samples,
    text_box,
)


def lines_of(picture: Composite) -> list[str]:
    """Return the text of a picture line by line: what shares a baseline is one line."""
    by_baseline: dict[int, list[Text]] = {}
    for layer in picture.layers:
        if isinstance(layer, Text):
            by_baseline.setdefault(layer.y, []).append(layer)
    return [
        " ".join(one.text for one in sorted(by_baseline[y], key=lambda one: one.x))
        for y in sorted(by_baseline)
    ]


def cents(text: str) -> int:
    (found,) = re.findall(r"\d+\.\d\d", text)
    return int(found.replace(".", ""))


def items_of(sample: DocumentSample) -> dict[str, int]:
    """Return name -> price of the items, from the facts about them."""
    names = [fact.answer for fact in facts_of(sample, "receipt_item")]
    prices = [cents(fact.answer) for fact in facts_of(sample, "receipt_price")]
    return dict(zip(names, prices, strict=True))


def test_text_is_neither_cut_nor_covered() -> None:
    for sample in samples(sample_receipt, 60):
        assert_text_is_whole(sample.picture)


def test_the_answers_are_what_is_written() -> None:
    for sample in samples(sample_receipt, 80):
        lines = lines_of(sample.picture)
        (read,) = facts_of(sample, "read_receipt")
        assert read.answer.split("\n") == lines
        (shop,) = facts_of(sample, "receipt_shop")
        assert lines[0] == shop.answer
        items = items_of(sample)
        assert 2 <= len(items) <= 6 and len(set(items.values())) == len(items)
        for fact in facts_of(sample, "receipt_item"):
            assert f"{fact.answer} {fact.fields[0]}" in lines
        (count,) = facts_of(sample, "receipt_count")
        assert count.answer == str(len(items))
        (most,), (least,) = facts_of(sample, "receipt_most"), facts_of(sample, "receipt_least")
        assert items[most.answer] == max(items.values())
        assert items[least.answer] == min(items.values())


def test_the_sums_are_right() -> None:
    paid_ones = taxed = 0
    for sample in samples(sample_receipt, 80):
        (total,) = facts_of(sample, "receipt_total")
        tax = sum(cents(fact.answer) for fact in facts_of(sample, "receipt_tax"))
        assert cents(total.answer) == sum(items_of(sample).values()) + tax
        taxed += tax > 0
        for paid, change in zip(
            facts_of(sample, "receipt_paid"), facts_of(sample, "receipt_change"), strict=True
        ):
            paid_ones += 1
            assert cents(paid.answer) - cents(total.answer) == cents(change.answer) > 0
    assert taxed > 5 and paid_ones > 5


def test_presence_is_asked_in_balance() -> None:
    answers = []
    for sample in samples(sample_receipt, 150):
        (fact,) = facts_of(sample, "receipt_has")
        is_listed = fact.fields[0].lower() in {name.lower() for name in items_of(sample)}
        assert fact.answer == ("yes" if is_listed else "no")
        answers.append(is_listed)
    assert 50 < sum(answers) < 100


def test_ordinals_follow_the_order_on_the_receipt() -> None:
    ordinals = ("first", "second", "third", "fourth", "fifth", "sixth")
    for sample in samples(sample_receipt, 40):
        names = list(items_of(sample))
        for fact in facts_of(sample, "receipt_nth"):
            place = -1 if fact.fields == ("last",) else ordinals.index(fact.fields[0])
            assert names[place] == fact.answer


def test_pictures_that_are_too_small_have_no_receipt() -> None:
    mixture = Mixture(fonts="bundled", picture_side=(28, 50))
    assert sample_receipt(Random(1), mixture) is None


def test_amounts_are_written_with_two_decimals() -> None:
    receipt = Receipt(shop="A", items=(("Tea", 5), ("Cake", 1200)), currency="{} €", tax=10)
    assert receipt.format_amount(5) == "0.05 €"
    assert receipt.total == 1215
    assert receipt.text() == "A\nTea 0.05 €\nCake 12.00 €\nTax 0.10 €\nTotal 12.15 €"


def test_the_receipt_of_the_demo_is_fixed_and_legible() -> None:
    picture, question = demo_receipt()
    assert (picture, question) == demo_receipt()
    assert_text_is_whole(picture)
    assert question.answer == "$17.30"
    assert f"Total {question.answer}" in lines_of(picture)
    assert -(-picture.width // 28) * -(-picture.height // 28) < 150
    pixels = draw_composite(picture)
    (total,) = [one for one in picture.layers if isinstance(one, Text) and one.text == "$17.30"]
    x1, y1, x2, y2 = text_box(total)
    assert np.ptp(pixels[y1:y2, x1:x2].astype(int)) > 200
