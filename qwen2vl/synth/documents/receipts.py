"""Receipts: a shop, two to six items with prices, a total, sometimes date, tax, paid and change.

All prices of a receipt differ, and the sums are right: the total is that of the items and the tax,
and the change is what was paid without the total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from qwen2vl.synth.compositing.layers import Composite, Ground, Layer, Rect
from qwen2vl.synth.documents.layout import (
    DocumentSample,
    Fact,
    Sheet,
    Style,
    largest_width,
    mix_colors,
    place_sheet,
    sample_budget,
    sample_style,
    shift_layer,
    text_size,
    text_width,
    write,
)
from qwen2vl.synth.documents.vocabulary import (
    cased,
    load_word_lists,
    sample_date,
    sample_good,
    sample_shop,
    sample_time,
    spoken,
)
from qwen2vl.synth.spec import Mixture, Question

__all__ = ["Receipt", "demo_receipt", "sample_receipt"]

_NUM_ITEMS = (2, 6)
_ATTEMPTS = 6
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_CURRENCIES = ("{}", "{}", "{}", "${}", "${}", "€{}", "£{}", "{} €")
_TOTALS = ("Total", "Total", "Total", "Sum", "Amount due", "To pay")
_NOTES = (500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)  # cents


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What is written on a receipt; amounts are in cents."""

    shop: str
    items: tuple[tuple[str, int], ...]
    currency: str = "{}"
    date: str = ""
    time: str = ""
    total_label: str = "Total"
    tax: int = 0
    paid: int = 0  # 0: not written, and neither is the change
    footer: str = ""

    @property
    def total(self) -> int:
        """Sum of the items and the tax."""
        return sum(price for _, price in self.items) + self.tax

    def format_amount(self, cents: int) -> str:
        """Write an amount as the receipt does."""
        return self.currency.format(f"{cents // 100}.{cents % 100:02d}")

    def lines(self) -> list[tuple[str, str, str]]:
        """Return (kind, left, right) of each line: title, center, item, bold or rule."""
        rows = [("title", self.shop, "")]
        when = f"{self.date} {self.time}".strip()
        rows += [("center", when, "")] if when else []
        rows.append(("rule", "", ""))
        rows += [("item", name, self.format_amount(price)) for name, price in self.items]
        rows += [("item", "Tax", self.format_amount(self.tax))] if self.tax else []
        rows.append(("rule", "", ""))
        rows.append(("bold", self.total_label, self.format_amount(self.total)))
        if self.paid:
            rows.append(("item", "Paid", self.format_amount(self.paid)))
            rows.append(("item", "Change", self.format_amount(self.paid - self.total)))
        return rows + ([("center", self.footer, "")] if self.footer else [])

    def text(self) -> str:
        """Return the whole text, its lines joined by line feeds."""
        return "\n".join(f"{left} {right}".strip() for kind, left, right in self.lines() if left)


