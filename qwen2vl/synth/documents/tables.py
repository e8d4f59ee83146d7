"""Tables: a header, and rows of labels with numbers or words in two to five columns.

The first column has the labels, which differ. Numbers of a column differ, so that one row has the
largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from qwen2vl.synth.compositing.layers import Layer, Rect
from qwen2vl.synth.documents.layout import (
    DocumentSample,
    Fact,
    Sheet,
    Style,
    draw_frame,
    largest_width,
    mix_colors,
    place_sheet,
    sample_budget,
    sample_style,
    write,
)
from qwen2vl.synth.documents.vocabulary import (
    cased,
    load_word_lists,
    sample_code,
    sample_good,
    spoken,
)
from qwen2vl.synth.spec import Mixture

__all__ = ["Table", "sample_table"]

_NUM_ROWS = (2, 6)  # below the header
_NUM_COLUMNS = (2, 5)
_ATTEMPTS = 7
_TITLE_SHARE = 0.15
_WORD_SHARE = 0.3  # of the columns have words
_WORD_COLUMNS = {
    "Color": "plain_colors",
    "Day": "days",
    "Month": "months",
    "Status": "states",
    "Size": "sizes",
}
_GRIDS = ("full", "rows", "zebra", "header", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What is written in a table."""

    title: str
    head: tuple[str, ...]  # of the label column, then of the others
    rows: tuple[tuple[str, ...], ...]  # label, then cells

    def column(self, number: int) -> list[str]:
        """Return the cells of a column, without its header."""
        return [row[number] for row in self.rows]

    def is_numeric(self, number: int) -> bool:
        """Return whether a column has numbers."""
        return self.rows[0][number].isdigit()


