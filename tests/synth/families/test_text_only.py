"""Family `text_only`: the answers are correct."""

from __future__ import annotations

import re
from collections import Counter

from qwen2vl.synth import Mixture, sample
from qwen2vl.synth.families.text_only import SMALL_TALK

MIXTURE = Mixture(weights={"text_only": 1.0}, text_length=(2, 20))


def test_answers_are_correct() -> None:
    tasks: Counter[str] = Counter()
    places = {"first": 0, "second": 1, "third": 2, "fourth": 3, "last": -1}
    for index in range(1500):
        spec = sample(61, index, MIXTURE)
        assert spec.pictures == ()
        (question,) = spec.questions
        tasks[question.task] += 1
        text, answer = question.text, question.answer
        if question.task == "repeat":
            assert answer in text
        elif question.task == "reverse":
            assert answer[::-1] in text
            assert 2 <= len(answer) <= 8
        elif question.task == "spell":
            assert answer.replace(" ", "") in text
            assert answer[1::2].strip() == ""
        elif question.task == "character_at":
            words = re.sub(r'[?.,:"]', "", text).split()
            place = next(word for word in words if word in places)
            assert any(
                len(word) > places[place] and word[places[place]] == answer for word in words
            )
        else:
            assert answer == SMALL_TALK[question.task]
    assert min(tasks[task] for task in ("repeat", "reverse", "spell", "character_at")) > 100
    assert set(SMALL_TALK) <= set(tasks)


def test_boxes_are_among_the_texts_to_copy() -> None:
    copied = [sample(61, i, MIXTURE).questions[0] for i in range(300)]
    boxes = [q for q in copied if q.task == "repeat" and "<|box_start|>" in q.answer]
    assert boxes
    assert all(q.answer.endswith(")<|box_end|>") for q in boxes)
