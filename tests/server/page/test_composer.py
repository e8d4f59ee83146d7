"""The next question: it waits for its pictures, and belongs to the conversation that is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    EXAMPLES,
    ask,
    attach,
    expect,
    expect_value,
    problems_of,
    stop_clock,
    wait_for_pending,
)

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
    const load = { set() { window.measured = true; }, get() { return ""; } };
    Object.defineProperty(HTMLVideoElement.prototype, "src", load);
}"""


def test_enter_waits_for_the_picture_that_is_opened(page: Page) -> None:
    page.evaluate(HOLD)
    page.set_input_files("#file", EXAMPLES / "text.png")
    page.fill("#question", "What does it say?")
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Enter")
    wait_for_pending(page)
    expect(page.locator(".question")).to_have_count(0)
    page.evaluate("release()")
    page.locator(".answer .actions").wait_for()
    expect(page.locator(".answer .text")).to_have_text("Tea 3.50")
    expect(page.locator("#attachments li")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("")


def test_a_picture_is_added_to_the_draft_of_its_conversation(page: Page) -> None:
    ask(page, "Hi")
    page.evaluate(HOLD)
    page.set_input_files("#file", EXAMPLES / "text.png")
    page.fill("#question", "What does it say?")
    page.keyboard.press("Enter")
    page.click("#new")
    page.fill("#question", "Another")
    page.evaluate("release()")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#attachments li")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()  # nothing was sent either
    page.locator(".conversation").click()
    page.locator("#attachments li").wait_for()
    expect(page.locator("#question")).to_have_value("What does it say?")
    expect(page.locator(".question")).to_have_count(1)


def test_drafts_are_kept(page: Page) -> None:
    ask(page, "Hi")
    attach(page, EXAMPLES / "text.png")
    page.locator("#picture-size").press("Home")
    page.fill("#question", "Half a")
    page.click("#new")
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#attachments li")).to_have_count(0)
    page.fill("#question", "New")
    page.locator(".conversation").click()
    page.locator("#attachments li").wait_for()
    expect(page.locator("#question")).to_have_value("Half a")
    expect(page.locator("#size-text")).to_have_text("at most 16 tokens each")
    page.reload()
    page.locator(".answer").wait_for()
    expect(page.locator("#question")).to_have_value("Half a")
    page.click("#new")
    expect(page.locator("#question")).to_have_value("New")
    page.fill("#question", "")
    stored = "Object.keys(JSON.parse(sessionStorage['qwen2vl.drafts'])).length"
    expect_value(page, stored, 1)  # nothing is kept of the one that was emptied


def test_a_picture_without_a_question_is_not_sent(page: Page) -> None:
    attach(page, EXAMPLES / "text.png")
    page.focus("#question")
    page.keyboard.press("Enter")
    page.locator("#composer-problem", has_text="Write a question about it first.").wait_for()
    page.keyboard.type("W")
    expect(page.locator("#composer-problem")).to_be_hidden()
    expect(page.locator(".question")).to_have_count(0)


def test_a_question_is_not_sent_without_a_file_that_failed(page: Page) -> None:
    page.evaluate(HOLD)
    broken = {"name": "cut.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n"}
    page.set_input_files("#file", broken)  # type: ignore[arg-type]
    page.fill("#question", "What does it say?")
    page.keyboard.press("Enter")
    page.evaluate("release()")
    page.locator("#composer-problem", has_text="cut.png cannot be opened").wait_for()
    wait_for_pending(page)
    expect(page.locator(".question")).to_have_count(0)
    expect(page.locator("#question")).to_have_value("What does it say?")


def test_a_video_that_cannot_be_measured_is_added(page: Page) -> None:
    page.evaluate(NEVER_MEASURED)
    stop_clock(page)
    clip = {"name": "a.mp4", "mimeType": "video/mp4", "buffer": b"\0"}
    page.set_input_files("#file", clip)  # type: ignore[arg-type]
    expect_value(page, "window.measured")
    expect(page.locator("#attachments li")).to_have_count(0)
    page.clock.run_for(5000)
    page.locator("#attachments li").wait_for()


def test_a_double_click_takes_an_example_once(page: Page) -> None:
    loaded: list[str] = []
    page.on("request", lambda r: loaded.append(r.url) if r.resource_type == "fetch" else None)
    page.locator(".example").first.dblclick()
    page.locator("#attachments li").wait_for()
    wait_for_pending(page)
    assert len([url for url in loaded if url.endswith("/text.png")]) == 1
    expect(page.locator("#attachments li")).to_have_count(1)


def test_an_example_that_cannot_be_loaded_is_said(page: Page) -> None:
    page.route("**/page/examples/*", lambda r: r.fulfill(status=503))
    page.locator(".example").first.click()
    page.locator("#composer-problem", has_text="The example cannot be loaded.").wait_for()
    page.unroute("**/page/examples/*")
    page.locator(".example").first.click()
    page.locator("#attachments li").wait_for()
    assert len(problems_of(page)) == 1
