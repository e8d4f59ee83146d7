"""Accessibility (axe), keyboard, narrow screens, colors, and how fast the page is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    EXAMPLES,
    LOCATE,
    PHONE,
    PageOpener,
    ask,
    attach,
    expect,
    expect_value,
    first_held,
    hold,
    last_answer,
    problems_of,
)
from tests.server.page.test_media import write_animation

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

pytestmark = needs_chromium


def violations(page: Page) -> list[str]:
    """Return what axe finds, of any severity."""
    from axe_playwright_python.sync_playwright import Axe

    result: dict[str, Any] = Axe().run(page).response
    assert len(result["passes"]) > 10, "axe has checked nothing"
    found: list[dict[str, Any]] = result["violations"]
    return [
        f"{one['impact']}: {one['id']}: {node['html'][:200]}"
        for one in found
        for node in one["nodes"]
    ]


@pytest.mark.parametrize(("screen", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_axe(open_page: PageOpener, tmp_path: Path, screen: str, scheme: str) -> None:
    options = PHONE if screen == "phone" else {}
    page = open_page(**options, color_scheme=scheme, reduced_motion="reduce")
    found = {"empty": violations(page)}
    attach(page, EXAMPLES / "boxes.png", EXAMPLES / "text.png")
    found["attachments"] = violations(page)
    ask(page, "Show me where the blue cross is.")
    ask(page, "Which one begins to move first?", write_animation(tmp_path / "a.gif"))
    page.route("**/v1/chat/completions", lambda r: r.abort())
    ask(page, "What now?")
    page.locator(".question").first.hover()
    found["messages"] = violations(page)
    page.get_by_label("Edit the question").first.click()
    page.locator("#editing").wait_for()
    found["edit"] = violations(page)
    page.keyboard.press("Escape")
    if screen == "phone":
        page.click("#menu")
    page.get_by_label("Options of the conversation").first.click()
    page.locator("#conversation-menu").wait_for()
    found["options"] = violations(page)
    page.get_by_text("Rename").click()
    field = page.get_by_label("Title of the conversation")
    field.wait_for()
    found["rename"] = violations(page)
    page.keyboard.press("Escape")
    field.wait_for(state="detached")
    if screen == "phone":
        page.keyboard.press("Escape")
        page.locator("#sidebar").wait_for(state="hidden")
    for button, dialog in [("#settings", "settings-dialog"), (CODE, "code-dialog")]:
        page.locator(button).first.click()
        page.locator(f"#{dialog}[open]").wait_for()
        found[dialog] = violations(page)
        page.locator(f"#{dialog} [data-close]").click()
    if screen == "phone":
        page.click("#menu")
        page.locator("#sidebar").wait_for()
        found["menu"] = violations(page)
    page.get_by_label("Options of the conversation").first.click()
    page.get_by_text("Delete", exact=True).click()
    page.locator("#notice").wait_for()
    found["notice"] = violations(page)
    assert found == {name: [] for name in found}
    problems_of(page)


CODE = "[aria-label^='Show the request']"


def test_the_keyboard_reaches_everything(page: Page) -> None:
    ask(page, "Show me where the blue cross is.", EXAMPLES / "boxes.png")
    page.evaluate("document.activeElement.blur()")
    reached: set[str] = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(NAME_OF_FOCUS))
    for name in (
        *("Skip to the question", "New conversation", "Settings", "Enlarge boxes.png"),
        *("Edit the question", "blue cross", "Copy the coordinates of blue cross", "Question"),
        *("Generate the answer again", "Choose pictures or videos", "Take a picture"),
    ):
        assert name in reached, (name, reached)
    assert any(name.startswith("blue cross: ") for name in reached)  # the box itself
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#empty")).to_be_visible()
    expect_value(page, f"({NAME_OF_FOCUS})()", "Question")


NAME_OF_FOCUS = """() => document.activeElement.getAttribute("aria-label")
    ?? document.activeElement.textContent.trim()"""


def test_a_narrow_screen(open_page: PageOpener, tmp_path: Path) -> None:
    page = open_page(**PHONE)
    ask(page, "Show me where the blue cross is.", EXAMPLES / "boxes.png")
    ask(page, "Which one begins to move first?", write_animation(tmp_path / "a.gif"))
    expect_value(page, "[...document.images].every((one) => one.complete)")
    expect_value(page, "document.documentElement.scrollWidth", 390)
    expect_value(page, "document.getElementById('scroll').scrollWidth <= 390")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#menu")
    page.locator(".conversation").wait_for()
    expect_value(page, "document.activeElement.id", "new")
    page.keyboard.press("Escape")
    page.locator("#sidebar").wait_for(state="hidden")
    expect_value(page, "document.activeElement.id", "menu")
    small = page.evaluate(
        """() => [...document.querySelectorAll("button")].filter((one) => one.offsetParent
        && !one.classList.contains("phrase")).map((one) => one.getBoundingClientRect())
        .filter((box) => box.width < 24 || box.height < 24).length"""
    )
    assert small == 0


def test_colors_follow_the_system_and_the_setting(open_page: PageOpener) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (open_page(color_scheme=one) for one in ("light", "dark"))
    shades = [page.evaluate(background) for page in (light, dark)]
    assert shades[0] != shades[1]
    light.click("#settings")
    light.select_option("#theme", "dark")
    expect_value(light, background, shades[1])
    dark.click("#settings")
    dark.select_option("#theme", "light")
    expect_value(dark, background, shades[0])


def test_the_page_is_drawn_before_its_scripts_have_come(page: Page) -> None:
    held = hold(page, "**/page/js/main.js")
    page.reload(wait_until="commit")
    script = first_held(page, held)
    expect_value(page, "performance.getEntriesByName('first-contentful-paint').length", 1)
    expect(page.locator("#empty")).to_be_visible()
    script.continue_()
    page.locator("body.ready").wait_for()


def test_events_are_told_to_screen_readers(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    expect(page.locator("#announcer")).to_have_text("Answer: Tea 3.50")
    expect(page.locator("#announcer")).to_have_attribute("role", "status")
    page.click("#new")
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    pixels = last_answer(page).locator(".rows code").inner_text()
    said = f"Answer: blue cross. blue cross: box {pixels}"
    expect(page.locator("#announcer")).to_have_text(said)
    expect(page.locator("#messages h2")).to_have_text(["You", "Answer of nano"])
