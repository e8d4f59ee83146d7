"""The next question: it waits for its pictures, and belongs to the conversation that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.requirements import needs_chromium
from tests.server.page.conftest import EXAMPLES, ask, attach, problems_of

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = needs_chromium

# Pictures are opened only when `window.release()` is called.
HOLD = """() => {
    const held = new Promise((resolve) => { window.release = resolve; });
    const decode = HTMLImageElement.prototype.decode;
    HTMLImageElement.prototype.decode = async function () { await held; return decode.call(this); };
}"""
NEVER_MEASURED = """() => {
    const none = { set() {}, get() { return null; } };
    for (const name of ["onloadedmetadata", "onerror"])
        Object.defineProperty(HTMLVideoElement.prototype, name, none);
}"""


def test_enter_waits_for_the_picture_that_is_opened(page: Page) -> None:
    page.evaluate(HOLD)
    page.set_input_files("#file", EXAMPLES / "text.png")
    page.fill("#question", "What does it say?")
    assert page.locator("#send").is_disabled()
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    assert page.locator(".question").count() == 0
    page.evaluate("release()")
    page.locator(".answer .actions").wait_for()
    assert page.locator(".answer .text").inner_text().strip() == "Tea 3.50"
    assert page.locator("#attachments li").count() == 0
    assert page.input_value("#question") == ""


def test_a_picture_is_added_to_the_draft_of_its_conversation(page: Page) -> None:
    ask(page, "Hi")
    page.evaluate(HOLD)
    page.set_input_files("#file", EXAMPLES / "text.png")
    page.fill("#question", "What does it say?")
    page.keyboard.press("Enter")
    page.click("#new")
    page.fill("#question", "Another")
    page.evaluate("release()")
    page.wait_for_function("() => !document.getElementById('send').disabled")
    assert page.locator("#attachments li").count() == 0
    assert page.locator("#empty").is_visible()  # nothing was sent either
    page.locator(".conversation").click()
    page.locator("#attachments li").wait_for()
    assert page.input_value("#question") == "What does it say?"
    assert page.locator(".question").count() == 1


def test_drafts_are_kept(page: Page) -> None:
    ask(page, "Hi")
    attach(page, EXAMPLES / "text.png")
    page.locator("#picture-size").press("Home")
    page.fill("#question", "Half a")
    page.click("#new")
    assert page.input_value("#question") == ""
    assert page.locator("#attachments li").count() == 0
    page.fill("#question", "New")
    page.locator(".conversation").click()
    page.locator("#attachments li").wait_for()
    assert page.input_value("#question") == "Half a"
    assert page.locator("#size-text").inner_text() == "at most 16 tokens each"
    page.reload()
    page.locator(".answer").wait_for()
    assert page.input_value("#question") == "Half a"
    page.click("#new")
    assert page.input_value("#question") == "New"
    page.fill("#question", "")
    stored = page.evaluate("Object.keys(JSON.parse(sessionStorage['qwen2vl.drafts'])).length")
    assert stored == 1  # nothing is kept of the one that was emptied


def test_a_picture_without_a_question_is_not_sent(page: Page) -> None:
    attach(page, EXAMPLES / "text.png")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.locator("#composer-problem", has_text="Write a question about it first.").wait_for()
    page.keyboard.type("W")
    assert page.locator("#composer-problem").is_hidden()
    assert page.locator(".question").count() == 0


def test_a_question_is_not_sent_without_a_file_that_failed(page: Page) -> None:
    page.evaluate(HOLD)
    broken = {"name": "cut.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n"}
    page.set_input_files("#file", broken)  # type: ignore[arg-type]
    page.fill("#question", "What does it say?")
    page.keyboard.press("Enter")
    page.evaluate("release()")
    page.locator("#composer-problem", has_text="cut.png cannot be opened").wait_for()
    assert page.locator(".question").count() == 0
    assert page.input_value("#question") == "What does it say?"


def test_a_video_that_cannot_be_measured_is_added(page: Page) -> None:
    page.evaluate(NEVER_MEASURED)
    page.clock.install()
    clip = {"name": "a.mp4", "mimeType": "video/mp4", "buffer": b"\0"}
    page.set_input_files("#file", clip)  # type: ignore[arg-type]
    page.wait_for_timeout(100)
    assert page.locator("#attachments li").count() == 0
    page.clock.run_for(5000)
    page.locator("#attachments li").wait_for()


def test_a_double_click_takes_an_example_once(page: Page) -> None:
    page.locator(".example").first.dblclick()
    page.locator("#attachments li").wait_for()
    page.wait_for_timeout(300)
    assert page.locator("#attachments li").count() == 1


def test_an_example_that_cannot_be_loaded_is_said(page: Page) -> None:
    page.route("**/page/examples/*", lambda r: r.fulfill(status=503))
    page.locator(".example").first.click()
    page.locator("#composer-problem", has_text="The example cannot be loaded.").wait_for()
    page.unroute("**/page/examples/*")
    page.locator(".example").first.click()
    page.locator("#attachments li").wait_for()
    assert len(problems_of(page)) == 1
