"""Task family `lines`: texts of many scripts, tight or anywhere on canvases of any size.

A picture has one line, a page of lines, or two or three separate texts of which the question
selects one by its place, color or size. The texts, their faces and colors, and the padding follow
the fields of `Mixture` that the family `text` has too, and `scripts`; the canvas follows
`picture_side` and `max_aspect`, or the ink.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from qwen2vl.errors import ConfigError
from qwen2vl.synth.canvas import sample_canvas, sample_size
from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.compositing.text import check_font
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.scripts.alphabets import SCRIPTS
from qwen2vl.synth.scripts.faces import check_faces, faces_of
from qwen2vl.synth.scripts.layout import (
    Block,
    Ink,
    Limits,
    box_of,
    crop_canvas,
    degrade_text,
    free_place,
    limits_of,
    place_block,
    sample_block,
    sample_ink,
    sample_style,
)
from qwen2vl.synth.scripts.words import check_words, sample_text
from qwen2vl.synth.spec import Box, FamilySample, Mixture, Question
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["check_lines", "sample"]

# Cumulative shares of the layouts; the rest are separate texts.
_CROPPED, _ANYWHERE, _PAGE = 0.45, 0.68, 0.86
_READ_SHARE = 0.85  # of the pictures about which one question is asked; 1 if there are more
_READ_LAST_SHARE = 0.6
_SEPARATE_SIDE = 84  # pixels of the shorter side from which a canvas has separate texts
_GAP = 4  # pixels between separate texts
_LARGER = 1.35  # ratio of font sizes from which one text is called larger
_SCRIPT_SHARE = 0.3  # of the pictures of the rarest script of a mixture: its name is asked
_NEAR_MISS_SHARE = 0.6  # of the texts of which "yes" would be wrong
_ATTEMPTS = 10
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
# Letters that look alike in some face: no near miss replaces one of them by another.
_LOOK_ALIKES = ("il1\u0131", "o0", "s5", "z2", "ьъы", "шщ", "гґ", "\u03bd\u03c5")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    block: Block
    box: Box
    ink: Ink


def check_lines(mixture: Mixture) -> None:
    """Check before a long run that the texts of a mixture can be sampled and drawn.

    Raises:
        ConfigError: `scripts` names an unknown script, or none.
        DatasetNotFoundError: the dataset names is not on this machine.
        FontError: fonts are not installed, or Pillow has no raqm layout.
    """
    scripts = _scripts(mixture)
    check_words(scripts)
    check_faces(scripts)
    for name in scripts:
        for family in faces_of(name):
            check_font(family[0].file)


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a picture with text, and questions about it.

    Raises:
        ConfigError, DatasetNotFoundError, FontError: as `check_lines` does.
    """
    weights = mixture.scripts
    (script,) = rng.choices(_scripts(mixture), [w for w in weights.values() if w > 0])
    layout = rng.random()
    if layout >= _PAGE:
        separate = _sample_separate(rng, mixture, script)
        if separate is not None:
            return separate
    lines = rng.randint(*mixture.page_lines) if _ANYWHERE <= layout < _PAGE else 1
    is_cropped = layout < _CROPPED or (lines > 1 and rng.random() < 0.5)
    drawn = None if is_cropped else _draw_anywhere(rng, mixture, script, lines)
    picture, block, ink = drawn or _draw_cropped(rng, mixture, script, lines)
    questions = _ask(rng, mixture, block, ink)
    return FamilySample(questions, (degrade_text(rng, picture, mixture),))


def _scripts(mixture: Mixture) -> list[str]:
    """Return the scripts of a mixture that have a weight.

    Raises:
        ConfigError: there are none.
    """
    scripts = [name for name, weight in mixture.scripts.items() if weight > 0]
    if not scripts:
        raise ConfigError(f"mixture: scripts is {dict(mixture.scripts)}; one must have a weight")
    return scripts


# Pictures ---------------------------------------------------------------------------------------


def _draw_cropped(
    rng: Random, mixture: Mixture, script: str, lines: int
) -> tuple[Composite, Block, Ink]:
    side, width = mixture.picture_side[1], mixture.max_width
    limits = Limits(width=width, height=side, area=side**2)
    block = sample_block(rng, mixture, script, lines, limits)
    for larger in (1, 2, 4, 8):  # one line may need more than the limits of a script of wide signs
        if block is None:
            limits = Limits(width=larger * width, height=larger * side, area=(larger * side) ** 2)
            block = sample_block(rng, mixture, script, 1, limits)
    assert block is not None, f"no face of {script} draws a text of it"
    picture, ink = crop_canvas(rng, mixture, block)
    return picture, block, ink


def _draw_anywhere(
    rng: Random, mixture: Mixture, script: str, lines: int
) -> tuple[Composite, Block, Ink] | None:
    canvas, ink = sample_style(rng, mixture, sample_size(rng, mixture))
    block = sample_block(rng, mixture, script, lines, limits_of(canvas))
    if block is None:
        return None
    x, y = free_place(rng, canvas, block)
    return replace(canvas, layers=place_block(block, x, y, ink)), block, ink


