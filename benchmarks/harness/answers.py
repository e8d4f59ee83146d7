"""Seeded answers as models write them, right and wrong, for the comparison of metrics.

Each generator returns one case: the arguments of one metric, as JSON. Answers are letters in many
forms, sentences around them, numbers with signs, separators and units, boxes in several notations,
other scripts, empty and multi-line texts, repeated words, wrong case. (metrics_parity.py)
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["ANSWERS_IN_A_CASE", "GENERATORS", "Case"]

Case = dict[str, Any]

WORDS = """
    a an the red blue circle cat dogs two ten none it's don't dont c\u0061nt Tom's U.S.A. New York
    hello-world A/C café naïve 東京 日本 ответ नमस्ते İstanbul straße \uff21\uff22\uff23 \uff11\uff12
    nike , inc yes no not sure total 3.5 1,000 $5.00 50% -7 5:30 O'Neil (left) [right] answer is
    final result so = x^2 "quoted" semi;colon left/right
""".split()
OPTIONS = (
    "dog|cat|red|blue|a dog|the red ball|2|3.5|10|North|None of the above|banana|Because it rains"
    "|yes|no|東京|circle and square|nan|left of the table|B|A and B|Apple.|It is a chart"
).split("|")
CHOICE_FORMS = (
    *("{l}", "{l}.", "({l})", "{l})", "{l}:", "{l},", "{k}", "({k})", "{l}. {t}", "({l}) {t}"),
    *("{t}", "{t}.", "The answer is {l}.", "The answer is ({l}).", "the answer is {t}"),
    *(
        "Answer: {l}",
        "Answer: {t}",
        "Option {l}",
        "**{l}**",
        "**{l}.** {t}",
        "The correct option is {l}",
    ),
    *(
        "I think {l}. Because {m} is wrong.",
        "{l} or {m}",
        "Both ({l}) and ({m})",
        "It is {t} I think",
    ),
    *("{m} is wrong, so {l}", "答案是{l}", "选{l}", "정답은 {l}", "A {t} in the picture", "a {t}"),
    *("Let me see.\n{l}", "{l}\n", " {l} ", "", " ", ".", "None of the above", "I don't know"),
    *(
        "The best answer is {l}: {t}",
        "<|box_start|>{l}<|box_end|>",
        "{l}{m}",
        "option {k}",
        ":{l}.",
    ),
    *("I choose {m}... no, {l}!", "Cannot determine the answer", "Z", "{t} {t} {t} {t} {t} {t}"),
    *(
        "In the picture we see that {t} is not there, and {o} is",
        "E",
        "'{l}'",
        '"{l}"',
        "{l};",
        "#{l}",
    ),
    *(
        "Failed to obtain answer via API",
        "Based on the image, the best option is\n\n({l}) {t}",
        "F.",
    ),
)
YES_NO_FORMS = (
    *("Yes", "No", "yes", "no", "Yes.", "No.", "YES", "Y", "n", "Not sure", "nope", "Yeah", "Now"),
    *("I think yes", "The answer is no", "yes and no", "yes, it is", "No, it is not", "", " yes "),
    *(
        "unknown",
        "Yes/No",
        "yes-no",
        "(yes)",
        "[no]",
        "Answer: yes.",
        "No.\nThere is none",
        "yesno",
    ),
    *(
        "Yes, there is a {w} in the {w}",
        "there is no {w}",
        "It is {w}",
        "none",
        "да",
        "y.",
        "noise",
    ),
    *("dyes", "y e s", "yes!", "No!", "...yes", "a yes", "'yes'", "yes_", "yes1", "No,no"),
)


def _words(r: Random, most: int = 5) -> str:
    gap = r.choice([" ", " ", " ", "  ", "\n", "\t"])
    text = gap.join(r.choice(WORDS) for _ in range(r.randint(0, most)))
    return r.choice(
        [text, text, text, f" {text}", f"{text}.", text.upper(), text.lower(), f"{text}\n"]
    )


def _number(r: Random) -> str:
    value = r.choice(
        [r.randint(0, 20), r.randint(-2000, 2100), round(r.uniform(-50, 50), r.randint(1, 3))]
    )
    forms = [
        "{}",
        "{}",
        "{}",
        "{}%",
        "{:,}",
        "{}.0",
        "{} %",
        "${}",
        "{} million",
        "+{}",
        "{}.",
        " {} ",
    ]
    return r.choice(
        [*forms, "{}e3", "nan", "inf", "-", "%", "1_0", "٣", "1,000", "0", "0.0"]
    ).format(value)


def _perturbed(r: Random, text: str) -> str:
    """Change a text a little, as a wrong reading does."""
    if not text:
        return r.choice(["", " ", "x"])
    i = r.randrange(len(text))
    changed = [
        text,
        text,
        f"{text}.",
        f"The answer is {text}",
        text.upper(),
        text[:i] + text[i + 1 :],
    ]
    changed += [
        f"{text[:i]}e{text[i:]}",
        f" {text}  ",
        text.replace(" ", "  "),
        f"{text} {text}",
        text[::-1],
    ]
    return r.choice(changed)


def _text_pair(r: Random) -> tuple[str, list[str]]:
    answers = [r.choice([_words, _number])(r) for _ in range(r.randint(1, 3))]
    other = r.choice([_words, _number])(r)
    return r.choice(
        [_perturbed(r, r.choice(answers)), _perturbed(r, r.choice(answers)), other]
    ), answers


def _text_case(r: Random) -> Case:
    text, answers = _text_pair(r)
    return {"text": text, "answers": answers}


def _single_case(r: Random) -> Case:
    text, answers = _text_pair(r)
    return {"text": text, "answer": answers[0]}


def _relaxed_case(r: Random) -> Case:
    answer = _number(r) if r.random() < 0.8 else _words(r, 2)
    if r.random() < 0.3:
        return {"text": _number(r), "answer": answer}
    try:
        close = float(answer) * r.choice([1, 1.01, 0.96, 1.05, 0.95, 1.0501, 0.9499, -1])
        return {
            "text": r.choice(["{:g}", "{}", "{:.2f}", "{:.0f}", "{}%"]).format(close),
            "answer": answer,
        }
    except ValueError:
        return {"text": _perturbed(r, answer), "answer": answer}


def _vqa_case(r: Random) -> Case:
    pool = [_words(r, 3) for _ in range(r.randint(1, 4))]
    answers = [
        _perturbed(r, r.choice(pool)) if r.random() < 0.3 else r.choice(pool) for _ in range(10)
    ]
    return {"text": _perturbed(r, r.choice(pool)), "answers": answers}


def _choices(r: Random) -> dict[str, str]:
    return dict(zip("ABCDE", r.sample(OPTIONS, r.randint(2, 4)), strict=False))


def _choice_text(r: Random, choices: dict[str, str]) -> str:
    letter, other = r.choice(list(choices)), r.choice(list(choices))
    values = {
        "l": letter,
        "k": letter.lower(),
        "t": choices[letter],
        "m": other,
        "o": choices[other],
    }
    text = r.choice(CHOICE_FORMS).format(**values)
    if r.random() < 0.2:
        text = f"{text} {_words(r)}" if r.random() < 0.5 else f"{_words(r)} {text}"
    return text


def _choice_case(r: Random) -> Case:
    choices = _choices(r)
    return {"text": _choice_text(r, choices), "choices": choices, "letter": r.choice(list(choices))}


def _four_choices_case(r: Random) -> Case:
    choices = dict(zip("ABCD", r.sample(OPTIONS, 4), strict=True))
    return {"text": _choice_text(r, choices), "choices": choices}


def _five_choices_case(r: Random) -> Case:
    choices = dict(zip("ABCDE", r.sample(OPTIONS, 5), strict=True))
    return {"text": _choice_text(r, choices), "choices": choices}


def _realworldqa_case(r: Random) -> Case:
    case = _choice_case(r)
    open_answer = _perturbed(r, case["text"])
    return {**case, "answer": case["letter"] if r.random() < 0.7 else open_answer}


def _circular_case(r: Random) -> Case:
    options, rotations = r.sample(OPTIONS, r.randint(2, 4)), []
    right, is_good = r.choice(options), r.random() < 0.7
    for shift in range(len(options)):
        turned = options[shift:] + options[:shift]
        choices = dict(zip("ABCD", turned, strict=False))
        letter = "ABCD"[turned.index(right)]
        plain = r.choice(CHOICE_FORMS[:20]).format(l=letter, k=letter, t=right, m=letter, o=right)
        rotations.append([plain if is_good else _choice_text(r, choices), letter, choices])
    return {"rotations": rotations}


def _yes_no_case(r: Random) -> Case:
    form = r.choice(YES_NO_FORMS).format(w=r.choice(WORDS))
    return {"text": form if r.random() < 0.8 else f"{form} {_words(r)}"}


def _ocr_case(r: Random) -> Case:
    return {**_text_case(r), "is_formula": r.random() < 0.3}


def _box_case(r: Random) -> Case:
    height, width = r.randint(20, 1200), r.randint(20, 1200)
    truth = [float(r.randint(0, width - 2)), float(r.randint(0, height - 2))]
    truth += [
        float(r.randint(int(truth[0]) + 1, width)),
        float(r.randint(int(truth[1]) + 1, height)),
    ]
    shares = [v / s for v, s in zip(truth, (width, height) * 2, strict=True)]
    shares = [min(max(s + r.choice([0, 0, r.gauss(0, 0.1)]), -0.1), 1.1) for s in shares]
    if r.random() < 0.1:
        r.shuffle(shares)
    pixels = [s * v for s, v in zip(shares, (width, height) * 2, strict=True)]
    a, b, c, d = r.choice(
        [[round(s, 3) for s in shares], [int(s * 1000) for s in shares], list(map(int, pixels))]
    )
    forms = [
        "<|box_start|>({},{}),({},{})<|box_end|>",
        "({},{}),({},{})",
        "[{}, {}, {}, {}]",
        "[{},{},{},{}]",
    ]
    forms += [
        "[[{},{},{},{}]]",
        "[{} {} {} {}]",
        "({}, {}), ({}, {})",
        '{{"bbox_2d": [{}, {}, {}, {}]}}',
    ]
    forms += [
        "the 2 dogs({},{}),({},{})",
        "x={}, y={}, w={}, h={}",
        "{} {} {}",
        "no box",
        "",
        "[{} , {},{},{}]",
    ]
    text = r.choice(forms).format(a, b, c, d)
    return {"text": text, "truth": truth, "size": [height, width]}


def _mmmu_open_case(r: Random) -> Case:
    case = _single_case(r)
    forms = [
        "{}",
        "The answer is {}.",
        "x = {}",
        "so it is {}.",
        "First 3. Then {}\nThus {}",
        "{} is final",
    ]
    forms += [
        "Therefore the result is {} cm",
        "could be {} or so",
        "is ",
        "approximately {}",
        "{}. So {}",
    ]
    return {**case, "text": r.choice(forms).replace("{}", case["text"])}


def _mathvista_case(r: Random) -> Case:
    choices = r.sample(OPTIONS, r.randint(2, 4))
    if r.random() < 0.4:
        lettered = dict(zip("ABCD", choices, strict=False))
        kind = {"question_type": "multi_choice", "answer_type": "text", "choices": choices}
        return {
            "text": _choice_text(r, lettered),
            "answer": r.choice(choices),
            "precision": 0,
            **kind,
        }
    answer_type = r.choice(["integer", "float", "list", "text"])
    answer = {"integer": str(r.randint(-5, 30)), "float": f"{r.uniform(0, 9):.1f}"}.get(
        answer_type, "[1, 2]"
    )
    text = r.choice(
        [answer, answer, f" {answer}", f"{answer}.0", f"{answer}0", _number(r), _words(r, 2)]
    )
    kind = {"question_type": "free_form", "answer_type": answer_type, "choices": []}
    return {"text": text, "answer": answer, "precision": 1, **kind}


def _mme_case(r: Random) -> Case:
    names = ["existence", "OCR", "code_reasoning", "artwork", "text_translation"]
    rows = [
        [c, f"{i}.png", r.random() < 0.7]
        for c in names
        for i in range(r.randint(1, 5))
        for _ in "ab"
    ]
    r.shuffle(rows)
    return {"rows": rows}


def _hallusion_case(r: Random) -> Case:
    rows = []
    for category, subcategory in (("VD", "ocr"), ("VD", "math"), ("VS", "ocr"), ("VS", "chart")):
        for which in range(r.randint(1, 3)):
            ids = [(f, q) for f in range(r.randint(1, 3)) for q in range(r.randint(1, 3))]
            rows += [
                [
                    category,
                    subcategory,
                    str(which),
                    str(f),
                    str(q),
                    _yes_no_case(r)["text"],
                    r.choice("01"),
                ]
                for f, q in ids
            ]
    return {"rows": rows}


def _groups_case(r: Random) -> Case:
    return {
        "rows": [[r.choice("abcdef"), float(r.random() < 0.6)] for _ in range(r.randint(1, 40))]
    }


def _answered_case(r: Random) -> Case:
    return {"rows": [[r.choice(["A", "", "B"]), r.random() < 0.5] for _ in range(r.randint(1, 12))]}


def _covered_case(r: Random) -> Case:
    covered = _words(r, 6).strip() or "covered"
    text = f"{_words(r)} {_perturbed(r, covered)} {_words(r)}" if r.random() < 0.9 else "I'm sorry"
    return {"text": text, "covered": covered}


GENERATORS: dict[str, Callable[[Random], Case]] = {
    "anls": _text_case,
    "relaxed_accuracy": _relaxed_case,
    "vqa_normalization": _single_case,
    "vqa_accuracy": _vqa_case,
    "ocrbench": _ocr_case,
    "multiple_choice": _choice_case,
    "mmmu_choice": _choice_case,
    "mmt_choice": _choice_case,
    "egoschema": _five_choices_case,
    "ai2d": _choice_case,
    "realworldqa": _realworldqa_case,
    "mvbench": _choice_case,
    "mvbench_aggregate": _answered_case,
    "perception_test": _choice_case,
    "video_mme": _four_choices_case,
    "circular": _circular_case,
    "yes_no": _yes_no_case,
    "mme": _mme_case,
    "hallusion_bench": _hallusion_case,
    "mmmu_open": _mmmu_open_case,
    "mtvqa": _single_case,
    "mathvista": _mathvista_case,
    "vcr": _covered_case,
    "box": _box_case,
    "refcoco": _box_case,
    "mmstar_aggregate": _groups_case,
}

# Cases that hold at least so many answers; there are fewer of them.
ANSWERS_IN_A_CASE = {"mme": 10, "hallusion_bench": 8, "circular": 2}
