"""Words of documents: nothing of the frozen suites, made-up words, dates, cases."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from random import Random

from qwen2vl.synth.documents.vocabulary import (
    cased,
    load_word_lists,
    sample_code,
    sample_date,
    sample_entry,
    sample_good,
    sample_made_up,
    sample_shop,
    sample_time,
    spoken,
)


def held_out_words() -> Iterator[str]:
    """Yield the words and the objects that a frozen suite holds out."""
    for file in files("qwen2vl.eval.suites").joinpath("frozen").iterdir():
        if file.name.endswith(".jsonl"):
            with file.open(encoding="utf-8") as lines:
                held_out = json.loads(next(iter(lines)))["held_out"]
            yield from (*held_out.get("words", ()), *held_out.get("absent_objects", ()))


def test_no_word_is_held_out_by_a_suite() -> None:
    held_out = {word.lower() for word in held_out_words()}
    assert len(held_out) > 90
    used = {word.lower() for words in load_word_lists().values() for word in words}
    assert not used & held_out
    assert not {word for phrase in used for word in phrase.split()} & held_out
    rng = Random(1)
    assert not {sample_made_up(rng) for _ in range(5000)} & held_out


def test_the_lists_have_no_duplicates() -> None:
    for use, words in load_word_lists().items():
        assert len({word.lower() for word in words}) == len(words), use


def test_a_part_of_the_goods_is_made_up() -> None:
    rng = Random(2)
    known = set(load_word_lists()["goods"])
    goods = [sample_good(rng) for _ in range(1000)]
    made_up = [good for good in goods if good.split()[-1] not in known]
    assert 60 < len(made_up) < 200
    assert all(re.fullmatch(r"[a-z]{6,9}", good) for good in made_up)
    assert 80 < sum(" " in good for good in goods) < 250
    assert not any(" " in sample_good(rng, short=True) for _ in range(200))


def test_dates_and_times_exist() -> None:
    rng = Random(3)
    assert len({re.sub(r"\d|[A-Za-z]", "", sample_date(rng)) for _ in range(60)}) == 5
    for _ in range(100):
        hour, minute = sample_time(rng).split(":")
        assert int(hour) < 24 and int(minute) < 60 and len(minute) == 2


def test_names_of_shops_entries_and_codes() -> None:
    rng = Random(4)
    assert any("'s " in sample_shop(rng) for _ in range(30))
    assert all(re.fullmatch(r"[A-Z]\d{2,4}", sample_code(rng)) for _ in range(50))
    assert len({sample_entry(rng) for _ in range(50)}) > 40


def test_cases() -> None:
    assert cased("green tea", "upper") == "GREEN TEA"
    assert cased("green tea", "first") == "Green tea"
    assert cased("green tea", "title") == "Green Tea"
    assert cased("green tea", "lower") == "green tea"
    assert {spoken(Random(i), "Green Tea") for i in range(20)} == {"Green Tea", "green tea"}
