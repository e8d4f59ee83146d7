"""Guesses at the next tokens, from what was said before: no second model.

The last tokens of a sequence are looked up in its own past and in earlier answers about the same
pictures; what followed there is the guess. The model verifies all guesses of a step in one forward
(runner.py), so that a right one costs no step of its own and a wrong one changes no answer. A
sequence begins with a few guesses, gets more as they come true, and none when they fail. (Prompt
lookup decoding; HF: prompt_lookup_num_tokens.)
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from qwen2vl.engine.request import Sequence

__all__ = ["Drafter"]

_LENGTHS = (6, 4, 3)  # tokens that must agree, the surest first
_CREDIT = 6  # guesses on trust; each one made costs 1, each that came true earns 4
_REMEMBERED = 64  # sets of pictures whose last answers are kept
_TOKENS_EACH = 2048  # of such answers
_LEAD = max(_LENGTHS)  # tokens of the prompt kept before an answer, by which it is found again
_BYTES = array("i").itemsize


class Drafter:
    """Proposes at most `num_drafts` tokens a step for each sequence."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self._answers: OrderedDict[tuple[bytes, ...], list[int]] = OrderedDict()

    def __call__(self, sequence: Sequence, most: int) -> list[int]:
        """Guess what follows, at most `most` tokens; often nothing."""
        forced = sequence.sampler.forced()  # what a grammar dictates is as good as known
        if forced:
            return forced[: max(0, min(most, self.num_drafts))]
        credit = _CREDIT + 4 * sequence.num_accepted - sequence.num_drafted
        most = min(most, self.num_drafts, (credit + 1) // 2)
        if most <= 0:
            return []
        known = array("i", self._answers.get(_pictures(sequence), ()))
        known.extend(array("i", sequence.ids))
        text = known.tobytes()
        for length in _LENGTHS:
            found = _continuation(text, length, most)
            if found:
                return found
        return []

    def learn(self, sequence: Sequence) -> None:
        """Remember a finished answer, if it was about pictures."""
        pictures = _pictures(sequence)
        if not pictures:
            return
        start = max(0, len(sequence.prompt.input_ids) - _LEAD)
        told = self._answers.pop(pictures, []) + sequence.ids[start:]
        self._answers[pictures] = told[-_TOKENS_EACH:]
        if len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)


def _pictures(sequence: Sequence) -> tuple[bytes, ...]:
    return tuple(item.digest for item in sequence.prompt.items)


def _continuation(text: bytes, length: int, most: int) -> list[int]:
    """Find the last earlier place where the last `length` ids stand, and what follows there.

    Searching bytes runs in C; a hit that is not aligned to whole ids is none.
    """
    pattern = text[-length * _BYTES :]
    end = len(text) - _BYTES
    while (at := text.rfind(pattern, 0, end)) >= 0:
        if at % _BYTES == 0:
            first = at + len(pattern)
            return array("i", text[first : first + most * _BYTES]).tolist()
        end = at + len(pattern) - 1
    return []
