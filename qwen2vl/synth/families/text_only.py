"""Task family `text_only`: copying, reversing and spelling of text, and small talk; no images.

Reading a line (family `text`) requires the language model to copy; a model that can copy text
learns to read images sooner. Boxes are among the texts to copy. Small talk has fixed answers: what
this model is, and what it can do.
"""

from __future__ import annotations

from random import Random

from qwen2vl.grounding import Box
from qwen2vl.synth.spec import FamilySample, Mixture, Question
from qwen2vl.synth.strings import ALPHABETS, DIGITS, LETTERS, load_words, random_string, word_string
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["SMALL_TALK", "sample"]

SMALL_TALK: dict[str, str] = {
    "hello": "Hello!",
    "how_are_you": "I am fine, thank you.",
    "thanks": "You are welcome.",
    "goodbye": "Goodbye!",
    "who_are_you": "I am nano, a small Qwen2-VL.",
    "what_can_you_do": "I read text, name, count and find shapes and icons, and see how they move.",
    "photographs": "No, I only know text, shapes and icons.",
    "no_picture": "I see no picture.",
}

_PLACES = ("first", "second", "third", "fourth")
_MAX_WORD_LENGTH = 8  # of strings to reverse, spell or index, in characters


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample one question that needs no image."""
    tasks = (_repeat, _reverse, _spell, _character_at, _small_talk)
    (task,) = rng.choices(tasks, (40, 15, 10, 15, 20))
    return FamilySample((task(rng, mixture),))


def _repeat(rng: Random, mixture: Mixture) -> Question:
    thing = _box(rng) if rng.random() < 0.15 else _sample_text(rng, mixture)
    return Question(
        task="repeat", text=sample_question_text(rng, "repeat", mixture.split, thing), answer=thing
    )


def _reverse(rng: Random, mixture: Mixture) -> Question:
    thing = _word(rng)
    text = sample_question_text(rng, "reverse", mixture.split, thing)
    return Question(task="reverse", text=text, answer=thing[::-1])


def _spell(rng: Random, mixture: Mixture) -> Question:
    thing = _word(rng)
    text = sample_question_text(rng, "spell", mixture.split, thing)
    return Question(task="spell", text=text, answer=" ".join(thing))


def _character_at(rng: Random, mixture: Mixture) -> Question:
    thing = _word(rng)
    places = dict(zip(_PLACES, thing, strict=False)) | {"last": thing[-1]}
    place = rng.choice(list(places))
    text = sample_question_text(rng, "character_at", mixture.split, thing, place)
    return Question(task="character_at", text=text, answer=places[place])


def _small_talk(rng: Random, mixture: Mixture) -> Question:
    topic = rng.choice(list(SMALL_TALK))
    return Question(
        task=topic, text=sample_question_text(rng, topic, mixture.split), answer=SMALL_TALK[topic]
    )


def _sample_text(rng: Random, mixture: Mixture) -> str:
    low, high = mixture.text_length
    alphabet = ALPHABETS[mixture.alphabet]
    if rng.random() >= mixture.random_share:
        return word_string(rng, low, high, alphabet)
    return random_string(rng, rng.randint(low, high), alphabet, spaces=mixture.alphabet == "all")


def _word(rng: Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(load_words())
    length = rng.randint(2, _MAX_WORD_LENGTH)
    return random_string(rng, length, LETTERS + DIGITS, spaces=False)


def _box(rng: Random) -> str:
    x1, x2 = sorted(rng.sample(range(1000), 2))
    y1, y2 = sorted(rng.sample(range(1000), 2))
    return Box(x1, y1, x2, y2).to_text()
