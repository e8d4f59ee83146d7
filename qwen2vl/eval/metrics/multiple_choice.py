"""Multiple choice: reads the letter of the chosen option from an answer, and CircularEval.

`extract_choice` is the general rule of each kit (MMStar, MMBench, AI2D in VLMEvalKit, RealWorldQA,
Video-MME in lmms-eval); rules of single benchmarks are in choice_sets.py. Where a kit draws a
letter at random or asks a judge, None is returned: the answer is wrong and lowers the parse rate.
`strict` reads a letter only where no other reading is possible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase

from qwen2vl.eval.metrics.scores import Style
from qwen2vl.eval.metrics.text_distance import normalize_answer

__all__ = ["REFUSED", "circular_correct", "extract_choice"]

REFUSED = "Z"  # of VLMEvalKit: the answer says that it cannot say, and is wrong without a judge

# lmms-eval: a letter after one of these counts as an answer.
PHRASES = tuple(
    f"{start} is"
    for start in (
        *("the answer", "answer", "the correct answer", "correct answer", "the best answer"),
        *("best answer", "the correct option", "correct option", "the best option", "best option"),
        *("the choice", "choice", "the correct choice", "correct choice", "my answer", "my choice"),
    )
) + (
    "i choose",
    "i select",
    "i pick",
    "옵션",
    "정답은",
    "답은",
    "답:",
    "答案是",
    "答案为",
    "选",
    "答えは",
)
START, END, PHRASE, FALLBACK = 10, 9, 7, 0  # ranks in lmms-eval; those of forms are in FORMS
FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))

# VLMEvalKit: an answer with one of these is REFUSED, and one with FAILED is unreadable.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"
SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 5  # the letter must be among them

MATCH_FORMS = (
    "{}.",
    "{},",
    "{}:",
    "{})",
    "{}).",
    "({})",
    "({}).",
    ":{}",
    ":{},",
    ":{}.",
    ":{})",
    ":{}).",
)

LETTER = re.compile(r"\(?([A-Z])\)?[.:,)]?")
LETTER_AND_TEXT = re.compile(r"\(?([A-Z])[).:,]+\s*(.+)", re.DOTALL)
STATED = re.compile(
    r"(?i:answer|option|choice)\s*(?:is\b\s*)?:?\s*(?:\(([A-Z])\)|([A-Z])(?=\s*(?:[.,;:!?\n]|\Z)))"
)


def extract_choice(text: str, choices: Mapping[str, str], *, style: Style) -> str | None:
    """Read the letter of the chosen option; None where it cannot be read.

    Args:
        text: the model's answer.
        choices: letter -> text of the option, in the order of letters.
        style: `lmms` ranks every occurrence of a letter by its form and position, and ignores the
            texts of the options. `vlmevalkit` takes the only letter that stands alone and is among
            the last five words, or the only option whose text occurs; REFUSED for a refusal.
            `strict` takes a letter alone, a letter with the text of its option, the one letter
            that is stated as the answer, or an option's text.

    (lmms-eval: _task_utils.mcq_extract.extract_mcq_answer; VLMEvalKit: matching_util.can_infer.)
    """
    if style == "lmms":
        return _highest_ranked(text, tuple(choices))
    if style == "vlmevalkit":
        return _only_letter(text, choices) or _only_option_text(text, choices, is_bounded=True)
    return _unambiguous(text, choices)


def _highest_ranked(text: str, letters: Sequence[str]) -> str | None:
    """Find the letter of highest rank, then of last position, then the first letter."""
    padded = text.strip()
    for mark in ",.!?;:'\"":
        padded = padded.strip(mark)
    padded, bare = f" {padded} ", padded.strip()
    found = [
        (rank, padded.rfind(form.format(letter)), letter)
        for form, rank in FORMS
        for letter in letters
        if form.format(letter) in padded
    ]
    found += _after_phrases(padded, letters)
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((START, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((END, len(padded) - 1, letter))
    if not found:
        found = [(FALLBACK, padded.rfind(c), c) for c in letters if c in padded]
    if not found:
        return None
    best = max(candidate[:2] for candidate in found)
    return next(letter for *rank, letter in found if tuple(rank) == best)


def _after_phrases(padded: str, letters: Sequence[str]) -> list[tuple[int, int, str]]:
    lowered = padded.lower()
    found = []
    for phrase in PHRASES:
        start = lowered.find(phrase)
        if start >= 0:
            places = [(padded.find(letter, start + len(phrase)), letter) for letter in letters]
            found += [(PHRASE, place, letter) for place, letter in places if place >= 0]
    return found


def _only_letter(text: str, choices: Mapping[str, str]) -> str | None:
    if FAILED in text:
        return None
    if any(refusal in text for refusal in REFUSALS):
        return REFUSED
    words = text.translate(SPACED).split()
    present = [letter for letter in choices if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - LAST_WORDS:
        return present[0]
    return REFUSED if not present and REFUSED in words else None


def _only_option_text(text: str, choices: Mapping[str, str], *, is_bounded: bool) -> str | None:
    """Find the only option whose text occurs in an answer that is at most twice as long as all."""
    lowered = text.lower()
    if is_bounded and len(lowered) > 2 * sum(map(len, choices.values())):
        return None
    present = [letter for letter, option in choices.items() if option.lower() in lowered]
    return present[0] if len(present) == 1 else None


def _unambiguous(text: str, choices: Mapping[str, str]) -> str | None:
    bare = text.replace("*", "").strip()
    plain = normalize_answer(bare)
    same = [letter for letter, option in choices.items() if normalize_answer(option) == plain != ""]
    if match := LETTER.fullmatch(bare):
        return match[1] if match[1] in choices else None
    if match := LETTER_AND_TEXT.fullmatch(bare):
        wanted = normalize_answer(choices.get(match[1], ""))
        return match[1] if wanted and normalize_answer(match[2]) == wanted else None
    stated = {a or b for a, b in STATED.findall(bare)} & set(choices)
    if not same and len(stated) == 1:
        return stated.pop()
    return same[0] if len(same) == 1 else None


def circular_correct(
    rotations: Iterable[tuple[str, str, Mapping[str, str]]], *, style: Style
) -> bool:
    """Return whether every rotation of a question is answered right (CircularEval, MMBench).

    Args:
        rotations: (the model's answer, right letter, letter -> text of the option) of each rotation
            of the options.
        style: `lmms` is its rule without a judge (`mmbench_en_dev_static`), which reads a first
            letter by forms such as "A)" and falls back to `extract_choice`. The other two read
            every rotation by `extract_choice`.

    (lmms-eval: mmbench_evals.eval_sub_data; VLMEvalKit: multiple_choice.prefetch_circular_group.)
    """
    read = _static_choice if style == "lmms" else extract_choice
    letters = [(read(text, choices, style=style), right) for text, right, choices in rotations]
    return bool(letters) and all(letter == right for letter, right in letters)


def _static_choice(text: str, choices: Mapping[str, str], *, style: Style) -> str | None:
    known = {letter: choices[letter] for letter in ascii_uppercase[:4] if letter in choices}
    matched = _matched_form(text) or _only_option_text(text, known, is_bounded=False)
    return matched or extract_choice(text, known, style=style)


def _matched_form(text: str) -> str | None:
    """Read a letter among A to E, also where there are fewer options, as lmms-eval does."""
    if FAILED in text:
        return None
    words, letters = text.split(), ascii_uppercase[:5]
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):  # "A" may be an article
        return alone[0]
    for form in MATCH_FORMS:
        if sum(form.format(letter) in words for letter in letters) == 1:
            return next(letter for letter in letters if form.format(letter) in words)
    return None