def _sample_separate(rng: Random, mixture: Mixture, script: str) -> FamilySample | None:
    """Sample two or three texts and questions that select one; None if they do not fit."""
    canvas = sample_canvas(rng, mixture)
    if min(canvas.width, canvas.height) < _SEPARATE_SIDE:
        return None
    placed = _place_texts(rng, mixture, script, canvas)
    named = [(one, by) for one in placed for by in _selectors(one, placed)]
    if len(placed) < 2 or not named:
        return None
    rng.shuffle(named)
    count = _sample_count(rng, mixture)
    asked: dict[str, Question] = {}
    for one, (task, field) in named:
        text = one.block.texts[0]
        if len(asked) < count and text not in asked:
            question = _word(rng, mixture, task, field)
            asked[text] = Question(task=task, text=question, answer=text)
    layers = [layer for one in placed for layer in place_block(one.block, *one.box[:2], one.ink)]
    picture = degrade_text(rng, replace(canvas, layers=tuple(layers)), mixture)
    return FamilySample(tuple(asked.values()), (picture,))


def _place_texts(rng: Random, mixture: Mixture, script: str, canvas: Composite) -> list[_Placed]:
    """Place up to three texts, all of them different, that do not touch."""
    placed: list[_Placed] = []
    limits = limits_of(canvas)
    limits = replace(limits, height=limits.height // 3, area=limits.area // 4)
    has_colors = rng.random() < 0.5
    ink = sample_ink(rng, canvas.ground)
    for _ in range(rng.choice((2, 2, 3))):
        block = sample_block(rng, mixture, script, 1, limits)
        if block is None or any(block.texts == one.block.texts for one in placed):
            continue
        for _ in range(_ATTEMPTS):
            box = box_of(block, *free_place(rng, canvas, block))
            if all(_are_apart(box, one.box) for one in placed):
                used = tuple(one.ink.name for one in placed)
                own = sample_ink(rng, canvas.ground, used) if has_colors else ink
                placed.append(_Placed(block=block, box=box, ink=own))
                break
    return placed


def _are_apart(a: Box, b: Box) -> bool:
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


def _selectors(one: _Placed, placed: Sequence[_Placed]) -> list[tuple[str, str]]:
    """Return (task, field) of all ways to say which of the texts is meant."""
    others = [other for other in placed if other is not one]
    x1, y1, x2, y2 = one.box
    sides = {
        "at the top": all(y2 <= other.box[1] for other in others),
        "at the bottom": all(y1 >= other.box[3] for other in others),
        "on the left": all(x2 <= other.box[0] for other in others),
        "on the right": all(x1 >= other.box[2] for other in others),
    }
    found = [("read_at", side) for side, holds in sides.items() if holds]
    if all(one.ink.name != other.ink.name for other in others):
        found.append(("read_colored", one.ink.name))
    size = one.block.size
    if all(size >= _LARGER * other.block.size for other in others):
        found.append(("read_sized", "largest"))
    if all(_LARGER * size <= other.block.size for other in others):
        found.append(("read_sized", "smallest"))
    return found


# Questions --------------------------------------------------------------------------------------


def _ask(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> tuple[Question, ...]:
    """Ask to read the text, most often, and further questions."""
    count = _sample_count(rng, mixture)
    is_read = count > 1 or rng.random() < _READ_SHARE
    makers = list(_PAGE_TASKS if len(block.texts) > 1 else _LINE_TASKS)
    rng.shuffle(makers)
    questions: list[Question] = []
    for make in makers:
        if len(questions) == count - is_read:
            break
        made = make(rng, mixture, block, ink)
        questions += [one for one in made if one.task not in {q.task for q in questions}]
    if is_read or not questions:
        task = "read_page" if len(block.texts) > 1 else "read"
        text = sample_question_text(rng, task, mixture.split)
        read = Question(task=task, text=text, answer="\n".join(block.texts))
        last = rng.random() < _READ_LAST_SHARE
        questions.insert(len(questions) if last else 0, read)
    return tuple(questions)


def _sample_count(rng: Random, mixture: Mixture) -> int:
    """Sample the number of questions: many share the cost of a picture."""
    most = mixture.max_questions
    return max(rng.randint(1, most), rng.randint(1, most))


def _word(rng: Random, mixture: Mixture, task: str, *fields: str) -> str:
    return word_question(rng, task, *fields, held_out=mixture.split == "held_out")


_Maker = Callable[[Random, Mixture, Block, Ink], "list[Question]"]


def _words(text: str) -> list[str]:
    """Return the words of a text; none if punctuation makes them unclear."""
    words = text.split()
    return words if all(word.isalnum() for word in words) else []


def _has_words(block: Block) -> bool:
    script = SCRIPTS[block.script]
    return script.separator == " " and not script.has_marks


def _count_words(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    count = len(_words(" ".join(block.texts)))
    if not count or not _has_words(block):
        return []
    task = "count_text_words"
    return [Question(task=task, text=_word(rng, mixture, task), answer=str(count))]


def _ask_word(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    words = _words(" ".join(block.texts))
    if len(words) < 2 or not _has_words(block):
        return []
    task, which = "text_word", rng.choice(("first", "last"))
    answer = words[0 if which == "first" else -1]
    return [Question(task=task, text=_word(rng, mixture, task, which), answer=answer)]


def _ask_letter(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    text = block.texts[0]
    which = rng.choice(("first", "last"))
    letter = text[0 if which == "first" else -1]
    if len(text) < 2 or not letter.isalpha() or not SCRIPTS[block.script].has_case:
        return []
    task = "text_letter"
    return [Question(task=task, text=_word(rng, mixture, task, which), answer=letter)]


def _ask_says(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    """Ask whether the text is another one: a near miss, or any."""
    text, task = block.texts[0], "text_says"
    holds = rng.random() < 0.5
    if len(text) < 2:
        return []
    said = text if holds else _other_text(rng, block.script, text)
    return [_yes_or_no(rng, mixture, task, said, holds=holds)]


def _ask_has_word(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    """Ask whether the text has a word: one of its own, a near miss, or any."""
    written = " ".join(block.texts)
    words = [word for word in written.split() if word.isalnum() and len(word) > 1]
    if not words or not _has_words(block):
        return []
    said, holds, task = rng.choice(words), rng.random() < 0.5, "has_word"
    while not holds and (said.lower() in written.lower() or not said.isalnum()):
        said = _other_text(rng, block.script, rng.choice(words))
    return [_yes_or_no(rng, mixture, task, said, holds=holds)]


def _yes_or_no(rng: Random, mixture: Mixture, task: str, said: str, *, holds: bool) -> Question:
    answer = "yes" if holds else "no"
    return Question(task=task, text=_word(rng, mixture, task, said), answer=answer, choices=2)


def _ask_script(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    """Ask for the script: of all scripts of the mixture about equally often."""
    totals: dict[str, float] = {}
    for name in _scripts(mixture):
        label = SCRIPTS[name].label
        totals[label] = totals.get(label, 0) + mixture.scripts[name]
    totals.pop("", None)
    label = SCRIPTS[block.script].label
    has_letters = any(char.isalpha() for text in block.texts for char in text)
    if len(totals) < 2 or label not in totals or not has_letters:
        return []
    if rng.random() >= _SCRIPT_SHARE * min(totals.values()) / totals[label]:
        return []
    task = "which_script"
    text = _word(rng, mixture, task)
    return [Question(task=task, text=text, answer=label, choices=len(totals))]


def _ask_color(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    if not ink.name or (ink.name == "black" and rng.random() < 0.8):
        return []
    task = "text_color"
    return [Question(task=task, text=_word(rng, mixture, task), answer=ink.name)]


def _count_lines(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    task = "count_text_lines"
    answer = str(len(block.texts))
    return [Question(task=task, text=_word(rng, mixture, task), answer=answer)]


def _ask_line(rng: Random, mixture: Mixture, block: Block, ink: Ink) -> list[Question]:
    index = rng.randrange(len(block.texts))
    is_last = index == len(block.texts) - 1
    which = "last" if is_last and rng.random() < 0.7 else _ORDINALS[min(index, 5)]
    task = "read_line"
    text = _word(rng, mixture, task, which)
    return [Question(task=task, text=text, answer=block.texts[index])]


_LINE_TASKS: tuple[_Maker, ...] = (
    *(_count_words, _ask_word, _ask_letter, _ask_says, _ask_script, _ask_color),
)
_PAGE_TASKS: tuple[_Maker, ...] = (
    *(_count_lines, _ask_line, _ask_line, _ask_has_word, _ask_word, _ask_script, _ask_color),
)


# Near misses ------------------------------------------------------------------------------------


def _other_text(rng: Random, script: str, text: str) -> str:
    """Return a text that differs in one character, or a different one."""
    if rng.random() < _NEAR_MISS_SHARE and SCRIPTS[script].letters:
        changed = _change_one(rng, script, text)
        if changed:
            return changed
    other = text
    while other.lower() == text.lower():
        other = sample_text(rng, script, max(1, len(text) - 1), len(text) + 1)
    return other


def _change_one(rng: Random, script: str, text: str) -> str:
    """Replace one letter or digit by one that looks different."""
    index = rng.randrange(len(text))
    old = text[index]
    if not old.isalnum():
        return ""
    letters: str = "0123456789" if old.isdigit() else SCRIPTS[script].letters
    new = rng.choice(letters)
    new = new.upper() if old.isupper() else new.lower()
    if len(new) != 1 or _look_alike(old, new):
        return ""
    return text[:index] + new + text[index + 1 :]


def _look_alike(a: str, b: str) -> bool:
    bases = [unicodedata.normalize("NFD", char.lower())[0] for char in (a, b)]
    return bases[0] == bases[1] or any(set(bases) <= set(group) for group in _LOOK_ALIKES)
