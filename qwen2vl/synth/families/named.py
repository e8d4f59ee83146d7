"""Task family `named`: the names of icons, one alone, or up to sixteen in rows and columns.

Icons are of the training styles; every name is about equally frequent, and so is every family of
styles. Some are outlined, drawn in lines only, or in other colors, since a name holds for drawings
of any style. Rows and columns give many names for few vision tokens.

Names of an answer are those of names.tsv. Of two questions about one picture, the later is not
answered by the earlier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random

from qwen2vl.grounding import Box as TextBox
from qwen2vl.grounding import ObjectRef
from qwen2vl.synth.canvas import degrade, sample_canvas, sample_size
from qwen2vl.synth.colors import is_light
from qwen2vl.synth.compositing.icon_sampling import (
    RASTERS,
    are_near,
    fit_ground,
    sample_icon_layer,
    sample_look,
    sample_names,
    sample_other_names,
)
from qwen2vl.synth.compositing.icons import load_drawings
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.objects import ink_box
from qwen2vl.synth.spec import Box, FamilySample, Mixture, Question

__all__ = ["sample"]

_SINGLE_SHARE = 0.45  # of the pictures
_SMALLER_SHARE = 0.4  # of the pictures of one icon, which are the smaller of two sizes
_SINGLE_SIDES = (0.4, 1.0)  # of the shorter side of the picture
_CELL_SIDES = (0.7, 1.0)  # of the shorter side of the cell
_CELLS = (28, 90)  # pixels of a cell's shorter side that are preferred
_MAX_ROWS = 4  # and columns
_MAX_LINE = 8  # icons in one row or column
_LIST_SHARE = 0.6  # of the pictures of several icons, which ask for all their names
_ONE_STYLE_SHARE = 0.5
_REPEATED_SHARE = 0.2  # of the pictures of several icons, which show few names
_COLORED_SHARE = 0.15  # of the light backgrounds, which get another light color
_LIGHTENED_SHARE = 0.4  # of the dark ones

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_SIDES = {"to the right of": (0, 1), "to the left of": (0, -1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Icons in rows and columns."""

    picture: Composite
    rows: int
    columns: int
    icons: tuple[Icon, ...]  # row by row
    num_names: int  # that the names are sampled from; 0: all

    @property
    def names(self) -> list[str]:
        return [icon.name for icon in self.icons]


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a picture of one or several icons and questions about their names.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
    """
    size = sample_size(rng, mixture)
    shape = None if rng.random() < _SINGLE_SHARE else _sample_shape(rng, *size)
    if shape is None:
        if rng.random() < _SMALLER_SHARE:
            size = min(size, sample_size(rng, mixture), key=math.prod)
        return _sample_single(rng, mixture, size)
    grid = _sample_grid(rng, mixture, size, shape)
    return FamilySample(_ask_grid(rng, grid, mixture), (grid.picture,))


def _sample_canvas(rng: Random, mixture: Mixture, size: tuple[int, int]) -> Composite:
    """Sample an empty picture; some have a light color, which is more frequent than a dark one."""
    canvas = sample_canvas(rng, mixture, size=size)
    if rng.random() < (_COLORED_SHARE if is_light(canvas.ground.rgb) else _LIGHTENED_SHARE):
        low = rng.randint(120, 235)
        rgb = (rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255))
        canvas = replace(canvas, ground=Ground(rgb=rgb))
    return canvas


# One icon


def _sample_single(rng: Random, mixture: Mixture, size: tuple[int, int]) -> FamilySample:
    (name,) = sample_names(rng, 1, mixture.num_names)
    shorter = min(size)
    side = round(shorter * max(rng.uniform(*_SINGLE_SIDES) for _ in range(2)))
    x, y = rng.randint(0, size[0] - side), rng.randint(0, size[1] - side)
    icon = sample_icon_layer(rng, name, (x, y, x + side, y + side), sample_look(rng, name))
    canvas = fit_ground(rng, _sample_canvas(rng, mixture, size), [icon])
    picture = degrade(rng, replace(canvas, layers=(icon,)), mixture)
    return FamilySample(tuple(_ask_single(rng, name, mixture)), (picture,))


def _ask_single(rng: Random, name: str, mixture: Mixture) -> Iterator[Question]:
    """Ask for the name last; before it, for what says less."""
    held_out = mixture.split == "held_out"
    more = mixture.max_questions - 1
    if rng.random() < (0.4 if more else 0.1) and (question := _category(rng, name, held_out)):
        yield question
        if not more:
            return
        more -= 1
    if rng.random() < 0.2 and (question := _is_named(rng, name, mixture)):
        yield question
        if question.answer == "yes" or not more:
            return
    if rng.random() < 0.25:
        yield _choice(rng, name, mixture)
    else:
        text = word_question(rng, "named_open", held_out=held_out)
        yield Question(task="named_open", text=text, answer=name)


def _choice(rng: Random, name: str, mixture: Mixture) -> Question:
    count = 4 if rng.random() < 0.75 else 2
    options = [name, *sample_other_names(rng, [name], count - 1, mixture.num_names)]
    rng.shuffle(options)
    task = "named_choice" if count == 4 else "named_pair"
    text = word_question(rng, task, *options, held_out=mixture.split == "held_out")
    return Question(task=task, text=text, answer=name, choices=count)


def _is_named(rng: Random, name: str, mixture: Mixture) -> Question | None:
    if name in _no_article():
        return None
    answer = rng.choice(("yes", "no"))
    asked = name
    while answer == "no" and (asked == name or asked in _no_article()):
        (asked,) = sample_other_names(rng, [name], 1, mixture.num_names)
    text = word_question(rng, "named_is", asked, held_out=mixture.split == "held_out")
    return Question(task="named_is", text=text, answer=answer, choices=2)


def _category(rng: Random, name: str, held_out: bool) -> Question | None:
    """Ask for the category of a name; None where it has none, or not only one."""
    answer = _categories().get(name)
    if answer is None:
        return None
    others = [c for c in dict.fromkeys(_categories().values()) if c != answer]
    # A fruit is both; the other plants and food are not offered together either.
    unclear = {"plant": "food", "food": "plant"}.get(answer)
    others = [category for category in others if category != unclear]
    if rng.random() < 0.5:
        asked = answer if rng.random() < 0.5 else rng.choice(others)
        text = word_question(rng, "named_in_category", _with_article(asked), held_out=held_out)
        is_it = "yes" if asked == answer else "no"
        return Question(task="named_in_category", text=text, answer=is_it, choices=2)
    options = [answer, *rng.sample(others, rng.randint(1, 4))]
    rng.shuffle(options)
    listed = [_with_article(option) for option in options]
    field = f"{', '.join(listed[:-1])} or {listed[-1]}"
    text = word_question(rng, "named_category", field, held_out=held_out)
    return Question(task="named_category", text=text, answer=answer, choices=len(options))


def _with_article(category: str) -> str:
    if category in ("food", "clothing"):
        return category
    return f"an {category}" if category[0] in "aeiou" else f"a {category}"


# Several icons


def _sample_shape(rng: Random, width: int, height: int) -> tuple[int, int] | None:
    """Sample rows and columns for a picture; None where it is too small for two icons."""
    shapes: dict[tuple[int, int], float] = {}
    for rows in range(1, _MAX_LINE + 1):
        for columns in range(1, _MAX_LINE + 1):
            if rows * columns == 1 or (min(rows, columns) > 1 and max(rows, columns) > _MAX_ROWS):
                continue
            cell = (width / columns, height / rows)
            if min(cell) < _CELLS[0] or max(cell) > 1.8 * min(cell):
                continue
            # Many icons are better than few, as long as they can be recognized.
            shapes[rows, columns] = rows * columns * (1.0 if min(cell) <= _CELLS[1] else 0.3)
    if not shapes:
        return None
    return rng.choices(list(shapes), list(shapes.values()))[0]


def _sample_grid(
    rng: Random, mixture: Mixture, size: tuple[int, int], shape: tuple[int, int]
) -> _Grid:
    (rows, columns), num_names = shape, mixture.num_names
    count = rows * columns
    if rng.random() < _REPEATED_SHARE:
        few = sample_names(rng, min(count, rng.choice((2, 3, 4))), num_names)
        names = [rng.choice(few) for _ in range(count)]
    else:
        names = sample_names(rng, count, num_names)
    common = sample_look(rng, names[0]) if rng.random() < _ONE_STYLE_SHARE else None
    sides = _CELL_SIDES if rng.random() < 0.5 else (rng.uniform(*_CELL_SIDES),) * 2
    icons: list[Icon] = []
    for index, name in enumerate(names):
        box = _sample_box(rng, size, shape, divmod(index, columns), rng.uniform(*sides))
        icons.append(sample_icon_layer(rng, name, box, common or sample_look(rng, name)))
    canvas = fit_ground(rng, _sample_canvas(rng, mixture, size), icons)
    picture = degrade(rng, replace(canvas, layers=tuple(icons)), mixture)
    shown = tuple(icons)
    return _Grid(picture=picture, rows=rows, columns=columns, icons=shown, num_names=num_names)


def _sample_box(
    rng: Random, size: tuple[int, int], shape: tuple[int, int], cell: tuple[int, int], share: float
) -> Box:
    """Sample a square box within a cell (row, column)."""
    wide, high = size[0] / shape[1], size[1] / shape[0]
    side = min(wide, high) * share
    cached = [raster for raster in RASTERS if 0.8 * side <= raster <= min(wide, high)]
    # Icons that are not resized are drawn faster.
    side = rng.choice(cached) if cached and rng.random() < 0.7 else int(side)
    x = cell[1] * wide + rng.uniform(0.2, 0.8) * (wide - side)
    y = cell[0] * high + rng.uniform(0.2, 0.8) * (high - side)
    return (int(x), int(y), int(x) + side, int(y) + side)


def _ask_grid(rng: Random, grid: _Grid, mixture: Mixture) -> tuple[Question, ...]:
    """Ask for all names, then perhaps for a box; or for names that no earlier question tells."""
    held_out = mixture.split == "held_out"
    cells = rng.sample(range(len(grid.icons)), len(grid.icons))
    questions: list[Question] = []
    if rng.random() < _LIST_SHARE:
        found = _find(rng, grid, cells[0], held_out) if rng.random() < 0.5 else None
        questions = [_list(rng, grid, held_out), *([found] if found else [])]
        return tuple(questions[: mixture.max_questions])
    if len(set(grid.names)) < len(cells) and (counted := _count(rng, grid, held_out)):
        questions.append(counted)
    elif rng.random() < 0.25 and min(grid.rows, grid.columns) > 1:
        questions.append(_ask_line(rng, grid, held_out))
    for cell in cells:
        told = " ".join(question.text + question.answer for question in questions)
        if len(questions) < mixture.max_questions and grid.names[cell] not in told:
            question = rng.choice(_CELL_SAMPLERS)(rng, grid, cell, held_out)
            questions += [question] if question else []
    return tuple(questions or [_list(rng, grid, held_out)])


def _list(rng: Random, grid: _Grid, held_out: bool) -> Question:
    answer = ", ".join(grid.names)
    if grid.rows > 1 and grid.columns > 1:
        text = word_question(rng, "named_list", held_out=held_out)
        return Question(task="named_list", text=text, answer=answer)
    order = "from left to right" if grid.rows == 1 else "from top to bottom"
    text = word_question(rng, "named_list_line", order, held_out=held_out)
    return Question(task="named_list_line", text=text, answer=answer)


def _ask_line(rng: Random, grid: _Grid, held_out: bool) -> Question:
    """Ask for the names of a row or a column."""
    task = rng.choice(("named_row", "named_column"))
    axis, count = (0, grid.rows) if task == "named_row" else (1, grid.columns)
    number = rng.randrange(count)
    inside = [n for i, n in enumerate(grid.names) if divmod(i, grid.columns)[axis] == number]
    text = word_question(rng, task, str(number + 1), held_out=held_out)
    return Question(task=task, text=text, answer=", ".join(inside))


def _absent_name(rng: Random, grid: _Grid) -> str:
    return sample_other_names(rng, grid.names, 1, grid.num_names)[0]


def _count(rng: Random, grid: _Grid, held_out: bool) -> Question | None:
    """Ask how many icons have a name; one of ten questions is about a name that none has."""
    is_absent = rng.random() < 0.1
    name = _absent_name(rng, grid) if is_absent else rng.choice(grid.names)
    if name in _no_article():
        return None
    text = word_question(rng, "named_count", name, held_out=held_out)
    return Question(task="named_count", text=text, answer=str(grid.names.count(name)))


_CellSampler = Callable[[Random, _Grid, int, bool], Question | None]


def _cell(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question:
    """Ask for the name at a place: by row and column, by the number in a line, or by a corner."""
    name, (row, column) = grid.names[cell], divmod(cell, grid.columns)
    if min(grid.rows, grid.columns) == 1:
        text = word_question(rng, "named_nth", *_ordinal(rng, grid, cell), held_out=held_out)
        return Question(task="named_nth", text=text, answer=name)
    is_corner = row in (0, grid.rows - 1) and column in (0, grid.columns - 1)
    if is_corner and rng.random() < 0.5:
        corner = f"{'bottom' if row else 'top'} {'right' if column else 'left'}"
        text = word_question(rng, "named_corner", corner, held_out=held_out)
        return Question(task="named_corner", text=text, answer=name)
    place = (str(row + 1), str(column + 1))
    others = [other for other in set(grid.names) if not are_near(other, name)]
    if len(others) >= 2 and rng.random() < 0.3:
        options = [name, *rng.sample(sorted(others), 2)]
        rng.shuffle(options)
        text = word_question(rng, "named_cell_choice", *place, *options, held_out=held_out)
        return Question(task="named_cell_choice", text=text, answer=name, choices=3)
    text = word_question(rng, "named_cell", *place, held_out=held_out)
    return Question(task="named_cell", text=text, answer=name)


def _ordinal(rng: Random, grid: _Grid, cell: int) -> tuple[str, str]:
    """Return the number of an icon in a line, and the end to count from: "second", "left"."""
    last = len(grid.icons) - 1
    start, end = ("left", "right") if grid.rows == 1 else ("top", "bottom")
    if rng.random() < 0.6:
        return ("last" if cell == last and rng.random() < 0.3 else _ORDINALS[cell]), start
    return _ORDINALS[last - cell], end


def _box(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question:
    text = word_question(rng, "named_box", _box_text(grid, cell), held_out=held_out)
    return Question(task="named_box", text=text, answer=grid.names[cell])


def _find(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question | None:
    name = grid.names[cell]
    if grid.names.count(name) > 1:
        return None
    text = word_question(rng, "named_find", name, held_out=held_out)
    answer = ObjectRef(name).to_text() + _box_text(grid, cell)
    return Question(task="named_find", text=text, answer=answer, box=ink_box(grid.icons[cell]))


def _where(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question | None:
    name, (row, column) = grid.names[cell], divmod(cell, grid.columns)
    is_line = min(grid.rows, grid.columns) == 1
    if is_line or grid.names.count(name) > 1 or name in _no_article():
        return None
    text = word_question(rng, "named_where", name, held_out=held_out)
    return Question(task="named_where", text=text, answer=f"row {row + 1}, column {column + 1}")


def _next(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question | None:
    """Ask for the name beside another icon."""
    row, column = divmod(cell, grid.columns)
    word = rng.choice(list(_SIDES))
    down, right = _SIDES[word]
    row, column = row - down, column - right  # the icon that the question names
    if not (0 <= row < grid.rows and 0 <= column < grid.columns):
        return None
    name = grid.names[row * grid.columns + column]
    if grid.names.count(name) > 1:
        return None
    text = word_question(rng, "named_next", name, word, held_out=held_out)
    return Question(task="named_next", text=text, answer=grid.names[cell])


def _exists(rng: Random, grid: _Grid, cell: int, held_out: bool) -> Question | None:
    is_there = rng.random() < 0.5
    name = grid.names[cell] if is_there else _absent_name(rng, grid)
    if name in _no_article():
        return None
    text = word_question(rng, "named_exists", name, held_out=held_out)
    answer = "yes" if is_there else "no"
    return Question(task="named_exists", text=text, answer=answer, choices=2)


# Names at a place are asked for most often: they train recognition as lists do.
_CELL_SAMPLERS: tuple[_CellSampler, ...] = (
    _cell,
    _cell,
    _cell,
    _box,
    _find,
    _where,
    _next,
    _exists,
)


def _box_text(grid: _Grid, cell: int) -> str:
    size = (grid.picture.height, grid.picture.width)
    return TextBox.from_pixels(ink_box(grid.icons[cell]), size).to_text()


@cache
def _no_article() -> frozenset[str]:
    return frozenset(load_drawings()["no_article"])


@cache
def _categories() -> dict[str, str]:
    listed = load_drawings()["categories"]
    return {name: category for category, names in listed.items() for name in names}
