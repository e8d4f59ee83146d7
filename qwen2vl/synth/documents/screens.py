"""Simple windows: a title bar, text fields, checkboxes, a progress bar and buttons.

Elements are named by their label and kind ("Save button", "Sound checkbox"), so that a question can
ask for the box of one. Labels of a window differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from qwen2vl.synth.colors import contrast, sample_color
from qwen2vl.synth.compositing.layers import Layer, Rect
from qwen2vl.synth.documents.layout import (
    DocumentSample,
    Fact,
    Sheet,
    Style,
    distinct_colors,
    draw_frame,
    largest_width,
    mix_colors,
    place_sheet,
    sample_budget,
    sample_style,
    text_width,
    write,
)
from qwen2vl.synth.documents.vocabulary import load_word_lists, sample_entry, spoken
from qwen2vl.synth.spec import RGB, Box, Mixture

__all__ = ["Window", "sample_screen"]

_ATTEMPTS = 7
_NUM_BUTTONS = (1, 3)
_COLORED_SHARE = 0.4  # of the windows have buttons in named colors
_WRITTEN_SHARE = 0.5  # of the progress bars have their value beside them
_CLOSE_SHARE = 0.6  # of the windows have a button in the title bar that closes them
_BAR_WIDTH = 6.0  # of a progress bar, in text sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a window contains."""

    title: str
    buttons: tuple[str, ...]
    colors: tuple[str, ...] = ()  # of the buttons; empty: all look alike
    fields: tuple[tuple[str, str], ...] = ()  # label, text
    checks: tuple[tuple[str, bool], ...] = ()  # label, whether it is checked
    bar: str = ""  # label of the progress bar; empty: there is none
    percent: int = 0
    is_percent_written: bool = False


