"""Boxes of answers: where they are drawn, what they are linked to, how they are copied."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.requirements import needs_chromium
from tests.server.conftest import LiveServer
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    LOCATE,
    PageOpener,
    ask,
    ask_api,
    event,
    expect,
    expect_value,
    last_answer,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = needs_chromium


def test_a_box_is_drawn_where_the_model_has_it(page: Page, live_server: LiveServer) -> None:
    assert ask(page, LOCATE, EXAMPLES / "boxes.png") == "blue cross"
    message = ask_api(live_server, LOCATE, EXAMPLES / "boxes.png")
    (shape,) = message["grounding"]
    x1, y1, x2, y2 = shape["pixels"][0]["coordinates"]
    line = last_answer(page).locator("rect.line")
    drawn = [float(line.get_attribute(name) or "") for name in ("x", "y", "width", "height")]
    assert drawn == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.02)
    shown = last_answer(page).locator(".rows code").inner_text()
    assert shown == ", ".join(str(round(number)) for number in (x1, y1, x2, y2))
    # On the screen, the drawing covers the picture.
    expect_value(page, "document.querySelector('.canvas img').naturalWidth > 0")
    picture, overlay = page.evaluate(PLACES)
    assert picture == pytest.approx(overlay, abs=0.5)
    assert picture["width"] / picture["height"] == pytest.approx(195 / 155, rel=0.01)


# Both at once: the page may scroll in between.
PLACES = """() => ["img", "svg"].map((tag) => {
    const place = document.querySelector(`.canvas ${tag}`).getBoundingClientRect();
    return { x: place.x, y: place.y, width: place.width, height: place.height };
})"""


def test_a_phrase_its_box_and_its_row_are_linked(page: Page) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    answer = last_answer(page)
    parts = [answer.locator(name) for name in (".phrase", ".mark", ".rows li")]

    expect_value(page, "[...document.images].every((one) => one.complete)")  # nothing moves then
    for part in parts:
        part.hover()
        expect_active(parts)
        page.mouse.move(0, 0)
        expect_inactive(parts)
    for part in (parts[0], parts[1], answer.locator(".rows button")):
        part.focus()
        expect_active(parts)
        part.blur()
        expect_inactive(parts)


ACTIVE = re.compile(r"(^|\s)active(\s|$)")


def expect_active(parts: list[Locator]) -> None:
    for part in parts:
        expect(part).to_have_class(ACTIVE)


def expect_inactive(parts: list[Locator]) -> None:
    for part in parts:
        expect(part).not_to_have_class(ACTIVE)


def test_coordinates_and_answers_are_copied(open_page: PageOpener) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    read = "navigator.clipboard.readText()"
    page.get_by_label("Copy the coordinates of blue cross").click()
    page.wait_for_function(f"() => {read}.then((text) => text.startsWith('['))")
    coordinates = json.loads(page.evaluate(read))
    assert [round(one) for one in coordinates] == [
        int(one) for one in last_answer(page).locator(".rows code").inner_text().split(", ")
    ]
    page.get_by_label("Copy the answer").click()
    page.wait_for_function(f"() => {read}.then((text) => text === 'blue cross')")


def shape(kind: str, label: str | None, *numbers: int) -> dict[str, Any]:
    pixels = [
        {"param": f"messages[0].content[{index}]", "coordinates": [n * scale for n in numbers]}
        for index, scale in enumerate((0.5, 2.0))
    ]
    return {"type": kind, "label": label, "normalized": list(numbers), "pixels": pixels}


def test_all_kinds_of_shapes_on_two_pictures(open_page: PageOpener) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    shapes = [
        shape("box", "cats", 10, 20, 300, 400),
        shape("box", "cats", 500, 20, 700, 400),
        shape("point", "the **nose**", 500, 600),
        shape("quad", None, 1, 2, 900, 4, 900, 900, 1, 800),
    ]
    text = (
        "1. Two cats(10,20),(300,400)(500,20),(700,400)\n"
        "2. the nose(500,600) and (1,2),(900,4),(900,900),(1,800)."
    )
    body = event({"content": text}) + event({"grounding": shapes}, "stop") + "data: [DONE]\n\n"
    page.route(CHAT, lambda r: r.fulfill(status=200, body=body))
    ask(page, "Where?", EXAMPLES / "shapes.png", EXAMPLES / "boxes.png")
    expect(page.locator(".answer .text li")).to_have_text(
        ["Two cats", "the nose point 3 and quad 4."]
    )
    expect(page.locator(".phrase").first).to_have_attribute("data-shapes", "0 1")
    expect(page.locator(".canvas")).to_have_count(2)
    for tag, number in [("rect", 4), ("circle", 2), ("polygon", 2)]:
        expect(page.locator(f".canvas {tag}.line")).to_have_count(number)
    expect(page.locator("figcaption")).to_contain_text("picture 1 as sent")
    page.get_by_text("Copy all as JSON").click()
    read = "navigator.clipboard.readText()"
    page.wait_for_function(f"() => {read}.then((text) => text.startsWith('['))")
    copied = json.loads(page.evaluate(read))
    assert copied[2] == {
        "type": "point",
        "label": "the **nose**",
        "pictures": [
            {"name": "shapes.png", "coordinates": [250, 300]},
            {"name": "boxes.png", "coordinates": [1000, 1200]},
        ],
    }
