"""The list of conversations: rename, search, save as a file, delete and undo; the settings."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    LOCATE,
    ask,
    choose,
    finish,
    last_answer,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

COUNT = """() => new Promise((resolve) => {
    indexedDB.open("qwen2vl").onsuccess = ({ target: { result } }) => {
        const names = ["conversations", "media"];
        const transaction = result.transaction(names);
        const counts = names.map((name) => transaction.objectStore(name).count());
        transaction.oncomplete = () => {
            result.close();
            resolve(counts.map((one) => one.result));
        };
    };
})"""
FOCUS = "document.activeElement.textContent.trim()"


def ask_quickly(page: Page, *questions: str) -> None:
    """Ask each question in a conversation of its own."""
    page.route(CHAT, finish)
    for question in questions:
        page.click("#new")
        ask(page, question)
        page.locator(".conversation[aria-current] .name", has_text=question).wait_for()


def titles(page: Page) -> list[str]:
    return page.locator(".conversation .name").all_inner_texts()


# Delete and undo ----------------------------------------------------------------------------------


def test_a_deleted_conversation_can_be_restored(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    page.locator(".conversation").focus()
    page.keyboard.press("Delete")
    page.locator("#notice", has_text="“What does it say?” is deleted.").wait_for()
    page.locator("#no-conversations").wait_for()
    assert page.locator("#empty").is_visible()
    assert "is deleted. Undo" in page.locator("#announcer").inner_text()
    assert page.evaluate(FOCUS) == "Undo"
    page.keyboard.press("Enter")
    page.locator(".conversation").wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"
    assert page.evaluate("document.querySelector('.question img').naturalWidth") > 0
    assert page.locator("#notice").is_hidden()
    assert ask(page, "Hi")  # it is stored again
    page.reload()
    page.locator(".answer").nth(1).wait_for()


def test_a_deletion_is_final_when_its_notice_goes(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    page.locator(".conversation").wait_for()
    # Saved: the list, which is drawn again then, closes an open menu.
    page.wait_for_function(f"async () => String(await ({COUNT})()) === '1,1'")
    page.clock.install()
    choose(page, "What does it say?", "Delete")
    page.locator("#notice").wait_for()
    assert page.evaluate(COUNT) == [1, 1]
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    page.clock.run_for(10_000)
    page.locator("#notice").wait_for(state="hidden")
    page.wait_for_function(f"async () => String(await ({COUNT})()) === '0,0'")


def test_delete_all_asks_before(page: Page) -> None:
    ask_quickly(page, "One")
    page.click("#settings")
    page.click("#delete-all")
    text = page.locator("#delete-all-confirm").inner_text()
    assert text.startswith("Delete all conversations, pictures and videos in this browser?")
    assert page.evaluate(FOCUS) == "Delete all"
    assert page.evaluate(COUNT) == [1, 0]
    page.keyboard.press("Enter")
    page.wait_for_function(f"async () => String(await ({COUNT})()) === '0,0'")


# Names --------------------------------------------------------------------------------------------


def test_conversations_are_renamed(page: Page) -> None:
    ask_quickly(page, "First", "Second")
    page.locator(".conversation", has_text="First").focus()
    page.keyboard.press("F2")
    field = page.get_by_label("Title of the conversation")
    assert field.input_value() == "First"
    field.fill("Receipts")
    field.press("Enter")
    page.locator(".conversation", has_text="Receipts").wait_for()
    assert titles(page) == ["Second", "Receipts"]
    page.locator(".conversation", has_text="Receipts").dblclick()
    field.fill("Bills")
    field.press("Escape")
    field.wait_for(state="detached")
    assert titles(page) == ["Second", "Receipts"]
    choose(page, "Receipts", "Rename")
    field.fill("Bills")
    page.locator("#question").click()  # leaving the field takes it, too
    page.locator(".conversation", has_text="Bills").wait_for()
    assert page.locator("#title").inner_text() == "Bills"
    page.get_by_label("Edit the question").click()
    page.fill("#question", "Changed")
    page.keyboard.press("Enter")
    page.locator(".question .line .text", has_text="Changed").wait_for()
    page.locator(".answer .actions").wait_for()
    page.reload()
    page.locator(".answer").wait_for()
    assert page.locator("#title").inner_text() == "Bills"  # an edit keeps a name that was given


def test_conversations_of_the_same_title_have_their_time(page: Page) -> None:
    ask_quickly(page, "Same", "Other")
    assert page.locator(".conversation .date").count() == 0
    page.click("#new")
    ask(page, "Same")
    page.locator(".conversation .date").nth(1).wait_for()
    assert page.locator(".conversation .date").count() == 2
    name = page.locator(".conversation .name").nth(1)
    box = name.bounding_box()
    assert box and box["width"] > 200  # no space is kept for a button that is hidden


def test_many_conversations_can_be_searched(page: Page) -> None:
    ask_quickly(page, *(f"Question {i}" for i in range(8)))
    assert page.locator("#search").is_hidden()
    ask_quickly(page, "About Apples")
    page.locator("#search").wait_for()
    page.fill("#search", "apples")
    assert titles(page) == ["About Apples"]
    page.fill("#search", "OK")  # of the answers
    assert len(titles(page)) == 9
    page.fill("#search", "nothing of this")
    assert page.locator("#none-found").is_visible()


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
        assert page.input_value(f"#{field}") == value  # as it was written
        assert page.get_attribute(f"#{field}", "aria-invalid") == str(is_wrong).lower()
        assert page.evaluate(stored) == (float(valid) if value else None)
    assert page.locator(f"#{field}-range").inner_text().endswith(", or empty")
