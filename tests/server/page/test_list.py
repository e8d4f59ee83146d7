"""The list of conversations: rename, search, save as a file, delete and undo; the settings."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    COUNT,
    EXAMPLES,
    LOCATE,
    ask,
    choose,
    expect,
    expect_stored,
    expect_value,
    finish,
    first_held,
    hold,
    last_answer,
    send,
    stop_clock,
    wait_until_stored,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

FOCUS = "document.activeElement.textContent.trim()"


def ask_quickly(page: Page, *questions: str) -> None:
    """Ask each question in a conversation of its own."""
    page.route(CHAT, finish)
    for question in questions:
        page.click("#new")
        ask(page, question)
        page.locator(".conversation[aria-current] .name", has_text=question).wait_for()


def expect_titles(page: Page, *titles: str) -> None:
    """Wait until these conversations are listed, in this order."""
    expect(page.locator(".conversation .name")).to_have_text(list(titles))


# Delete and undo ----------------------------------------------------------------------------------


def test_a_deleted_conversation_can_be_restored(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    page.locator(".conversation").focus()
    for _ in range(2):  # the second time, there is nothing left to delete
        page.keyboard.press("Delete")
    page.locator("#notice", has_text="“What does it say?” is deleted.").wait_for()
    page.locator("#no-conversations").wait_for()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#announcer")).to_contain_text("is deleted. Undo")
    expect_value(page, FOCUS, "Undo")
    page.keyboard.press("Enter")
    page.locator(".conversation").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")
    expect_value(page, "document.querySelector('.question img').naturalWidth > 0")
    expect(page.locator("#notice")).to_be_hidden()
    assert ask(page, "Hi")  # it is stored again
    page.reload()
    expect(page.locator(".answer .actions")).to_have_count(2)


def test_a_deletion_is_final_when_its_notice_goes(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    page.locator(".conversation").wait_for()
    stop_clock(page)
    choose(page, "What does it say?", "Delete")
    page.locator("#notice").wait_for()
    assert page.evaluate(COUNT) == [1, 1]
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.clock.run_for(10_000)
    page.locator("#notice").wait_for(state="hidden")
    expect_stored(page, 0, 0)


def test_delete_all_asks_before(page: Page) -> None:
    ask_quickly(page, "One")
    page.click("#settings")
    page.click("#delete-all")
    expect(page.locator("#delete-all-confirm")).to_be_visible()
    expect(page.locator("#delete-all-confirm")).to_contain_text(
        "Delete all conversations, pictures and videos in this browser?"
    )
    expect_value(page, FOCUS, "Delete all")
    assert page.evaluate(COUNT) == [1, 0]
    page.keyboard.press("Enter")
    expect_stored(page, 0, 0)


# Names --------------------------------------------------------------------------------------------


def test_conversations_are_renamed(page: Page) -> None:
    ask_quickly(page, "First", "Second")
    page.locator(".conversation", has_text="First").focus()
    page.keyboard.press("F2")
    field = page.get_by_label("Title of the conversation")
    expect(field).to_have_value("First")
    field.fill("Receipts")
    field.press("Enter")
    expect_titles(page, "Second", "Receipts")
    expect_value(page, "document.activeElement.title", "Receipts")
    page.locator(".conversation", has_text="Receipts").dblclick()
    field.fill("Bills")
    field.press("Escape")
    field.wait_for(state="detached")
    expect_titles(page, "Second", "Receipts")
    choose(page, "Receipts", "Rename")
    field.fill("Bills")
    page.locator("#question").click()  # leaving the field takes it, too
    expect_titles(page, "Second", "Bills")
    expect(page.locator("#title")).to_have_text("Bills")
    page.get_by_label("Edit the question").click()
    page.fill("#question", "Changed")
    page.keyboard.press("Enter")
    page.locator(".question .line .text", has_text="Changed").wait_for()
    page.locator(".answer .actions").wait_for()
    wait_until_stored(page)
    page.reload()
    page.locator(".question .line .text", has_text="Changed").wait_for()
    expect(page.locator("#title")).to_have_text("Bills")  # an edit keeps a name that was given


def test_conversations_of_the_same_title_have_their_time(page: Page) -> None:
    ask_quickly(page, "Same", "Other")
    expect(page.locator(".conversation .date")).to_have_count(0)
    page.click("#new")
    ask(page, "Same")
    expect(page.locator(".conversation .date")).to_have_count(2)
    # No space is kept for a button that is hidden.
    width = "document.querySelectorAll('.conversation .name')[1].getBoundingClientRect().width"
    expect_value(page, f"{width} > 200")


def test_many_conversations_can_be_searched(page: Page) -> None:
    ask_quickly(page, *(f"Question {i}" for i in range(8)))
    expect(page.locator("#search")).to_be_hidden()
    ask_quickly(page, "About Apples")
    page.locator("#search").wait_for()
    page.fill("#search", "apples")
    expect_titles(page, "About Apples")
    page.fill("#search", "OK")  # of the answers
    expect_titles(page, "About Apples", *(f"Question {i}" for i in reversed(range(8))))
    page.fill("#search", "nothing of this")
    expect(page.locator("#none-found")).to_be_visible()
    expect_titles(page)


def test_no_click_is_lost_when_the_list_is_drawn_again(page: Page) -> None:
    ask_quickly(page, "First")
    page.unroute(CHAT)
    held = hold(page, CHAT)
    page.click("#new")
    send(page, "Second")
    page.locator(".conversation .running").wait_for()
    page.get_by_label("Options of the conversation First").hover()
    page.mouse.down()
    finish(first_held(page, held))
    page.locator(".conversation:not(:has(.running))", has_text="Second").wait_for()
    page.mouse.up()
    page.locator("#conversation-menu").wait_for()
    page.keyboard.press("Escape")
    expect_value(page, "document.activeElement.ariaLabel", "Options of the conversation First")


# Files --------------------------------------------------------------------------------------------


def test_a_conversation_is_saved_as_a_file(page: Page, tmp_path: Path) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    shown = last_answer(page).locator(".rows code").inner_text()
    page.locator(".conversation").wait_for()

    def save(choice: str, name: str) -> str:
        with page.expect_download() as download:
            choose(page, LOCATE, choice)
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        return (tmp_path / name).read_text(encoding="utf-8")

    assert save("Save as Markdown", "Show me where the blue cross is.md") == (
        f"# {LOCATE}\n\n## Question\n\n- file 1: boxes.png\n\n{LOCATE}\n\n"
        f"## Answer of nano\n\nblue cross\n\n- blue cross: box {shown}\n"
    )
    saved = json.loads(save("Save as JSON", "Show me where the blue cross is.json"))
    question, answer = saved["messages"]
    (file,) = question["files"]
    assert (file["name"], file["width"], file["height"]) == ("boxes.png", 195, 155)
    data = base64.b64decode(file["url"].removeprefix("data:image/png;base64,"))
    assert data == (EXAMPLES / "boxes.png").read_bytes()
    assert answer["text"] == "blue cross"
    assert answer["grounding"][0]["label"] == "blue cross"


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "wrong", "valid"),
    [("max-tokens", ["0", "-5", "1.5"], "20"), ("temperature", ["-1", "3"], "0.25")],
)
def test_settings_out_of_range_change_nothing(
    page: Page, field: str, wrong: list[str], valid: str
) -> None:
    page.click("#settings")
    key = {"max-tokens": "maxTokens", "temperature": "temperature"}[field]
    stored = f"JSON.parse(localStorage['qwen2vl.settings'] ?? '{{}}').{key}"
    for value, is_wrong in [(valid, False), *((one, True) for one in wrong), ("", False)]:
        page.fill(f"#{field}", value)
        page.keyboard.press("Tab")
        expect(page.locator(f"#{field}")).to_have_value(value)  # as it was written
        expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", str(is_wrong).lower())
        expect_value(page, stored, float(valid) if value else None)
    expect(page.locator(f"#{field}-range")).to_have_text(re.compile(", or empty$"))
