"""Open answers: MMMU's open questions, MTVQA, MathVista after extraction, and VCR's covered text.

MMMU searches the sentences of an answer for numbers and phrases, MTVQA for the reference text,
MathVista brings an extracted answer into the form of the reference, and VCR compares the most
similar run of tokens. Standard library only; VCR's tokenizer is given by the caller.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Literal

from qwen2vl.eval.metrics.multiple_choice import extract_choice
from qwen2vl.eval.metrics.scores import Style
from qwen2vl.eval.metrics.text_distance import edit_distance, normalize_answer

__all__ = [
    "covered_text_match",
    "mathvista_correct",
    "mmmu_open_candidates",
    "mmmu_open_correct",
    "mtvqa_correct",
]

INDICATORS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)  # what follows the last of these may be the answer
TRIVIAL = frozenset(":,.!?;'")
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)  # with thousands separators; scientific; simple

# VCR: answers with one of these are refusals, and score 0.
REFUSALS = ("I can't", "I cannot", "无法", "抱歉")


def mmmu_open_candidates(text: str, *, style: Style) -> frozenset[str | float]:
    """Return the numbers and phrases of an answer that may be meant, numbers to two decimals.

    Sentences are to be split at full stops before capitals, but the kit has lower-cased the text
    by then, so that only line breaks split; `strict` splits first. A phrase of one letter gets a
    space on one side, in two forms. (MMMU's eval_utils; lmms-eval: mmmu.utils.parse_open_response.)
    """
    bare = text.strip().strip(".")
    if style == "strict":
        sentences = [s.lower() for s in re.split(r"\.\s(?=[A-Z])|\n", bare)]
    else:
        sentences = bare.lower().split("\n")
    phrases = [p for i, s in enumerate(sentences) if (p := _tail(s, i == len(sentences) - 1))]
    phrases = [phrase for phrase in phrases if phrase not in TRIVIAL] or [bare.lower()]
    numbers = [n for phrase in phrases for form in NUMBERS for n in form.findall(phrase)]
    return frozenset(form for candidate in [*phrases, *numbers] for form in _forms(candidate))


def _tail(sentence: str, is_last: bool) -> str:
    """Return the shortest text after an indicator; in the last sentence also after "="."""
    indicators = (*INDICATORS, "=") if is_last else INDICATORS
    tails = [sentence.split(i)[-1].strip() for i in indicators if i in sentence]
    # An empty tail is replaced by the next one, as in the kit, where it counts as none.
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def _forms(text: str) -> list[str | float]:
    bare = text.strip()
    try:
        return [round(float(bare.replace(",", "")), 2)]
    except ValueError:
        lowered = bare.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def mmmu_open_correct(text: str, answers: Sequence[str], *, style: Style) -> bool:
    """Return whether an answer to an open question of MMMU is right for one of the references.

    `lmms`: a reference phrase occurs in a candidate phrase, or a reference number equals a
    candidate number. `vlmevalkit` makes a choice of it, "A" the reference, "B" the text "Other
    Answers". `strict`: phrases must be equal after `normalize_answer`, and not only occur.
    (lmms-eval: mmmu.utils.eval_open; VLMEvalKit: multiple_choice.MMMU_preproc.)
    """
    if style == "vlmevalkit":
        choices = [{"A": answer, "B": "Other Answers"} for answer in answers]
        return any(extract_choice(text, c, style=style) == "A" for c in choices)
    candidates = mmmu_open_candidates(text, style=style)
    wanted = [form for answer in answers for form in _forms(answer)]
    return any(_agrees(c, w, style) for c in candidates for w in wanted)


def _agrees(candidate: str | float, wanted: str | float, style: Style) -> bool:
    if isinstance(candidate, str) and isinstance(wanted, str):
        if style == "lmms":
            return wanted in candidate
        return normalize_answer(candidate) == normalize_answer(wanted) != ""
    return candidate == wanted


def mtvqa_correct(text: str, answer: str, *, style: Style) -> bool:
    """Return whether the reference occurs in an answer of MTVQA, without case and full stops.

    Both kits have one rule, by which an empty reference always occurs; `strict` also applies NFKC
    and collapses whitespace, and an empty reference never occurs. (lmms-eval: mtvqa.utils;
    VLMEvalKit: image_vqa.MTVQADataset.)
    """
    if style == "strict":
        found, wanted = (
            " ".join(unicodedata.normalize("NFKC", t).casefold().replace(".", "").split())
            for t in (text, answer)
        )
        return wanted != "" and wanted in found
    return answer.strip().lower().replace(".", "") in text.strip().lower().replace(".", "")


def mathvista_correct(
    extraction: str,
    answer: str,
    *,
    question_type: Literal["multi_choice", "free_form"],
    answer_type: Literal["text", "integer", "float", "list"],
    choices: Sequence[str] = (),
    precision: int = 0,
    style: Style,
) -> bool:
    """Return whether an extracted answer of MathVista equals the reference.

    In both kits a language model extracts the answer from the text where rules cannot; that part is
    left to them.

    Args:
        extraction: what was extracted.
        answer: the reference; of multiple choice the text of the right option.
        question_type: as in the data.
        answer_type: as in the data.
        choices: texts of the options.
        precision: decimals of floats.
        style: `lmms`: a letter stands for its option, other texts for the most similar option;
            integers are cut, floats rounded. `vlmevalkit`: options by `extract_choice`; integers
            and floats as Python reads them; texts and lists are never right. `strict`: as `lmms`,
            but the option must be named by its letter or its text.

    (lmms-eval: mathvista_evals.normalize_extracted_answer; VLMEvalKit: mathvista.post_check.)
    """
    if question_type == "multi_choice":
        named = _option_of(extraction, choices, style)
        return named is not None and named.strip() == answer.strip()
    if style == "vlmevalkit":
        return _python_equal(extraction, answer, answer_type)
    try:
        if answer_type == "integer":
            extraction = str(int(float(extraction)))
        elif answer_type == "float":
            extraction = str(round(float(extraction), precision))
    except (ValueError, OverflowError):
        return answer.strip() == "None" and style == "lmms"  # the kit compares str(None)
    return extraction.strip() == answer.strip()


def _option_of(extraction: str, choices: Sequence[str], style: Style) -> str | None:
    letters: Mapping[str, str] = {chr(ord("A") + i): text for i, text in enumerate(choices)}
    if style != "lmms":
        letter = extract_choice(extraction, letters, style=style)
        return letters.get(letter or "")
    bare = extraction.strip()
    if match := re.search(r"\(([a-zA-Z])\)", bare):
        bare = match[1].upper()
    if bare in letters:
        return letters[bare]
    return min(choices, key=lambda choice: edit_distance(bare, choice))


def _python_equal(extraction: str, answer: str, answer_type: str) -> bool:
    read: Callable[[str], float] | None = {"integer": int, "float": float}.get(answer_type)
    try:
        return read is not None and read(extraction) == read(answer)
    except ValueError:
        return False


def covered_text_match(
    text: str, covered: str, tokenize: Callable[[str], Sequence[str]], *, is_chinese: bool
) -> tuple[float, float]:
    """Return (exact match, Jaccard index) of one covered text of VCR.

    The run of as many tokens as the covered text has that is most similar to it, by difflib's
    ratio, is compared with it: whether it is equal, and the share of common tokens. Both kits have
    one rule, and so there is no style.

    Args:
        text: the model's answer.
        covered: the text that was covered in the image.
        tokenize: the kits use spaCy's en_core_web_sm and zh_core_web_sm.
        is_chinese: tokens of a run are joined without spaces.

    (lmms-eval: vcr_wiki.utils.vcr_process_results_single; VLMEvalKit: vcr.find_best_match.)
    """
    if "sorry" in text.lower() or any(refusal in text for refusal in REFUSALS):
        return 0.0, 0.0
    tokens, wanted = list(tokenize(text)), list(tokenize(covered))
    runs = [tokens[i : i + len(wanted)] for i in range(len(tokens) - len(wanted) + 1)]
    best, best_ratio = [""], 0.0
    for run in runs:
        if not set(run).isdisjoint(wanted):
            joined = ("" if is_chinese else " ").join(run)
            ratio = SequenceMatcher(None, joined, covered).ratio()
            best, best_ratio = (run, ratio) if ratio > best_ratio else (best, best_ratio)
    if not best_ratio:
        return 0.0, 0.0
    common, either = set(best) & set(wanted), set(best) | set(wanted)
    return float(best == wanted), len(common) / len(either)
