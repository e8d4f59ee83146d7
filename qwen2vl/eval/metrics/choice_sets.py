"""Multiple choice where a benchmark has its own rule: MMMU, AI2D, RealWorldQA and the video sets.

Where lmms-eval draws a letter at random (MMMU, MMT-Bench, EgoSchema), None is returned, unless a
generator is given to draw from. VLMEvalKit reads the sets with pictures by `extract_choice`, and
has no rule for EgoSchema and PerceptionTest. `strict` is always that of `extract_choice`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from string import punctuation

from qwen2vl.eval.metrics.multiple_choice import extract_choice
from qwen2vl.eval.metrics.scores import Style, mean
from qwen2vl.eval.metrics.vqa import remove_punctuation

__all__ = [
    "egoschema_choice",
    "mmmu_choice",
    "mmt_choice",
    "mvbench_accuracy",
    "mvbench_correct",
    "option_letter_match",
    "perception_test_choice",
    "realworldqa_correct",
    "video_mme_choice",
]

# VLMEvalKit removes these before it takes the first A to D; two commas are missing in its list.
PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)


def mmmu_choice(
    text: str, choices: Mapping[str, str], *, style: Style, draw: Random | None = None
) -> str | None:
    """Read the letter of an MMMU answer.

    `lmms`: letters in the first of the forms "(A)", "A ", "A." that occurs, or else, in answers of
    more than five words, options whose text occurs; of several, the last in the answer.

    Args:
        text: the model's answer.
        choices: letter -> text of the option.
        style: see above; the others as `extract_choice`.
        draw: `lmms` draws from it where no letter can be read. With `Random(seed)` the letters are
            those of lmms-eval after `random.seed(seed)`.

    (MMMU's eval_utils; lmms-eval: mmmu_mcq_utils.parse_mmmu_multi_choice_response.)
    """
    if style != "lmms":
        return extract_choice(text, choices, style=style)
    padded = _padded(text)
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in choices if form.format(letter) in padded]
        if found:
            return max(found, key=lambda letter: padded.rfind(place.format(letter)))
    return _option_in(padded, choices, max) or _drawn(choices, draw)


def mmt_choice(
    text: str, choices: Mapping[str, str], *, style: Style, draw: Random | None = None
) -> str | None:
    """Read the letter of an MMT-Bench answer.

    `lmms`: letters in the first of the forms "(A)", " A ", "A." that occurs; of several, the last
    that stands between spaces, or else the first letter. `draw` as for `mmmu_choice`.
    (lmms-eval: mmt.utils.parse_multi_choice_response.)
    """
    if style != "lmms":
        return extract_choice(text, choices, style=style)
    padded = _padded(text.strip())
    for form in ("({})", " {} ", "{}."):
        found = [letter for letter in choices if form.format(letter) in padded]
        if found:
            return max(found, key=lambda letter: padded.rfind(f" {letter} "))
    return _drawn(choices, draw)


def egoschema_choice(
    text: str, choices: Mapping[str, str], *, style: Style, draw: Random | None = None
) -> str | None:
    """Read the letter of an EgoSchema answer.

    `lmms`: of all letters in one of the forms "(A)", "A ", "A.", the first in the answer; or else,
    in answers of more than five words, the first option whose text occurs. `draw` as for
    `mmmu_choice`. Options are published as "A. text", which `lmms` compares, and the others without
    the letter. (lmms-eval: egoschema.utils.parse_multi_choice_response.)
    """
    if style != "lmms":
        bare = {c: option.removeprefix(f"{c}. ") for c, option in choices.items()}
        return extract_choice(text, bare, style=style)
    padded = _padded(text)
    forms = [(form.format(c), c) for form in ("({})", "{} ", "{}.") for c in choices]
    found = [(padded.rfind(form), letter) for form, letter in forms if form in padded]
    if found:
        return min(found, key=lambda candidate: candidate[0])[1]
    return _option_in(padded, choices, min) or _drawn(choices, draw)


def option_letter_match(
    text: str, letter: str, choices: Mapping[str, str], *, style: Style
) -> bool:
    """Return whether an AI2D answer is the right letter.

    `lmms`: a letter with a full stop at the start, or else the whole answer, is compared without
    case and punctuation. (lmms-eval: ai2d.utils.MultiChoiceRegexFilter and exact_match.)
    """
    if style != "lmms":
        return extract_choice(text, choices, style=style) == letter
    match = re.match(r"\s*([A-Z])\.", text)
    removed = str.maketrans("", "", punctuation)
    return (match[1] if match else text).lower().translate(removed) == letter.lower()


def realworldqa_correct(
    text: str, answer: str, choices: Mapping[str, str], *, style: Style
) -> bool:
    """Return whether a RealWorldQA answer is right: a letter, or a word or number.

    `lmms` reads letters among A to D whatever options there are; other answers must be equal but
    for case, surrounding whitespace and full stops at the end of the prediction. VLMEvalKit has
    options for every question. (lmms-eval: realworldqa.utils.realworldqa_process_results.)
    """
    wanted = answer.strip()
    if style == "lmms" and wanted.upper() in ("A", "B", "C", "D"):
        return extract_choice(text, dict.fromkeys("ABCD", ""), style=style) == wanted.upper()
    if style == "lmms" or not choices:
        return text.lower().strip().rstrip(".") == wanted.lower()
    return extract_choice(text, choices, style=style) == wanted


def mvbench_correct(text: str, letter: str, choices: Mapping[str, str], *, style: Style) -> bool:
    """Return whether an MVBench answer is right.

    `lmms`: a letter with a full stop at the start, or else the first letter A to E that stands
    alone, in either case, so that "a dog" is A. `vlmevalkit`: the first word without full stops
    lies in "(b)", or "(b)" in the first word; an empty answer is wrong here, and left out there.
    (lmms-eval: mvbench.utils.mcq_acc; VLMEvalKit: mvbench.check_ans.)
    """
    if style == "strict":
        return extract_choice(text, choices, style=style) == letter
    if style == "lmms":
        return _mvbench_text(text) == _mvbench_text(letter)
    first, wanted = text.lower().strip().split(" ")[0], f"({letter})".lower()
    return first != "" and (first.replace(".", "") in wanted or wanted in first)


def mvbench_accuracy(answers: Iterable[tuple[str, bool]], *, style: Style) -> float:
    """Return the accuracy on MVBench, NaN for no answers.

    Args:
        answers: (the model's answer, whether it is right).
        style: `lmms` leaves empty answers out of the mean; of empty answers alone it is 0.
    """
    listed = list(answers)
    answered = [right for text, right in listed if text or style != "lmms"]
    return 0.0 if listed and not answered else mean(map(float, answered))


def perception_test_choice(text: str, choices: Mapping[str, str], *, style: Style) -> str | None:
    """Read the letter of a PerceptionTest answer; `lmms`: the first A to D that stands alone.

    (lmms-eval: perceptiontest.val.utils.perceptiontest_val_process_results_mc.)
    """
    if style != "lmms":
        return extract_choice(text, choices, style=style)
    match = re.search(r"\b([A-D])\b", text.strip())
    return match[1] if match else None


def video_mme_choice(text: str, choices: Mapping[str, str], *, style: Style) -> str | None:
    """Read the letter of a Video-MME answer; `vlmevalkit`: the first A to D after known phrases.

    (lmms-eval: videomme.utils.extract_characters_regex; VLMEvalKit: videomme.)
    """
    if style != "vlmevalkit":
        return extract_choice(text, choices, style=style)
    bare = text.strip()
    for prefix in PREFIXES:
        bare = bare.replace(prefix, "")
    match = re.search("[ABCD]", bare)
    return match[0] if match else None


def _padded(text: str) -> str:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    return f" {text} "


def _option_in(padded: str, choices: Mapping[str, str], select: Callable[..., str]) -> str | None:
    if len(padded.split()) <= 5:
        return None
    lowered = padded.lower()
    found = [letter for letter, option in choices.items() if option.lower() in lowered]
    if not found:
        return None
    return select(found, key=lambda letter: lowered.rfind(choices[letter].lower()))


def _drawn(letters: Iterable[str], draw: Random | None) -> str | None:
    options: Sequence[str] = tuple(letters)
    return draw.choice(options) if draw is not None else None


def _mvbench_text(text: str) -> str:
    if match := re.match(r"([A-E])\.\s*(.+)$", text.strip(), re.IGNORECASE):
        return match[1].upper()
    bare = text.replace("\n", " ").replace("\t", " ").strip()
    bare = remove_punctuation(bare, style="lmms")
    for mark in "'\")(":
        bare = bare.strip(mark)
    bare = bare.strip().lower()
    match = re.search(r"\b([A-E])\b", bare, re.IGNORECASE)
    return match[1].upper() if match else bare