class _Drawing:
    """Draws the elements of a window from top to bottom, and records their boxes."""

    def __init__(self, rng: Random, style: Style, window: Window) -> None:
        self.style = style
        self.window = window
        self.layers: list[Layer] = []
        self.boxes: dict[str, Box] = {}  # name of an element -> box
        self.row = style.pixels(rng.uniform(1.4, 1.7))
        self.pad = style.pixels(rng.uniform(0.5, 1.1))
        self.mark = rng.choice(("cross", "square", "tick"))
        self.bar_rgb = sample_color(rng, rng.choice(("green", "blue", "blue", "orange", "purple")))
        self.button_rgbs = [sample_color(rng, name) for name in window.colors]
        self.button_shade = self.shade(rng.choice((0.0, 0.08, 0.15)))
        self.button_align = rng.choice(("left", "right", "center"))
        self.title_rgb = self._sample_title_color(rng)
        self.title_align = rng.choice(("left", "left", "center"))
        self.has_close = rng.random() < _CLOSE_SHARE and "Close" not in window.buttons
        self.y = self.row + self.pad
        self.width = self._measure()

    def shade(self, share: float) -> RGB:
        return mix_colors(self.style.paper, self.style.ink, share)

    def draw(self) -> None:
        """Draw the window from (0, 0) to (width, y)."""
        window = self.window
        self._draw_title()
        for label, text in window.fields:
            self._draw_field(label, text)
        for label, is_checked in window.checks:
            self._draw_check(label, is_checked=is_checked)
        if window.bar:
            self._draw_bar()
        self._draw_buttons()
        self.layers += draw_frame((0, 0, self.width, self.y), self.shade(0.5))

    def _sample_title_color(self, rng: Random) -> RGB:
        how = rng.randrange(3)
        if how == 0:
            return self.shade(0.15)
        if how == 1:
            return sample_color(rng, rng.choice(("blue", "purple", "teal", "brown")))
        return self.shade(0.75)

    def _text_width(self, text: str) -> int:
        return text_width(text, self.style.font, self.style.size)

    def _button_width(self, label: str) -> int:
        return self._text_width(label) + self.style.size

    def _label_width(self) -> int:
        """Return the width of the column of labels, with the gap after it."""
        window, style = self.window, self.style
        labels = [label for label, _ in window.fields] + ([window.bar] if window.bar else [])
        widest = largest_width(labels, style.font, style.size)
        return widest + style.pixels(0.6) if labels else 0

    def _measure(self) -> int:
        window, style = self.window, self.style
        texts = [self._text_width(text) for _, text in window.fields]
        percent = self._text_width("100%") + style.pixels(0.4) if window.is_percent_written else 0
        needed = [
            text_width(window.title, style.bold, style.size) + 2 * self.row,
            sum(self._button_width(label) for label in window.buttons)
            + (len(window.buttons) - 1) * (self.pad // 2),
            *(
                style.size + style.pixels(0.6) + self._text_width(label)
                for label, _ in window.checks
            ),
            *(self._label_width() + width + style.size for width in texts),
            self._label_width() + style.pixels(_BAR_WIDTH) + percent if window.bar else 0,
        ]
        return max(needed) + 2 * self.pad

    def _rect(self, box: Box, rgb: RGB) -> None:
        self.layers.append(Rect(rgb=rgb, box=box))

    def _write(self, text: str, box: Box, rgb: RGB, align: str = "left", font: str = "") -> None:
        style = self.style
        font = font or style.font
        self.layers.append(write(text, box, rgb, font=font, size=style.size, align=align))

    def _draw_title(self) -> None:
        self._rect((0, 0, self.width, self.row), self.title_rgb)
        ink = _readable(self.title_rgb)
        box = (self.pad, 0, self.width - self.pad, self.row)
        self._write(self.window.title, box, ink, self.title_align, self.style.bold)
        if self.has_close:
            side = self.row - 2 * (self.row // 6)
            x2, y1 = self.width - self.row // 6, self.row // 6
            close = (x2 - side, y1, x2, y1 + side)
            self.layers += draw_frame(close, ink)
            self._write("x", close, ink, "center")
            self.boxes["close button"] = close

    def _draw_field(self, label: str, text: str) -> None:
        top, bottom = self.y, self.y + self.row
        left = self.pad + self._label_width()
        box = (left, top, self.width - self.pad, bottom)
        self._write(label, (self.pad, top, left, bottom), self.style.ink)
        self._rect(box, self.shade(0.04))
        self.layers += draw_frame(box, self.shade(0.55))
        inner = (left + self.style.size // 2, top, box[2], bottom)
        self._write(text, inner, self.style.ink)
        self.boxes[f"{label} field"] = box
        self.y = bottom + max(3, self.pad // 2)

    def _draw_check(self, label: str, *, is_checked: bool) -> None:
        top, bottom, size = self.y, self.y + self.row, self.style.size
        y1 = top + (self.row - size) // 2
        box = (self.pad, y1, self.pad + size, y1 + size)
        self.layers += draw_frame(box, self.shade(0.8), max(1, size // 16))
        if is_checked:
            self.layers += _draw_mark(self.mark, box, self.style.ink)
        left = box[2] + self.style.pixels(0.5)
        self._write(label, (left, top, self.width, bottom), self.style.ink)
        self.boxes[f"{label} checkbox"] = box
        self.y = bottom + self.pad // 4

    def _draw_bar(self) -> None:
        window, style = self.window, self.style
        top, bottom = self.y, self.y + self.row
        left = self.pad + self._label_width()
        self._write(window.bar, (self.pad, top, left, bottom), style.ink)
        percent = f"{window.percent}%"
        right = left + style.pixels(_BAR_WIDTH)
        if window.is_percent_written:
            text_left = right + style.pixels(0.4)
            self._write(percent, (text_left, top, self.width, bottom), style.ink)
        thin = self.row // 5
        box = (left, top + thin, right, bottom - thin)
        self._rect(box, self.shade(0.12))
        done = left + round((right - left) * window.percent / 100)
        self._rect((left, box[1], done, box[3]), self.bar_rgb)
        self.layers += draw_frame(box, self.shade(0.6))
        self.boxes["progress bar"] = box
        self.y = bottom + max(3, self.pad // 2)

    def _draw_buttons(self) -> None:
        window, gap = self.window, self.pad // 2
        widths = [self._button_width(label) for label in window.buttons]
        free = self.width - 2 * self.pad - sum(widths) - gap * (len(widths) - 1)
        x = self.pad + {"left": 0, "center": free // 2, "right": free}[self.button_align]
        for number, (label, width) in enumerate(zip(window.buttons, widths, strict=True)):
            box = (x, self.y, x + width, self.y + self.row)
            rgb = self.button_rgbs[number] if self.button_rgbs else self.button_shade
            self._rect(box, rgb)
            self.layers += draw_frame(box, self.shade(0.6))
            ink = _readable(rgb) if self.button_rgbs else self.style.ink
            self._write(label, box, ink, "center")
            self.boxes[f"{label} button"] = box
            x += width + gap
        self.y += self.row + self.pad


def sample_screen(rng: Random, mixture: Mixture) -> DocumentSample | None:
    """Sample a window as a picture; None if the mixture's pictures are too small for it.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    budget = sample_budget(rng, mixture)
    for attempt in range(_ATTEMPTS):
        style = sample_style(rng, mixture, budget, attempt=attempt, light=0.75)
        window = _sample_content(rng, style, attempt)
        drawing = _Drawing(rng, style, window)
        drawing.draw()
        facts = _facts(rng, window, drawing.boxes)
        sheet = Sheet(
            width=drawing.width, height=drawing.y, layers=tuple(drawing.layers), facts=facts
        )
        if budget.admits(sheet):
            return place_sheet(rng, mixture, budget, style, sheet)
    return None


def _sample_content(rng: Random, style: Style, attempt: int) -> Window:
    lists = load_word_lists()
    title = rng.choice(lists["windows"])
    labels = [label for label in lists["buttons"] if label != title]
    buttons = rng.sample(labels, rng.randint(*_NUM_BUTTONS) if attempt < 3 else 1)
    kinds = ("field", "check", "bar")
    wanted = rng.sample(kinds, rng.choice((0, 1, 1, 2, 3) if attempt < 2 else (0, 1)))
    taken = {title, *buttons}

    def pick(use: str, count: int) -> list[str]:
        words = [word for word in lists[use] if word not in taken]
        picked = rng.sample(words, count)
        taken.update(picked)
        return picked

    fields = pick("fields", rng.choice((1, 1, 2))) if "field" in wanted else []
    checks = pick("checks", rng.choice((1, 1, 2, 3))) if "check" in wanted else []
    colors = [name for name in distinct_colors(style.paper) if name not in ("white", "black")]
    is_colored = rng.random() < _COLORED_SHARE
    return Window(
        title=title,
        buttons=tuple(buttons),
        colors=tuple(rng.sample(colors, len(buttons))) if is_colored else (),
        fields=tuple((label, sample_entry(rng)) for label in fields),
        checks=tuple((label, rng.random() < 0.5) for label in checks),
        bar=pick("bars", 1)[0] if "bar" in wanted else "",
        percent=10 * rng.randint(0, 10),
        is_percent_written=rng.random() < _WRITTEN_SHARE,
    )


def _readable(rgb: RGB) -> RGB:
    """Return black or white, whichever has more contrast to a color."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(black, rgb) > contrast(white, rgb) else white


def _draw_mark(mark: str, box: Box, rgb: RGB) -> list[Layer]:
    """Draw the mark of a checked box: diagonals, a filled square or a tick."""
    x1, y1, x2, _ = box
    side = x2 - x1
    inset = max(2, side // 5)
    if mark == "square":
        return [Rect(rgb=rgb, box=(x1 + inset, y1 + inset, x2 - inset, y1 + side - inset))]
    inner, thick = side - 2 * inset, max(2, side // 8)
    layers: list[Layer] = []
    for step in range(inner):
        heights = [step, inner - 1 - step]
        if mark == "tick":  # down to two thirds of the way, then up
            heights = [abs(step - inner // 3)]
            heights = [inner - 1 - heights[0]] if step >= inner // 3 else [inner * 2 // 3 + step]
        for height in heights:
            top = y1 + inset + min(inner - 1, height) - thick // 2
            left = x1 + inset + step
            layers.append(Rect(rgb=rgb, box=(left, top, left + 1, top + thick)))
    return layers


def _facts(rng: Random, window: Window, boxes: dict[str, Box]) -> tuple[Fact, ...]:
    buttons = window.buttons
    facts = [
        _fact("screen_title", window.title, "title"),
        _fact("screen_button_count", str(len(buttons)), "buttons", choices=_NUM_BUTTONS[1]),
        _fact("screen_buttons", ", ".join(buttons), "buttons"),
    ]
    for name, box in boxes.items():
        fact = Fact(
            task="screen_click", answer=name, fields=(name,), about=frozenset({name}), box=box
        )
        facts.append(fact)
    for label, color in zip(buttons, window.colors, strict=False):
        facts.append(_fact("screen_button_color", color, f"{label} color", spoken(rng, label)))
        if len(buttons) > 1:
            facts.append(
                _fact(
                    "screen_button_of_color", label, f"{label} color", color, choices=len(buttons)
                )
            )
    for label, text in window.fields:
        facts.append(_fact("screen_field", text, label, spoken(rng, label)))
    for label, is_checked in window.checks:
        answer = "yes" if is_checked else "no"
        facts.append(_fact("screen_checked", answer, label, spoken(rng, label), choices=2))
    if window.bar:
        facts.append(_fact("screen_progress", f"{window.percent}%", "bar", choices=11))
    return tuple(facts)


def _fact(task: str, answer: str, about: str, *fields: str, choices: int = 0) -> Fact:
    return Fact(task=task, answer=answer, fields=fields, about=frozenset({about}), choices=choices)
