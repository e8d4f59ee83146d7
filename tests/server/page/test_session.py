"""What runs and what is stored: stop, keys, messages that stay as they are, full storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.requirements import needs_chromium
from tests.server.page.conftest import (
    CHAT,
    EXAMPLES,
    MODELS,
    PageOpener,
    ask,
    ask_unstored,
    attach,
    edit,
    event,
    expect,
    expect_stored,
    expect_value,
    finish,
    first_held,
    hold,
    last_answer,
    problems_of,
    requests_of,
    send,
    wait_for_pending,
    wait_until_stored,
)

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.server.conftest import ServerStarter

pytestmark = needs_chromium

# Stop and keys ------------------------------------------------------------------------------------


def test_stop_while_the_models_load(page: Page) -> None:
    held = hold(page, MODELS)
    page.reload()
    page.wait_for_selector("body.ready")
    send(page, "Hi")
    page.click("#stop")
    page.locator(".answer .note", has_text="Stopped.").wait_for()
    expect(page.locator("#send")).to_be_visible()
    wait_for_pending(page)
    assert len(held) == 1  # the page and the question wait for the same response
    sent = requests_of(page)
    first_held(page, held).continue_()
    page.locator("#model-name", has_text="nano").wait_for()
    wait_for_pending(page)
    assert sent == []


def test_two_refusals_ask_for_the_key_once(
    open_page: PageOpener, start_server: ServerStarter
) -> None:
    server = start_server(api_keys=("right-key",))
    page = open_page(server.base_url)
    page.locator("#key-dialog[open]").wait_for()
    script = """async () => {
        const { askForKey } = await import(new URL("page/js/client/models.js", document.baseURI));
        window.given = Promise.all([askForKey(), askForKey()]);
    }"""
    page.evaluate(script)
    page.fill("#key", "right-key")
    page.keyboard.press("Enter")
    expect_value(page, "window.given", [True, True])
    page.locator("#model-name", has_text="nano").wait_for()
    expect(page.locator("#key-dialog[open]")).to_have_count(0)
    problems_of(page)


def test_models_that_are_not_json_are_said(page: Page) -> None:
    page.route(MODELS, lambda r: r.fulfill(status=200, body="<h1>Sign in"))
    page.reload()
    page.locator("#problem", has_text="is not a list of models").wait_for()


# Several conversations and tabs -------------------------------------------------------------------


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page) -> None:
    held = hold(page, CHAT)
    send(page, "Slow")
    page.click("#new")
    page.locator(".conversation .running").wait_for()
    expect(page.locator("#send")).to_be_visible()
    send(page, "Second")  # one for each conversation
    page.locator(".conversation .running").nth(1).wait_for()
    finish(first_held(page, held))
    page.locator(".conversation:not(:has(.running))", has_text="Slow").wait_for()
    expect(page.locator("#announcer")).to_have_text("“Slow” is answered.")
    expect(page.locator(".answer .actions")).to_have_count(0)  # of the second
    page.locator(".conversation", has_text="Slow").click()
    page.locator(".answer .text", has_text="ok").wait_for()
    page.locator(".conversation", has_text="Second").click()
    page.locator(".answer .waiting").wait_for()
    page.keyboard.press("Escape")
    page.locator(".answer .note", has_text="Stopped.").wait_for()


def second_tab(page: Page) -> Page:
    """Open the conversation of a page in another tab."""
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("body.ready")
    other.locator(".conversation").first.click()
    other.locator(".question").first.wait_for()
    return other


def expect_questions(page: Page, *questions: str) -> None:
    """Wait until the page shows these questions."""
    expect(page.locator(".question .line .text")).to_have_text(list(questions))


def test_two_tabs_show_the_same(page: Page) -> None:
    page.context.route(CHAT, finish)
    ask(page, "One")
    page.locator(".conversation").wait_for()
    other = second_tab(page)
    ask(page, "Two", EXAMPLES / "text.png")
    other.locator(".answer .actions").nth(1).wait_for()
    other.locator("[aria-label='Enlarge text.png']").wait_for()
    ask(other, "Three")
    page.locator(".answer .actions").nth(2).wait_for()
    for tab in (page, other):
        expect_questions(tab, "One", "Two", "Three")
    page.locator(".conversation").focus()
    page.keyboard.press("F2")
    page.keyboard.type("Named")
    page.keyboard.press("Enter")  # gives the focus back to the row at once
    page.keyboard.press("Delete")
    page.locator("#notice", has_text="“Named” is deleted.").wait_for()
    other.locator("#empty").wait_for()
    page.locator("#notice button", has_text="Undo").click()
    other.locator(".conversation", has_text="Named").wait_for()


def test_a_tab_waits_for_the_answer_of_another(page: Page) -> None:
    page.context.route(CHAT, finish)
    ask(page, "One")
    page.locator(".conversation").wait_for()
    held = hold(page, CHAT)
    send(page, "Two")
    other = second_tab(page)
    other.locator("#composer-problem", has_text="Another tab is receiving").wait_for()
    expect(other.locator(".answer").nth(1)).to_have_attribute("aria-busy", "true")
    other.fill("#question", "Three")
    other.keyboard.press("Enter")
    wait_for_pending(other)
    expect_questions(other, "One", "Two")
    finish(first_held(page, held))
    other.locator(".answer .actions").nth(1).wait_for()
    other.locator("#composer-problem").wait_for(state="hidden")
    send(page, "Four")
    other.locator("[aria-busy]").wait_for()
    page.close()  # its answer will not come
    other.locator(".failure", has_text="The page was closed").wait_for()


def test_tabs_that_do_not_hear_each_other_lose_nothing(page: Page) -> None:
    page.context.route(CHAT, finish)
    page.context.add_init_script("BroadcastChannel.prototype.postMessage = () => {};")
    page.reload()
    ask(page, "One")
    page.locator(".conversation").wait_for()
    other = second_tab(page)
    ask(page, "Two", EXAMPLES / "text.png")
    expect_questions(other, "One")
    ask(other, "Three", EXAMPLES / "boxes.png")
    other.locator("#notice", has_text="The questions of both are kept.").wait_for()
    expect_questions(other, "One", "Two", "Three")
    edit(page, 1)  # this tab does not know the third
    page.fill("#question", "Two again")
    page.keyboard.press("Enter")
    page.locator("#notice", has_text="The questions of both are kept.").wait_for()
    expect_questions(page, "One", "Two", "Three", "Two again")
    page.locator(".answer .actions").nth(3).wait_for()
    wait_until_stored(page)
    page.reload()
    expect_questions(page, "One", "Two", "Three", "Two again")
    expect(page.locator(".answer .actions")).to_have_count(4)
    files = page.locator(".media > li")
    for index, name in enumerate(("text.png", "boxes.png", "text.png")):
        expect(files.nth(index)).to_have_attribute("title", name)
    expect(files).to_have_count(3)


# Ends of transactions that read pictures and videos come only when `window.release()` is called.
HOLD_READS = """() => {
    const held = new Promise((resolve) => { window.release = resolve; });
    const { set } = Object.getOwnPropertyDescriptor(IDBTransaction.prototype, "oncomplete");
    Object.defineProperty(IDBTransaction.prototype, "oncomplete", { set(listener) {
        const isHeld = this.mode === "readonly" && this.objectStoreNames.contains("media");
        set.call(this, isHeld ? () => held.then(listener) : listener);
    } });
}"""
# Counts what other tabs tell; the page hears it first.
HEARD = """() => {
    window.heard = [];
    window.hearing = new BroadcastChannel("qwen2vl");
    window.hearing.onmessage = ({ data }) => window.heard.push(data.type);
}"""


def test_a_conversation_that_is_stored_while_a_tab_opens_it_is_read_again(page: Page) -> None:
    page.context.route(CHAT, finish)
    ask(page, "One")
    other = second_tab(page)
    other.click("#new")
    other.evaluate(HOLD_READS)
    other.evaluate(HEARD)
    other.locator(".conversation").click()
    ask(page, "Two")
    expect_value(other, "window.heard", ["saved", "saved"])
    other.evaluate("release()")
    expect_questions(other, "One", "Two")
    expect(other.locator(".answer .actions")).to_have_count(2)


def test_a_conversation_that_is_deleted_while_a_tab_opens_it_is_not_shown(page: Page) -> None:
    page.context.route(CHAT, finish)
    ask(page, "One")
    other = second_tab(page)
    other.click("#new")
    other.evaluate(HOLD_READS)
    other.evaluate(HEARD)
    other.locator(".conversation").click()
    page.locator(".conversation").focus()
    page.keyboard.press("Delete")
    expect_value(other, "window.heard", ["deleted"])
    other.evaluate("release()")
    other.locator("#no-conversations").wait_for()
    expect(other.locator("#empty")).to_be_visible()


def test_files_of_another_tab_are_shown_when_they_have_been_read(page: Page) -> None:
    page.context.route(CHAT, finish)
    page.context.add_init_script("BroadcastChannel.prototype.postMessage = () => {};")
    page.reload()
    ask(page, "One")
    other = second_tab(page)
    ask(page, "Two", EXAMPLES / "text.png")
    other.evaluate(HOLD_READS)
    ask(other, "Three")  # both are merged when it is stored
    other.locator(".question .note", has_text="1 file no longer stored").wait_for()
    other.evaluate("release()")
    other.locator("[aria-label='Enlarge text.png']").wait_for()


# What stays as it is ------------------------------------------------------------------------------


def test_an_edit_stays_while_an_answer_ends(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    held = hold(page, CHAT)
    send(page, "Really?")
    page.fill("#question", "And a dr")
    edit(page)
    page.fill("#question", "Can you read")
    finish(first_held(page, held))
    page.locator(".answer .actions").nth(1).wait_for()
    page.keyboard.type(" this?")  # the focus is still there
    expect(page.locator("#question")).to_have_value("Can you read this?")
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("And a dr")
    send(page, "And now?")
    edit(page)
    page.locator("#question").press("Escape")
    page.locator("#editing").wait_for(state="hidden")
    expect_value(page, "document.activeElement.ariaLabel", "Edit the question")
    expect(page.locator("#stop")).to_be_visible()  # the answer goes on
    page.keyboard.press("Escape")
    page.locator(".answer .note", has_text="Stopped.").wait_for()


def test_a_video_stays_while_an_answer_ends(page: Page, tmp_path: Path) -> None:
    from tests.server.page.test_media import write_clip

    attach(page, write_clip(tmp_path / "clip.webm"))
    held = hold(page, CHAT)
    send(page, "Which one begins to move first?")
    page.evaluate("window.video = document.querySelector('.question video')")
    first_held(page, held).continue_()
    page.locator(".answer .actions").wait_for()
    page.locator(".strip").wait_for()
    assert page.evaluate("window.video === document.querySelector('.question video')")


def test_a_question_reads_the_pictures_of_its_own_conversation(page: Page) -> None:
    held = hold(page, MODELS)
    page.reload()
    page.wait_for_selector("body.ready")
    attach(page, EXAMPLES / "text.png")
    send(page, "What does it say?")
    page.click("#new")
    attach(page, EXAMPLES / "boxes.png")  # is not sent
    first_held(page, held).continue_()
    page.locator(".conversation:not(:has(.running))").wait_for()
    page.locator(".conversation").click()
    page.locator(".answer .actions").wait_for()
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")


# Storage ------------------------------------------------------------------------------------------

FULL = """() => { IDBObjectStore.prototype.put = () => {
    throw new DOMException("full", "QuotaExceededError");
}; }"""
LISTS = """() => {
    window.lists = 0;
    const getAll = IDBObjectStore.prototype.getAll;
    IDBObjectStore.prototype.getAll = function () { window.lists += 1; return getAll.call(this); };
}"""


def test_full_storage_is_said_once(page: Page) -> None:
    page.evaluate(FULL)
    ask_unstored(page, "Hi")
    page.locator("#composer-problem", has_text="storage for this page is full").wait_for()
    ask_unstored(page, "Hi again")
    expect(page.locator("#composer-problem")).to_be_hidden()
    expect(page.locator("#sidebar-note")).to_contain_text("storage for this page is full")


def test_a_closed_database_is_opened_again(page: Page) -> None:
    ask(page, "Hi")
    page.locator(".conversation").wait_for()
    deleted = """() => new Promise((resolve) => {
        indexedDB.deleteDatabase("qwen2vl").onsuccess = () => resolve(true);
    })"""
    assert page.evaluate(deleted)  # the page closes its own connection for this
    page.click("#new")
    ask(page, "What is 2 + 2?")
    page.locator(".conversation", has_text="What is 2 + 2?").wait_for()


def test_pictures_of_dropped_questions_are_deleted(page: Page) -> None:
    ask(page, "What does it say?", EXAMPLES / "text.png")
    ask(page, "And this?", EXAMPLES / "boxes.png")
    expect_stored(page, 1, 2)
    edit(page)
    page.fill("#question", "Can you read this?")
    page.keyboard.press("Enter")
    page.locator(".question .line .text", has_text="Can you read this?").wait_for()
    page.locator(".answer .actions").wait_for()
    expect(page.locator(".question")).to_have_count(1)
    expect_stored(page, 1, 1)
    expect(last_answer(page).locator(".text")).to_have_text("Tea 3.50")


def test_the_list_is_not_read_while_an_answer_grows(page: Page) -> None:
    expect_stored(page, 0, 0)  # the page has asked for the list before this does
    page.evaluate(LISTS)
    grow = """async ({ seconds, body }) => {
        const encoder = new TextEncoder();
        window.fetch = async () => new Response(new ReadableStream({ async start(controller) {
            for (let i = 0; i < seconds * 4; i += 1) {
                controller.enqueue(encoder.encode(body));
                await new Promise((resolve) => setTimeout(resolve, 250));
            }
            controller.enqueue(encoder.encode("data: [DONE]\\n\\n"));
            controller.close();
        } }));
    }"""
    page.evaluate(grow, {"seconds": 3, "body": event({"content": "word "})})
    assert ask(page, "Hi").startswith("word word")
    page.locator(".conversation:not(:has(.running))").wait_for()
    assert page.evaluate("window.lists") <= 2  # when it began, and when it ended
