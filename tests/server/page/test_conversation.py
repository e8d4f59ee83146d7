"""Conversations on the page, with nano: ask, stop, ask again, edit, reload, delete, keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.requirements import needs_chromium
from tests.server.conftest import LiveServer
from tests.server.page.conftest import (
    COUNT,
    EXAMPLES,
    LOCATE,
    ask,
    ask_api,
    attach,
    choose,
    edit,
    encode,
    expect,
    expect_stored,
    expect_value,
    last_answer,
    requests_of,
    wait_for_pending,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium


def test_examples_are_answered(page: Page, live_server: LiveServer) -> None:
    expected = {"What does it say?": "Tea 3.50", "How many items are in the picture?": "5"}
    for number, button in enumerate(page.locator(".example").all(), start=1):
        question = button.inner_text().strip()
        page.click("#new")
        button.click()
        page.locator("#attachments li").wait_for()
        expect(page.locator("#question")).to_have_value(question)
        page.click("#send")
        last_answer(page).locator(".actions").wait_for()
        expect(last_answer(page).locator(".text")).to_have_text(
            expected.get(question, "blue cross")
        )
        expect(page.locator("#conversations li")).to_have_count(number)


def test_two_pictures_keep_their_order(page: Page, live_server: LiveServer) -> None:
    files = [EXAMPLES / "shapes.png", EXAMPLES / "text.png"]
    attach(page, *files)
    expect(page.locator("#attachments .order")).to_have_text(["1", "2"])
    page.get_by_label("Move text.png to the left").click()
    bodies = requests_of(page)
    answer = ask(page, "What does the first picture say?")
    assert (
        answer
        == ask_api(live_server, "What does the first picture say?", *reversed(files))["content"]
    )
    (body,) = bodies
    sent = [item["image_url"]["url"] for item in body["messages"][0]["content"][:2]]
    assert sent == [f"data:image/png;base64,{encode(file)}" for file in reversed(files)]
    expect(page.locator(".question .number")).to_have_text(["1", "2"])


def test_a_reload_brings_the_conversation_back(page: Page) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    ask(page, "And the orange shape?")
    texts = page.locator(".answer .text").all_inner_texts()
    page.locator("#conversations [aria-current]").wait_for()
    page.reload()
    expect(page.locator(".answer .text")).to_have_text(texts)
    page.locator(".mark").first.wait_for()
    expect_value(page, "document.querySelector('.question img').naturalWidth", 195)
    page.click("#new")
    expect(page.locator("#empty")).to_be_visible()
    page.locator(".conversation").click()
    page.locator(".answer").nth(1).wait_for()
    choose(page, LOCATE, "Delete")
    page.locator("#notice").wait_for()  # the deletion is stored
    page.reload()
    page.locator("body.ready").wait_for()
    page.evaluate(COUNT)  # the page has asked for the list before this does
    expect(page.locator(".conversation")).to_have_count(0)
    expect(page.locator(".answer")).to_have_count(0)


def test_an_edited_question_is_asked_again(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    ask(page, "Really?")
    edit(page)
    expect(page.locator("#question")).to_have_value("What does it say?")
    expect(page.locator(".replaced")).to_have_count(3)  # what follows it
    page.fill("#question", "Can you read this?")
    page.keyboard.press("Enter")
    page.locator("#editing").wait_for(state="hidden")
    expect(page.locator(".question .line .text")).to_have_text(["Can you read this?"])
    page.locator(".answer .actions").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")
    bodies = requests_of(page)
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .actions").wait_for()
    expect(page.locator(".answer .text")).to_have_text(["Tea 3.50"])
    assert len(bodies) == 1


def test_an_edit_changes_the_pictures_or_nothing(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "boxes.png")
    ask(page, "And?")
    edit(page)
    page.keyboard.press("Enter")
    page.locator("#editing").wait_for(state="hidden")
    expect(page.locator(".question")).to_have_count(2)
    edit(page)
    page.get_by_label("Remove boxes.png").click()
    attach(page, EXAMPLES / "text.png")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.locator("[aria-label='Enlarge text.png']").wait_for()
    page.locator(".answer .actions").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")
    expect(page.locator(".question")).to_have_count(1)


@contextmanager
def slow_network(page: Page, bytes_per_second: float) -> Iterator[None]:
    """Slow what the page receives down."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    options = {"offline": False, "latency": 20, "uploadThroughput": -1}
    session.send(
        "Network.emulateNetworkConditions", {**options, "downloadThroughput": bytes_per_second}
    )
    yield
    session.detach()


def test_a_slow_answer_is_shown_as_it_comes_and_can_be_stopped(page: Page) -> None:
    attach(page, EXAMPLES / "boxes.png")
    with slow_network(page, 400):
        page.fill("#question", LOCATE)
        page.keyboard.press("Enter")
        page.locator("#send").wait_for(state="hidden")
        page.locator(".waiting").wait_for()
        page.locator(".answer[aria-busy] .text p", has_text=re.compile("^b")).wait_for()
        page.click("#stop")
        last_answer(page).locator(".actions").wait_for()
    expect(last_answer(page).locator("> .note")).to_have_text("Stopped.")
    text = last_answer(page).locator(".text").inner_text()
    assert text and "blue cross(".startswith(text[:11])
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .shapes").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("blue cross")
    expect(page.locator("#send")).to_be_visible()


def test_what_is_deleted_stays_deleted(page: Page) -> None:
    with slow_network(page, 300):
        page.fill("#question", "Hi")
        page.keyboard.press("Enter")
        page.locator(".conversation").wait_for()
        choose(page, "Hi", "Delete")
        page.locator("#no-conversations").wait_for()
    ask(page, "What is 2 + 2?")
    page.locator(".conversation").wait_for()
    page.click("#settings")
    page.click("#delete-all")
    page.click("#delete-all-now")
    expect_stored(page, 0, 0)
    page.reload()
    page.locator("body.ready").wait_for()
    expect_stored(page, 0, 0)  # the page has asked for the list before this does
    expect(page.locator(".conversation")).to_have_count(0)
    expect_value(page, "indexedDB.databases().then((all) => all.length)", 1)


def test_nothing_is_sent_before_there_is_a_question(page: Page) -> None:
    expect(page.locator("#send")).to_be_disabled()
    page.focus("#question")
    page.keyboard.press("Enter")
    page.fill("#question", "  ")
    page.keyboard.press("Enter")
    wait_for_pending(page)
    expect(page.locator(".question")).to_have_count(0)
    page.fill("#question", "two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    expect(page.locator("#question")).to_have_value("two\nlines")
