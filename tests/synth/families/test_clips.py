"""The family `clips`: all tasks, balanced answers, distinct questions, no pattern of the suite."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files
from random import Random

import numpy as np
import pytest

from qwen2vl.synth.clips import tracks as tracks_module
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.families.clips import _SCENARIOS, sample
from qwen2vl.synth.grammar import is_held_out
from qwen2vl.synth.grammar.expansion import sample_pattern
from qwen2vl.synth.spec import FamilySample, Mixture, Spec
from tests.requirements import needs_dataset

MIXTURE = Mixture(fonts="bundled")
SUITE = "qwen2vl.eval.suites"


@pytest.fixture(autouse=True)
def only_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Icons need a dataset."""
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 0.0)


def _samples(count: int, mixture: Mixture = MIXTURE) -> list[FamilySample]:
    return [sample(Random(seed), mixture) for seed in range(count)]


@cache
def _tasks() -> list[str]:
    path = files("qwen2vl.synth.grammar").joinpath("clips.json")
    return list(json.loads(path.read_text(encoding="utf-8")))


def test_every_task_is_sampled_and_has_templates() -> None:
    clips = [scenario(Random(seed), MIXTURE) for scenario in _SCENARIOS for seed in range(40)]
    assert {f"clip_{offer.task}" for clip in clips for offer in clip.offers} == set(_tasks())


def test_answers_are_balanced() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for one in _samples(400):
        for question in one.questions:
            answers[question.task][question.answer] += 1
    moves = answers["clip_does_move"]
    for task, num_answers in {
        "clip_does_move": 2,
        "clip_anything_moves": 2,
        "clip_flashes": 4,
    }.items():
        assert len(answers[task]) == num_answers
    assert 0.3 < moves["yes"] / moves.total() < 0.7
    assert len(answers["clip_direction"]) == 4
    assert min(answers["clip_direction"].values()) > 0.15 * answers["clip_direction"].total()
    assert (
        min(answers["clip_count_in_turn"].values()) > 0.12 * answers["clip_count_in_turn"].total()
    )
    yes_or_no = Counter(
        answer for task in answers for answer in answers[task].elements() if answer in ("yes", "no")
    )
    assert 0.42 < yes_or_no["yes"] / yes_or_no.total() < 0.58


@pytest.mark.parametrize("max_questions", [1, 3, 8])
def test_questions_are_distinct(max_questions: int) -> None:
    mixture = Mixture(fonts="bundled", max_questions=max_questions)
    for one in _samples(60, mixture):
        assert 1 <= len(one.questions) <= max_questions
        asked = [question.text for question in one.questions]
        assert len(set(asked)) == len(asked)
        assert one.clip
        assert len(one.pictures) in mixture.num_frames
        assert len({(p.width, p.height) for p in one.pictures}) == 1


def test_wordings_of_the_split_are_used() -> None:
    held_out = Mixture(fonts="bundled", split="held_out")
    texts = [q.text for one in _samples(40, held_out) for q in one.questions]
    train = {q.text for one in _samples(40) for q in one.questions}
    assert not train & set(texts)


def test_samples_are_pure_functions_of_the_random_state_and_convert_to_json() -> None:
    for seed in range(30):
        first, second = sample(Random(seed), MIXTURE), sample(Random(seed), MIXTURE)
        assert first == second
        spec = Spec(family="clips", seed=0, index=seed, **first._asdict())
        assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_no_pattern_of_the_frozen_suite_is_trained() -> None:
    """The suite's patterns have the words "first" or "faster" as fields."""
    path = files(SUITE).joinpath("frozen", "clips.jsonl")
    with path.open(encoding="utf-8") as file:
        patterns = json.loads(file.readline())["held_out"]["patterns"]
    words = "faster|slower|first|last|appears|disappears"
    asked = [re.sub(r"\\{[024]\\}", rf"(?:{words}|\\{{\\d\\}})", re.escape(p)) for p in patterns]
    asked = [re.sub(r"\\{\d\\}", r"\\{\\d\\}", pattern) for pattern in asked]
    suite = re.compile("|".join(asked))
    assert suite.fullmatch("Which moves faster, the {0} or the {1}?")
    for task in _tasks():
        rng = Random(task)
        for pattern in {sample_pattern(rng, task) for _ in range(150)}:
            assert is_held_out(pattern) or not suite.fullmatch(pattern), pattern


def test_clips_are_drawn() -> None:
    for one in _samples(12):
        frames = np.stack([draw_image(picture) for picture in one.pictures])
        assert frames.dtype == np.uint8
        assert frames.shape[3] == 3
        is_still = any(
            (q.task, q.answer) in (("clip_is_still", "yes"), ("clip_anything_moves", "no"))
            for q in one.questions
        )
        assert (frames == frames[:1]).all() or not is_still


@needs_dataset("named-pictures")
def test_icons_are_objects_of_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 1.0)
    for one in _samples(3):
        for picture in one.pictures:
            assert draw_image(picture).shape == (picture.height, picture.width, 3)
