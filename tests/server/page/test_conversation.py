"""Conversations on the page, with nano: ask, stop, ask again, edit, reload, delete, keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.requirements import needs_chromium
from tests.server.conftest import LiveServer
from tests.server.page.conftest import (
    EXAMPLES,
    LOCATE,
    ask,
    ask_api,
    attach,
    choose,
    edit,
    encode,
    last_answer,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium


def test_examples_are_answered(page: Page, live_server: LiveServer) -> None:
    expected = {"What does it say?": "Tea 3.50", "How many items are in the picture?": "5"}
    for number, button in enumerate(page.locator(".example").all()):
        question = button.inner_text().strip()
        page.click("#new")
        button.click()
        page.locator("#attachments li").wait_for()
        assert page.input_value("#question") == question
        page.click("#send")
        last_answer(page).locator(".actions").wait_for()
        text = last_answer(page).locator(".text").inner_text().strip()
        assert text == expected.get(question, "blue cross"), number
    page.locator("#conversations li").nth(2).wait_for()


def test_two_pictures_keep_their_order(page: Page, live_server: LiveServer) -> None:
    files = [EXAMPLES / "shapes.png", EXAMPLES / "text.png"]
    attach(page, *files)
    assert page.locator("#attachments .order").all_inner_texts() == ["1", "2"]
    page.get_by_label("Move text.png to the left").click()
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.method == "POST" else None)
    answer = ask(page, "What does the first picture say?")
    assert (
        answer
        == ask_api(live_server, "What does the first picture say?", *reversed(files))["content"]
    )
    (body,) = bodies
    sent = [item["image_url"]["url"] for item in body["messages"][0]["content"][:2]]
    assert sent == [f"data:image/png;base64,{encode(file)}" for file in reversed(files)]
    assert page.locator(".question .number").all_inner_texts() == ["1", "2"]


def test_a_reload_brings_the_conversation_back(page: Page) -> None:
    ask(page, LOCATE, EXAMPLES / "boxes.png")
    ask(page, "And the orange shape?")
    texts = page.locator(".answer .text").all_inner_texts()
    page.locator("#conversations [aria-current]").wait_for()
    page.reload()
    page.locator(".answer").nth(1).wait_for()
    assert page.locator(".answer .text").all_inner_texts() == texts
    assert page.locator(".mark").count() >= 1
    assert page.evaluate("document.querySelector('.question img').naturalWidth") == 195
    page.click("#new")
    assert page.locator("#empty").is_visible()
    page.locator(".conversation").click()
    page.locator(".answer").nth(1).wait_for()
    choose(page, LOCATE, "Delete")
    page.locator("#no-conversations").wait_for()
    page.reload()
    page.locator("#no-conversations").wait_for()
    assert page.locator(".answer").count() == 0


def test_an_edited_question_is_asked_again(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    ask(page, "Really?")
    edit(page)
    assert page.input_value("#question") == "What does it say?"
    assert page.locator(".replaced").count() == 3  # what follows it
    page.fill("#question", "Can you read this?")
    page.keyboard.press("Enter")
    page.locator("#editing").wait_for(state="hidden")
    page.locator(".answer .actions").wait_for()
    assert page.locator(".question .line .text").all_inner_texts() == ["Can you read this?"]
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .actions").wait_for()
    assert page.locator(".answer").count() == 1


def test_an_edit_changes_the_pictures_or_nothing(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "boxes.png")
    ask(page, "And?")
    edit(page)
    page.keyboard.press("Enter")
    page.locator("#editing").wait_for(state="hidden")
    assert page.locator(".question").count() == 2
    edit(page)
    page.get_by_label("Remove boxes.png").click()
    attach(page, EXAMPLES / "text.png")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.locator("[aria-label='Enlarge text.png']").wait_for()
    page.locator(".answer .actions").wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"
    assert page.locator(".question").count() == 1


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
    with slow_network(page, 1200):
        page.fill("#question", LOCATE)
        page.keyboard.press("Enter")
        page.locator("#send").wait_for(state="hidden")
        page.locator(".waiting").wait_for()
        last_answer(page).locator(".text p", has_text=re.compile("^b")).wait_for()
        assert last_answer(page).get_attribute("aria-busy") == "true"
        page.click("#stop")
        last_answer(page).locator(".actions").wait_for()
    assert last_answer(page).locator("> .note").inner_text() == "Stopped."
    text = last_answer(page).locator(".text").inner_text()
    assert text and "blue cross(".startswith(text[:11])
    page.get_by_label("Generate the answer again").click()
    page.locator(".answer .shapes").wait_for()
    assert last_answer(page).locator(".text").inner_text().strip() == "blue cross"
    assert page.locator("#send").is_visible()


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
    page.locator("#no-conversations").wait_for(state="attached")
    page.reload()
    page.locator("body.ready").wait_for()
    page.wait_for_timeout(300)
    assert page.locator(".conversation").count() == 0
    stored = "indexedDB.databases().then((all) => all.length)"
    assert page.evaluate(stored) == 1


def test_nothing_is_sent_before_there_is_a_question(page: Page) -> None:
    assert page.locator("#send").is_disabled()
    page.focus("#question")
    page.keyboard.press("Enter")
    page.fill("#question", "  ")
    page.keyboard.press("Enter")
    assert page.locator(".question").count() == 0
    page.fill("#question", "two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    assert page.input_value("#question") == "two\nlines"