def sample_table(rng: Random, mixture: Mixture) -> DocumentSample | None:
    """Sample a table as a picture; None if the mixture's pictures are too small for it.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    budget = sample_budget(rng, mixture)
    for attempt in range(_ATTEMPTS):
        style = sample_style(rng, mixture, budget, attempt=attempt, light=0.75)
        most_rows = max(_NUM_ROWS[0], _NUM_ROWS[1] - attempt)
        most_columns = max(_NUM_COLUMNS[0], _NUM_COLUMNS[1] - attempt // 2)
        table = _sample_content(rng, most_rows, most_columns)
        width, height, layers = _lay_out(rng, table, style)
        sheet = Sheet(width=width, height=height, layers=tuple(layers), facts=_facts(rng, table))
        if budget.admits(sheet):
            return place_sheet(rng, mixture, budget, style, sheet)
    return None


def _sample_content(rng: Random, most_rows: int, most_columns: int) -> Table:
    lists = load_word_lists()
    num_rows = rng.randint(_NUM_ROWS[0], most_rows)
    # Wide tables are rarer, since they need many pixels.
    num_columns = min(rng.randint(_NUM_COLUMNS[0], most_columns) for _ in range(2))
    first, labels = _sample_labels(rng, num_rows)
    words = [name for name in _WORD_COLUMNS if name != first]
    heads: list[str] = []
    columns: list[list[str]] = [labels]
    for head in rng.sample(lists["amounts"], num_columns - 1):
        if rng.random() < _WORD_SHARE and words:
            head = words.pop(rng.randrange(len(words)))
            columns.append([rng.choice(lists[_WORD_COLUMNS[head]]) for _ in range(num_rows)])
        else:
            columns.append(_sample_numbers(rng, num_rows))
        heads.append(head)
    case = rng.choice(("first", "first", "first", "lower", "upper"))
    return Table(
        title=rng.choice(lists["titles"]) if rng.random() < _TITLE_SHARE else "",
        head=tuple(cased(head.lower(), case) for head in (first, *heads)),
        rows=tuple(zip(*columns, strict=True)),
    )


def _sample_labels(rng: Random, count: int) -> tuple[str, list[str]]:
    """Sample the head of the label column and different labels."""
    lists = load_word_lists()
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(lists["people_heads"]), rng.sample(lists["people"], count)
    if kind < 0.55:
        return "Day", list(lists["days"][:count])
    if kind < 0.65:
        start = rng.randrange(len(lists["months"]) - count + 1)
        return "Month", list(lists["months"][start : start + count])
    case = rng.choice(("lower", "first"))
    labels: list[str] = []
    while len(labels) < count:
        label = sample_code(rng) if kind > 0.9 else cased(sample_good(rng, short=True), case)
        labels += [label] if label not in labels else []
    return rng.choice(lists["goods_heads"]), labels


def _sample_numbers(rng: Random, count: int) -> list[str]:
    highest = rng.choice((9, 20, 60, 99, 99, 999))
    return [str(number) for number in rng.sample(range(highest + 1), count)]


def _lay_out(rng: Random, table: Table, style: Style) -> tuple[int, int, list[Layer]]:
    """Return width, height and layers."""
    gap, height = style.pixels(rng.uniform(0.4, 0.9)), style.pixels(rng.uniform(1.35, 1.9))
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [
        2 * gap
        + max(
            largest_width(column[:1], style.bold, style.size),
            largest_width(column[1:], style.font, style.size),
        )
        for column in columns
    ]
    pad = style.pixels(rng.uniform(0.2, 0.6))
    width = sum(widths)
    if table.title:
        width = max(width, largest_width([table.title], style.bold, style.size))
        widths[0] += width - sum(widths)
    top = pad + (height if table.title else 0)
    lefts = [pad + sum(widths[:number]) for number in range(len(widths) + 1)]
    tops = [top + number * height for number in range(len(table.rows) + 2)]
    layers = _draw_grid(rng, style, lefts, tops)
    if table.title:
        box = (pad, pad, pad + width, top)
        layers.append(
            write(table.title, box, style.ink, font=style.bold, size=style.size, align="center")
        )
    numbers = rng.choice(("left", "right", "right", "center"))
    for number, column in enumerate(columns):
        align = numbers if number and table.is_numeric(number) else "left"
        for row, text in enumerate(column):
            box = (lefts[number] + gap, tops[row], lefts[number + 1] - gap, tops[row + 1])
            font = style.font if row else style.bold
            layers.append(write(text, box, style.ink, font=font, size=style.size, align=align))
    return width + 2 * pad, tops[-1] + pad, layers


def _draw_grid(rng: Random, style: Style, lefts: list[int], tops: list[int]) -> list[Layer]:
    """Draw fills and lines of a table, below its text."""
    grid = rng.choice(_GRIDS)
    shade = mix_colors(style.paper, style.ink, rng.uniform(0.06, 0.16))
    line = mix_colors(style.paper, style.ink, rng.uniform(0.3, 0.8))
    left, right = lefts[0], lefts[-1]
    layers: list[Layer] = []
    if grid == "zebra":
        layers += [
            Rect(rgb=shade, box=(left, tops[row], right, tops[row + 1]))
            for row in range(0, len(tops) - 1, 2)
        ]
    elif grid != "none" and rng.random() < 0.5:
        layers.append(Rect(rgb=shade, box=(left, tops[0], right, tops[1])))
    ruled = {"full": tops, "rows": tops, "header": tops[1:2]}.get(grid, [])
    layers += [Rect(rgb=line, box=(left, y, right, y + 1)) for y in ruled]
    if grid == "full":
        layers += [Rect(rgb=line, box=(x, tops[0], x + 1, tops[-1])) for x in lefts[1:-1]]
        layers += draw_frame((left, tops[0], right, tops[-1] + 1), line)
    return layers


def _facts(rng: Random, table: Table) -> tuple[Fact, ...]:
    facts = [
        Fact(
            task="table_rows",
            answer=str(len(table.rows)),
            about=frozenset({"rows"}),
            choices=_NUM_ROWS[1] - _NUM_ROWS[0] + 1,
        ),
        Fact(
            task="table_columns",
            answer=str(len(table.head)),
            about=frozenset({"head"}),
            choices=_NUM_COLUMNS[1] - _NUM_COLUMNS[0] + 1,
        ),
        Fact(task="table_header", answer=", ".join(table.head), about=frozenset({"head"})),
    ]
    if table.title:
        facts.append(Fact(task="table_title", answer=table.title, about=frozenset({"title"})))
    for row in table.rows:
        about = frozenset(f"{row[0]}/{head}" for head in table.head)
        facts.append(
            Fact(
                task="read_table_row",
                answer=" ".join(row),
                fields=(spoken(rng, row[0]),),
                about=about,
            )
        )
    for number in range(1, len(table.head)):
        facts += _column_facts(rng, table, number)
    return tuple(facts)


def _column_facts(rng: Random, table: Table, number: int) -> list[Fact]:
    head, cells, labels = table.head[number], table.column(number), table.column(0)
    facts = []
    for label, cell in zip(labels, cells, strict=True):
        about = frozenset({f"{label}/{head}"})
        fields = (spoken(rng, label), spoken(rng, head))
        facts.append(Fact(task="table_cell", answer=cell, fields=fields, about=about))
        if cells.count(cell) == 1:
            fields = (cell, spoken(rng, head))
            facts.append(
                Fact(
                    task="table_row_of",
                    answer=label,
                    fields=fields,
                    about=about,
                    choices=len(labels),
                )
            )
    for task, cell, label in (
        ("table_first", cells[0], labels[0]),
        ("table_last", cells[-1], labels[-1]),
    ):
        about = frozenset({f"{label}/{head}"})
        facts.append(Fact(task=task, answer=cell, fields=(spoken(rng, head),), about=about))
    return facts + (_order_facts(rng, table, number) if table.is_numeric(number) else [])


def _order_facts(rng: Random, table: Table, number: int) -> list[Fact]:
    """Ask for the largest and smallest number of a column, and compare two."""
    head = table.head[number]
    by_value = [row[0] for row in sorted(table.rows, key=lambda row: int(row[number]))]
    facts = [
        Fact(
            task=task,
            answer=label,
            fields=(spoken(rng, head),),
            about=frozenset({f"{label}/{head}"}),
            choices=len(by_value),
        )
        for task, label in (("table_largest", by_value[-1]), ("table_smallest", by_value[0]))
    ]
    a, b = rng.sample(by_value, 2)
    facts.append(
        Fact(
            task="table_larger",
            answer="yes" if by_value.index(a) > by_value.index(b) else "no",
            fields=(spoken(rng, a), spoken(rng, b), spoken(rng, head)),
            about=_pair(head, (a, b)),
            choices=2,
        )
    )
    return facts


def _pair(head: str, labels: Sequence[str]) -> frozenset[str]:
    return frozenset(f"{label}/{head}" for label in labels)
