"""VQA accuracy of TextVQA: how many of ten people gave the answer, after a normalization.

The normalization is that of the VQA challenge: case, punctuation, number words, articles and
contractions. The kits implement it with different slips, which decide points; each style keeps its
own. (Antol et al., "VQA", arXiv 1505.00468; Singh et al., "TextVQA", arXiv 1904.08920.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen2vl.eval.metrics.scores import Style, mean, require_answers

__all__ = ["normalize_vqa_answer", "remove_punctuation", "vqa_accuracy"]

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = ("a", "an", "the")
DIGITS = {word: str(i) for i, word in enumerate("zero one two three four five six".split())}
DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10", "none": "0"}
# Contractions whose key is the text without its apostrophe.
ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've
""".split()
# Contractions with two keys: the text without its first, and without its second apostrophe.
TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()
CONTRACTIONS = {
    **{text.replace("'", ""): text for text in ONE_APOSTROPHE},
    **{"".join(text.partition("'")[::2]): text for text in TWO_APOSTROPHES},
    **{"".join(text.rpartition("'")[::2]): text for text in TWO_APOSTROPHES},
    **dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've"),
    **dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at"),
    "somebody'd": "somebodyd",
}

# "(?!<=\d)" was meant to be "(?<!\d)", and says nothing: a full stop goes unless a digit follows.
PERIOD = {
    "lmms": re.compile(r"\.(?!\d)"),
    "vlmevalkit": re.compile(r"(?<!\d)\.(?!\d)"),
    "strict": re.compile(r"\.(?!\d)"),
}
MOST_PERIODS = 32  # the kits pass re.UNICODE, which is 32, where `sub` takes a count
THOUSANDS = re.compile(r"\d,\d")


def remove_punctuation(text: str, *, style: Style) -> str:
    """Remove the punctuation of the VQA challenge.

    A mark goes where it stands beside a space anywhere in the text, or where the text has a number
    with a comma; otherwise a space takes its place. Full stops: see `PERIOD`. (lmms-eval:
    EvalAIAnswerProcessor.process_punctuation; VLMEvalKit: smp.misc.process_punctuation.)
    """
    all_go = THOUSANDS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        goes = all_go or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return PERIOD[style].sub("", cleaned, 0 if style == "strict" else MOST_PERIODS)


def normalize_vqa_answer(answer: str, *, style: Style) -> str:
    """Normalize an answer as the VQA challenge does.

    `lmms` also drops every "," and "?" first, and puts a space before "'s". `strict` does neither
    and keeps the words of an answer of which nothing would be left, such as "A".
    """
    text = answer
    if style == "lmms":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = remove_punctuation(text, style=style).lower().split()
    kept = [word for word in (DIGITS.get(w, w) for w in words) if word not in ARTICLES]
    if style == "strict" and not kept:
        kept = answer.lower().split()
    return " ".join(CONTRACTIONS.get(word, word) for word in kept)


def vqa_accuracy(prediction: str, answers: Sequence[str], *, style: Style) -> float:
    """Return the mean, over the references, of min(1, matches among the others / 3).

    Of ten references, one match scores 0.3, two 0.6, three 0.9, and four or more 1. (lmms-eval:
    textvqa.utils.textvqa_process_results; VLMEvalKit: vqa_eval.process_line.)

    Raises:
        InputError: there are no reference answers.
    """
    found = normalize_vqa_answer(prediction, style=style)
    matches = [normalize_vqa_answer(a, style=style) == found for a in require_answers(answers)]
    total = sum(matches)
    return mean(min(1.0, (total - match) / 3) for match in matches)
