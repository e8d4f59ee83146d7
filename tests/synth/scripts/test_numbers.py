"""Numbers as they are written."""

from __future__ import annotations

import re
from random import Random

from qwen2vl.synth.scripts.numbers import sample_number

FORMS = {
    "date": r"\d{4}-\d\d-\d\d",
    "time": r"\d{1,2}:\d\d",
    "price": r"[$£€]\d+[.,]\d\d",
    "grouped": r"\d{1,3}(,\d{3})+",
    "phone": r"\+\d{1,2} \d+[ -]\d+.*",
    "percent": r"[-+]?\d+(\.\d)?%",
    "measure": r"\d+(\.\d)? ?(kg|cm|ml)",
    "digits": r"\d+",
}


def test_all_forms_occur_and_no_number_is_long() -> None:
    rng = Random(5)
    numbers = [sample_number(rng) for _ in range(3000)]
    assert max(map(len, numbers)) <= 22
    assert all(number == number.strip() and number.isprintable() for number in numbers)
    assert all(re.search(r"\d|May|Jan", number) for number in numbers)
    for name, form in FORMS.items():
        found = sum(bool(re.fullmatch(form, number)) for number in numbers)
        assert found >= 10, name


def test_all_digits_are_about_equally_frequent() -> None:
    rng = Random(6)
    text = "".join(sample_number(rng) for _ in range(3000))
    counts = [text.count(digit) for digit in "0123456789"]
    assert max(counts) < 2.5 * min(counts)