def sample_receipt(rng: Random, mixture: Mixture) -> DocumentSample | None:
    """Sample a receipt as a picture; None if the mixture's pictures are too small for it.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    budget = sample_budget(rng, mixture)
    for attempt in range(_ATTEMPTS):
        style = sample_style(rng, mixture, budget, attempt=attempt, light=0.9)
        receipt = _sample_content(rng, max(_NUM_ITEMS[0], _NUM_ITEMS[1] - attempt))
        spacing, gap = rng.uniform(1.25, 1.7), rng.uniform(1.2, 4.0)
        width, height, layers = _lay_out(receipt, style, spacing=spacing, gap=gap)
        facts = _facts(rng, receipt)
        sheet = Sheet(width=width, height=height, layers=tuple(layers), facts=facts)
        if budget.admits(sheet):
            return place_sheet(rng, mixture, budget, style, sheet)
    return None


def demo_receipt() -> tuple[Composite, Question]:
    """Return a fixed receipt in a font of the package, with a question about it."""
    receipt = Receipt(
        shop="River Cafe",
        items=(("Coffee", 340), ("Apple cake", 425), ("Green tea", 290), ("Sandwich", 675)),
        currency="${}",
        date="2024-09-18",
        time="10:42",
        paid=2000,
        footer="Thank you!",
    )
    paper, table = (252, 251, 247), (96, 78, 66)
    style = Style(
        ground=Ground(rgb=table),
        paper=paper,
        is_bare=False,
        ink=(24, 24, 28),
        font="Cabin-Regular.otf",
        bold="Cabin-Bold.otf",
        size=18,
    )
    width, height, layers = _lay_out(receipt, style, spacing=1.4, gap=3.0)
    margin = 14
    box = (margin, margin, margin + width, margin + height)
    picture = Composite(
        width=width + 2 * margin,
        height=height + 2 * margin,
        ground=style.ground,
        layers=(Rect(rgb=paper, box=box), *(shift_layer(one, margin, margin) for one in layers)),
    )
    answer = receipt.format_amount(receipt.total)
    return picture, Question(task="receipt_total", text="What is the total?", answer=answer)


def _sample_content(rng: Random, most: int) -> Receipt:
    case = rng.choice(("lower", "upper", "first", "first", "title"))
    count = rng.randint(_NUM_ITEMS[0], most)
    goods: dict[str, str] = {}
    while len(goods) < count:
        good = sample_good(rng)
        # "Tea" and "green tea" would be ambiguous.
        goods.setdefault(good.split()[-1], good)
    prices = _sample_prices(rng, count)
    tax = rng.randint(5, max(6, sum(prices) // 5)) if rng.random() < 0.2 else 0
    total = sum(prices) + tax
    notes = [note for note in _NOTES if note > total]
    shop, footer = sample_shop(rng), rng.choice(load_word_lists()["footers"])
    return Receipt(
        shop=shop.upper() if case == "upper" or rng.random() < 0.2 else shop,
        items=tuple(zip((cased(good, case) for good in goods.values()), prices, strict=True)),
        currency=rng.choice(_CURRENCIES),
        date=sample_date(rng) if rng.random() < 0.4 else "",
        time=sample_time(rng) if rng.random() < 0.25 else "",
        total_label=cased(rng.choice(_TOTALS), "upper" if case == "upper" else "first"),
        tax=tax,
        paid=rng.choice(notes[:2]) if notes and rng.random() < 0.25 else 0,
        footer=footer if rng.random() < 0.2 else "",
    )


def _sample_prices(rng: Random, count: int) -> list[int]:
    """Sample different prices, in cents."""
    unit = rng.choice((1, 1, 5, 10, 25, 50))
    highest = rng.choice((600, 1500, 4000, 10000)) // unit
    prices = [unit * number for number in rng.sample(range(50 // unit, highest), count)]
    return [price - 1 if unit >= 10 and rng.random() < 0.2 else price for price in prices]


def _lay_out(
    receipt: Receipt, style: Style, *, spacing: float, gap: float
) -> tuple[int, int, list[Layer]]:
    """Return width, height and layers; `spacing` and `gap` are shares of the text size."""
    rows, size, pad = receipt.lines(), style.size, style.pixels(0.6)
    sizes = {"title": max(size, text_size(round(1.2 * size), style.bold))}
    fonts = {"title": style.bold, "bold": style.bold}
    inner = 0
    for kind, left, right in rows:
        font = fonts.get(kind, style.font)
        needed = largest_width([left], font, sizes.get(kind, size))
        inner = max(
            inner, needed + (style.pixels(gap) + text_width(right, font, size) if right else 0)
        )
    y, step, layers = pad, style.pixels(spacing), list[Layer]()
    rule = mix_colors(style.paper, style.ink, 0.5)
    for kind, left, right in rows:
        if kind == "rule":
            middle = y + step // 4
            layers.append(
                Rect(rgb=rule, box=(pad, middle, pad + inner, middle + style.pixels(0.06)))
            )
            y += step // 2
            continue
        font, own = fonts.get(kind, style.font), sizes.get(kind, size)
        box = (pad, y, pad + inner, y + round(spacing * own))
        align = "center" if kind in ("title", "center") else "left"
        layers.append(write(left, box, style.ink, font=font, size=own, align=align))
        if right:
            layers.append(write(right, box, style.ink, font=font, size=own, align="right"))
        y = box[3]
    return inner + 2 * pad, y + pad, layers


def _facts(rng: Random, receipt: Receipt) -> tuple[Fact, ...]:
    amount = receipt.format_amount
    names = [name for name, _ in receipt.items]
    by_price = sorted(receipt.items, key=lambda item: item[1])
    facts = [
        _fact("receipt_total", amount(receipt.total), "total"),
        _fact("receipt_count", str(len(names)), "count", choices=_NUM_ITEMS[1] - _NUM_ITEMS[0] + 1),
        _fact("receipt_shop", receipt.shop, "shop"),
        _fact("receipt_most", by_price[-1][0], by_price[-1][0], choices=len(names)),
        _fact("receipt_least", by_price[0][0], by_price[0][0], choices=len(names)),
        Fact(task="read_receipt", answer=receipt.text(), about=frozenset({"all"})),
    ]
    for position, (name, price) in enumerate(receipt.items):
        facts.append(_fact("receipt_price", amount(price), name, spoken(rng, name)))
        facts.append(_fact("receipt_item", name, name, amount(price), choices=len(names)))
        ordinals = [_ORDINALS[position]] + (["last"] if name == names[-1] else [])
        facts.append(_fact("receipt_nth", name, name, rng.choice(ordinals), choices=len(names)))
    facts.append(_sample_presence(rng, names))
    optional = {
        "receipt_date": receipt.date,
        "receipt_time": receipt.time,
        "receipt_tax": amount(receipt.tax) if receipt.tax else "",
        "receipt_paid": amount(receipt.paid) if receipt.paid else "",
        "receipt_change": amount(receipt.paid - receipt.total) if receipt.paid else "",
    }
    return (*facts, *(_fact(task, text, task) for task, text in optional.items() if text))


def _sample_presence(rng: Random, names: Sequence[str]) -> Fact:
    """Ask for an item that is on the receipt, or for another one, equally often."""
    name = rng.choice(names)
    is_present = rng.random() < 0.5
    listed = {one.lower().split()[-1] for one in names}
    while not is_present and (name := sample_good(rng)).split()[-1] in listed:
        pass
    return _fact("receipt_has", "yes" if is_present else "no", name, spoken(rng, name), choices=2)


def _fact(task: str, answer: str, about: str, *fields: str, choices: int = 0) -> Fact:
    return Fact(task=task, answer=answer, fields=fields, about=frozenset({about}), choices=choices)
