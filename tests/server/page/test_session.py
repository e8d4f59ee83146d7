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
    attach,
    edit,
    event,
    finish,
    first_held,
    hold,
    last_answer,
    problems_of,
    send,
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
    assert page.locator("#send").is_visible()
    assert len(held) == 1  # the page and the question wait for the same response
    sent: list[str] = []
    page.on("request", lambda r: sent.append(r.url) if r.method == "POST" else None)
    first_held(page, held).continue_()
    page.locator("#model-name", has_text="nano").wait_for()
    page.wait_for_timeout(100)
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
    assert page.evaluate("window.given") == [True, True]
    page.locator("#model-name", has_text="nano").wait_for()
    assert page.locator("#key-dialog[open]").count() == 0
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
    assert page.locator("#send").is_visible()
    send(page, "Second")  # one for each conversation
    page.locator(".conversation .running").nth(1).wait_for()
    finish(first_held(page, held))
    page.locator(".conversation:not(:has(.running))", has_text="Slow").wait_for()
    assert page.locator("#announcer").inner_text() == "“Slow” is answered."
    assert page.locator(".answer .actions").count() == 0  # of the second
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


def questions(page: Page) -> list[str]:
    return page.locator(".question .line .text").all_inner_texts()


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
    assert questions(page) == questions(other) == ["One", "Two", "Three"]
    page.locator(".conversation").focus()
    page.keyboard.press("F2")
    page.keyboard.type("Named")
    page.keyboard.press("Enter")
    other.locator("#title", has_text="Named").wait_for()
    page.keyboard.press("Delete")
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
    assert other.locator(".answer").nth(1).get_attribute("aria-busy") == "true"
    other.fill("#question", "Three")
    other.keyboard.press("Enter")
    assert questions(other) == ["One", "Two"]
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
    assert questions(other) == ["One"]
    ask(other, "Three", EXAMPLES / "boxes.png")
    other.locator("#notice", has_text="The questions of both are kept.").wait_for()
    assert questions(other) == ["One", "Two", "Three"]
    edit(page, 1)  # this tab does not know the third
    page.fill("#question", "Two again")
    page.keyboard.press("Enter")
    page.locator("#notice", has_text="The questions of both are kept.").wait_for()
    assert questions(page) == ["One", "Two", "Three", "Two again"]
    page.locator(".answer .actions").nth(3).wait_for()
    page.reload()
    page.locator(".answer").nth(3).wait_for()
    assert questions(page) == ["One", "Two", "Three", "Two again"]
    names = ("text.png", "boxes.png", "text.png")
    assert [one.get_attribute("title") for one in page.locator(".media > li").all()] == [*names]


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
    assert page.input_value("#question") == "Can you read this?"
    page.keyboard.press("Escape")
    assert page.input_value("#question") == "And a dr"
    send(page, "And now?")
    edit(page)
    page.locator("#question").press("Escape")
    page.locator("#editing").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.ariaLabel") == "Edit the question"
    assert page.locator("#stop").is_visible()  # the answer goes on
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
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"


# Storage ------------------------------------------------------------------------------------------

FULL = """() => { IDBObjectStore.prototype.put = () => {
    throw new DOMException("full", "QuotaExceededError");
}; }"""
STORED = """() => new Promise((resolve) => {
    indexedDB.open("qwen2vl").onsuccess = ({ target: { result } }) => {
        const count = result.transaction("media").objectStore("media").count();
        count.onsuccess = () => { result.close(); resolve(count.result); };
    };
})"""
LISTS = """() => {
    window.lists = 0;
    const getAll = IDBObjectStore.prototype.getAll;
    IDBObjectStore.prototype.getAll = function () { window.lists += 1; return getAll.call(this); };
}"""


def test_full_storage_is_said_once(page: Page) -> None:
    page.evaluate(FULL)
    ask(page, "Hi")
    page.locator("#composer-problem", has_text="storage for this page is full").wait_for()
    ask(page, "Hi again")
    assert page.locator("#composer-problem").is_hidden()
    assert "storage for this page is full" in (page.locator("#sidebar-note").text_content() or "")


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
    assert page.evaluate(STORED) == 2
    edit(page)
    page.fill("#question", "Can you read this?")
    page.keyboard.press("Enter")
    page.locator(".question .line .text", has_text="Can you read this?").wait_for()
    page.locator(".answer .actions").wait_for()
    assert page.locator(".question").count() == 1
    assert page.evaluate(STORED) == 1
    assert last_answer(page).locator(".text").inner_text().strip() == "Tea 3.50"


def test_the_list_is_not_read_while_an_answer_grows(page: Page) -> None:
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
    page.wait_for_timeout(300)
    assert page.evaluate("window.lists") == 2  # when it began, and when it ended
